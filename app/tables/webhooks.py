"""Webhook endpoints and what was sent to them."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, Leased, new_key, now, of_project


class WebhookEndpoint(Base):
    """An address of a project that hears of its events. Its signing secret is derived from the studio's and `generation`, and not stored."""

    __tablename__ = "webhook_endpoints"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[Any]]
    generation: Mapped[int] = mapped_column(server_default="1", comment="rises with every new secret")
    old_until: Mapped[datetime | None] = mapped_column(comment="until then the secret of the generation before signs too")
    created_at: Mapped[datetime] = now()
    updated_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at"),)


class WebhookDelivery(Leased, Base):
    """One event for one endpoint, sent until it is taken. States in `app/webhooks/service.py`."""

    __tablename__ = "webhook_deliveries"
    endpoint_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    status: Mapped[str] = mapped_column(server_default="queued", comment="queued, running, succeeded or failed")
    event_key: Mapped[uuid.UUID] = mapped_column(comment="of what happened: its second report makes no second delivery")
    event: Mapped[JSON] = mapped_column(comment="the body that is sent")
    tries: Mapped[int] = mapped_column(server_default="0")
    status_code: Mapped[int | None] = mapped_column(comment="of the last answer")
    error: Mapped[str | None] = mapped_column(comment="why the last try failed")
    next_at: Mapped[datetime] = now()
    created_at: Mapped[datetime] = now()
    finished_at: Mapped[datetime | None]
    __table_args__ = (
        UniqueConstraint("endpoint_id", "event_key"),
        Index(None, "endpoint_id", "created_at"),
        Index(None, "status", "next_at"),
    )
