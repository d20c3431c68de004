"""Graders that are saved under a name."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    when = sa.DateTime(timezone=True)
    op.create_table(
        "graders",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("body", postgresql.JSONB(), nullable=False, comment="the grader as app.graders.to_json writes it"),
        sa.Column("created_at", when, server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("updated_at", when, server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("deleted_at", when, nullable=True),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_graders_owner_id_users")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_graders_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_graders")),
    )
    op.create_index(op.f("ix_graders_project_id_created_at"), "graders", ["project_id", "created_at"])


def downgrade() -> None:
    op.drop_table("graders")
