"""Evaluations: models scored on a dataset or run over a file."""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, Leased, now, of_project


class Evaluation(Leased, Base):
    """A model scored on a dataset, or run over a file, without training. Its states and leases are in `app/evaluation/service.py`."""

    __tablename__ = "evaluations"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    kind: Mapped[str] = mapped_column(comment="scores, advice or blend; predictions or vectors")
    status: Mapped[str] = mapped_column(server_default="queued", comment="queued, running, succeeded, failed or cancelled")
    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("models.id"), index=True)
    dataset_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"), index=True)
    spec: Mapped[JSON] = mapped_column(comment="app.evaluation.service.EvaluationSpec, frozen")
    result: Mapped[JSON | None]
    error: Mapped[JSON | None] = mapped_column(comment="code, message, hint")
    output_bytes: Mapped[int] = mapped_column(server_default="0", comment="size of the file that predictions left")
    progress: Mapped[float | None] = mapped_column(comment="share of the work done, 0 to 1")
    stage: Mapped[str | None] = mapped_column(comment="what is being done, in words")
    created_at: Mapped[datetime] = now()
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at"), Index(None, "status", "lease_until"))
