"""Batches of API requests, and the answers of one that has not ended."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, Leased, now, of_project


class RequestBatch(Leased, Base):
    """The requests of a file, answered in the background. What the API calls its status follows from the times (`app/batches/service.py`)."""

    __tablename__ = "batches"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    status: Mapped[str] = mapped_column(server_default="open", comment="open or ended")
    endpoint: Mapped[str]
    input_file_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("files.id"), index=True)
    output_file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"))
    error_file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"))
    output_seconds: Mapped[int | None] = mapped_column(comment="how long its files are kept; null is without an end")
    model: Mapped[str | None] = mapped_column(comment="the one model that its requests name")
    user_metadata: Mapped[JSON | None]
    total: Mapped[int] = mapped_column(server_default="0", comment="requests in the file")
    completed: Mapped[int] = mapped_column(server_default="0")
    failed: Mapped[int] = mapped_column(server_default="0")
    usage: Mapped[JSON | None] = mapped_column(comment="tokens of all answers: input, cached, output, reasoning")
    errors: Mapped[list[Any] | None] = mapped_column(comment="why the file cannot be run: code, message, line, param")
    created_at: Mapped[datetime] = now()
    expires_at: Mapped[datetime]
    in_progress_at: Mapped[datetime | None]
    finalizing_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    failed_at: Mapped[datetime | None]
    expired_at: Mapped[datetime | None]
    cancelling_at: Mapped[datetime | None]
    cancelled_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at"), Index(None, "status", "created_at"))


class BatchAnswer(Base):
    """The answer to one request. Removed when the batch ends: they are then in its files."""

    __tablename__ = "batch_answers"
    batch_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    custom_id: Mapped[str]
    request_id: Mapped[str]
    status_code: Mapped[int] = mapped_column(comment="of HTTP; 0 where the batch ended before the request was sent")
    body: Mapped[JSON]
