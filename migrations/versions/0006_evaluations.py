"""Evaluations say what they are doing, can be cancelled, and count the processes that died over them."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

STATUS = {"existing_type": sa.Text(), "existing_nullable": False, "existing_server_default": sa.text("'queued'::text")}
BEFORE, AFTER = "queued, running, succeeded or failed", "queued, running, succeeded, failed or cancelled"


def upgrade() -> None:
    op.add_column("evaluations", sa.Column("stage", sa.Text(), nullable=True, comment="what is being done, in words"))
    deaths = sa.Column("deaths", sa.BigInteger(), server_default="0", nullable=False, comment="processes that died over it")
    op.add_column("evaluations", deaths)
    op.alter_column("evaluations", "status", comment=AFTER, existing_comment=BEFORE, **STATUS)


def downgrade() -> None:
    op.alter_column("evaluations", "status", comment=BEFORE, existing_comment=AFTER, **STATUS)
    op.drop_column("evaluations", "deaths")
    op.drop_column("evaluations", "stage")
