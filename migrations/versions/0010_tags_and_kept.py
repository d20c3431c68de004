"""Jobs, datasets and models carry tags; a comparison's results stay out of the selects until somebody keeps them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

TAGGED = ("jobs", "datasets", "models")


def upgrade() -> None:
    for table in TAGGED:
        op.add_column(table, sa.Column("tags", JSONB(none_as_null=True), nullable=False, server_default=sa.text("'[]'")))
    op.add_column(
        "models",
        sa.Column("kept", sa.Boolean(), nullable=False, server_default=sa.true(), comment="false: a comparison's result nobody kept yet"),
    )
    op.execute(
        "UPDATE models SET kept = false WHERE step IS NULL AND job_id IN (SELECT id FROM jobs WHERE comparison_id IS NOT NULL)"
    )  # a checkpoint was kept by hand


def downgrade() -> None:
    op.drop_column("models", "kept")
    for table in TAGGED:
        op.drop_column(table, "tags")
