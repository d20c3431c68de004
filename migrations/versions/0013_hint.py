"""What to do about an error is its `hint`; stored errors said `way_out`."""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

TABLES = {
    "datasets": "error", "inspections": "error", "models": "error", "jobs": "error", "evaluations": "error",
    "prompt_runs": "error", "answers": "error", "events": "data",
}  # fmt: skip


def rename(old: str, new: str) -> None:
    for table, column in TABLES.items():
        op.execute(
            f"UPDATE {table} SET {column} = ({column} - '{old}') || jsonb_build_object('{new}', {column} -> '{old}') "  # noqa: S608
            f"WHERE jsonb_typeof({column}) = 'object' AND {column} ? '{old}'"
        )


def upgrade() -> None:
    rename("way_out", "hint")


def downgrade() -> None:
    rename("hint", "way_out")
