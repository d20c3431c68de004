"""A share of long work is the event `progress`; stored events said `doing`."""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("UPDATE events SET type = 'progress' WHERE type = 'doing'")


def downgrade() -> None:
    op.execute("UPDATE events SET type = 'doing' WHERE type = 'progress'")
