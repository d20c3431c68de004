"""Tokens of texts that were embedded or classified, the size of the files that predictions left, and the newest models of a project."""

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None

NEW = (
    ("token_uses", "encoded", "of those read, the tokens of texts that were embedded or classified"),
    ("evaluations", "output_bytes", "size of the file that predictions left"),
)


def upgrade() -> None:
    for table, name, comment in NEW:
        op.add_column(table, sa.Column(name, sa.BigInteger(), server_default="0", nullable=False, comment=comment))
    op.create_index(op.f("ix_models_project_id_created_at"), "models", ["project_id", "created_at"])


def downgrade() -> None:
    op.drop_index(op.f("ix_models_project_id_created_at"), "models")
    for table, name, _ in NEW:
        op.drop_column(table, name)
