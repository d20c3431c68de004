"""Every table that has a lease has the same columns for it: a fence, deaths and the time until which it is held."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

FENCE = "rises with every claim; stale writers are refused by it"
DEATHS = "workers that died over it since it last got on"
OLD_FENCES = {
    "datasets": None, "models": "rises with every claim of a fetch", "evaluations": "rises with every claim",
    "prompt_runs": "rises with every claim",
}  # fmt: skip
OLD_DEATHS = {"jobs": "worker deaths since the newest checkpoint", "evaluations": "processes that died over it"}
WITHOUT_DEATHS = ("datasets", "inspections", "models", "prompt_runs")


def count(name: str, comment: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), server_default="0", nullable=False, comment=comment)


def upgrade() -> None:
    op.add_column("inspections", count("fence", FENCE))
    for table in WITHOUT_DEATHS:
        op.add_column(table, count("deaths", DEATHS))
    for table, old in OLD_FENCES.items():
        op.alter_column(table, "fence", comment=FENCE, existing_comment=old)
    for table, old in OLD_DEATHS.items():
        op.alter_column(table, "deaths", comment=DEATHS, existing_comment=old)
    op.execute("UPDATE inspections SET lease_until = NULL WHERE status <> 'running'")  # from now on what waits has no lease
    op.execute("UPDATE prompt_runs SET result = result - 'deaths' - 'rows_at_death' WHERE result IS NOT NULL")


def downgrade() -> None:
    for table, old in OLD_DEATHS.items():
        op.alter_column(table, "deaths", comment=old, existing_comment=DEATHS)
    for table, old in OLD_FENCES.items():
        op.alter_column(table, "fence", comment=old, existing_comment=FENCE)
    for table in WITHOUT_DEATHS:
        op.drop_column(table, "deaths")
    op.drop_column("inspections", "fence")
