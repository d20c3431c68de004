"""Accounts: users, invitations, browser sessions, two-step codes, sign-in links and API keys."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import CheckConstraint, ForeignKey, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, new_key, now


class User(Base):
    __tablename__ = "users"
    id: Mapped[uuid.UUID] = new_key()
    name: Mapped[str] = mapped_column(unique=True)
    password_hash: Mapped[str | None]
    role: Mapped[str] = mapped_column(server_default="member", comment="admin, member or viewer")
    limits: Mapped[JSON | None] = mapped_column(comment="app.limits.LIMITS, where an admin set one")
    created_at: Mapped[datetime] = now()
    disabled_at: Mapped[datetime | None] = mapped_column(comment="nobody signs in to it any more; its keys and sessions are gone")
    __table_args__ = (CheckConstraint("role IN ('admin', 'member', 'viewer')", name="role"),)

    _working_in: ClassVar[uuid.UUID | None] = None

    @property
    def project_id(self) -> uuid.UUID:
        """The project that this person works in now: their own, which has the person's id, unless `work_in` chose another."""
        return self._working_in or self.id

    def work_in(self, project_id: uuid.UUID) -> User:
        self.__dict__["_working_in"] = project_id
        return self


class Invitation(Base):
    """A link with which one person makes an account. Only the SHA-256 of its token is stored."""

    __tablename__ = "invitations"
    id: Mapped[uuid.UUID] = new_key()
    token_sha256: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str]
    note: Mapped[str] = mapped_column(server_default="", comment="whom it is for, as the admin wrote it")
    invited_by: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    user_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"), comment="the account made with it")
    created_at: Mapped[datetime] = now()
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    __table_args__ = (CheckConstraint("role IN ('admin', 'member', 'viewer')", name="role"),)


class Identity(Base):
    """An account of an OpenID Connect provider that signs in to an account here."""

    __tablename__ = "identities"
    id: Mapped[uuid.UUID] = new_key()
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    issuer: Mapped[str]
    subject: Mapped[str]
    email: Mapped[str] = mapped_column(server_default="", comment="as the provider last gave it; to be read by people only")
    created_at: Mapped[datetime] = now()
    last_used_at: Mapped[datetime | None]
    __table_args__ = (UniqueConstraint("issuer", "subject"),)


class TwoStep(Base):
    """A person's one-time codes. Their secret is not stored: it is computed from `salt` and a secret file of the studio."""

    __tablename__ = "two_step"
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    salt: Mapped[str]
    confirmed_at: Mapped[datetime | None] = mapped_column(comment="null until the first code was right; not asked for before")
    last_step: Mapped[int] = mapped_column(server_default="0", comment="step of the clock of the last code taken; none is taken twice")
    recovery: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"), comment="SHA-256 of each unused recovery code")
    created_at: Mapped[datetime] = now()


class SignInLink(Base):
    """A link that signs in once. Only the SHA-256 of its token is stored."""

    __tablename__ = "sign_in_links"
    token_sha256: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = now()
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class BrowserSession(Base):
    __tablename__ = "browser_sessions"
    token_sha256: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[uuid.UUID] = mapped_column(
        unique=True, default=uuid.uuid4, server_default=func.gen_random_uuid(), comment="what its own person calls it; grants nothing"
    )
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    address: Mapped[str] = mapped_column(server_default="", comment="where it signed in from")
    browser: Mapped[str] = mapped_column(server_default="", comment="its User-Agent at sign-in")
    project_id: Mapped[uuid.UUID | None] = mapped_column(
        ForeignKey("projects.id", ondelete="SET NULL"), comment="the one chosen in the sidebar; null is the person's own"
    )
    share_id: Mapped[uuid.UUID | None] = mapped_column(
        ForeignKey("share_links.id", ondelete="CASCADE"), index=True, comment="a guest who came by this link, not the person"
    )
    created_at: Mapped[datetime] = now()
    last_used_at: Mapped[datetime] = now()
    expires_at: Mapped[datetime]


class ApiKey(Base):
    """`sk-luthier-<id>-<secret>`: the secret is shown once and stored as its SHA-256."""

    __tablename__ = "api_keys"
    id: Mapped[uuid.UUID] = new_key()
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    project_id: Mapped[uuid.UUID | None] = mapped_column(
        ForeignKey("projects.id", ondelete="CASCADE"), comment="the only one it reaches; null: any of its person's"
    )
    secret_sha256: Mapped[str]
    hint: Mapped[str] = mapped_column(comment="the last four characters, so that a person can tell keys apart")
    scopes: Mapped[list[Any]] = mapped_column(
        server_default=text("""'["admin"]'"""), comment="of app/web/policy.py; the person's role bounds them"
    )
    expires_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = now()
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
