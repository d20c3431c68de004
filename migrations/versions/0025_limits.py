"""Limits of people and projects, and the tokens that each wrote and read by day."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("users", "projects"):
        op.add_column(table, sa.Column("limits", postgresql.JSONB(), nullable=True, comment="app.limits.LIMITS, where an admin set one"))
    op.create_table(
        "token_uses",
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False, comment="of UTC"),
        sa.Column("read", sa.BigInteger(), server_default="0", nullable=False, comment="tokens of prompts"),
        sa.Column("written", sa.BigInteger(), server_default="0", nullable=False, comment="tokens of answers"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_token_uses_user_id_users"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_token_uses_project_id_projects"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("user_id", "project_id", "day", name=op.f("pk_token_uses")),
    )
    op.create_index(op.f("ix_token_uses_day"), "token_uses", ["day"])


def downgrade() -> None:
    op.drop_table("token_uses")
    for table in ("users", "projects"):
        op.drop_column(table, "limits")
