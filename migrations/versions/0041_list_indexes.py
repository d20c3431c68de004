"""Indexes for lists and queues of ten thousand: the lines of the list of datasets, imported models, sample files, and what waits for a worker."""

import sqlalchemy as sa
from alembic import op

revision = "0041"
down_revision = "0040"
branch_labels = None
depends_on = None

LIVE = "deleted_at IS NULL"
QUEUES = ("datasets", "evaluations", "models")


def upgrade() -> None:
    for table in QUEUES:
        op.create_index(f"ix_{table}_status_lease_until", table, ["status", "lease_until"])
    op.create_index("ix_datasets_uncounted", "datasets", ["created_at"], postgresql_where=sa.text("counted IS FALSE"))
    op.create_index("ix_datasets_filename", "datasets", ["project_id", sa.text("(origin ->> 'filename')")], postgresql_where=sa.text(LIVE))
    op.create_index("ix_models_bases", "models", ["created_at"], postgresql_where=sa.text(f"base_id IS NULL AND {LIVE}"))
    op.create_index("ix_models_made", "models", ["created_at"], postgresql_where=sa.text(f"base_id IS NOT NULL AND {LIVE}"))
    op.create_index("ix_models_imported", "models", ["status"], postgresql_where=sa.text("(source ->> 'from') IN ('folder', 'hub')"))
    op.create_index("ix_checkpoints_live", "checkpoints", ["created_at"], postgresql_where=sa.text(LIVE))
    op.create_index(
        "ix_exchanges_history", "exchanges", ["project_id", sa.text("(title IS NULL)"), sa.text("created_at DESC"), "id"],
        postgresql_where=sa.text("source = 'playground'"),
    )  # fmt: skip


def downgrade() -> None:
    op.drop_index("ix_exchanges_history", "exchanges")
    op.drop_index("ix_checkpoints_live", "checkpoints")
    for name in ("imported", "made", "bases"):
        op.drop_index(f"ix_models_{name}", "models")
    for name in ("filename", "uncounted"):
        op.drop_index(f"ix_datasets_{name}", "datasets")
    for table in QUEUES:
        op.drop_index(f"ix_{table}_status_lease_until", table)
