"""Jobs in trackers, and how far the events of each were sent."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0033"
down_revision = "0032"
branch_labels = None
depends_on = None


def upgrade() -> None:
    when, now = sa.DateTime(timezone=True), sa.text("clock_timestamp()")
    json, empty = postgresql.JSONB, sa.text("'{}'")
    op.create_table(
        "tracked_runs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False, comment="of app.trackers"),
        sa.Column("wish", json(), nullable=False, comment="what the order says of the tracker"),
        sa.Column(
            "status", sa.Text(), server_default="queued", nullable=False, comment="queued, running, or failed after deaths of its workers"
        ),
        sa.Column(
            "last_event_id",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="of the job's events all that were before were sent",
        ),
        sa.Column("sent_steps", json(), server_default=empty, nullable=False, comment="type of event → the last step that was sent"),
        sa.Column("state", json(), server_default=empty, nullable=False, comment="what the tracker keeps: its id and address of the run"),
        sa.Column("tries", sa.BigInteger(), server_default="0", nullable=False, comment="that failed, since one succeeded"),
        sa.Column("error", sa.Text(), nullable=True, comment="why the last try failed"),
        sa.Column("next_at", when, server_default=now, nullable=False),
        sa.Column("sent_at", when, nullable=True),
        sa.Column("created_at", when, server_default=now, nullable=False),
        sa.Column(
            "fence",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="rises with every claim; stale writers are refused by it",
        ),
        sa.Column("deaths", sa.BigInteger(), server_default="0", nullable=False, comment="workers that died over it since it last got on"),
        sa.Column("lease_until", when, nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_tracked_runs_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tracked_runs")),
        sa.UniqueConstraint("job_id", "kind", name=op.f("uq_tracked_runs_job_id_kind")),
    )
    op.create_index(op.f("ix_tracked_runs_status_next_at"), "tracked_runs", ["status", "next_at"])


def downgrade() -> None:
    op.drop_table("tracked_runs")
