"""Webhook endpoints, and the deliveries of events to them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None


def upgrade() -> None:
    when, now = sa.DateTime(timezone=True), sa.text("clock_timestamp()")
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("event_types", postgresql.JSONB(), nullable=False),
        sa.Column("generation", sa.BigInteger(), server_default="1", nullable=False, comment="rises with every new secret"),
        sa.Column("old_until", when, nullable=True, comment="until then the secret of the generation before signs too"),
        sa.Column("created_at", when, server_default=now, nullable=False),
        sa.Column("updated_at", when, server_default=now, nullable=False),
        sa.Column("deleted_at", when, nullable=True),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_webhook_endpoints_owner_id_users")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_webhook_endpoints_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_endpoints")),
    )
    op.create_index(op.f("ix_webhook_endpoints_project_id_created_at"), "webhook_endpoints", ["project_id", "created_at"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("endpoint_id", sa.Uuid(), nullable=False),
        sa.Column("status", sa.Text(), server_default="queued", nullable=False, comment="queued, running, succeeded or failed"),
        sa.Column("event_key", sa.Uuid(), nullable=False, comment="of what happened: its second report makes no second delivery"),
        sa.Column("event", postgresql.JSONB(), nullable=False, comment="the body that is sent"),
        sa.Column("tries", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("status_code", sa.BigInteger(), nullable=True, comment="of the last answer"),
        sa.Column("error", sa.Text(), nullable=True, comment="why the last try failed"),
        sa.Column("next_at", when, server_default=now, nullable=False),
        sa.Column("created_at", when, server_default=now, nullable=False),
        sa.Column("finished_at", when, nullable=True),
        sa.Column(
            "fence",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="rises with every claim; stale writers are refused by it",
        ),
        sa.Column("deaths", sa.BigInteger(), server_default="0", nullable=False, comment="workers that died over it since it last got on"),
        sa.Column("lease_until", when, nullable=True),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["webhook_endpoints.id"],
            name=op.f("fk_webhook_deliveries_endpoint_id_webhook_endpoints"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
        sa.UniqueConstraint("endpoint_id", "event_key", name=op.f("uq_webhook_deliveries_endpoint_id_event_key")),
    )
    op.create_index(op.f("ix_webhook_deliveries_endpoint_id_created_at"), "webhook_deliveries", ["endpoint_id", "created_at"])
    op.create_index(op.f("ix_webhook_deliveries_status_next_at"), "webhook_deliveries", ["status", "next_at"])


def downgrade() -> None:
    op.drop_table("webhook_deliveries")
    op.drop_table("webhook_endpoints")
