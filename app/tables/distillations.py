"""Runs of distillation by a dataset: a teacher's answers to the prompts of one dataset, of which the best become another."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, Leased, now, of_project


class DistillationRun(Leased, Base):
    """One teacher on the prompts of one dataset. States in `app/distillations/service.py`."""

    __tablename__ = "distillation_runs"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("models.id"), index=True, comment="the teacher")
    dataset_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("datasets.id"), index=True, comment="whose prompts are answered")
    made_id: Mapped[uuid.UUID | None] = mapped_column(
        ForeignKey("datasets.id"), index=True, comment="the dataset of the answers that were kept"
    )
    spec: Mapped[JSON] = mapped_column(comment="app.distillations.service.DistillationSpec, frozen")
    status: Mapped[str] = mapped_column(server_default="queued", comment="queued, running, succeeded, failed or cancelled")
    progress: Mapped[float | None]
    result: Mapped[JSON | None] = mapped_column(comment="prompts, kept, scores, tokens and seconds")
    error: Mapped[JSON | None]
    created_at: Mapped[datetime] = now()
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at"),)


class DistilledRow(Base):
    """The teacher's answers to one prompt."""

    __tablename__ = "distilled_rows"
    run_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("distillation_runs.id", ondelete="CASCADE"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True, autoincrement=False, comment="of the prompt in its dataset")
    messages: Mapped[list[Any]] = mapped_column(comment="what the teacher was asked")
    answers: Mapped[list[Any]] = mapped_column(comment="each with its text, its score and why it has none")
    best: Mapped[int | None] = mapped_column(comment="the place of the answer that is kept")
