"""What a person did in the reading room is kept."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0036"
down_revision = "0035"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "stop_visits",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("stop", sa.Text(), nullable=False, comment="of app.learn"),
        sa.Column("refs", postgresql.JSONB(), nullable=False, comment="ids of what was started, and what was chosen"),
        sa.Column("headline", sa.Text(), nullable=True, comment="the result in one line, once there is one"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("done_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_stop_visits_owner_id_users"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_stop_visits_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stop_visits")),
    )
    op.create_index(
        op.f("ix_stop_visits_owner_id_project_id_stop_created_at"), "stop_visits", ["owner_id", "project_id", "stop", "created_at"]
    )


def downgrade() -> None:
    op.drop_table("stop_visits")
