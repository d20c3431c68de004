"""API keys with scopes and an end. Those that were there keep all that their person may do."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "api_keys",
        sa.Column(
            "scopes",
            postgresql.JSONB(),
            server_default=sa.text("""'["admin"]'"""),
            nullable=False,
            comment="of app/web/policy.py; the person's role bounds them",
        ),
    )
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    # A narrower key would become one that may do everything.
    op.execute(
        sa.text(
            """UPDATE api_keys SET revoked_at = clock_timestamp() WHERE revoked_at IS NULL AND (scopes <> '["admin"]' OR expires_at IS NOT NULL)"""
        )
    )
    op.drop_column("api_keys", "expires_at")
    op.drop_column("api_keys", "scopes")
