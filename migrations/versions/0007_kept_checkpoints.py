"""A checkpoint can be kept as a model of its own, beside the result of its job."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "models", sa.Column("step", sa.BigInteger(), nullable=True, comment="of the checkpoint it was kept from; null for a job's result")
    )
    op.drop_constraint("uq_models_job_id", "models", type_="unique")
    op.create_index("uq_models_result", "models", ["job_id"], unique=True, postgresql_where=sa.text("step IS NULL"))


def downgrade() -> None:
    op.execute("DELETE FROM models WHERE step IS NOT NULL")
    op.drop_index("uq_models_result", table_name="models", postgresql_where=sa.text("step IS NULL"))
    op.create_unique_constraint("uq_models_job_id", "models", ["job_id"])
    op.drop_column("models", "step")
