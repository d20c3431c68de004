"""Graders that are saved under a name."""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, new_key, now, of_project


class SavedGrader(Base):
    """A grader that evaluations, jobs and prompts can name by its id. What uses one keeps a copy of it as it was."""

    __tablename__ = "graders"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    name: Mapped[str]
    body: Mapped[JSON] = mapped_column(comment="the grader as app.graders.to_json writes it")
    created_at: Mapped[datetime] = now()
    updated_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at"),)
