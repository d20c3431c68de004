"""Predictions over a whole file wait in the queue of evaluations; a file need not be a dataset."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

KIND = {"existing_type": sa.Text(), "existing_nullable": False}
BEFORE, AFTER = "scores, advice or blend", "scores, advice or blend; predictions or vectors"


def upgrade() -> None:
    op.alter_column("evaluations", "dataset_id", existing_type=sa.Uuid(), nullable=True)
    op.alter_column("evaluations", "kind", comment=AFTER, existing_comment=BEFORE, **KIND)
    op.add_column("evaluations", sa.Column("file_id", sa.Uuid(), nullable=True))
    op.create_index(op.f("ix_evaluations_file_id"), "evaluations", ["file_id"])
    op.create_foreign_key(op.f("fk_evaluations_file_id_files"), "evaluations", "files", ["file_id"], ["id"])


def downgrade() -> None:
    op.execute("DELETE FROM evaluations WHERE dataset_id IS NULL")
    op.drop_constraint(op.f("fk_evaluations_file_id_files"), "evaluations", type_="foreignkey")
    op.drop_index(op.f("ix_evaluations_file_id"), "evaluations")
    op.drop_column("evaluations", "file_id")
    op.alter_column("evaluations", "kind", comment=BEFORE, existing_comment=AFTER, **KIND)
    op.alter_column("evaluations", "dataset_id", existing_type=sa.Uuid(), nullable=False)
