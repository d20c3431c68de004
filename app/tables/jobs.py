"""Fine-tuning jobs and comparisons of them, their events and checkpoints."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Computed, ForeignKey, Identity, Index, UniqueConstraint, false, text
from sqlalchemy.orm import Mapped, mapped_column

from app.tables._base import JSON, Base, Leased, new_key, now, of_project


class Job(Leased, Base):
    """One fine-tuning job. Its states and transitions are in `app/jobs/lifecycle.py`."""

    __tablename__ = "jobs"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    name: Mapped[str]
    tags: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"))
    status: Mapped[str] = mapped_column(server_default="queued")
    spec: Mapped[JSON] = mapped_column(comment="app.spec.JobSpec, frozen")
    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("models.id"), index=True, comment="the model that is tuned")
    dataset_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("datasets.id"), index=True)
    validation_dataset_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id"))
    comparison_id: Mapped[uuid.UUID | None] = mapped_column(index=True)
    order: Mapped[JSON] = mapped_column(server_default=text("'{}'"), comment="the request as it came: suffix, method, integrations")
    user_metadata: Mapped[JSON | None]
    idempotency_key: Mapped[str | None]
    priority: Mapped[str] = mapped_column(server_default="normal", comment="low, normal or high")
    resumed_at: Mapped[datetime | None] = mapped_column(comment="when a person queued it again, last")
    # What it needs of a machine: `app.machines.placement.Needs`.
    num_gpus: Mapped[int | None] = mapped_column(comment="GPUs that train it; null: as many as usual")
    num_machines: Mapped[int | None] = mapped_column(comment="machines that train it together; null: one")
    gpu_type: Mapped[str | None] = mapped_column(comment="part of the name of the GPU")
    labels: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"), comment="that its worker must have")
    gpu_bytes: Mapped[int | None] = mapped_column(server_default="0", comment="memory of each GPU; null: it does not train on one")
    cpu_bytes: Mapped[int | None] = mapped_column(server_default="0", comment="memory of each process without a GPU; null: it needs one")
    reserved_by: Mapped[str | None] = mapped_column(comment="the machine that keeps free GPUs for it")
    reserved_until: Mapped[datetime | None]
    # What a claim reads of every waiting job, from the two documents that are long.
    rows_ready: Mapped[bool | None] = mapped_column(
        Computed(
            "((((spec -> 'dataset'::text) ->> 'path'::text) <> ''::text) AND "
            "(COALESCE(((spec -> 'validation'::text) ->> 'path'::text), 'none'::text) <> ''::text))",
            persisted=True,
        )
    )
    device: Mapped[str | None] = mapped_column(
        Computed("COALESCE(((spec -> 'run'::text) ->> 'device'::text), 'auto'::text)", persisted=True)
    )
    estimated_seconds: Mapped[float | None] = mapped_column(Computed("((estimate ->> 'seconds'::text))::double precision", persisted=True))
    # The lease: who holds the job, and until when.
    attempt: Mapped[int] = mapped_column(server_default="0")
    worker: Mapped[str | None]
    cancel_requested: Mapped[bool] = mapped_column(server_default=false())
    pause_requested: Mapped[bool] = mapped_column(server_default=false())
    save_requested: Mapped[bool] = mapped_column(server_default=false())
    # Progress and results.
    step: Mapped[int] = mapped_column(server_default="0")
    total_steps: Mapped[int | None]
    seconds_left: Mapped[float | None]
    trained_tokens: Mapped[int | None]
    error: Mapped[JSON | None] = mapped_column(comment="code, message, hint, param")
    estimate: Mapped[JSON | None]
    measured: Mapped[JSON | None]
    forgetting: Mapped[JSON | None]
    evaluation: Mapped[JSON | None] = mapped_column(comment="scores of base and tuned on the same validation rows")
    # As a trial of a search (app/searches/).
    trial: Mapped[JSON | None] = mapped_column(comment="its number, parameters, rungs, and why it was pruned")
    pause_at: Mapped[int | None] = mapped_column(comment="the step at which it pauses by itself")
    result_file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"), comment="the CSV of step metrics")
    created_at: Mapped[datetime] = now()
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (
        UniqueConstraint("project_id", "owner_id", "idempotency_key"),
        Index(None, "project_id", "created_at"),
        Index(None, "status", "lease_until"),
        Index("ix_jobs_live", "project_id", postgresql_where=text("deleted_at IS NULL")),
        Index("ix_jobs_reserved", "reserved_by", postgresql_where=text("reserved_by IS NOT NULL")),
        CheckConstraint("priority IN ('low', 'normal', 'high')", name="priority"),
    )


class Comparison(Base):
    """Several jobs on the same data, split, seed and token budget, created together; its jobs carry its id.

    `refused` lists the requested strategies that could not run, each with the reason.
    """

    __tablename__ = "comparisons"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    project_id: Mapped[uuid.UUID] = of_project()
    name: Mapped[str]
    kind: Mapped[str] = mapped_column(server_default="strategies", comment="strategies, learning_curve, models, matrix or search")
    order: Mapped[JSON] = mapped_column(comment="the request as it came")
    refused: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"), comment="[{strategy, title, reason}]")
    search: Mapped[JSON | None] = mapped_column(comment="of a search: its status, and what it found")
    idempotency_key: Mapped[str | None]
    created_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (UniqueConstraint("project_id", "owner_id", "idempotency_key"), Index(None, "project_id", "created_at"))


class JobPlace(Base):
    """A worker's place in one attempt at a job on several machines: offered, then taken (`app/jobs/gangs.py`)."""

    __tablename__ = "job_places"
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True, comment="of the claim that it is for")
    worker: Mapped[str] = mapped_column(primary_key=True)
    machine: Mapped[str]
    place: Mapped[int | None] = mapped_column(comment="0 leads; null while it is only offered")
    address: Mapped[str | None] = mapped_column(comment="where the processes meet: host:port of place 0")
    checkpoint: Mapped[str | None] = mapped_column(comment="of place 0: that all go on from; empty for none, null while not chosen")
    ready: Mapped[bool] = mapped_column(server_default=false(), comment="its trainer is about to start")
    counts: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"), comment="how far its processes are")
    ended: Mapped[JSON | None] = mapped_column(comment="how it ended; null while it is alive")
    offered_at: Mapped[datetime] = now()
    seen_at: Mapped[datetime] = now()


class Event(Base):
    """One event of a job, in the order of recording. Its id is the SSE id, so a watcher can resume anywhere."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    key: Mapped[uuid.UUID] = mapped_column(default=uuid.uuid4, unique=True, comment="the part of ftevent-… that is ours")
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    type: Mapped[str] = mapped_column(comment="one of app.events")
    data: Mapped[JSON]
    created_at: Mapped[datetime] = now()
    __table_args__ = (Index(None, "job_id", "id"), Index(None, "job_id", "type", "id"))


class Checkpoint(Base):
    """A state that verified when it was saved: it can be resumed from and tried in the playground."""

    __tablename__ = "checkpoints"
    id: Mapped[uuid.UUID] = new_key()
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    step: Mapped[int]
    path: Mapped[str]
    manifest_sha256: Mapped[str]
    bytes: Mapped[int]
    metrics: Mapped[JSON]
    best: Mapped[bool] = mapped_column(server_default=false())
    created_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None] = mapped_column(comment="its folder was swept away")
    __table_args__ = (
        UniqueConstraint("job_id", "step"),
        Index("ix_checkpoints_live", "created_at", postgresql_where=text("deleted_at IS NULL")),
    )


class CheckpointPermission(Base):
    """A project that may use a checkpoint of this job, as OpenAI's checkpoint permissions record it."""

    __tablename__ = "checkpoint_permissions"
    id: Mapped[uuid.UUID] = new_key()
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    checkpoint: Mapped[str] = mapped_column(comment="the checkpoint's model name, ft:…")
    project_id: Mapped[str]
    created_at: Mapped[datetime] = now()
    __table_args__ = (UniqueConstraint("checkpoint", "project_id"),)
