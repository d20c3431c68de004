"""A message carries the id of the request that it comes from, and its trace."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("outbox", sa.Column("context", postgresql.JSONB(), nullable=True, comment="request_id and traceparent of who sent it"))


def downgrade() -> None:
    op.drop_column("outbox", "context")
