"""Certificates: what was tried on a model when it was added."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "what was tried on it when it was added: worker/conversion/certify.py"
    op.add_column("models", sa.Column("certificate", postgresql.JSONB(), nullable=True, comment=comment))


def downgrade() -> None:
    op.drop_column("models", "certificate")
