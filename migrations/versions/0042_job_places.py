"""Jobs on several machines: how many, and the places that workers offer and take."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0042"
down_revision = "0041"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("num_machines", sa.BigInteger(), comment="machines that train it together; null: one"))
    moment = {"nullable": False, "server_default": sa.func.clock_timestamp()}
    op.create_table(
        "job_places",
        sa.Column("job_id", sa.Uuid(), sa.ForeignKey("jobs.id", name="fk_job_places_job_id_jobs", ondelete="CASCADE"), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False, comment="of the claim that it is for"),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("machine", sa.Text(), nullable=False),
        sa.Column("place", sa.BigInteger(), comment="0 leads; null while it is only offered"),
        sa.Column("address", sa.Text(), comment="where the processes meet: host:port of place 0"),
        sa.Column("checkpoint", sa.Text(), comment="of place 0: that all go on from; empty for none, null while not chosen"),
        sa.Column("ready", sa.Boolean(), nullable=False, server_default=sa.false(), comment="its trainer is about to start"),
        sa.Column("counts", postgresql.JSONB(), nullable=False, server_default=sa.text("'[]'"), comment="how far its processes are"),
        sa.Column("ended", postgresql.JSONB(), comment="how it ended; null while it is alive"),
        sa.Column("offered_at", sa.DateTime(timezone=True), **moment),
        sa.Column("seen_at", sa.DateTime(timezone=True), **moment),
        sa.PrimaryKeyConstraint("job_id", "fence", "worker", name="pk_job_places"),
    )


def downgrade() -> None:
    op.drop_table("job_places")
    op.drop_column("jobs", "num_machines")
