"""Accounts beside the first: invitations, two-step codes, disabled accounts, and what a session was opened with."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

ROLES = "role IN ('admin', 'member', 'viewer')"


def upgrade() -> None:
    when = sa.DateTime(timezone=True)
    created = lambda name="created_at": sa.Column(name, when, server_default=sa.text("clock_timestamp()"), nullable=False)  # noqa: E731
    op.add_column(
        "users", sa.Column("disabled_at", when, nullable=True, comment="nobody signs in to it any more; its keys and sessions are gone")
    )
    # Until now there was no way to a second account but by hand, and no role had a meaning of its own.
    op.execute(sa.text("UPDATE users SET role = 'member' WHERE role NOT IN ('admin', 'member', 'viewer')"))
    op.alter_column("users", "role", server_default="member", comment="admin, member or viewer", existing_type=sa.Text())
    op.create_check_constraint(op.f("ck_users_role"), "users", ROLES)
    op.create_table(
        "invitations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("token_sha256", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), server_default="", nullable=False, comment="whom it is for, as the admin wrote it"),
        sa.Column("invited_by", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=True, comment="the account made with it"),
        created(),
        sa.Column("expires_at", when, nullable=False),
        sa.Column("used_at", when, nullable=True),
        sa.Column("revoked_at", when, nullable=True),
        sa.CheckConstraint(ROLES, name=op.f("ck_invitations_role")),
        sa.ForeignKeyConstraint(["invited_by"], ["users.id"], name=op.f("fk_invitations_invited_by_users"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_invitations_user_id_users"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invitations")),
        sa.UniqueConstraint("token_sha256", name=op.f("uq_invitations_token_sha256")),
    )
    op.create_table(
        "two_step",
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("salt", sa.Text(), nullable=False),
        sa.Column("confirmed_at", when, nullable=True, comment="null until the first code was right; not asked for before"),
        sa.Column(
            "last_step",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="step of the clock of the last code taken; none is taken twice",
        ),
        sa.Column(
            "recovery",
            postgresql.JSONB(),
            server_default=sa.text("'[]'"),
            nullable=False,
            comment="SHA-256 of each unused recovery code",
        ),
        created(),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_two_step_user_id_users"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_two_step")),
    )
    op.add_column(
        "browser_sessions",
        sa.Column(
            "id",
            sa.Uuid(),
            server_default=sa.text("gen_random_uuid()"),
            nullable=False,
            comment="what its own person calls it; grants nothing",
        ),
    )
    op.create_unique_constraint(op.f("uq_browser_sessions_id"), "browser_sessions", ["id"])
    for name, comment in (("address", "where it signed in from"), ("browser", "its User-Agent at sign-in")):
        op.add_column("browser_sessions", sa.Column(name, sa.Text(), server_default="", nullable=False, comment=comment))
    op.add_column("browser_sessions", created("last_used_at"))


def downgrade() -> None:
    for name in ("last_used_at", "browser", "address", "id"):
        op.drop_column("browser_sessions", name)
    op.drop_table("two_step")
    op.drop_table("invitations")
    op.drop_constraint(op.f("ck_users_role"), "users", type_="check")
    op.alter_column(
        "users", "role", server_default="admin", comment=None, existing_type=sa.Text(), existing_comment="admin, member or viewer"
    )
    op.drop_column("users", "disabled_at")
