"""What to do about an error is its `hint`; stored errors said `way_out`."""

from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

TABLES = {
    "datasets": "error", "inspections": "error", "models": "error", "jobs": "error", "evaluations": "error",
    "prompt_runs": "error", "answers": "error", "events": "data",
}  # fmt: skip

COMMENTS = {"datasets": "message, hint, line, column", "jobs": "code, message, hint, param", "evaluations": "code, message, hint"}


def rename(old: str, new: str) -> None:
    for table, column in TABLES.items():
        op.execute(
            f"UPDATE {table} SET {column} = ({column} - '{old}') || jsonb_build_object('{new}', {column} -> '{old}') "  # noqa: S608
            f"WHERE jsonb_typeof({column}) = 'object' AND {column} ? '{old}'"
        )


def say(old: str, new: str) -> None:
    for table, words in COMMENTS.items():
        before, after = (words.replace("hint", word) for word in (old, new))
        op.alter_column(table, "error", existing_type=JSONB(), comment=after, existing_comment=before)


def upgrade() -> None:
    rename("way_out", "hint")
    say("way_out", "hint")


def downgrade() -> None:
    rename("hint", "way_out")
    say("hint", "way_out")
