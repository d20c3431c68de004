"""Jobs say what they need of a machine; what a claim reads of every waiting job are columns of their own."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0037"
down_revision = "0036"
branch_labels = None
depends_on = None

ROWS_READY = "((((spec -> 'dataset'::text) ->> 'path'::text) <> ''::text) AND (COALESCE(((spec -> 'validation'::text) ->> 'path'::text), 'none'::text) <> ''::text))"
DEVICE = "COALESCE(((spec -> 'run'::text) ->> 'device'::text), 'auto'::text)"
SECONDS = "((estimate ->> 'seconds'::text))::double precision"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("num_gpus", sa.BigInteger(), nullable=True, comment="GPUs that train it; null: as many as usual"))
    op.add_column("jobs", sa.Column("gpu_type", sa.Text(), nullable=True, comment="part of the name of the GPU"))
    labels = sa.Column("labels", postgresql.JSONB(), server_default=sa.text("'[]'"), nullable=False, comment="that its worker must have")
    op.add_column("jobs", labels)
    op.add_column(
        "jobs",
        sa.Column(
            "gpu_bytes", sa.BigInteger(), server_default="0", nullable=True, comment="memory of each GPU; null: it does not train on one"
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "cpu_bytes",
            sa.BigInteger(),
            server_default="0",
            nullable=True,
            comment="memory of each process without a GPU; null: it needs one",
        ),
    )
    op.add_column("jobs", sa.Column("reserved_by", sa.Text(), nullable=True, comment="the machine that keeps free GPUs for it"))
    op.add_column("jobs", sa.Column("reserved_until", sa.DateTime(timezone=True), nullable=True))
    for name, kind, expression in (
        ("rows_ready", sa.Boolean(), ROWS_READY),
        ("device", sa.Text(), DEVICE),
        ("estimated_seconds", sa.Float(), SECONDS),
    ):
        op.add_column("jobs", sa.Column(name, kind, sa.Computed(expression, persisted=True), nullable=True))
    op.create_index("ix_jobs_reserved", "jobs", ["reserved_by"], postgresql_where=sa.text("reserved_by IS NOT NULL"))
    op.execute("UPDATE jobs SET gpu_bytes = NULL WHERE device = 'cpu'")
    op.execute("UPDATE jobs SET cpu_bytes = NULL WHERE device = 'cuda'")


def downgrade() -> None:
    op.drop_index("ix_jobs_reserved", "jobs")
    for name in (
        "estimated_seconds", "device", "rows_ready", "reserved_until", "reserved_by", "cpu_bytes", "gpu_bytes", "labels", "gpu_type", "num_gpus",
    ):  # fmt: skip
        op.drop_column("jobs", name)
