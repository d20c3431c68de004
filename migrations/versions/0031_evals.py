"""Evals of OpenAI's API, their runs and the graded items of each run."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None


def upgrade() -> None:
    when, now = sa.DateTime(timezone=True), sa.text("clock_timestamp()")
    json = postgresql.JSONB
    op.create_table(
        "evals",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("data_source_config", json(), nullable=False, comment="as it was sent"),
        sa.Column("criteria", json(), nullable=False, comment="graders as they were sent, each with its pass_threshold where it has one"),
        sa.Column("user_metadata", json(), nullable=True),
        sa.Column("created_at", when, server_default=now, nullable=False),
        sa.Column("deleted_at", when, nullable=True),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_evals_owner_id_users")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_evals_project_id_projects")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evals")),
    )
    op.create_index(op.f("ix_evals_project_id_created_at"), "evals", ["project_id", "created_at"])
    op.create_table(
        "eval_runs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("eval_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("data_source", json(), nullable=False, comment="as it was sent"),
        sa.Column(
            "status", sa.Text(), server_default="queued", nullable=False, comment="queued, in_progress, completed, failed or canceled"
        ),
        sa.Column("cancel_requested", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        *(sa.Column(name, sa.BigInteger(), server_default="0", nullable=False) for name in ("total", "passed", "failed", "errored")),
        sa.Column(
            "criteria_counts", json(), server_default=sa.text("'[]'"), nullable=False, comment="testing_criteria, passed and failed of each"
        ),
        sa.Column("usage", json(), server_default=sa.text("'{}'"), nullable=False, comment="model → invocations and tokens"),
        sa.Column("error", json(), nullable=True),
        sa.Column("user_metadata", json(), nullable=True),
        sa.Column("created_at", when, server_default=now, nullable=False),
        sa.Column("finished_at", when, nullable=True),
        sa.Column("deleted_at", when, nullable=True),
        sa.Column(
            "fence",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="rises with every claim; stale writers are refused by it",
        ),
        sa.Column("deaths", sa.BigInteger(), server_default="0", nullable=False, comment="workers that died over it since it last got on"),
        sa.Column("lease_until", when, nullable=True),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_eval_runs_owner_id_users")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_eval_runs_project_id_projects")),
        sa.ForeignKeyConstraint(["eval_id"], ["evals.id"], name=op.f("fk_eval_runs_eval_id_evals"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_eval_runs")),
    )
    op.create_index(op.f("ix_eval_runs_eval_id_created_at"), "eval_runs", ["eval_id", "created_at"])
    op.create_index(op.f("ix_eval_runs_status_created_at"), "eval_runs", ["status", "created_at"])
    op.create_table(
        "eval_items",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("place", sa.BigInteger(), nullable=False, comment="of the item in its source, from 0"),
        sa.Column("status", sa.Text(), nullable=False, comment="pass, fail or error"),
        sa.Column("item", json(), nullable=False),
        sa.Column("sample", json(), nullable=False, comment="the request and the answer"),
        sa.Column("results", json(), nullable=False, comment="name, passed and score of each criterion"),
        sa.Column("created_at", when, server_default=now, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["eval_runs.id"], name=op.f("fk_eval_items_run_id_eval_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_eval_items")),
    )
    op.create_index(op.f("ix_eval_items_run_id_place"), "eval_items", ["run_id", "place"], unique=True)


def downgrade() -> None:
    op.drop_table("eval_items")
    op.drop_table("eval_runs")
    op.drop_table("evals")
