"""The playground: prompts sent to models, their answers, and blind votes between two of them."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, new_key, now, of_project


class Exchange(Base):
    """One prompt sent to one or more models at once, or one call of the API. `parent_id` is the turn before it in a conversation."""

    __tablename__ = "exchanges"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    parent_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("exchanges.id", ondelete="SET NULL"), index=True)
    source: Mapped[str] = mapped_column(server_default="playground", comment="playground, api, responses or vote")
    title: Mapped[str | None] = mapped_column(comment="given when a person saves it as a comparison")
    messages: Mapped[list[Any] | None]
    prompt: Mapped[str | None]
    sampling: Mapped[JSON]
    stored: Mapped[JSON | None] = mapped_column(comment="what the API answered, where it was asked to keep it (store)")
    user_metadata: Mapped[JSON | None]
    created_at: Mapped[datetime] = now()
    __table_args__ = (
        Index(None, "project_id", "created_at"),
        Index(
            "ix_exchanges_history",
            "project_id",
            text("(title IS NULL)"),
            text("created_at DESC"),
            "id",
            postgresql_where=text("source = 'playground'"),
        ),
        Index("ix_exchanges_stored", "project_id", "source", "created_at", postgresql_where=text("stored IS NOT NULL")),
    )


class Answer(Base):
    """What one model answered, and the proof of which weights gave it."""

    __tablename__ = "answers"
    id: Mapped[uuid.UUID] = new_key()
    exchange_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("exchanges.id", ondelete="CASCADE"), index=True)
    model_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("models.id"), index=True)
    checkpoint_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("checkpoints.id", ondelete="SET NULL"))
    model_name: Mapped[str]
    revision: Mapped[str | None]
    adapter_sha256: Mapped[str | None]
    seed: Mapped[int]
    rendered_prompt: Mapped[str | None]
    text: Mapped[str] = mapped_column(server_default="")
    reasoning: Mapped[str | None] = mapped_column(comment="what a model that thinks wrote before its answer")
    tool_calls: Mapped[list[Any] | None] = mapped_column(comment="as the API sends them")
    finish_reason: Mapped[str | None] = mapped_column(comment="stop, length, cancelled or error")
    error: Mapped[JSON | None]
    usage: Mapped[JSON | None]
    first_token_seconds: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    created_at: Mapped[datetime] = now()


class Vote(Base):
    """Two answers to one prompt with their sides shuffled, and which of them a person preferred.

    `choice` is 1 (the left one), 2 (the right one) or 0 (equally good), and null until somebody has voted.
    """

    __tablename__ = "votes"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    exchange_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("exchanges.id", ondelete="SET NULL"), index=True)
    dataset_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id"), comment="where the prompt came from")
    messages: Mapped[list[Any]]
    left_model: Mapped[str]
    right_model: Mapped[str]
    left_text: Mapped[str] = mapped_column(server_default="")
    right_text: Mapped[str] = mapped_column(server_default="")
    choice: Mapped[int | None]
    edited: Mapped[str | None] = mapped_column(comment="the answer a person would have liked better")
    created_at: Mapped[datetime] = now()
    voted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at"),)
