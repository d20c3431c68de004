"""The bytes of an upload are known to every web process."""

import sqlalchemy as sa
from alembic import op

revision = "0039"
down_revision = "0038"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "upload_pieces",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("upload_id", sa.Uuid(), nullable=False),
        sa.Column(
            "start",
            sa.BigInteger(),
            nullable=True,
            comment="byte of the file that it begins at; null: a part whose place is said at the end",
        ),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False, comment="its place in the object storage"),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"], name=op.f("fk_upload_pieces_upload_id_uploads"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload_pieces")),
        sa.UniqueConstraint("path", name=op.f("uq_upload_pieces_path")),
        sa.UniqueConstraint("upload_id", "start", name=op.f("uq_upload_pieces_upload_id_start")),
    )


def downgrade() -> None:
    op.drop_table("upload_pieces")
