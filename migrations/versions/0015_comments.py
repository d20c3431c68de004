"""Comments of columns name classes and files where they are now."""

from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

EDITS = "what this version changes in its file's rows, see "
COMMENTS = (
    ("datasets", "edits", EDITS + "app/edits.py", EDITS + "app/datasets/edits.py"),
    ("evaluations", "spec", "app.evaluations.EvaluationSpec, frozen", "app.evaluation.service.EvaluationSpec, frozen"),
    ("prompt_versions", "body", "app.prompts.PromptBody", "app.prompts.service.PromptBody"),
    ("prompt_runs", "spec", "app.prompt_runs.RunSpec, frozen", "app.prompts.runs.RunSpec, frozen"),
)


def upgrade() -> None:
    for table, column, old, new in COMMENTS:
        op.alter_column(table, column, existing_type=JSONB(), comment=new, existing_comment=old)


def downgrade() -> None:
    for table, column, old, new in COMMENTS:
        op.alter_column(table, column, existing_type=JSONB(), comment=old, existing_comment=new)
