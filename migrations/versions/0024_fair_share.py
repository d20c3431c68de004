"""What a fair queue needs: the use of the machine by each attempt, a job's priority, a project's weight."""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

RECORD = """
CREATE FUNCTION record_machine_use() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.lease_until IS NOT NULL THEN
        -- A holder that died was heard of until its lease; one that is known to be dead has the lease end 1970.
        UPDATE machine_uses SET ended_at = greatest(started_at, least(clock_timestamp(), OLD.lease_until))
        WHERE row_id = OLD.id AND ended_at IS NULL;
    END IF;
    IF NEW.fence <> OLD.fence AND NEW.lease_until IS NOT NULL THEN
        INSERT INTO machine_uses (id, user_id, project_id, kind, row_id, fence)
        VALUES (gen_random_uuid(), NEW.owner_id, NEW.project_id, TG_TABLE_NAME, NEW.id, NEW.fence);
    END IF;
    RETURN NULL;
END $$
"""
CHANGED = """
    NEW.fence <> OLD.fence
    OR (OLD.lease_until IS NOT NULL AND (NEW.lease_until IS NULL OR NEW.lease_until = '1970-01-01 00:00:00+00'))
"""


def upgrade() -> None:
    op.create_table(
        "machine_uses",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False, comment="whose work it was then"),
        sa.Column("project_id", sa.Uuid(), nullable=True, comment="null: it was deleted"),
        sa.Column("kind", sa.Text(), nullable=False, comment="jobs or evaluations"),
        sa.Column("row_id", sa.Uuid(), nullable=False, comment="of the job or evaluation"),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("gpus", sa.BigInteger(), server_default="0", nullable=False, comment="GPUs that it held; 0 where it ran on the CPU"),
        sa.Column("joules", sa.Float(), nullable=True, comment="energy of those GPUs; null where they do not count it"),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_machine_uses_user_id_users"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_machine_uses_project_id_projects"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_machine_uses")),
    )
    op.create_index(op.f("ix_machine_uses_row_id_fence"), "machine_uses", ["row_id", "fence"])
    for column in ("user_id", "project_id"):
        op.create_index(op.f(f"ix_machine_uses_{column}_started_at"), "machine_uses", [column, "started_at"])
    op.create_index("ix_machine_uses_open", "machine_uses", ["row_id"], postgresql_where=sa.text("ended_at IS NULL"))
    op.execute(RECORD)
    # Predictions run beside training and hold no train worker.
    for table, more in (("jobs", ""), ("evaluations", "NEW.kind NOT IN ('predictions', 'vectors') AND ")):
        op.execute(
            f"CREATE TRIGGER {table}_machine_use AFTER UPDATE OF lease_until, fence ON {table} FOR EACH ROW "
            f"WHEN ({more}({CHANGED})) EXECUTE FUNCTION record_machine_use()"
        )
    op.add_column("jobs", sa.Column("priority", sa.Text(), server_default="normal", nullable=False, comment="low, normal or high"))
    op.create_check_constraint(op.f("ck_jobs_priority"), "jobs", "priority IN ('low', 'normal', 'high')")
    op.add_column("jobs", sa.Column("resumed_at", sa.DateTime(timezone=True), nullable=True, comment="when a person queued it again, last"))
    op.add_column(
        "projects",
        sa.Column(
            "weight", sa.Float(), server_default="1", nullable=False, comment="how much of the machine its work may use beside others"
        ),
    )
    op.create_check_constraint(op.f("ck_projects_weight"), "projects", "weight > 0")


def downgrade() -> None:
    op.drop_column("projects", "weight")
    op.drop_column("jobs", "resumed_at")
    op.drop_column("jobs", "priority")
    for table in ("jobs", "evaluations"):
        op.execute(f"DROP TRIGGER {table}_machine_use ON {table}")
    op.drop_table("machine_uses")
    op.execute("DROP FUNCTION record_machine_use()")
