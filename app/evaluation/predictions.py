"""Batch predictions over a file, and embedding maps of datasets: evaluations with results of their own.

The generate worker runs predictions, one at a time, so that they do not wait for hours behind a job that trains.

A row of the table `evaluations` with the kind `predictions` returns a file with added columns: classes with their probabilities,
answers, or embeddings. `vectors` is a map of a dataset's rows with the nearest neighbors of each. Claims, leases, deaths and the
confined process are those of `app/evaluation/service.py`. Predictions are in a file of the data folder, moved there when
complete.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from app import limits, queue
from app.datasets import readers
from app.datasets import service as datasets
from app.datasets.findings_export import guarded
from app.db import on_commit
from app.errors import BadData, BadField, Conflict, NotFound, problem_json
from app.evaluation import service as evaluations
from app.evaluation.service import EvaluationSpec, Kind
from app.inference import tryout
from app.kit import ids
from app.kit.json_safe import storable
from app.languages import gettext
from app.models import service as models
from app.objectives import DEFAULT
from app.settings import get_settings
from app.spec import DatasetRef
from app.storage import atomic, files, places
from app.storage.objects import Beat
from app.tables import JSON, Evaluation, User

MAX_ROWS = 100_000
OUTPUT = "output.jsonl"
"""The process writes it into its own folder: each row of the file with its prediction."""
KINDS: tuple[Kind, ...] = ("predictions",)
VECTORS: tuple[Kind, ...] = ("vectors",)
MAX_POINTS = 500
Format = Literal["csv", "jsonl"]


class PredictionOrder(BaseModel):
    """A model, and the file it runs on."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=512, description="A classifier, a model that writes, or an embedding model.")
    file: str = Field(description="Id of an uploaded file: CSV, TSV, JSON, JSONL, Parquet or text, of at most 100,000 rows.")
    column: str | None = Field(None, max_length=200, description="Column with the text or the messages. Empty detects it.")
    system: str | None = Field(None, max_length=20_000, description="System prompt. Empty takes that of the model's training rows.")
    max_tokens: int = Field(128, ge=1, le=1024, description="Longest answer of a model that writes.")


def create(session: Session, user: User, order: PredictionOrder) -> Evaluation:
    """A queued run and its message. Raises NotFound, BadField for a model on an external server, Unsupported for an unsupported
    file type, Conflict while the model is not ready, LimitReached."""
    resolved = models.resolve(session, user, order.model)
    _check_is_here(resolved)
    file = files.get(session, user, ids.parse(ids.FILE, order.file, param="file"))
    if not files.is_kept(file.sha256):
        raise NotFound(
            gettext("The bytes of %(file)s are gone from the disk.", file=file.filename),
            hint=gettext("Upload the file again."),
            param="file",
        )
    readers.kind_of(file.filename)
    look = tryout.of_name(session, user, order.model) if resolved.ref.kind in ("dialogue", "instruction") else None
    path = files.blob_path(file.sha256).relative_to(get_settings().data_dir).as_posix()
    spec = EvaluationSpec(
        kind="predictions",
        task="classification" if resolved.ref.labels else "generation",
        model=resolved.ref,
        dataset=DatasetRef(id=file.id, name=file.filename, path=path, sha256=file.sha256, format="file", rows=0),
        rows=MAX_ROWS,
        part="all",
        answer_tokens=order.max_tokens,
        column=order.column or None,
        system=(look.system if look and order.system is None else order.system) or "",
        forgetting=False,
    )
    limits.check(session, user, "tokens_per_day")
    limits.check(session, user, "storage_bytes")
    return _queued(session, user, spec, resolved.model.id, file_id=file.id)


def create_vectors(session: Session, user: User, model: str, dataset_id: str) -> Evaluation:
    """A map of a dataset's rows as a model embeds them; an existing or running one is returned instead of a second. Raises NotFound,
    BadField for a classifier, Conflict while the dataset is not ready, LimitReached."""
    resolved = models.resolve(session, user, model)
    _check_is_here(resolved)
    if resolved.ref.labels:
        raise BadField(
            gettext("%(model)s is a classifier.", model=model),
            hint=gettext("Take an embedding model, or the base it was fine-tuned from."),
            param="model",
        )
    dataset = evaluations.find_dataset(session, user, dataset_id, None)
    if dataset.status != "ready" or not dataset.good_rows:
        raise Conflict(
            gettext("%(name)s is %(status)s.", name=dataset.name, status=gettext(dataset.status)),
            hint=gettext("Take a dataset that is ready."),
            param="dataset_id",
        )
    task = dataset.task or DEFAULT
    ref = datasets.reference(dataset)
    spec = EvaluationSpec(
        kind="vectors", task=task, model=resolved.ref, dataset=ref, rows=MAX_POINTS, part="all", max_length=256, forgetting=False
    )
    same = evaluations.mine(user, VECTORS).where(Evaluation.spec == spec.model_dump(mode="json"))
    earlier = session.scalar(same.where(Evaluation.status.in_((*evaluations.OPEN, "succeeded"))).limit(1))
    if earlier is not None:
        return earlier
    limits.check(session, user, "tokens_per_day")
    return _queued(session, user, spec, resolved.model.id, dataset_id=dataset.id)


def _check_is_here(resolved: models.Resolved) -> None:
    if resolved.model.answered_elsewhere:
        raise BadField(
            gettext("%(model)s answers through another server; its weights are not here.", model=resolved.ref.name),
            hint=gettext("Take a model of this studio."),
            param="model",
        )


def _queued(session: Session, user: User, spec: EvaluationSpec, model_id: uuid.UUID, **of: uuid.UUID) -> Evaluation:
    made = Evaluation(
        id=uuid.uuid4(),
        owner_id=user.id,
        project_id=user.project_id,
        kind=spec.kind,
        model_id=model_id,
        spec=storable(spec.model_dump(mode="json")),
        **of,
    )
    session.add(made)
    session.flush()
    queue.enqueue(session, queue.PREDICT if spec.kind in evaluations.BESIDE_TRAINING else queue.EVALUATE, made.id)
    session.refresh(made)
    return made


def to_json(found: Evaluation) -> JSON:
    """A run as the API returns it."""
    spec, result = found.spec, found.result or {}
    return {
        "id": ids.public(ids.PREDICTION, found.id),
        "object": "prediction",
        "status": found.status,
        "model": spec["model"]["name"],
        "file": ids.public(ids.FILE, found.file_id) if found.file_id else None,
        "filename": spec["dataset"]["name"],
        "column": result.get("column") or spec.get("column"),
        "system": spec.get("system") or None,
        "max_tokens": spec["answer_tokens"],
        "progress": found.progress,
        "stage": found.stage,
        "rows": result.get("rows"),
        "added": result.get("added") or [],
        "without": result.get("without"),
        "seconds": result.get("seconds"),
        "error": problem_json(found.error),
        "created_at": int(found.created_at.timestamp()),
        "finished_at": int(found.finished_at.timestamp()) if found.finished_at else None,
    }


# The file that comes of it ----------------------------------------------------------------------------------------------


def path_of(evaluation_id: uuid.UUID) -> Path:
    return get_settings().data_dir / _place(evaluation_id)


def _place(evaluation_id: uuid.UUID) -> str:
    return f"predictions/{evaluation_id.hex}.jsonl"


def keep(evaluation_id: uuid.UUID, folder: Path, beat: Beat = lambda: None) -> int:
    """Move the process's output out of its folder; returns its size in bytes. Raises BadData for anything but a plain file."""
    written = folder / OUTPUT
    if not written.exists() or not stat.S_ISREG(written.lstat().st_mode):
        raise BadData("The process left no predictions.", hint="Start it again.")
    with atomic.disk_errors(), written.open("rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    target = path_of(evaluation_id)
    get_settings().folder("predictions")
    os.replace(written, target)
    atomic.sync(target.parent)
    places.push(_place(evaluation_id), beat=beat)
    return size


def forget_unless_wanted(session: Session, evaluation_id: uuid.UUID) -> None:
    """Remove the file of a run that was cancelled or deleted before it was recorded."""
    found = session.get(Evaluation, evaluation_id, populate_existing=True)
    if found is None or found.deleted_at is not None or found.status in ("cancelled", "failed"):
        path_of(evaluation_id).unlink(missing_ok=True)


def delete(session: Session, user: User, evaluation_id: uuid.UUID) -> None:
    """Delete a run and its file; a running one is stopped."""
    evaluations.delete(session, user, evaluation_id, KINDS)
    on_commit(session, lambda: path_of(evaluation_id).unlink(missing_ok=True))


def usual_format(filename: str) -> Format:
    """The format of the input: tables as CSV, everything else as JSON lines."""
    return "csv" if readers.kind_of(filename) in ("csv", "tsv") else "jsonl"


def content(found: Evaluation, format: Format) -> Iterator[str]:
    """The file with its added columns, in pieces. Raises Conflict before there is one."""
    if found.status != "succeeded" or not (path := places.path(_place(found.id))).is_file():
        raise Conflict(
            gettext("The predictions are %(status)s.", status=gettext(found.status)),
            hint=gettext("Wait until they have succeeded."),
            code="not_ready",
        )
    if format == "jsonl":
        return _lines(path)
    result = found.result or {}
    return _csv(path, result.get("columns") or [], frozenset(result.get("added") or ()))


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


def _csv(path: Path, columns: list[str], added: frozenset[str]) -> Iterator[str]:
    """The columns of the file as they were given, those that the model added protected against formulas."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for line in _lines(path):
        row = json.loads(line)
        cells = {column: _cell(row.get(column)) for column in columns}
        writer.writerow([guarded(cell) if column in added else cell for column, cell in cells.items()])
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None else json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | bool) else value
