"""Whether the text of a dataset was counted, without unpacking its report; and the counts of the menu from indexes alone."""

import sqlalchemy as sa
from alembic import op

revision = "0038"
down_revision = "0037"
branch_labels = None
depends_on = None

COUNTED = "((report ? 'tokens'::text) OR (report ? 'uncountable'::text))"
LIVE = sa.text("deleted_at IS NULL")


def upgrade() -> None:
    op.add_column("datasets", sa.Column("counted", sa.Boolean(), sa.Computed(COUNTED, persisted=True), nullable=True))
    op.create_index("ix_datasets_live", "datasets", ["project_id", "file_id", "name"], postgresql_where=LIVE)
    op.create_index("ix_jobs_live", "jobs", ["project_id"], postgresql_where=LIVE)


def downgrade() -> None:
    op.drop_index("ix_jobs_live", "jobs")
    op.drop_index("ix_datasets_live", "datasets")
    op.drop_column("datasets", "counted")
