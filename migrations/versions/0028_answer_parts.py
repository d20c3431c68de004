"""Reasoning and tool calls of an answer."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("answers", sa.Column("reasoning", sa.Text(), nullable=True, comment="what a model that thinks wrote before its answer"))
    op.add_column("answers", sa.Column("tool_calls", postgresql.JSONB(), nullable=True, comment="as the API sends them"))


def downgrade() -> None:
    op.drop_column("answers", "tool_calls")
    op.drop_column("answers", "reasoning")
