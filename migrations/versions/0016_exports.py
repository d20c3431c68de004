"""Exports: a model written in a format for other programs, as a queued task with a lease."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    when = sa.DateTime(timezone=True)
    op.create_table(
        "exports",
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("status", sa.Text(), server_default="queued", nullable=False, comment="queued, running, succeeded, failed or cancelled"),
        sa.Column("format", sa.Text(), nullable=False, comment="name of one of app/export_formats"),
        sa.Column("spec", postgresql.JSONB(), nullable=False, comment="app.models.exports.ExportSpec, frozen"),
        sa.Column(
            "files",
            postgresql.JSONB(),
            server_default=sa.text("'[]'"),
            nullable=False,
            comment="name, type, bytes, sha256 and notes of each",
        ),
        sa.Column("parity", postgresql.JSONB(), nullable=True, comment="the files compared with the model, one line per type"),
        sa.Column("error", postgresql.JSONB(), nullable=True, comment="code, message, hint"),
        sa.Column(
            "hub", postgresql.JSONB(), nullable=True, comment="the last push to the hub: repo, private, status, url, commit and error"
        ),
        sa.Column("progress", sa.Float(), nullable=True, comment="share of the work done, 0 to 1"),
        sa.Column("stage", sa.Text(), nullable=True, comment="what is being done, in words"),
        sa.Column("created_at", when, server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("finished_at", when, nullable=True),
        sa.Column("deleted_at", when, nullable=True),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column(
            "fence",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="rises with every claim; stale writers are refused by it",
        ),
        sa.Column("deaths", sa.BigInteger(), server_default="0", nullable=False, comment="workers that died over it since it last got on"),
        sa.Column("lease_until", when, nullable=True),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_exports_model_id_models")),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_exports_owner_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_exports")),
    )
    op.create_index(op.f("ix_exports_model_id"), "exports", ["model_id"])
    op.create_index(op.f("ix_exports_owner_id_created_at"), "exports", ["owner_id", "created_at"])


def downgrade() -> None:
    op.drop_table("exports")
