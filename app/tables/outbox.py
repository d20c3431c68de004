"""The outbox: messages that a committed transaction wants sent."""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import Identity, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, now


class Outbox(Base):
    """A message to be sent once its transaction is committed. The relay sends it at least once."""

    __tablename__ = "outbox"
    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    task: Mapped[str] = mapped_column(comment="name of the Celery task, from app/queue.py")
    key: Mapped[uuid.UUID] = mapped_column(comment="the one argument: id of the job, dataset or model")
    context: Mapped[JSON | None] = mapped_column(comment="request_id and traceparent of who sent it")
    created_at: Mapped[datetime] = now()
    sent_at: Mapped[datetime | None]
    __table_args__ = (
        Index("ix_outbox_unsent", "id", postgresql_where=text("sent_at IS NULL")),
        Index(None, "key", "created_at"),
    )
