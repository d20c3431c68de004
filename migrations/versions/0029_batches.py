"""Batches of API requests, and the answers of those that have not ended."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    when = sa.DateTime(timezone=True)
    op.create_table(
        "batches",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("status", sa.Text(), server_default="open", nullable=False, comment="open or ended"),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("input_file_id", sa.Uuid(), nullable=False),
        sa.Column("output_file_id", sa.Uuid(), nullable=True),
        sa.Column("error_file_id", sa.Uuid(), nullable=True),
        sa.Column("output_seconds", sa.BigInteger(), nullable=True, comment="how long its files are kept; null is without an end"),
        sa.Column("model", sa.Text(), nullable=True, comment="the one model that its requests name"),
        sa.Column("user_metadata", postgresql.JSONB(), nullable=True),
        sa.Column("total", sa.BigInteger(), server_default="0", nullable=False, comment="requests in the file"),
        sa.Column("completed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("failed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("usage", postgresql.JSONB(), nullable=True, comment="tokens of all answers: input, cached, output, reasoning"),
        sa.Column("errors", postgresql.JSONB(), nullable=True, comment="why the file cannot be run: code, message, line, param"),
        sa.Column("created_at", when, server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("expires_at", when, nullable=False),
        *(
            sa.Column(f"{name}_at", when, nullable=True)
            for name in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        ),
        sa.Column(
            "fence",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="rises with every claim; stale writers are refused by it",
        ),
        sa.Column("deaths", sa.BigInteger(), server_default="0", nullable=False, comment="workers that died over it since it last got on"),
        sa.Column("lease_until", when, nullable=True),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_batches_owner_id_users")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_batches_project_id_projects")),
        *(
            sa.ForeignKeyConstraint([f"{name}_file_id"], ["files.id"], name=op.f(f"fk_batches_{name}_file_id_files"))
            for name in ("input", "output", "error")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index(op.f("ix_batches_input_file_id"), "batches", ["input_file_id"])
    op.create_index(op.f("ix_batches_project_id_created_at"), "batches", ["project_id", "created_at"])
    op.create_index(op.f("ix_batches_status_created_at"), "batches", ["status", "created_at"])
    op.create_table(
        "batch_answers",
        sa.Column("batch_id", sa.Uuid(), nullable=False),
        sa.Column("line", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("status_code", sa.BigInteger(), nullable=False, comment="of HTTP; 0 where the batch ended before the request was sent"),
        sa.Column("body", postgresql.JSONB(), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_batch_answers_batch_id_batches"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("batch_id", "line", name=op.f("pk_batch_answers")),
    )


def downgrade() -> None:
    op.drop_table("batch_answers")
    op.drop_table("batches")
