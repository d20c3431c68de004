"""The playground and the prompt lab: prompts, their runs, votes, saved comparisons, external engines."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "prompts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_prompts_owner_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prompts")),
    )
    op.create_index(op.f("ix_prompts_owner_id_created_at"), "prompts", ["owner_id", "created_at"], unique=False)
    op.create_table(
        "prompt_versions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("prompt_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("body", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False, comment="app.prompts.PromptBody"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompts.id"], name=op.f("fk_prompt_versions_prompt_id_prompts"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prompt_versions")),
        sa.UniqueConstraint("prompt_id", "number", name=op.f("uq_prompt_versions_prompt_id_number")),
    )
    op.create_table(
        "prompt_runs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("version_id", sa.Uuid(), nullable=False),
        sa.Column("model_id", sa.Uuid(), nullable=False),
        sa.Column("dataset_id", sa.Uuid(), nullable=False),
        sa.Column(
            "spec", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False, comment="app.prompt_runs.RunSpec, frozen"
        ),
        sa.Column("status", sa.Text(), server_default="queued", nullable=False, comment="queued, running, succeeded, failed or cancelled"),
        sa.Column("progress", sa.Double(), nullable=True),
        sa.Column(
            "result",
            postgresql.JSONB(none_as_null=True, astext_type=sa.Text()),
            nullable=True,
            comment="score, interval, rows, tokens and seconds",
        ),
        sa.Column("error", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("fence", sa.BigInteger(), server_default="0", nullable=False, comment="rises with every claim"),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_prompt_runs_dataset_id_datasets")),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_prompt_runs_model_id_models")),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_prompt_runs_owner_id_users")),
        sa.ForeignKeyConstraint(["version_id"], ["prompt_versions.id"], name=op.f("fk_prompt_runs_version_id_prompt_versions")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prompt_runs")),
    )
    op.create_index(op.f("ix_prompt_runs_dataset_id"), "prompt_runs", ["dataset_id"], unique=False)
    op.create_index(op.f("ix_prompt_runs_model_id"), "prompt_runs", ["model_id"], unique=False)
    op.create_index(op.f("ix_prompt_runs_owner_id_created_at"), "prompt_runs", ["owner_id", "created_at"], unique=False)
    op.create_index(op.f("ix_prompt_runs_version_id"), "prompt_runs", ["version_id"], unique=False)
    op.create_table(
        "votes",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("exchange_id", sa.Uuid(), nullable=True),
        sa.Column("dataset_id", sa.Uuid(), nullable=True, comment="where the prompt came from"),
        sa.Column("messages", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
        sa.Column("left_model", sa.Text(), nullable=False),
        sa.Column("right_model", sa.Text(), nullable=False),
        sa.Column("left_text", sa.Text(), server_default="", nullable=False),
        sa.Column("right_text", sa.Text(), server_default="", nullable=False),
        sa.Column("choice", sa.BigInteger(), nullable=True),
        sa.Column("edited", sa.Text(), nullable=True, comment="the answer a person would have liked better"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("voted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_votes_dataset_id_datasets")),
        sa.ForeignKeyConstraint(["exchange_id"], ["exchanges.id"], name=op.f("fk_votes_exchange_id_exchanges"), ondelete="SET NULL"),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_votes_owner_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_votes")),
    )
    op.create_index(op.f("ix_votes_exchange_id"), "votes", ["exchange_id"], unique=False)
    op.create_index(op.f("ix_votes_owner_id_created_at"), "votes", ["owner_id", "created_at"], unique=False)
    op.create_table(
        "prompt_results",
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("line", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("input", sa.Text(), nullable=False),
        sa.Column("rendered_prompt", sa.Text(), nullable=False),
        sa.Column("expected", sa.Text(), nullable=False),
        sa.Column("said", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False, comment="each sample's whole text"),
        sa.Column("answer", sa.Text(), nullable=False, comment="what the rule took from it; the majority of several samples"),
        sa.Column("score", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["prompt_runs.id"], name=op.f("fk_prompt_results_run_id_prompt_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "line", name=op.f("pk_prompt_results")),
    )
    op.add_column("exchanges", sa.Column("title", sa.Text(), nullable=True, comment="given when a person saves it as a comparison"))
    op.alter_column(
        "exchanges",
        "source",
        existing_type=sa.TEXT(),
        comment="playground, api or vote",
        existing_comment="playground or api",
        existing_nullable=False,
        existing_server_default=sa.text("'playground'::text"),
    )
    op.add_column(
        "models",
        sa.Column(
            "engine",
            postgresql.JSONB(none_as_null=True, astext_type=sa.Text()),
            nullable=True,
            comment="an external server that answers for it: {url, model}; null is our own engine",
        ),
    )


def downgrade() -> None:
    op.drop_column("models", "engine")
    op.alter_column(
        "exchanges",
        "source",
        existing_type=sa.TEXT(),
        comment="playground or api",
        existing_comment="playground, api or vote",
        existing_nullable=False,
        existing_server_default=sa.text("'playground'::text"),
    )
    op.drop_column("exchanges", "title")
    op.drop_table("prompt_results")
    op.drop_index(op.f("ix_votes_owner_id_created_at"), table_name="votes")
    op.drop_index(op.f("ix_votes_exchange_id"), table_name="votes")
    op.drop_table("votes")
    op.drop_index(op.f("ix_prompt_runs_version_id"), table_name="prompt_runs")
    op.drop_index(op.f("ix_prompt_runs_owner_id_created_at"), table_name="prompt_runs")
    op.drop_index(op.f("ix_prompt_runs_model_id"), table_name="prompt_runs")
    op.drop_index(op.f("ix_prompt_runs_dataset_id"), table_name="prompt_runs")
    op.drop_table("prompt_runs")
    op.drop_table("prompt_versions")
    op.drop_index(op.f("ix_prompts_owner_id_created_at"), table_name="prompts")
    op.drop_table("prompts")
