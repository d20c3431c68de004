"""Every table. Postgres is the truth; whatever is in Redis can be wiped at any moment.

Times are `timestamptz` written by the database's clock. Paths are relative to the data folder. Sizes are bytes.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Identity, Index, MetaData, Text, UniqueConstraint, false, func, text, true
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import DateTime

JSON = dict[str, Any]


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        JSON: JSONB(none_as_null=True),  # None is NULL and not JSON null
        list[Any]: JSONB(none_as_null=True),
        str: Text,
        int: BigInteger,
        datetime: DateTime(timezone=True),
    }


def new_key() -> Mapped[uuid.UUID]:
    return mapped_column(primary_key=True, default=uuid.uuid4)


def now() -> Mapped[datetime]:
    return mapped_column(server_default=func.clock_timestamp())


class Leased:
    """Rows that one worker at a time holds, by the protocol of `app/leases.py`."""

    id: Mapped[uuid.UUID] = new_key()
    status: Mapped[str]
    fence: Mapped[int] = mapped_column(server_default="0", comment="rises with every claim; stale writers are refused by it")
    deaths: Mapped[int] = mapped_column(server_default="0", comment="workers that died over it since it last got on")
    lease_until: Mapped[datetime | None]


# People -------------------------------------------------------------------------------------------------------------


class User(Base):
    __tablename__ = "users"
    id: Mapped[uuid.UUID] = new_key()
    name: Mapped[str] = mapped_column(unique=True)
    password_hash: Mapped[str | None]
    role: Mapped[str] = mapped_column(server_default="admin")
    created_at: Mapped[datetime] = now()


class SignInLink(Base):
    """A link that signs in once. Only the SHA-256 of its token is stored."""

    __tablename__ = "sign_in_links"
    token_sha256: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = now()
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class BrowserSession(Base):
    __tablename__ = "browser_sessions"
    token_sha256: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = now()
    expires_at: Mapped[datetime]


class ApiKey(Base):
    """`sk-luthier-<id>-<secret>`: the secret is shown once and stored as its SHA-256."""

    __tablename__ = "api_keys"
    id: Mapped[uuid.UUID] = new_key()
    user_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    secret_sha256: Mapped[str]
    hint: Mapped[str] = mapped_column(comment="the last four characters, so that a person can tell keys apart")
    created_at: Mapped[datetime] = now()
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


# Data ---------------------------------------------------------------------------------------------------------------


class File(Base):
    """Uploaded bytes. Two files with equal bytes share one blob, found by `sha256`."""

    __tablename__ = "files"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    sha256: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int]
    filename: Mapped[str]
    purpose: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="uploaded", comment="uploaded, processed or error")
    status_details: Mapped[str | None]
    created_at: Mapped[datetime] = now()
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "owner_id", "created_at"),)


class Dataset(Leased, Base):
    """A file parsed into rows of one format. Never changed in place: a fix makes a new version with `parent_id`.

    `status` goes reading → ready | error. `rows_path` is a Parquet file with the columns `line` (int64, the 1-based line or
    record of the source) and `row` (the normalized row as JSON; shapes in `app/formats/__init__.py`).
    """

    __tablename__ = "datasets"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"), index=True)
    parent_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    name: Mapped[str]
    tags: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"))
    version: Mapped[int] = mapped_column(server_default="1")
    origin: Mapped[JSON | None] = mapped_column(comment="how this version came from its parents: operation and arguments")
    format: Mapped[str | None]
    format_chosen: Mapped[bool] = mapped_column(server_default=false(), comment="true when a person overruled the guess")
    task: Mapped[str | None]
    mapping: Mapped[JSON] = mapped_column(server_default=text("'{}'"), comment="field of the format → column of the file")
    edits: Mapped[list[Any] | None] = mapped_column(comment="what this version changes in its file's rows, see app/datasets/edits.py")
    status: Mapped[str] = mapped_column(server_default="reading")
    progress: Mapped[float | None] = mapped_column(comment="share of the bytes read so far, 0 to 1")
    error: Mapped[JSON | None] = mapped_column(comment="message, hint, line, column")
    rows: Mapped[int | None]
    good_rows: Mapped[int | None]
    rows_path: Mapped[str | None]
    rows_sha256: Mapped[str | None]
    report: Mapped[JSON | None] = mapped_column(comment="counts per rule, length histograms, label counts, preview")
    created_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "owner_id", "created_at"),)


class Finding(Base):
    """One issue of the report: its path in the row, the rule, the offending value and a fix."""

    __tablename__ = "findings"
    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    dataset_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"))
    line: Mapped[int | None]
    column: Mapped[str | None]
    rule: Mapped[str]
    severity: Mapped[str] = mapped_column(comment="error (the row is left out), warning or note")
    value: Mapped[str | None]
    message: Mapped[str]
    fix: Mapped[JSON | None] = mapped_column(comment="{label, operation, arguments}")
    __table_args__ = (Index(None, "dataset_id", "severity", "rule", "line"), Index(None, "dataset_id", "line"))


class Inspection(Leased, Base):
    """A cached question about a dataset that takes a child of the data worker: token counts of a model, rows as its trainer sees
    them, the two sides of a split."""

    __tablename__ = "inspections"
    dataset_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"))
    model_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(comment="lengths, rows or split")
    arguments: Mapped[JSON] = mapped_column(server_default=text("'{}'"))
    question: Mapped[str] = mapped_column(unique=True, comment="SHA-256 over dataset, model, kind and arguments")
    status: Mapped[str] = mapped_column(server_default="waiting", comment="waiting, running, ready or error")
    result: Mapped[JSON | None]
    error: Mapped[JSON | None]
    asked_at: Mapped[datetime] = now()
    __table_args__ = (Index(None, "dataset_id", "kind"),)


class Upload(Base):
    """A resumable upload (tus 1.0) that is not complete yet. Its bytes are in tmp/; `sha256` is known at the end."""

    __tablename__ = "uploads"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    wishes: Mapped[JSON] = mapped_column(server_default=text("'{}'"), comment="name and format for the dataset")
    length: Mapped[int]
    path: Mapped[str]
    file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"), comment="set once all bytes are there")
    dataset_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id"))
    created_at: Mapped[datetime] = now()
    expires_at: Mapped[datetime]


# Models -------------------------------------------------------------------------------------------------------------


class Model(Leased, Base):
    """A base model (its own weights) or a fine-tuned one (`job_id`, and an adapter or weights of its own).

    `base_id` is the model it was fine-tuned from. `path` is its folder; for an adapter that folder holds the adapter alone.
    `revision` is the SHA-256 over its files; `adapter_sha256` that of the adapter's weights, null for whole models.
    """

    __tablename__ = "models"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("users.id"), comment="null: shared by everyone")
    name: Mapped[str] = mapped_column(comment="what `model=` takes; ft:… for tuned models; unique among models not deleted")
    title: Mapped[str]
    tags: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"))
    kept: Mapped[bool] = mapped_column(server_default=true(), comment="false: a comparison's result nobody kept yet")
    kind: Mapped[str] = mapped_column(comment="generic, instruction, dialogue, classifier or encoder")
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
    labels: Mapped[list[Any] | None] = mapped_column(comment="class names of a classifier, in order")
    bytes: Mapped[int | None]
    engine: Mapped[JSON | None] = mapped_column(comment="an external server that answers for it: {url, model}; null is our own engine")
    created_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None]
    base: Mapped[Model | None] = relationship(remote_side=[id], viewonly=True)
    __table_args__ = (
        Index("uq_models_live_name", "name", unique=True, postgresql_where=text("deleted_at IS NULL")),
        Index("uq_models_result", "job_id", unique=True, postgresql_where=text("step IS NULL")),
    )


class ModelAlias(Base):
    """A name that a person chose for a model; `app/models/aliases.py` validates it."""

    __tablename__ = "model_aliases"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True, index=True, comment="what `model=` takes; never the name of a model")
    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("models.id"), index=True, comment="the model that answers now")
    created_at: Mapped[datetime] = now()
    moved_at: Mapped[datetime] = now()


# Jobs ---------------------------------------------------------------------------------------------------------------


class Job(Leased, Base):
    """One fine-tuning job. Its states and transitions are in `app/jobs/lifecycle.py`."""

    __tablename__ = "jobs"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
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
    result_file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"), comment="the CSV of step metrics")
    created_at: Mapped[datetime] = now()
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (
        UniqueConstraint("owner_id", "idempotency_key"),
        Index(None, "owner_id", "created_at"),
        Index(None, "status", "lease_until"),
    )


class Comparison(Base):
    """Several jobs on the same data, split, seed and token budget, created together; its jobs carry its id.

    `refused` lists the requested strategies that could not run, each with the reason.
    """

    __tablename__ = "comparisons"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    name: Mapped[str]
    kind: Mapped[str] = mapped_column(server_default="strategies", comment="strategies, or learning_curve")
    order: Mapped[JSON] = mapped_column(comment="the request as it came")
    refused: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"), comment="[{strategy, title, reason}]")
    idempotency_key: Mapped[str | None]
    created_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (UniqueConstraint("owner_id", "idempotency_key"), Index(None, "owner_id", "created_at"))


class Evaluation(Leased, Base):
    """A model scored on a dataset, or run over a file, without training. Its states and leases are in `app/evaluation/service.py`."""

    __tablename__ = "evaluations"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    kind: Mapped[str] = mapped_column(comment="scores, advice or blend; predictions or vectors")
    status: Mapped[str] = mapped_column(server_default="queued", comment="queued, running, succeeded, failed or cancelled")
    model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("models.id"), index=True)
    dataset_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"), index=True)
    spec: Mapped[JSON] = mapped_column(comment="app.evaluation.service.EvaluationSpec, frozen")
    result: Mapped[JSON | None]
    error: Mapped[JSON | None] = mapped_column(comment="code, message, hint")
    progress: Mapped[float | None] = mapped_column(comment="share of the work done, 0 to 1")
    stage: Mapped[str | None] = mapped_column(comment="what is being done, in words")
    created_at: Mapped[datetime] = now()
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "owner_id", "created_at"),)


class Export(Leased, Base):
    """A model written in a format for other programs. Its states and claims are in `app/models/exports.py`; its files lie in `exports/<id>/`."""

    __tablename__ = "exports"
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
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
    __table_args__ = (Index(None, "owner_id", "created_at"),)


class Outbox(Base):
    """A message to be sent once its transaction is committed. The relay sends it at least once."""

    __tablename__ = "outbox"
    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    task: Mapped[str] = mapped_column(comment="name of the Celery task, from app/queue.py")
    key: Mapped[uuid.UUID] = mapped_column(comment="the one argument: id of the job, dataset or model")
    created_at: Mapped[datetime] = now()
    sent_at: Mapped[datetime | None]
    __table_args__ = (
        Index("ix_outbox_unsent", "id", postgresql_where=text("sent_at IS NULL")),
        Index(None, "key", "created_at"),
    )


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
    __table_args__ = (UniqueConstraint("job_id", "step"),)


class CheckpointPermission(Base):
    """A project that may use a checkpoint of this job, as OpenAI's checkpoint permissions record it."""

    __tablename__ = "checkpoint_permissions"
    id: Mapped[uuid.UUID] = new_key()
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    checkpoint: Mapped[str] = mapped_column(comment="the checkpoint's model name, ft:…")
    project_id: Mapped[str]
    created_at: Mapped[datetime] = now()
    __table_args__ = (UniqueConstraint("checkpoint", "project_id"),)


# The playground -----------------------------------------------------------------------------------------------------


class Exchange(Base):
    """One prompt sent to one or more models at once. `parent_id` is the turn before it in a conversation."""

    __tablename__ = "exchanges"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    parent_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("exchanges.id", ondelete="SET NULL"), index=True)
    source: Mapped[str] = mapped_column(server_default="playground", comment="playground, api or vote")
    title: Mapped[str | None] = mapped_column(comment="given when a person saves it as a comparison")
    messages: Mapped[list[Any] | None]
    prompt: Mapped[str | None]
    sampling: Mapped[JSON]
    created_at: Mapped[datetime] = now()
    __table_args__ = (Index(None, "owner_id", "created_at"),)


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
    __table_args__ = (Index(None, "owner_id", "created_at"),)


# The prompt lab -----------------------------------------------------------------------------------------------------


class Prompt(Base):
    """A named prompt. Its text is in its versions, which are never changed."""

    __tablename__ = "prompts"
    id: Mapped[uuid.UUID] = new_key()
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("users.id"))
    name: Mapped[str]
    created_at: Mapped[datetime] = now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "owner_id", "created_at"),)


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
    __table_args__ = (Index(None, "owner_id", "created_at"),)


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
