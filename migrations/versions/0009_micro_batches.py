"""The setting that splits a batch over passes is called micro_batches; accumulation means the opposite everywhere else."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

HELD = (("jobs", "spec"), ("jobs", '"order"'), ("comparisons", '"order"'))


def upgrade() -> None:
    _rename("accumulation", "micro_batches")


def downgrade() -> None:
    _rename("micro_batches", "accumulation")


def _rename(old: str, new: str) -> None:
    for table, column in HELD:
        op.execute(  # the four names are those above
            f"UPDATE {table} SET {column} = jsonb_set({column} #- '{{run,{old}}}', '{{run,{new}}}', {column} #> '{{run,{old}}}') "  # noqa: S608
            f"WHERE {column} #> '{{run,{old}}}' IS NOT NULL"
        )
