"""Base models, fine-tuned models and their aliases."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, false, text, true
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app.tables._base import JSON, Base, Leased, new_key, now, of_project


class Model(Leased, Base):
    """A base model (its own weights) or a fine-tuned one (`job_id`, and an adapter or weights of its own).

    `base_id` is the model it was fine-tuned from. `path` is its folder; for an adapter that folder holds the adapter alone.
    `revision` is the SHA-256 over its files; `adapter_sha256` that of the adapter's weights, null for whole models.
    """

    __tablename__ = "models"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("users.id"), comment="null: shared by everyone")
    project_id: Mapped[uuid.UUID | None] = of_project()
    name: Mapped[str] = mapped_column(comment="what `model=` takes; ft:… for tuned models; unique in its project among models not deleted")
    title: Mapped[str]
    tags: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"))
    kept: Mapped[bool] = mapped_column(server_default=true(), comment="false: a comparison's result nobody kept yet")
    kind: Mapped[str] = mapped_column(comment="generic, instruction, dialogue, classifier, encoder or reward")
    base_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("models.id"), index=True)
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", use_alter=True))
    step: Mapped[int | None] = mapped_column(comment="of the checkpoint it was kept from; null for a job's result")
    strategy: Mapped[str | None] = mapped_column(comment="name of the strategy that made it; null for a base")
    adapter: Mapped[bool] = mapped_column(server_default=false(), comment="true when it needs its base's weights")
    status: Mapped[str] = mapped_column(server_default="ready", comment="fetching, ready or error")
    error: Mapped[JSON | None]
    progress: Mapped[float | None]
    path: Mapped[str | None]
    revision: Mapped[str | None]
    adapter_sha256: Mapped[str | None]
    source: Mapped[JSON] = mapped_column(server_default=text("'{}'"), comment="where it came from: hub, folder or wheel, and its pin")
    license: Mapped[str | None]
    shape: Mapped[JSON | None] = mapped_column(comment="app.shapes.Shape")
    certificate: Mapped[JSON | None] = mapped_column(comment="what was tried on it when it was added: worker/conversion/certify.py")
    labels: Mapped[list[Any] | None] = mapped_column(comment="class names of a classifier, in order")
    bytes: Mapped[int | None]
    engine: Mapped[JSON | None] = mapped_column(comment="an external server that answers for it: {url, model}; null is our own engine")
    created_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None]
    base: Mapped[Model | None] = relationship(remote_side=[id], viewonly=True)
    __table_args__ = (
        Index("uq_models_live_name", "project_id", "name", unique=True, postgresql_where=text("deleted_at IS NULL")),
        Index("uq_models_shared_name", "name", unique=True, postgresql_where=text("deleted_at IS NULL AND project_id IS NULL")),
        Index(None, "project_id", "created_at"),
        Index("uq_models_result", "job_id", unique=True, postgresql_where=text("step IS NULL")),
        Index("ix_models_made", "created_at", postgresql_where=text("base_id IS NOT NULL AND deleted_at IS NULL")),
        Index("ix_models_bases", "created_at", postgresql_where=text("base_id IS NULL AND deleted_at IS NULL")),
        Index("ix_models_imported", "status", postgresql_where=text("(source ->> 'from') IN ('folder', 'hub')")),
        Index(None, "status", "lease_until"),
    )

    @property
    def answered_elsewhere(self) -> bool:
        """Whether another server answers for it, and not an engine of this studio."""
        return self.engine is not None and self.engine["url"] != "llama.cpp"


class ModelAlias(Base):
    """A name that a person chose for a model; `app/models/aliases.py` validates it."""

    __tablename__ = "model_aliases"
    project_id: Mapped[uuid.UUID] = of_project(primary_key=True)
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), comment="who chose the name")
    name: Mapped[str] = mapped_column(primary_key=True, index=True, comment="what `model=` takes; never the name of a model")
    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("models.id"), index=True, comment="the model that answers now")
    gate: Mapped[JSON | None] = mapped_column(comment="what a model must pass before it is moved there: app.evaluation.gates.PromotionGate")
    created_at: Mapped[datetime] = now()
    moved_at: Mapped[datetime] = now()


class AliasMove(Base):
    """One move of an alias to a model. Names are kept as they were, so that the history outlives the models."""

    __tablename__ = "alias_moves"
    id: Mapped[uuid.UUID] = new_key()
    project_id: Mapped[uuid.UUID] = of_project()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), comment="who moved it")
    user_name: Mapped[str] = mapped_column(comment="the name of that person then")
    alias: Mapped[str]
    from_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("models.id", ondelete="SET NULL"), index=True)
    from_name: Mapped[str | None] = mapped_column(comment="null for the first model of an alias")
    to_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("models.id", ondelete="SET NULL"), index=True)
    to_name: Mapped[str]
    how: Mapped[str] = mapped_column(comment="set without a gate, gate passed, force, or back to the model before")
    reason: Mapped[str | None]
    result: Mapped[JSON | None] = mapped_column(comment="what the gate measured: app.evaluation.gates.GateResult")
    created_at: Mapped[datetime] = now()
    __table_args__ = (Index(None, "project_id", "alias", "created_at"),)


class Export(Leased, Base):
    """A model written in a format for other programs. Its states and claims are in `app/models/exports.py`; its files lie in `exports/<id>/`."""

    __tablename__ = "exports"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("models.id"), index=True)
    status: Mapped[str] = mapped_column(server_default="queued", comment="queued, running, succeeded, failed or cancelled")
    format: Mapped[str] = mapped_column(comment="name of one of app/export_formats")
    spec: Mapped[JSON] = mapped_column(comment="app.models.exports.ExportSpec, frozen")
    files: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"), comment="name, type, bytes, sha256 and notes of each")
    parity: Mapped[JSON | None] = mapped_column(comment="the files compared with the model, one line per type")
    error: Mapped[JSON | None] = mapped_column(comment="code, message, hint")
    hub: Mapped[JSON | None] = mapped_column(comment="the last push to the hub: repo, private, status, url, commit and error")
    progress: Mapped[float | None] = mapped_column(comment="share of the work done, 0 to 1")
    stage: Mapped[str | None] = mapped_column(comment="what is being done, in words")
    created_at: Mapped[datetime] = now()
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at"),)
