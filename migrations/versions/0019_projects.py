"""Projects: everything belongs to one. Each person gets one of their own, with the person's id, and what was there moves into it."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

LISTED = ("files", "datasets", "jobs", "comparisons", "evaluations", "prompts", "prompt_runs", "exchanges", "votes", "exports")
"""Tables whose lists are read by project and time."""
OWNED = (*LISTED, "uploads", "models", "model_aliases")
KEYED = ("jobs", "comparisons")
ROLES = "role IN ('admin', 'member', 'viewer')"
LIVE = "deleted_at IS NULL"


def upgrade() -> None:
    when = sa.DateTime(timezone=True)
    created = lambda: sa.Column("created_at", when, server_default=sa.text("clock_timestamp()"), nullable=False)  # noqa: E731
    op.create_table(
        "projects",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "personal", sa.Boolean(), server_default=sa.text("false"), nullable=False, comment="somebody's own; it has no further members"
        ),
        created(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
    )
    op.create_table(
        "project_members",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column(
            "role",
            sa.Text(),
            nullable=False,
            comment="admin, member or viewer of this project; the person's role in the studio bounds it",
        ),
        created(),
        sa.CheckConstraint(ROLES, name=op.f("ck_project_members_role")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_project_members_project_id_projects"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_project_members_user_id_users"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("project_id", "user_id", name=op.f("pk_project_members")),
    )
    op.create_index(op.f("ix_project_members_user_id"), "project_members", ["user_id"])
    op.create_table(
        "share_links",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("token_sha256", sa.Text(), nullable=False),
        sa.Column("created_by", sa.Uuid(), nullable=False),
        created(),
        sa.Column("last_used_at", when, nullable=True),
        sa.Column("revoked_at", when, nullable=True),
        sa.ForeignKeyConstraint(["created_by"], ["users.id"], name=op.f("fk_share_links_created_by_users"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_share_links_project_id_projects"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_share_links")),
        sa.UniqueConstraint("token_sha256", name=op.f("uq_share_links_token_sha256")),
    )
    op.create_index(op.f("ix_share_links_project_id"), "share_links", ["project_id"])
    op.execute("INSERT INTO projects (id, name, personal, created_at) SELECT id, name, true, created_at FROM users")
    op.execute("INSERT INTO project_members (project_id, user_id, role) SELECT id, id, 'admin' FROM users")
    for table in OWNED:
        op.add_column(table, sa.Column("project_id", sa.Uuid(), nullable=True))
        op.execute(f"UPDATE {table} SET project_id = owner_id")  # noqa: S608  names of tables
        if table != "models":  # those without an owner are shared by everyone
            op.alter_column(table, "project_id", nullable=False)
        op.create_foreign_key(op.f(f"fk_{table}_project_id_projects"), table, "projects", ["project_id"], ["id"])
    for table in LISTED:
        op.drop_index(op.f(f"ix_{table}_owner_id_created_at"), table_name=table)
        op.create_index(op.f(f"ix_{table}_project_id_created_at"), table, ["project_id", "created_at"])
    for table in KEYED:
        op.drop_constraint(op.f(f"uq_{table}_owner_id_idempotency_key"), table)
        columns = ["project_id", "owner_id", "idempotency_key"]
        op.create_unique_constraint(op.f(f"uq_{table}_project_id_owner_id_idempotency_key"), table, columns)
    op.drop_index("uq_models_live_name", table_name="models")
    op.create_index("uq_models_live_name", "models", ["project_id", "name"], unique=True, postgresql_where=sa.text(LIVE))
    shared = sa.text(f"{LIVE} AND project_id IS NULL")
    op.create_index("uq_models_shared_name", "models", ["name"], unique=True, postgresql_where=shared)
    op.alter_column("models", "name", comment="what `model=` takes; ft:… for tuned models; unique in its project among models not deleted")
    op.drop_constraint(op.f("pk_model_aliases"), "model_aliases")
    op.create_primary_key(op.f("pk_model_aliases"), "model_aliases", ["project_id", "name"])
    op.alter_column("model_aliases", "owner_id", comment="who chose the name")
    op.add_column(
        "browser_sessions",
        sa.Column("project_id", sa.Uuid(), nullable=True, comment="the one chosen in the sidebar; null is the person's own"),
    )
    op.create_foreign_key(
        op.f("fk_browser_sessions_project_id_projects"), "browser_sessions", "projects", ["project_id"], ["id"], ondelete="SET NULL"
    )
    op.add_column(
        "browser_sessions", sa.Column("share_id", sa.Uuid(), nullable=True, comment="a guest who came by this link, not the person")
    )
    op.create_foreign_key(
        op.f("fk_browser_sessions_share_id_share_links"), "browser_sessions", "share_links", ["share_id"], ["id"], ondelete="CASCADE"
    )
    op.create_index(op.f("ix_browser_sessions_share_id"), "browser_sessions", ["share_id"])
    op.add_column(
        "api_keys", sa.Column("project_id", sa.Uuid(), nullable=True, comment="the only one it reaches; null: any of its person's")
    )
    op.create_foreign_key(op.f("fk_api_keys_project_id_projects"), "api_keys", "projects", ["project_id"], ["id"], ondelete="CASCADE")


def downgrade() -> None:
    # A key of one project would reach all that its person owns, and a guest would become the person.
    op.execute("UPDATE api_keys SET revoked_at = clock_timestamp() WHERE revoked_at IS NULL AND project_id IS NOT NULL")
    op.execute("DELETE FROM browser_sessions WHERE share_id IS NOT NULL")
    op.drop_column("api_keys", "project_id")
    op.drop_column("browser_sessions", "share_id")
    op.drop_column("browser_sessions", "project_id")
    # Names that were free in their project and are not in the studio: the older one keeps the name.
    op.execute(
        """UPDATE models m SET name = name || '-' || left(id::text, 8) WHERE deleted_at IS NULL AND EXISTS (
            SELECT FROM models o WHERE o.name = m.name AND o.deleted_at IS NULL AND (o.created_at, o.id) < (m.created_at, m.id))"""
    )
    op.execute(
        """DELETE FROM model_aliases a WHERE EXISTS (
            SELECT FROM model_aliases o WHERE o.owner_id = a.owner_id AND o.name = a.name AND o.project_id < a.project_id)"""
    )
    op.drop_constraint(op.f("pk_model_aliases"), "model_aliases")
    op.create_primary_key(op.f("pk_model_aliases"), "model_aliases", ["owner_id", "name"])
    op.alter_column("model_aliases", "owner_id", comment=None)
    op.alter_column("models", "name", comment="what `model=` takes; ft:… for tuned models; unique among models not deleted")
    op.drop_index("uq_models_shared_name", table_name="models")
    op.drop_index("uq_models_live_name", table_name="models")
    op.create_index("uq_models_live_name", "models", ["name"], unique=True, postgresql_where=sa.text(LIVE))
    for table in KEYED:
        op.execute(
            f"""UPDATE {table} t SET idempotency_key = NULL WHERE EXISTS (SELECT FROM {table} o WHERE o.owner_id = t.owner_id
                AND o.idempotency_key = t.idempotency_key AND o.project_id < t.project_id)"""  # noqa: S608  names of tables
        )
        op.drop_constraint(op.f(f"uq_{table}_project_id_owner_id_idempotency_key"), table)
        op.create_unique_constraint(op.f(f"uq_{table}_owner_id_idempotency_key"), table, ["owner_id", "idempotency_key"])
    for table in LISTED:
        op.drop_index(op.f(f"ix_{table}_project_id_created_at"), table_name=table)
        op.create_index(op.f(f"ix_{table}_owner_id_created_at"), table, ["owner_id", "created_at"])
    for table in OWNED:
        op.drop_column(table, "project_id")
    op.drop_table("share_links")
    op.drop_table("project_members")
    op.drop_table("projects")
