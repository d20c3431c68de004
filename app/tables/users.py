"""Accounts: users, their browser sessions, sign-in links and API keys."""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import Base, new_key, now


class User(Base):
    __tablename__ = "users"
    id: Mapped[uuid.UUID] = new_key()
    name: Mapped[str] = mapped_column(unique=True)
    password_hash: Mapped[str | None]
    role: Mapped[str] = mapped_column(server_default="admin")
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
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = now()
    expires_at: Mapped[datetime]


class ApiKey(Base):
    """`sk-luthier-<id>-<secret>`: the secret is shown once and stored as its SHA-256."""

    __tablename__ = "api_keys"
    id: Mapped[uuid.UUID] = new_key()
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    secret_sha256: Mapped[str]
    hint: Mapped[str] = mapped_column(comment="the last four characters, so that a person can tell keys apart")
    created_at: Mapped[datetime] = now()
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
