"""Evals of OpenAI's API: what is asked of a model, their runs, and the graded items of each run."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, false, text
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, Leased, new_key, now, of_project


class Eval(Base):
    """The shape of the items, and the criteria that an answer is graded by."""

    __tablename__ = "evals"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    name: Mapped[str]
    data_source_config: Mapped[JSON] = mapped_column(comment="as it was sent")
    criteria: Mapped[list[Any]] = mapped_column(comment="graders as they were sent, each with its pass_threshold where it has one")
    user_metadata: Mapped[JSON | None]
    created_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at"),)


class EvalRun(Leased, Base):
    """One run of an eval: a model over items. States in `app/evals/service.py`."""

    __tablename__ = "eval_runs"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    eval_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("evals.id", ondelete="CASCADE"))
    name: Mapped[str]
    data_source: Mapped[JSON] = mapped_column(comment="as it was sent")
    stored_ids: Mapped[list[Any] | None] = mapped_column(comment="the stored answers that are its items, as they were when it was made")
    status: Mapped[str] = mapped_column(server_default="queued", comment="queued, in_progress, completed, failed or canceled")
    cancel_requested: Mapped[bool] = mapped_column(server_default=false())
    total: Mapped[int] = mapped_column(server_default="0")
    passed: Mapped[int] = mapped_column(server_default="0")
    failed: Mapped[int] = mapped_column(server_default="0")
    errored: Mapped[int] = mapped_column(server_default="0")
    criteria_counts: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"), comment="testing_criteria, passed and failed of each")
    usage: Mapped[JSON] = mapped_column(server_default=text("'{}'"), comment="model → invocations and tokens")
    error: Mapped[JSON | None]
    user_metadata: Mapped[JSON | None]
    created_at: Mapped[datetime] = now()
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "eval_id", "created_at"), Index(None, "status", "created_at"))


class EvalItem(Base):
    """One item of a run, with the answer and its grades."""

    __tablename__ = "eval_items"
    id: Mapped[uuid.UUID] = new_key()
    run_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("eval_runs.id", ondelete="CASCADE"))
    place: Mapped[int] = mapped_column(comment="of the item in its source, from 0")
    status: Mapped[str] = mapped_column(comment="pass, fail or error")
    item: Mapped[JSON]
    sample: Mapped[JSON] = mapped_column(comment="the request and the answer")
    results: Mapped[list[Any]] = mapped_column(comment="name, passed and score of each criterion")
    created_at: Mapped[datetime] = now()
    __table_args__ = (Index(None, "run_id", "place", unique=True),)
