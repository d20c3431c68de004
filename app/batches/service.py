"""Batches: the requests of a file, answered in the background with the lowest priority, within 24 hours.

    validating ──▶ in_progress ──▶ finalizing ──▶ completed      all requests have an answer or an error
        │              └─ cancelling ─┴─▶ cancelled              and what was answered until then is kept,
        │              └──────────────┴─▶ expired                after 24 hours too
        └──▶ failed                                              the file cannot be run

A web process claims an open batch and sends its requests (`app/web/batch_runner.py`). Answers are stored line by line, so whoever
takes the batch over goes on where the last one was; a request that was under way at a crash is sent again, and its answer stored once.
The states above follow from the row's times: `status` only says whether a batch is open.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Select, delete, func, insert, select
from sqlalchemy.orm import Session

from app import leases, ownership
from app.batches import requests
from app.errors import BadField
from app.jobs.request import MetadataKey, MetadataValue
from app.kit import ids
from app.kit.humanize import human_number
from app.kit.json_safe import storable
from app.languages import gettext
from app.storage import files
from app.tables import JSON, BatchAnswer, RequestBatch, User
from app.webhooks import service as webhooks

WINDOW = timedelta(hours=24)
Endpoint = Literal["/v1/responses", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)


class OutputExpiresAfter(BaseModel):
    """When the files of a batch are deleted."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000, description="Seconds after the file was written.")


class BatchOrder(BaseModel):
    """Which requests, and what they are sent to."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    input_file_id: Annotated[str, Field(description="A file with the purpose batch: one request per line, as JSON.")]
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)
    output_expires_after: OutputExpiresAfter | None = None


def create(session: Session, user: User, order: BatchOrder) -> RequestBatch:
    """An open batch; its file is read when it is run. Raises NotFound, and BadField for a file of another purpose or one that is too large."""
    file = files.get(session, user, ids.parse(ids.FILE, order.input_file_id, param="input_file_id"))
    if file.purpose != "batch":
        message = gettext("%(file)s was uploaded for %(purpose)s.", file=file.filename, purpose=file.purpose)
        raise BadField(message, hint=gettext("Upload it with the purpose batch."), param="input_file_id")
    if file.bytes > requests.MAX_BYTES:
        size, most = human_number(file.bytes), human_number(requests.MAX_BYTES)
        message = gettext("%(file)s has %(size)s bytes; %(most)s is the most.", file=file.filename, size=size, most=most)
        raise BadField(message, hint=gettext("Split it."), param="input_file_id")
    files.content(session, user, file.id)
    batch = RequestBatch(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, endpoint=order.endpoint, input_file_id=file.id,
        user_metadata=storable(order.metadata), expires_at=leases.now() + WINDOW,
        output_seconds=order.output_expires_after.seconds if order.output_expires_after else None,
    )  # fmt: skip
    session.add(batch)
    session.flush()
    session.refresh(batch)
    return batch


def mine(user: User) -> Select[RequestBatch]:
    return ownership.mine(RequestBatch, user)


def get(session: Session, user: User, batch_id: uuid.UUID) -> RequestBatch:
    return ownership.owned(session, RequestBatch, user, batch_id)


def cancel(session: Session, user: User, batch_id: uuid.UUID) -> RequestBatch:
    """Send no further request; what was answered is kept. One that has ended is unchanged."""
    batch = get(session, user, batch_id)
    session.refresh(batch, with_for_update=True)
    if batch.status == "open" and batch.finalizing_at is None and batch.cancelling_at is None:
        batch.cancelling_at = func.clock_timestamp()
        session.flush()
        session.refresh(batch)
    return batch


def status_of(batch: RequestBatch) -> str:
    """What the API calls the status: the last state that has a time."""
    ends = ("completed", "failed", "expired", "cancelled")
    stages = ("cancelling", "finalizing", "in_progress")
    return next((name for name in (*ends, *stages) if getattr(batch, f"{name}_at") is not None), "validating")


def to_json(batch: RequestBatch) -> JSON:
    times = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": ids.public(ids.BATCH, batch.id),
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": ids.public(ids.FILE, batch.input_file_id),
        "completion_window": "24h",
        "status": status_of(batch),
        "output_file_id": _file_id(batch.output_file_id),
        "error_file_id": _file_id(batch.error_file_id),
        "created_at": int(batch.created_at.timestamp()),
        **{f"{name}_at": _seconds(getattr(batch, f"{name}_at")) for name in times},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": _usage(batch.usage or {}),
        "metadata": batch.user_metadata,
    }


def _file_id(key: uuid.UUID | None) -> str | None:
    return ids.public(ids.FILE, key) if key else None


def _seconds(at: datetime | None) -> int | None:
    return int(at.timestamp()) if at else None


def _usage(have: JSON) -> JSON:
    read, written = have.get("input", 0), have.get("output", 0)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": have.get("cached", 0)},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": have.get("reasoning", 0)},
        "total_tokens": read + written,
    }


# Who runs it ------------------------------------------------------------------------------------------------------------


def _died(session: Session, batch: RequestBatch, how: str) -> None:
    """Let another process go on, or fail a batch when its processes die without an answer stored between them."""
    if leases.requeue(session, WORK, batch, died=True):
        return
    batch.status, batch.failed_at = "ended", session.scalar(select(leases.now()))
    message = f"The process that ran it {how} That was death {batch.deaths} without an answer between."
    batch.errors = [{"code": "crashed", "message": message, "line": None, "param": None}]
    _tell(session, batch)


WORK = leases.Work(RequestBatch, None, waits_as="open", runs_as="open", since=RequestBatch.created_at, on_death=_died)


def claim_next(session: Session) -> RequestBatch | None:
    """The oldest open batch that nobody holds, now held by the caller; None without any."""
    free = select(RequestBatch.id).where(WORK.free()).order_by(RequestBatch.created_at).limit(1).with_for_update(skip_locked=True)
    key = session.scalar(free)
    return leases.claim(session, WORK, key) if key is not None else None


def begin(session: Session, batch_id: uuid.UUID, fence: int, found: requests.FoundRequests) -> bool:
    """Record what was found in the file: requests, or why it cannot be run, which ends the batch. False when the lease is lost."""
    if found.errors:
        return _failed(session, batch_id, fence, found.errors)
    values: JSON = {
        "total": len(found.places),
        "model": found.model,
        "in_progress_at": func.coalesce(RequestBatch.in_progress_at, leases.now()),
    }
    return leases.heartbeat(session, WORK, batch_id, fence, **values)


def fail(session: Session, batch_id: uuid.UUID, fence: int, code: str, message: str) -> bool:
    """End a batch that cannot be run."""
    return _failed(session, batch_id, fence, [{"code": code, "message": message, "line": None, "param": None}])


def _failed(session: Session, batch_id: uuid.UUID, fence: int, errors: Sequence[JSON]) -> bool:
    ended: JSON = {"status": "ended", "failed_at": leases.now(), "errors": storable(list(errors))}
    held = leases.finish_if_held(session, WORK, batch_id, fence, **ended)
    if held:
        _tell(session, session.get_one(RequestBatch, batch_id, populate_existing=True))
    return held


def _tell(session: Session, batch: RequestBatch) -> None:
    webhooks.emit(session, batch.project_id, f"batch.{status_of(batch)}", ids.public(ids.BATCH, batch.id), batch.id)


def answered(session: Session, batch_id: uuid.UUID) -> set[int]:
    """Lines with an answer."""
    return set(session.scalars(select(BatchAnswer.line).where(BatchAnswer.batch_id == batch_id)))


def store(session: Session, batch_id: uuid.UUID, fence: int, rows: Sequence[JSON]) -> RequestBatch | None:
    """Renew the lease and store answers, with the counts of all; None when the lease is lost, and then nothing is stored. Once the
    batch is being finalized, because it was cancelled or its time is over, no further request is to be sent."""
    batch = leases.lock_if_held(session, WORK, batch_id, fence)
    if batch is None:
        return None
    if rows:
        session.execute(insert(BatchAnswer), [storable({"batch_id": batch_id} | row) for row in rows])
        failed = sum(not _is_good(row["status_code"]) for row in rows)
        batch.failed += failed
        batch.completed += len(rows) - failed
        batch.usage, batch.deaths = _added(batch.usage or {}, rows), 0
    if batch.cancelling_at or session.scalar(select(RequestBatch.expires_at <= leases.now()).where(RequestBatch.id == batch_id)):
        batch.finalizing_at = func.coalesce(RequestBatch.finalizing_at, leases.now())
    batch.lease_until = leases.lease()
    session.flush()
    session.refresh(batch)
    return batch


def finalize(session: Session, batch_id: uuid.UUID, fence: int, places: Sequence[requests.RequestPlace]) -> bool:
    """Write down for each request without an answer why it was not sent. False when the lease is lost."""
    batch = leases.lock_if_held(session, WORK, batch_id, fence)
    if batch is None:
        return False
    code, why = ("batch_cancelled", "was cancelled") if batch.cancelling_at else ("batch_expired", "had run for 24 hours")
    reason = {"code": code, "message": f"The batch {why} before this request was sent."}
    have = answered(session, batch_id)
    unsent = [place for place in places if place.line not in have]
    rows = [{"line": p.line, "custom_id": p.custom_id, "request_id": "", "status_code": 0, "body": reason} for p in unsent]
    if rows:
        session.execute(insert(BatchAnswer), [storable({"batch_id": batch_id} | row) for row in rows])
    batch.finalizing_at = func.coalesce(RequestBatch.finalizing_at, leases.now())
    batch.lease_until = leases.lease()
    session.flush()
    return True


def _is_good(status_code: int) -> bool:
    return 200 <= status_code < 300


def _added(usage: JSON, rows: Sequence[JSON]) -> JSON:
    """The tokens of a batch with those of some more answers."""
    total = {"input": 0, "cached": 0, "output": 0, "reasoning": 0} | usage
    for one in (row["body"].get("usage") or {} for row in rows if _is_good(row["status_code"])):
        total["input"] += one.get("prompt_tokens", one.get("input_tokens", 0))  # the second as responses call it
        total["output"] += one.get("completion_tokens", one.get("output_tokens", 0))
        read = one.get("prompt_tokens_details") or one.get("input_tokens_details") or {}
        written = one.get("completion_tokens_details") or one.get("output_tokens_details") or {}
        total["cached"] += read.get("cached_tokens", 0)
        total["reasoning"] += written.get("reasoning_tokens", 0)
    return total


def reap(session: Session) -> dict[str, int]:
    """One round of the reaper."""
    return leases.reap(session, WORK)


def release(session: Session, batch_id: uuid.UUID, fence: int) -> None:
    """Let another process go on with it, as a web process that is stopped does."""
    leases.finish_if_held(session, WORK, batch_id, fence)


# Its files --------------------------------------------------------------------------------------------------------------


def output_lines(session: Session, batch_id: uuid.UUID, *, good: bool) -> Iterator[JSON]:
    """The lines of the output file, or of the file of errors, in the order of the requests."""
    query = select(BatchAnswer).where(BatchAnswer.batch_id == batch_id).order_by(BatchAnswer.line)
    for row in session.scalars(query.execution_options(yield_per=200)):
        if _is_good(row.status_code) == good:
            yield _line(row)


def _line(row: BatchAnswer) -> JSON:
    """A line of a file. A request that was not sent has no response, but the reason."""
    sent = row.status_code > 0
    response = {"status_code": row.status_code, "request_id": row.request_id, "body": row.body} if sent else None
    name = ids.public(ids.BATCH_REQUEST, uuid.uuid5(row.batch_id, str(row.line)))
    return {"id": name, "custom_id": row.custom_id, "response": response, "error": None if sent else row.body}


def end(session: Session, batch_id: uuid.UUID, fence: int, output: files.Blob | None, errors: files.Blob | None) -> bool:
    """Record its files and end it: completed, or cancelled or expired with what was answered until then. False when the lease is lost."""
    batch = leases.lock_if_held(session, WORK, batch_id, fence)
    if batch is None:
        return False
    owner = session.get_one(User, batch.owner_id).work_in(batch.project_id)
    name = ids.public(ids.BATCH, batch.id)
    for blob, column, filename in ((output, "output_file_id", f"{name}_output.jsonl"), (errors, "error_file_id", f"{name}_error.jsonl")):
        if blob is not None:
            setattr(batch, column, files.create(session, owner, blob, filename, files.BATCH_OUTPUT, batch.output_seconds).id)
    done = batch.completed + batch.failed >= batch.total
    setattr(batch, "cancelled_at" if batch.cancelling_at else "completed_at" if done else "expired_at", leases.now())
    batch.status, batch.lease_until = "ended", None
    session.flush()
    session.refresh(batch)
    _tell(session, batch)
    session.execute(delete(BatchAnswer).where(BatchAnswer.batch_id == batch_id))
    session.flush()
    return True
