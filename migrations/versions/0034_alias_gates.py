"""An alias may have a gate, and its moves are kept."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0034"
down_revision = "0033"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "model_aliases",
        sa.Column(
            "gate",
            postgresql.JSONB(),
            nullable=True,
            comment="what a model must pass before it is moved there: app.evaluation.gates.PromotionGate",
        ),
    )
    op.create_table(
        "alias_moves",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=False, comment="who moved it"),
        sa.Column("user_name", sa.Text(), nullable=False, comment="the name of that person then"),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("from_id", sa.Uuid(), nullable=True),
        sa.Column("from_name", sa.Text(), nullable=True, comment="null for the first model of an alias"),
        sa.Column("to_id", sa.Uuid(), nullable=True),
        sa.Column("to_name", sa.Text(), nullable=False),
        sa.Column("how", sa.Text(), nullable=False, comment="set without a gate, gate passed, force, or back to the model before"),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("result", postgresql.JSONB(), nullable=True, comment="what the gate measured: app.evaluation.gates.GateResult"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.ForeignKeyConstraint(["from_id"], ["models.id"], name=op.f("fk_alias_moves_from_id_models"), ondelete="SET NULL"),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name=op.f("fk_alias_moves_owner_id_users"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_alias_moves_project_id_projects")),
        sa.ForeignKeyConstraint(["to_id"], ["models.id"], name=op.f("fk_alias_moves_to_id_models"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alias_moves")),
    )
    op.create_index(op.f("ix_alias_moves_project_id_alias_created_at"), "alias_moves", ["project_id", "alias", "created_at"])
    op.create_index(op.f("ix_alias_moves_from_id"), "alias_moves", ["from_id"])
    op.create_index(op.f("ix_alias_moves_to_id"), "alias_moves", ["to_id"])


def downgrade() -> None:
    op.drop_table("alias_moves")
    op.drop_column("model_aliases", "gate")
