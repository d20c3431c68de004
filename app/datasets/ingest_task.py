"""Parsing a dataset in the data worker: claim it, parse its bytes in a limited child, record the child's result.

    reading ──read()──→ ready          rows in rows/<id>/, a report, findings
       ↑         └────→ error          the file as a whole cannot be parsed; says why
       └─ reap(): redelivered when its worker died; after three deaths the dataset has an error

Which worker may parse it is decided by a claim (`app/leases.py`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from sqlalchemy import delete, insert
from sqlalchemy.orm import Session

from app import db, leases, queue
from app.datasets import compose_rows, inspections, token_counts
from app.datasets import hub as hub_datasets
from app.datasets.row_store import verify_rows
from app.errors import BadData, Conflict, StudioError
from app.kit import sandbox
from app.kit.json_safe import storable
from app.languages import gettext
from app.ownership import maker_of
from app.settings import get_settings
from app.storage import atomic, files, places
from app.storage.objects import Beat
from app.tables import Dataset, File, Finding, Model

LIMITS = sandbox.Limits()
PASSING = (
    "disk_full",
    "out_of_memory",
    "out_of_time",
    "crashed",
    "unavailable",
    "hub_unreachable",
    "storage_unavailable",
    "storage_refused",
)
"""Codes of errors that another attempt may not meet: the machine or the network may be their cause as well as the file."""


def _died(session: Session, dataset: Dataset, how: str) -> None:
    if not leases.requeue(session, WORK, dataset, died=True):
        _fail(session, dataset, _why(sandbox.Killed("crashed", f"Its reader died {dataset.deaths} times; the last one {how}")))


WORK = leases.Work(Dataset, queue.READ, waits_as="reading", runs_as="reading", since=Dataset.created_at, on_death=_died)


def claim(session: Session, dataset_id: uuid.UUID) -> int | None:
    """The fence of a new holder, or None when there is nothing to do or another worker holds it."""
    dataset = leases.claim(session, WORK, dataset_id, progress=0.0)
    return None if dataset is None else dataset.fence


def heartbeat(session: Session, dataset_id: uuid.UUID, fence: int, progress: float, so_far: dict[str, Any] | None = None) -> bool:
    """Renew the lease and store the progress; False when the lease is lost. `so_far` is what a page may show before there is a
    report: rows, and seconds_left or None."""
    report = {"report": {"so_far": so_far}} if so_far else {}
    kept = leases.heartbeat(session, WORK, dataset_id, fence, progress=progress, **report)
    if kept:
        queue.notify(session, "dataset", dataset_id)
    return kept


def read(dataset_id: uuid.UUID) -> None:
    """Body of the task READ: claim, parse in a child, record. Each step is a transaction of its own."""
    with db.transaction() as session:
        fence = claim(session, dataset_id)
        payload = _payload(session, session.get_one(Dataset, dataset_id)) if fence is not None else {}
    if fence is None:
        token_counts.count(dataset_id)  # nothing to parse; its tokens may still be uncounted
        return
    rows = get_settings().data_dir / "rows" / str(dataset_id) / f"f{fence}.parquet"
    reading = _Reading(dataset_id, fence)
    try:
        with atomic.disk_errors():
            get_settings().folder("rows", str(dataset_id))
            if payload["bring"]:
                payload["sha256"], payload["filename"] = _bring(payload["bring"], reading)
            result = _in_child(payload, rows, reading)
            _store(rows, reading.keep_going)
    except sandbox.Killed as killed:
        _drop(rows)
        if killed.kind != "stopped":
            _record_error(dataset_id, fence, _why(killed) | {"details": {"line": reading.line}})
        return
    except (sandbox.Refused, StudioError) as refused:
        _drop(rows)
        _record_error(dataset_id, fence, refused.error if isinstance(refused, sandbox.Refused) else refused.as_problem())
        return
    with db.transaction() as session:
        kept = _record(session, dataset_id, fence, result, rows, reading.findings, payload["counters"].get(result["task"]))
    if not kept:
        _drop(rows)


def read_again(session: Session, dataset: Dataset) -> None:
    """Enqueue another parsing after an error that need not be due to the file, or of rows that were damaged since they were
    written. Raises Conflict where there is no such error."""
    if dataset.status == "ready" and _rows_are_whole(dataset):
        raise Conflict(
            gettext("The rows of this dataset are whole, so there is nothing to read again."),
            hint=gettext("Change its format or columns instead."),
        )
    if dataset.status != "ready" and not can_be_read_again(dataset):
        raise Conflict(
            gettext("This dataset cannot be read again as it is."), hint=gettext("Change its format or columns, or upload another file.")
        )
    dataset.error, dataset.progress, dataset.deaths = None, None, 0
    file = session.get(File, dataset.file_id) if dataset.file_id else None
    if file is not None:
        file.status, file.status_details = "uploaded", None
    leases.requeue(session, WORK, dataset)
    queue.notify(session, "dataset", dataset.id)


def _rows_are_whole(dataset: Dataset) -> bool:
    assert dataset.rows_path and dataset.rows_sha256, "a dataset that is ready has rows"
    try:
        verify_rows(places.path(dataset.rows_path), dataset.rows_sha256, dataset.name)
    except BadData:
        return False
    return True


def can_be_read_again(dataset: Dataset) -> bool:
    return dataset.status == "error" and (dataset.error or {}).get("code") in PASSING


def _payload(session: Session, dataset: Dataset) -> dict[str, Any]:
    file = session.get(File, dataset.file_id) if dataset.file_id else None
    origin = dataset.origin or {}
    return {
        "counters": token_counts.counters(session),
        "bring": origin if file is None and origin.get("operation") in (hub_datasets.OPERATION, *compose_rows.OPERATIONS) else None,
        "sha256": file.sha256 if file and file.deleted_at is None else None,
        "filename": file.filename if file else "",
        "format": dataset.format if dataset.format_chosen else None,
        "mapping": dataset.mapping,
        "reason": _reason(session, dataset),
        "edits": dataset.edits or [],
    }


def _reason(session: Session, dataset: Dataset) -> str | None:
    """The reason for its format, where that was found or chosen for the parent of an edited version."""
    parent = session.get(Dataset, dataset.parent_id) if dataset.parent_id and dataset.format_chosen else None
    return (parent.report or {}).get("reason") if parent is not None and (dataset.origin or {}).get("operation") != "read_as" else None


class _Reading:
    """The child's messages, and when the database was last updated."""

    def __init__(self, dataset_id: uuid.UUID, fence: int) -> None:
        self.dataset_id, self.fence = dataset_id, fence
        self.findings: list[dict[str, Any]] = []
        self.progress = 0.0
        self.line = 1
        self.rows = 0
        self._began, self._told = time.monotonic(), 0.0

    def on_message(self, message: dict[str, Any]) -> None:
        if "finding" in message:
            self.findings.append(message["finding"])
        else:
            self.progress = float(message.get("progress", self.progress))
            self.line = int(message.get("line", self.line))
            self.rows = int(message.get("rows", self.rows))

    def keep_going(self) -> bool:
        now = time.monotonic()
        if now - self._told < min(1.0, get_settings().beat_seconds):
            return True
        self._told = now
        with db.transaction() as session:
            return heartbeat(session, self.dataset_id, self.fence, self.progress, self._so_far(now))

    def _so_far(self, now: float) -> dict[str, Any] | None:
        if not self.rows:
            return None
        spent = now - self._began
        return {"rows": self.rows, "seconds_left": round(spent * (1 / self.progress - 1)) if self.progress > 0.01 and spent > 2 else None}


def _bring(origin: dict[str, Any], reading: _Reading) -> tuple[str, str]:
    """Create the file of a dataset that was not uploaded, and assign it to the dataset; returns its SHA-256 and its name."""
    with tempfile.TemporaryDirectory(prefix="bring-", dir=get_settings().folder("tmp")) as name:
        folder = Path(name)
        if origin["operation"] == hub_datasets.OPERATION:
            path, filename, more = hub_datasets.bring(origin, folder, LIMITS, reading.keep_going)
            blob = files.adopt(path, files.Blob(_sha256(path), path.stat().st_size))
        else:
            path, filename = folder / "rows.jsonl", ""
            written = _join(origin, path, reading)
            blob, more = files.adopt(path, files.Blob(written["sha256"], written["bytes"])), {"left_out": written["left_out"]}
    with db.transaction() as session:
        ours = leases.lock_if_held(session, WORK, reading.dataset_id, reading.fence)
        if ours is None:
            raise sandbox.Killed("stopped", "It was stopped.")
        filename = filename or f"{ours.name}-v{ours.version}.jsonl"
        file = files.create(session, maker_of(session, ours), blob, filename, "fine-tune")
        ours.file_id = file.id
        ours.origin = {**origin, **more}
        return file.sha256, file.filename


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _join(origin: dict[str, Any], out: Path, reading: _Reading) -> dict[str, Any]:
    """Write the rows of a combined dataset; returns the child's result."""
    sources = [{**source, "path": str(places.path(source["path"], beat=reading.keep_going))} for source in origin["sources"]]
    result: dict[str, Any] = sandbox.run(
        "app.datasets.compose_rows:write",
        {**origin, "sources": sources, "out": str(out)},
        LIMITS,
        folder=out.parent,
        read=[source["path"] for source in sources],
        write=[out.parent],
        on_message=reading.on_message,
        keep_going=reading.keep_going,
    )
    return result


def _in_child(payload: dict[str, Any], rows: Path, reading: _Reading) -> dict[str, Any]:
    path = files.brought(payload["sha256"], reading.keep_going) if payload["sha256"] else None
    if path is None or not path.exists():
        raise BadData("The file of this dataset was deleted before it was read.", hint="Upload it again.")
    draft = rows.with_suffix(".draft")
    job = {**payload, "path": str(path), "rows": str(draft), "lines": str(lines_path(rows))}
    try:
        result: dict[str, Any] = sandbox.run(
            "worker.data.inspection:read_file"
            if payload["counters"]
            else "app.datasets.ingest:read",  # by name, because nothing here imports the worker
            job,
            LIMITS,
            folder=get_settings().folder("tmp"),
            read=[path, *(counter["tokenizer"] for counter in payload["counters"].values())],
            write=[rows.parent],
            on_message=reading.on_message,
            keep_going=reading.keep_going,
        )
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(rows)
        atomic.sync(rows.parent)
        return result
    finally:
        draft.unlink(missing_ok=True)


def _store(rows: Path, beat: Beat = lambda: None) -> None:
    """Put the rows, and what is found in them, into the object storage, where there is one."""
    for path in (rows, lines_path(rows)):
        if path.exists():
            places.push(path.relative_to(get_settings().data_dir).as_posix(), beat=beat)


def _record(
    session: Session,
    dataset_id: uuid.UUID,
    fence: int,
    result: dict[str, Any],
    rows: Path,
    found: list[dict[str, Any]],
    counted_by: dict[str, Any] | None,
) -> bool:
    """Make the dataset ready, with its findings, in one transaction; False when the lease is lost."""
    ours = leases.lock_if_held(session, WORK, dataset_id, fence)
    if ours is None:
        return False
    if ours.rows_path and ours.rows_sha256 == result["sha256"]:
        rows = _put_back(rows, get_settings().data_dir / ours.rows_path)
        db.on_commit(session, functools.partial(_store, rows))
    session.execute(delete(Finding).where(Finding.dataset_id == dataset_id))
    for at in range(0, len(found), 1000):
        session.execute(insert(Finding), [{"dataset_id": dataset_id, **finding} for finding in found[at : at + 1000]])
    ours.status, ours.progress, ours.lease_until, ours.error, ours.deaths = "ready", 1.0, None, None, 0
    ours.format, ours.task, ours.mapping = result["format"], result["task"], result["mapping"]
    ours.rows, ours.good_rows = result["rows"], result["good_rows"]
    ours.rows_path, ours.rows_sha256 = rows.relative_to(get_settings().data_dir).as_posix(), result["sha256"]
    ours.report = result["report"]
    _publish(session, ours, "processed", None)
    counter = session.get(Model, uuid.UUID(counted_by["model"])) if counted_by else None
    if counter is not None and result.get("lengths"):
        inspections.keep_lengths(session, ours, counter, result["lengths"])
    return True


def _put_back(rows: Path, damaged: Path) -> Path:
    """Put rows that were parsed again where the damaged ones were: jobs and other datasets refer to them by that path and their hash."""
    damaged.parent.mkdir(parents=True, exist_ok=True)
    lines_path(rows).replace(lines_path(damaged))
    rows.replace(damaged)
    atomic.sync(damaged.parent)
    return damaged


def _record_error(dataset_id: uuid.UUID, fence: int, error: dict[str, Any]) -> None:
    with db.transaction() as session:
        ours = leases.lock_if_held(session, WORK, dataset_id, fence)
        if ours is not None:
            _fail(session, ours, error)


def _fail(session: Session, dataset: Dataset, error: dict[str, Any]) -> None:
    file = session.get(File, dataset.file_id) if dataset.file_id else None
    details = {"file": file.filename if file else dataset.name, "line": None} | (error.get("details") or {})
    dataset.status, dataset.lease_until, dataset.progress, dataset.report = "error", None, None, None
    dataset.error = {key: error.get(key) for key in ("code", "message", "hint")} | details
    _publish(session, dataset, "error", storable(error.get("message")))


def _publish(session: Session, dataset: Dataset, file_status: str, details: str | None) -> None:
    """Update the file and notify open pages. Waiting jobs are resolved by the task, and by the reaper."""
    if dataset.file_id and (dataset.version == 1 or (dataset.origin or {}).get("sources")):
        file = session.get(File, dataset.file_id)
        if file is not None:
            file.status, file.status_details = file_status, details
    queue.notify(session, "dataset", dataset.id)


def _why(killed: sandbox.Killed) -> dict[str, Any]:
    hint = {
        "out_of_memory": "Split the file, or give one row per line instead of one very large row.",
        "out_of_time": "Split the file into smaller ones.",
        "file_too_large": "Split the file into smaller ones.",
    }.get(killed.kind, "Try again. When it happens again, the file is one our readers cannot take: save it as .jsonl.")
    return {"code": killed.kind, "message": f"The file could not be read. {killed.message}", "hint": hint}


def lines_path(rows: Path) -> Path:
    """The file next to the rows that has, for each rule with a fix, every line it found, as JSON."""
    return rows.with_suffix(".lines.json")


def _drop(rows: Path) -> None:
    rows.unlink(missing_ok=True)
    lines_path(rows).unlink(missing_ok=True)
    if rows.parent.exists() and not any(rows.parent.iterdir()):
        shutil.rmtree(rows.parent, ignore_errors=True)


def reap(session: Session) -> dict[str, int]:
    """One round over parsings and token counts; removes what is not needed any more."""
    readings, counts = leases.reap(session, WORK), token_counts.reap(session)
    _sweep(session)
    return {name: readings[name] + counts[name] for name in readings}


_swept_at = float("-inf")


def _sweep(session: Session) -> None:
    """Walking over all blobs is expensive, so it is done once a minute at most."""
    from app.datasets import resumable_upload

    global _swept_at
    if time.monotonic() - _swept_at > 60:
        _swept_at = time.monotonic()
        files.sweep(session)
        resumable_upload.sweep(session)
        inspections.sweep(session)
