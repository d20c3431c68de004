"""The audit log: who did what to which object, when and from where. A trigger keeps its rows from being changed or deleted."""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import Identity, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, now


class AuditLog(Base):
    """One deed. It refers to people and objects by value, so that it says the same when they are gone."""

    __tablename__ = "audit_logs"
    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    type: Mapped[str] = mapped_column(comment="as api_key.created; OpenAI's names where it has one")
    actor: Mapped[str] = mapped_column(comment="session, api_key, console, or nobody: who was not let in")
    user_id: Mapped[uuid.UUID | None]
    user_name: Mapped[str | None]
    key_id: Mapped[uuid.UUID | None]
    object_id: Mapped[str | None] = mapped_column(comment="public id, or what the request named")
    address: Mapped[str | None]
    request_id: Mapped[str | None]
    details: Mapped[JSON | None] = mapped_column(comment="method and route of the request")
    created_at: Mapped[datetime] = now()
    __table_args__ = (
        Index(None, "created_at"),
        Index(None, "type", "id"),
        Index(None, "user_id", "id"),
        Index(None, "object_id", "id"),
    )
