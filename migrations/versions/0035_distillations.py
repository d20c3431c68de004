"""A teacher answers the prompts of a dataset, and the best answers become another dataset."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0035"
down_revision = "0034"
branch_labels = None
depends_on = None

KINDS = ("generic, instruction, dialogue, classifier or encoder", "generic, instruction, dialogue, classifier, encoder or reward")


def upgrade() -> None:
    when, now = sa.DateTime(timezone=True), sa.text("clock_timestamp()")
    op.create_table(
        "distillation_runs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("model_id", sa.Uuid(), nullable=False, comment="the teacher"),
        sa.Column("dataset_id", sa.Uuid(), nullable=False, comment="whose prompts are answered"),
        sa.Column("made_id", sa.Uuid(), nullable=True, comment="the dataset of the answers that were kept"),
        sa.Column("spec", postgresql.JSONB(), nullable=False, comment="app.distillations.service.DistillationSpec, frozen"),
        sa.Column("status", sa.Text(), server_default="queued", nullable=False, comment="queued, running, succeeded, failed or cancelled"),
        sa.Column("progress", sa.Float(), nullable=True),
        sa.Column("result", postgresql.JSONB(), nullable=True, comment="prompts, kept, scores, tokens and seconds"),
        sa.Column("error", postgresql.JSONB(), nullable=True),
        sa.Column("created_at", when, server_default=now, nullable=False),
        sa.Column("finished_at", when, nullable=True),
        sa.Column("deleted_at", when, nullable=True),
        sa.Column(
            "fence", sa.BigInteger(), server_default="0", nullable=False, comment="rises with every claim; stale writers are refused by it"
        ),
        sa.Column("deaths", sa.BigInteger(), server_default="0", nullable=False, comment="workers that died over it since it last got on"),
        sa.Column("lease_until", when, nullable=True),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_distillation_runs_owner_id_users")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_distillation_runs_project_id_projects")),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name=op.f("fk_distillation_runs_model_id_models")),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_distillation_runs_dataset_id_datasets")),
        sa.ForeignKeyConstraint(["made_id"], ["datasets.id"], name=op.f("fk_distillation_runs_made_id_datasets")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_distillation_runs")),
    )
    for column in ("model_id", "dataset_id", "made_id"):
        op.create_index(op.f(f"ix_distillation_runs_{column}"), "distillation_runs", [column])
    op.create_index(op.f("ix_distillation_runs_project_id_created_at"), "distillation_runs", ["project_id", "created_at"])
    op.create_table(
        "distilled_rows",
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("line", sa.BigInteger(), autoincrement=False, nullable=False, comment="of the prompt in its dataset"),
        sa.Column("messages", postgresql.JSONB(), nullable=False, comment="what the teacher was asked"),
        sa.Column("answers", postgresql.JSONB(), nullable=False, comment="each with its text, its score and why it has none"),
        sa.Column("best", sa.BigInteger(), nullable=True, comment="the place of the answer that is kept"),
        sa.ForeignKeyConstraint(
            ["run_id"], ["distillation_runs.id"], name=op.f("fk_distilled_rows_run_id_distillation_runs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "line", name=op.f("pk_distilled_rows")),
    )
    op.alter_column("models", "kind", comment=KINDS[1], existing_comment=KINDS[0])


def downgrade() -> None:
    op.alter_column("models", "kind", comment=KINDS[0], existing_comment=KINDS[1])
    op.drop_table("distilled_rows")
    op.drop_table("distillation_runs")
