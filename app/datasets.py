"""Datasets: files read as rows, with a report. A dataset is never changed in place; what differs is a new version.

    create ─→ reading ──read()──→ ready          rows in rows/<id>/, a report, findings
                 ↑         └────→ error          the file as a whole cannot be read; says why
                 └─ reap(): a reader that died is announced again; after three deaths the dataset has an error

The claim is the one of jobs: a fence that rises with every reader, and a lease by the database's clock. The bytes are
read in a limited child; this process only hands over paths and records what the child says.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import ColumnElement, Select, func, insert, literal, or_, select, update
from sqlalchemy.orm import Session

from app import db, files, formats, ids, queue, readers, recount, sandbox
from app.errors import BadData, BadField, Conflict, NotFound, StudioError
from app.intake import VERSION
from app.settings import get_settings
from app.spec import DatasetRef
from app.tables import Dataset, File, Finding, Job, Outbox, User

log = logging.getLogger("luthier.datasets")

MOST_DEATHS = 3
UNFINISHED = ("queued", "running", "paused")
LIMITS = sandbox.Limits()


class DatasetStats(BaseModel):
    """Totals over the good rows. Token figures are None until a model's tokenizer has counted them."""

    rows: int
    characters: int
    tokens: int | None = None
    trained_tokens: int | None = None
    longest: int | None = None


# Making ---------------------------------------------------------------------------------------------------------------


def create(
    session: Session, user: User, file: File, name: str | None = None, format: str | None = None, mapping: dict[str, str] | None = None
) -> Dataset:
    """A dataset of this file, ordered to be read; at once ready when the same bytes were read the same way before.

    `format` and `mapping` overrule the guess. Raises Unsupported for an extension no reader takes, BadField for an
    unknown format.
    """
    readers.kind_of(file.filename)
    if format:
        formats.get(format)
    dataset = Dataset(
        id=uuid.uuid4(),
        owner_id=user.id,
        file_id=file.id,
        name=(name or Path(file.filename).name.split(".")[0] or file.filename).strip()[:200],
        version=1,
        format=format,
        format_chosen=bool(format),
        mapping=mapping or {},
        origin={"operation": "upload", "filename": file.filename},
    )
    return _order(session, dataset, file)


def read_as(session: Session, user: User, dataset: Dataset, format: str, mapping: dict[str, str] | None = None) -> Dataset:
    """A new version of a dataset: the same file, read as the person says."""
    formats.get(format)
    file = _file_of(session, dataset)
    version = session.scalar(select(func.max(Dataset.version)).where(Dataset.id.in_(_family(session, dataset)))) or dataset.version
    new = Dataset(
        id=uuid.uuid4(),
        owner_id=user.id,
        file_id=dataset.file_id,
        parent_id=dataset.id,
        name=dataset.name,
        version=version + 1,
        format=format,
        format_chosen=True,
        mapping={field: column for field, column in (mapping or {}).items() if column},
        origin={"operation": "read_as", "format": format, "mapping": mapping or {}, "from": ids.public(ids.DATASET, dataset.id)},
    )
    return _order(session, new, file)


def _order(session: Session, dataset: Dataset, file: File) -> Dataset:
    twin = _twin(session, dataset, file)
    if twin is not None:
        _copy_reading(session, twin, dataset)
        file.status = "processed"
    else:
        dataset.status = "reading"
        session.add(dataset)
        session.flush()
        queue.put_in_outbox(session, queue.READ, dataset.id)
    session.flush()
    session.refresh(dataset)
    return dataset


def _twin(session: Session, dataset: Dataset, file: File) -> Dataset | None:
    """A reading of the same bytes under the same kind of name, with the same wishes, that can be taken over."""
    query = (
        select(Dataset, File.filename)
        .join(File, File.id == Dataset.file_id)
        .where(Dataset.owner_id == dataset.owner_id, Dataset.status == "ready", Dataset.deleted_at.is_(None), File.sha256 == file.sha256)
        .where(Dataset.format_chosen == dataset.format_chosen, Dataset.report["version"].as_integer() == VERSION)
        .where(or_(Dataset.origin["operation"].astext.in_(("upload", "read_as")), Dataset.origin.is_(None)))
        .order_by(Dataset.created_at.desc())
        .limit(20)
    )
    for other, filename in session.execute(query):
        wishes = not dataset.format_chosen or (other.format == dataset.format and other.origin.get("mapping", {}) == dataset.mapping)
        same = Path(filename).suffixes[-2:] == Path(file.filename).suffixes[-2:]
        if wishes and same and other.rows_path and (get_settings().data_dir / other.rows_path).exists():
            return other
    return None


def _copy_reading(session: Session, twin: Dataset, dataset: Dataset) -> None:
    for column in ("format", "task", "mapping", "status", "rows", "good_rows", "rows_path", "rows_sha256", "report"):
        setattr(dataset, column, getattr(twin, column))
    session.add(dataset)
    session.flush()
    columns = ["line", "column", "rule", "severity", "value", "message", "fix"]
    source = (
        select(literal(dataset.id), *[getattr(Finding, column) for column in columns])
        .where(Finding.dataset_id == twin.id)
        .order_by(Finding.id)
    )
    session.execute(insert(Finding).from_select(["dataset_id", *columns], source))


def _file_of(session: Session, dataset: Dataset) -> File:
    file = session.get(File, dataset.file_id) if dataset.file_id else None
    if file is None or file.deleted_at is not None or not files.blob_path(file.sha256).exists():
        raise Conflict("The file of this dataset was deleted, so it cannot be read again.", way_out="Upload the file again.")
    return file


# Finding --------------------------------------------------------------------------------------------------------------


def get(session: Session, user: User, dataset_id: uuid.UUID) -> Dataset:
    """A dataset of this user. Raises NotFound, also for another person's."""
    dataset = session.get(Dataset, dataset_id)
    if dataset is None or dataset.owner_id != user.id or dataset.deleted_at is not None:
        raise NotFound(f"No such dataset: {ids.public(ids.DATASET, dataset_id)}", way_out="It may have been deleted.", param="dataset")
    return dataset


def for_file(session: Session, user: User, file_id: uuid.UUID) -> Dataset:
    """The newest dataset of a file. Raises NotFound for an unknown file, BadField for one that is no dataset."""
    file = files.get(session, user, file_id)
    query = select(Dataset).where(Dataset.file_id == file.id, Dataset.owner_id == user.id, Dataset.deleted_at.is_(None))
    dataset = session.scalars(query.order_by(Dataset.version.desc(), Dataset.created_at.desc()).limit(1)).first()
    if dataset is None:
        raise BadField(
            f"The file {file.filename} was uploaded with the purpose “{file.purpose}” and is not a dataset.",
            way_out="Upload it with purpose fine-tune.",
            param="file_id",
        )
    return dataset


def list_(session: Session, user: User) -> list[Dataset]:
    """This user's datasets, newest first."""
    query = select(Dataset).where(Dataset.owner_id == user.id, Dataset.deleted_at.is_(None))
    return list(session.scalars(query.order_by(Dataset.created_at.desc(), Dataset.id)))


def _family(session: Session, dataset: Dataset) -> list[uuid.UUID]:
    """Ids of this dataset, everything it came from and everything that came from any of them."""
    known = {dataset.id}
    edge = {dataset.id} | ({dataset.parent_id} if dataset.parent_id else set())
    while edge - known or edge == {dataset.id}:
        known |= edge
        rows = session.execute(select(Dataset.id, Dataset.parent_id).where(or_(Dataset.id.in_(known), Dataset.parent_id.in_(known))))
        edge = {key for row in rows for key in row if key is not None}
        if edge <= known:
            break
    return list(known)


def versions(session: Session, dataset: Dataset) -> list[Dataset]:
    """Every version of a dataset that is still there, oldest first."""
    query = select(Dataset).where(Dataset.id.in_(_family(session, dataset)), Dataset.deleted_at.is_(None))
    return list(session.scalars(query.order_by(Dataset.version, Dataset.created_at)))


# Telling --------------------------------------------------------------------------------------------------------------


def reference(dataset: Dataset) -> DatasetRef:
    """Which rows a trainer reads. Its `format` is the shape of the rows. Raises Conflict before the dataset is ready."""
    if dataset.status != "ready" or not dataset.rows_path or not dataset.rows_sha256 or not dataset.format:
        raise Conflict(
            f"The dataset {dataset.name} is {dataset.status}, not ready.", way_out="Wait until it is read, or look at its report."
        )
    return DatasetRef(
        id=dataset.id,
        name=dataset.name,
        path=dataset.rows_path,
        sha256=dataset.rows_sha256,
        format=formats.get(dataset.format).shape,
        rows=dataset.good_rows or 0,
    )


def stats(dataset: Dataset) -> DatasetStats:
    report = dataset.report or {}
    return DatasetStats(
        rows=dataset.good_rows or 0,
        characters=report.get("characters", 0),
        tokens=report.get("tokens"),
        trained_tokens=report.get("trained_tokens"),
        longest=report.get("longest"),
    )


def preview(dataset: Dataset, n: int = 10) -> list[dict[str, Any]]:
    """The first normalised rows, long texts cut."""
    return [item["row"] for item in (dataset.report or {}).get("preview", [])[:n]]


def rules(dataset: Dataset) -> list[dict[str, Any]]:
    """What was found, by rule: errors first, then by count. Keys: rule, severity, count, message (an example)."""
    order = {"error": 0, "warning": 1, "note": 2}
    found = [{"rule": rule, **entry} for rule, entry in (dataset.report or {}).get("findings", {}).items()]
    return sorted(found, key=lambda entry: (order.get(entry["severity"], 3), -entry["count"], entry["rule"]))


def findings(
    session: Session,
    dataset: Dataset,
    rule: str | None = None,
    severity: str | None = None,
    sort: str = "line",
    after: int = 0,
    limit: int = 50,
) -> tuple[list[Finding], bool]:
    """One page of findings and whether there are more. `sort` is line, rule or severity; `after` counts those before it."""
    query: Select[tuple[Finding]] = select(Finding).where(Finding.dataset_id == dataset.id)
    if rule:
        query = query.where(Finding.rule == rule)
    if severity:
        query = query.where(Finding.severity == severity)
    orders: dict[str, tuple[Any, ...]] = {"line": (), "rule": (Finding.rule,), "severity": (Finding.severity,)}
    if sort not in orders:
        raise BadField(f"Findings cannot be sorted by “{sort[:40]}”.", way_out="Use line, rule or severity.", param="sort")
    query = query.order_by(*orders[sort], Finding.line, Finding.id).offset(after).limit(limit + 1)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def delete(session: Session, user: User, dataset: Dataset) -> None:
    """Take a dataset away, unless an unfinished job needs it. Its rows go once no other version shares them."""
    job = session.scalars(
        select(Job).where(
            or_(Job.dataset_id == dataset.id, Job.validation_dataset_id == dataset.id), Job.status.in_(UNFINISHED), Job.deleted_at.is_(None)
        )
    ).first()
    if job is not None:
        raise Conflict(
            f"The job “{job.name}” ({job.status}) still needs the dataset {dataset.name}.",
            way_out=f"Cancel {ids.public(ids.JOB, job.id)} first, or wait until it has finished.",
        )
    dataset.deleted_at = func.clock_timestamp()  # type: ignore[assignment]
    session.flush()
    path = dataset.rows_path
    if path and not session.scalar(select(Dataset.id).where(Dataset.rows_path == path, Dataset.deleted_at.is_(None)).limit(1)):
        folder = (get_settings().data_dir / path).parent
        db.on_commit(session, lambda: shutil.rmtree(folder, ignore_errors=True))


def delete_file(session: Session, user: User, file_id: uuid.UUID) -> File:
    """Delete a file and the datasets read from it. Raises Conflict when an unfinished job needs one of them."""
    for dataset in session.scalars(
        select(Dataset).where(Dataset.file_id == file_id, Dataset.owner_id == user.id, Dataset.deleted_at.is_(None))
    ):
        delete(session, user, dataset)
    return files.delete(session, user, file_id)


# Reading (in the data worker) -----------------------------------------------------------------------------------------


def _lease() -> ColumnElement[Any]:
    return func.clock_timestamp() + timedelta(seconds=get_settings().lease_seconds)


def claim(session: Session, dataset_id: uuid.UUID) -> int | None:
    """The fence of a new reader, or None when there is nothing to do or another one is at it."""
    free = or_(Dataset.lease_until.is_(None), Dataset.lease_until < func.clock_timestamp())
    return session.scalar(
        update(Dataset)
        .where(Dataset.id == dataset_id, Dataset.status == "reading", Dataset.deleted_at.is_(None), free)
        .values(fence=Dataset.fence + 1, lease_until=_lease(), progress=0.0)
        .returning(Dataset.fence)
    )


def beat(session: Session, dataset_id: uuid.UUID, fence: int, progress: float) -> bool:
    """Keep the lease and note the progress; False when the dataset is no longer ours to read."""
    kept = session.scalar(
        update(Dataset)
        .where(Dataset.id == dataset_id, Dataset.fence == fence, Dataset.status == "reading", Dataset.deleted_at.is_(None))
        .values(lease_until=_lease(), progress=progress)
        .returning(Dataset.id)
    )
    if kept is not None:
        queue.wake(session, "dataset", dataset_id)
    return kept is not None


def read(dataset_id: uuid.UUID) -> None:
    """Body of the task READ: claim, read in a child, record. Each step is a transaction of its own."""
    with db.transaction() as session:
        fence = claim(session, dataset_id)
        payload = _payload(session, session.get_one(Dataset, dataset_id)) if fence is not None else {}
    if fence is None:
        recount.count(dataset_id)  # nothing to read; its tokens may be uncounted still
        return
    folder = get_settings().folder("rows", str(dataset_id))
    rows = folder / f"f{fence}.parquet"
    reading = _Reading(dataset_id, fence)
    try:
        result = _in_child(payload, rows, reading)
    except sandbox.Killed as killed:
        _drop(rows)
        if killed.kind != "stopped":
            _record_error(dataset_id, fence, _why(killed))
        return
    except (sandbox.Refused, StudioError) as refused:
        _drop(rows)
        _record_error(dataset_id, fence, refused.error if isinstance(refused, sandbox.Refused) else _as_json(refused))
        return
    with db.transaction() as session:
        kept = _record(session, dataset_id, fence, result, rows, reading.findings)
    if not kept:
        _drop(rows)


def _payload(session: Session, dataset: Dataset) -> dict[str, Any]:
    file = session.get(File, dataset.file_id) if dataset.file_id else None
    model = recount.counting_model(session)
    return {
        "sha256": file.sha256 if file and file.deleted_at is None else None,
        "filename": file.filename if file else "",
        "format": dataset.format if dataset.format_chosen else None,
        "mapping": dataset.mapping,
        "tokenizer": str(get_settings().data_dir / model.path) if model and model.path else None,
        "tokenizer_name": model.name if model else None,
    }


class _Reading:
    """What the child says, and when we last told the database."""

    def __init__(self, dataset_id: uuid.UUID, fence: int) -> None:
        self.dataset_id, self.fence = dataset_id, fence
        self.findings: list[dict[str, Any]] = []
        self.progress = 0.0
        self._told = 0.0

    def on_message(self, message: dict[str, Any]) -> None:
        if "finding" in message:
            self.findings.append(message["finding"])
        else:
            self.progress = float(message.get("progress", self.progress))

    def keep_going(self) -> bool:
        now = time.monotonic()
        if now - self._told < min(1.0, get_settings().beat_seconds):
            return True
        self._told = now
        with db.transaction() as session:
            return beat(session, self.dataset_id, self.fence, self.progress)


def _in_child(payload: dict[str, Any], rows: Path, reading: _Reading) -> dict[str, Any]:
    if not payload["sha256"] or not files.blob_path(payload["sha256"]).exists():
        raise BadData("The file of this dataset was deleted before it was read.", way_out="Upload it again.")
    path = files.blob_path(payload["sha256"])
    draft = rows.with_suffix(".draft")
    job = {**payload, "path": str(path), "rows": str(draft)}
    try:
        result = sandbox.run(
            "app.intake:read",
            job,
            LIMITS,
            folder=get_settings().folder("tmp"),
            on_message=reading.on_message,
            keep_going=reading.keep_going,
        )
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(rows)
        files.sync_folder(rows.parent)
        return result
    finally:
        draft.unlink(missing_ok=True)


def _record(session: Session, dataset_id: uuid.UUID, fence: int, result: dict[str, Any], rows: Path, found: list[dict[str, Any]]) -> bool:
    """Make the dataset ready, with its findings, in one go; False when it is no longer ours."""
    ours = session.scalar(
        select(Dataset).where(Dataset.id == dataset_id, Dataset.fence == fence, Dataset.status == "reading").with_for_update()
    )
    if ours is None:
        return False
    for at in range(0, len(found), 1000):
        session.execute(insert(Finding), [{"dataset_id": dataset_id, **finding} for finding in found[at : at + 1000]])
    ours.status, ours.progress, ours.lease_until, ours.error = "ready", 1.0, None, None
    ours.format, ours.task, ours.mapping = result["format"], result["task"], result["mapping"]
    ours.rows, ours.good_rows = result["rows"], result["good_rows"]
    ours.rows_path, ours.rows_sha256 = rows.relative_to(get_settings().data_dir).as_posix(), result["sha256"]
    ours.report = result["report"]
    _settle(session, ours, "processed", None)
    return True


def _record_error(dataset_id: uuid.UUID, fence: int, error: dict[str, Any]) -> None:
    with db.transaction() as session:
        ours = session.scalar(
            select(Dataset).where(Dataset.id == dataset_id, Dataset.fence == fence, Dataset.status == "reading").with_for_update()
        )
        if ours is not None:
            _fail(session, ours, error)


def _fail(session: Session, dataset: Dataset, error: dict[str, Any]) -> None:
    details = error.get("details") or {}
    dataset.status, dataset.lease_until, dataset.progress = "error", None, None
    dataset.error = json.loads(json.dumps({key: error.get(key) for key in ("code", "message", "way_out")} | details).replace("\\u0000", ""))
    _settle(session, dataset, "error", dataset.error["message"] if dataset.error else None)


def _settle(session: Session, dataset: Dataset, file_status: str, details: str | None) -> None:
    """Tell everything that waited: the file, the jobs, the open pages."""
    from app import jobs

    if dataset.file_id and dataset.version == 1:
        file = session.get(File, dataset.file_id)
        if file is not None:
            file.status, file.status_details = file_status, details
    session.flush()
    jobs.settle(session, dataset.id)
    queue.wake(session, "dataset", dataset.id)


def _why(killed: sandbox.Killed) -> dict[str, Any]:
    way_out = {
        "out_of_memory": "Split the file, or give one row per line instead of one very large row.",
        "out_of_time": "Split the file into smaller ones.",
        "file_too_large": "Split the file into smaller ones.",
    }.get(killed.kind, "Try again. When it happens again, the file is one our readers cannot take: save it as .jsonl.")
    return {"code": killed.kind, "message": f"The file could not be read. {killed.message}", "way_out": way_out}


def _as_json(error: StudioError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "way_out": error.way_out}


def _drop(rows: Path) -> None:
    rows.unlink(missing_ok=True)
    if rows.parent.exists() and not any(rows.parent.iterdir()):
        shutil.rmtree(rows.parent, ignore_errors=True)


def reap(session: Session) -> int:
    """Readers that died are announced again, and what nobody needs any more is swept. Returns how many were announced."""
    quiet = func.clock_timestamp() - timedelta(seconds=get_settings().announce_again_seconds)
    spoken_of = select(Outbox.id).where(
        Outbox.key == Dataset.id, Outbox.task == queue.READ, or_(Outbox.sent_at.is_(None), Outbox.sent_at > quiet)
    )
    free = or_(Dataset.lease_until.is_(None), Dataset.lease_until < func.clock_timestamp())
    lost = session.scalars(
        select(Dataset)
        .where(Dataset.status == "reading", Dataset.deleted_at.is_(None), free, ~spoken_of.exists())
        .order_by(Dataset.created_at)
        .limit(100)
        .with_for_update(skip_locked=True)
    ).all()
    announced = 0
    for dataset in lost:
        if dataset.fence >= MOST_DEATHS:
            _fail(session, dataset, _why(sandbox.Killed("crashed", f"Its reader died {MOST_DEATHS} times.")))
            continue
        dataset.lease_until = None
        queue.put_in_outbox(session, queue.READ, dataset.id)
        announced += 1
    _sweep(session)
    return announced + recount.order(session)


_swept_at = float("-inf")


def _sweep(session: Session) -> None:
    """Walking over all blobs is not free, so it is done once a minute at most."""
    global _swept_at
    if time.monotonic() - _swept_at > 60:
        _swept_at = time.monotonic()
        files.sweep(session)
