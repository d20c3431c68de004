"""Chat completions and responses that are kept, with their metadata, and the runs of evals over them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None


def upgrade() -> None:
    json = postgresql.JSONB
    _comment("playground, api, responses or vote", "playground, api or vote")
    op.add_column(
        "exchanges", sa.Column("stored", json(), nullable=True, comment="what the API answered, where it was asked to keep it (store)")
    )
    op.add_column("exchanges", sa.Column("user_metadata", json(), nullable=True))
    op.create_index(
        "ix_exchanges_stored", "exchanges", ["project_id", "source", "created_at"], postgresql_where=sa.text("stored IS NOT NULL")
    )
    op.add_column(
        "eval_runs",
        sa.Column("stored_ids", json(), nullable=True, comment="the stored answers that are its items, as they were when it was made"),
    )


def downgrade() -> None:
    _comment("playground, api or vote", "playground, api, responses or vote")
    op.drop_column("eval_runs", "stored_ids")
    op.drop_index("ix_exchanges_stored", table_name="exchanges")
    op.drop_column("exchanges", "user_metadata")
    op.drop_column("exchanges", "stored")


def _comment(now: str, before: str) -> None:
    op.alter_column("exchanges", "source", comment=now, existing_comment=before, existing_type=sa.Text(), existing_nullable=False)
