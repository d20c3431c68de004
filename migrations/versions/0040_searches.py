"""Searches: jobs that pause by themselves at a step, as trials of a comparison that chooses its jobs as it goes."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0040"
down_revision = "0039"
branch_labels = None
depends_on = None

KINDS = "strategies, learning_curve, models, matrix or search"


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column("trial", postgresql.JSONB(), nullable=True, comment="its number, parameters, rungs, and why it was pruned"),
    )
    op.add_column("jobs", sa.Column("pause_at", sa.BigInteger(), nullable=True, comment="the step at which it pauses by itself"))
    op.add_column(
        "comparisons", sa.Column("search", postgresql.JSONB(), nullable=True, comment="of a search: its status, and what it found")
    )
    op.alter_column("comparisons", "kind", comment=KINDS, existing_comment="strategies, or learning_curve")


def downgrade() -> None:
    op.alter_column("comparisons", "kind", comment="strategies, or learning_curve", existing_comment=KINDS)
    op.drop_column("comparisons", "search")
    op.drop_column("jobs", "pause_at")
    op.drop_column("jobs", "trial")
