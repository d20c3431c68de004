"""Prompts with versions, and runs of a version over validation rows."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, Leased, new_key, now, of_project


class Prompt(Base):
    """A named prompt. Its text is in its versions, which are never changed."""

    __tablename__ = "prompts"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    name: Mapped[str]
    created_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at"),)


class PromptVersion(Base):
    __tablename__ = "prompt_versions"
    id: Mapped[uuid.UUID] = new_key()
    prompt_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("prompts.id", ondelete="CASCADE"))
    number: Mapped[int]
    body: Mapped[JSON] = mapped_column(comment="app.prompts.service.PromptBody")
    created_at: Mapped[datetime] = now()
    __table_args__ = (UniqueConstraint("prompt_id", "number"),)


class PromptRun(Leased, Base):
    """One version of a prompt on one model, over the validation rows of one dataset. States in `app/prompts/runs.py`."""

    __tablename__ = "prompt_runs"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    version_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("prompt_versions.id"), index=True)
    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("models.id"), index=True)
    dataset_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("datasets.id"), index=True)
    spec: Mapped[JSON] = mapped_column(comment="app.prompts.runs.RunSpec, frozen")
    status: Mapped[str] = mapped_column(server_default="queued", comment="queued, running, succeeded, failed or cancelled")
    progress: Mapped[float | None]
    result: Mapped[JSON | None] = mapped_column(comment="score, interval, rows, tokens and seconds")
    error: Mapped[JSON | None]
    created_at: Mapped[datetime] = now()
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at"),)


class PromptResult(Base):
    """The result of one row of a run."""

    __tablename__ = "prompt_results"
    run_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("prompt_runs.id", ondelete="CASCADE"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    input: Mapped[str]
    rendered_prompt: Mapped[str]
    expected: Mapped[str]
    said: Mapped[list[Any]] = mapped_column(comment="each sample's whole text")
    answer: Mapped[str] = mapped_column(comment="what the rule took from it; the majority of several samples")
    score: Mapped[float]
