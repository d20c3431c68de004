"""The lease of a job, and all its state transitions.

    queued ──claim──▶ running ──finish──▶ succeeded
    ▲ │               │ │ └──fail────▶ failed
    │ └─cancel,pause  │ └──stopped───▶ paused | cancelled | queued (the worker is shutting down)
    └──resume, lost───┘   (failed and cancelled jobs with a checkpoint resume too)

The Celery message only says "look at this job"; the claim below decides. Each claim increments the job's `fence`, and every write
of an attempt names the fence it holds, so a worker that was taken for dead and wakes up later can change nothing. Every
transition is one conditional UPDATE by the database's clock, safe to repeat when the response to a COMMIT was lost.

The UPDATE comes first and the events after it: it locks the job's row, so the ids of one job's events increase in the order in
which they are committed, and a watcher who has seen event n has seen all before it.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, false, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import db, events, leases, queue
from app.errors import Unavailable
from app.jobs import checkpoint_folders, mail, usage
from app.kit import ids
from app.kit.json_safe import storable
from app.leases import MAX_DEATHS, now
from app.machines.placement import Needs
from app.settings import get_settings
from app.spec import JobSpec
from app.tables import Checkpoint, Event, Job, Outbox
from app.webhooks import service as webhooks

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run one attempt of a job, for as long as nobody holds a higher fence."""

    job_id: uuid.UUID
    fence: int
    attempt: int
    spec: JobSpec
    memory_bytes: int = 0
    """Estimated memory of the attempt; 0 when unknown."""
    processes: int = 1
    """How many train it together on each machine, each with a GPU where there are any."""
    pause_at: int | None = None
    """The step at which it pauses by itself."""

    @property
    def folder(self) -> str:
        """The attempt's own folder, relative to the data folder: a file system cannot check a fence, but a path of its own keeps
        attempts apart."""
        return f"runs/{self.job_id}/a{self.fence}"


@dataclass(frozen=True, slots=True)
class ControlFlags:
    """Requests from people about a running job since it was claimed."""

    cancel: bool
    pause: bool
    save: bool


class FenceLost(Exception):
    """Another attempt holds the job, or it was ended: this one must stop its trainer and write nothing more."""


def has_rows() -> ColumnElement[bool]:
    """The spec names rows that can be read; false while a dataset of the job is still being parsed."""
    return func.coalesce(Job.rows_ready, false())


def is_complete(session: Session, job_id: uuid.UUID) -> bool:
    return bool(session.scalar(select(has_rows()).where(Job.id == job_id)))


# Saying things ------------------------------------------------------------------------------------------------------


def record_event(session: Session, job_id: uuid.UUID, attempt: int, event: events.JobEvent, key: uuid.UUID | None = None) -> None:
    """Record one event and notify the job's watchers. The caller has locked the job's row by updating it."""
    record_events(session, job_id, attempt, [(key or uuid.uuid4(), event)])


def record_events(session: Session, job_id: uuid.UUID, attempt: int, said: Sequence[tuple[uuid.UUID, events.JobEvent]]) -> None:
    """Record events under keys of their own; an existing key is ignored, so recording is idempotent."""
    rows = [
        {
            "key": key,
            "job_id": job_id,
            "attempt": attempt,
            "type": event.type,
            "data": storable(event.model_dump(mode="json", exclude={"type"}), words=True),
        }
        for key, event in said
    ]
    if rows:
        session.execute(insert(Event).on_conflict_do_nothing(index_elements=["key"]), rows)
        mail.on_events(session, job_id, [event for _, event in said])
        _tell_webhooks(session, job_id, said)
        _tell_search(session, job_id, said)
    queue.notify(session, "job", job_id)


def _tell_webhooks(session: Session, job_id: uuid.UUID, said: Sequence[tuple[uuid.UUID, events.JobEvent]]) -> None:
    for key, event in said:
        match event:
            case events.Finished():
                ended = "succeeded"
            case events.Failed():
                ended = "failed"
            case events.Stopped(status="cancelled"):
                ended = "cancelled"
            case _:
                continue
        project_id = session.scalar(select(Job.project_id).where(Job.id == job_id))
        if project_id is not None:
            webhooks.emit(session, project_id, f"fine_tuning.job.{ended}", ids.public(ids.JOB, job_id), key)


def _tell_search(session: Session, job_id: uuid.UUID, said: Sequence[tuple[uuid.UUID, events.JobEvent]]) -> None:
    """Have the search of a trial that stopped decide what is next."""
    if any(isinstance(event, events.Finished | events.Failed | events.Stopped) for _, event in said):
        search = session.scalar(select(Job.comparison_id).where(Job.id == job_id, Job.trial.is_not(None)))
        if search is not None:
            queue.enqueue(session, queue.SEARCH, search)


# One attempt --------------------------------------------------------------------------------------------------------


def claim(session: Session, job_id: uuid.UUID, worker: str, gpus: int = 0) -> Claim | None:
    """Claim a queued job, or one whose holder stopped sending heartbeats. None: there is nothing to do, drop the message."""
    values = {"attempt": Job.attempt + 1, "worker": worker, "started_at": func.coalesce(Job.started_at, now()), "save_requested": False}
    job = leases.claim(session, WORK, job_id, **values, reserved_by=None, reserved_until=None)
    if job is None:
        return None
    usage.hold_gpus(session, job_id, job.fence, gpus)
    record_event(session, job_id, job.attempt, events.Claimed(attempt=job.attempt, worker=worker))
    checkpoint_folders.remove(
        session, job_id
    )  # the trainer takes the newest checkpoint on disk, so none may be there that the job went back behind
    return claim_of(job)


def claim_of(job: Job) -> Claim:
    """The claim under the fence that the row has."""
    memory_bytes, processes = int((job.estimate or {}).get("memory_bytes", 0)), job.num_gpus or get_settings().gpus_per_job
    return Claim(job.id, job.fence, job.attempt, JobSpec.model_validate(job.spec), memory_bytes, processes, job.pause_at)


def needs_of(job: Job) -> Needs:
    """What it needs of a machine."""
    gpu_bytes = None if job.device == "cpu" else job.gpu_bytes
    cpu_bytes = None if job.device == "cuda" else job.cpu_bytes
    return Needs(gpu_bytes, cpu_bytes, job.num_gpus, job.gpu_type, tuple(job.labels), job.num_machines or 1)


def heartbeat(session: Session, held: Claim) -> ControlFlags:
    """Renew the lease and return people's requests. Raises FenceLost."""
    _beat(session, held)
    wishes = select(Job.cancel_requested, Job.pause_requested, Job.save_requested).where(Job.id == held.job_id)
    return ControlFlags(*session.execute(wishes).one())


def _beat(session: Session, held: Claim, **values: Any) -> None:
    if not leases.heartbeat(session, WORK, held.job_id, held.fence, **values):
        raise FenceLost


def record(session: Session, held: Claim, first: int, said: Sequence[events.TrainerEvent]) -> None:
    """Record the trainer's events. `first` is the number of the first event within the attempt, from 0: recording the same events
    again changes nothing. Raises FenceLost."""
    _beat(session, held, **_changes(said))
    record_events(session, held.job_id, held.attempt, [(_key(held, first + i), event) for i, event in enumerate(said)])
    for event in said:
        if isinstance(event, events.Saved):
            _checkpoint(session, held, event)


def _key(held: Claim, number: int) -> uuid.UUID:
    return uuid.uuid5(held.job_id, f"{held.fence}/{number}")


def _changes(said: Sequence[events.TrainerEvent]) -> dict[str, Any]:
    """The columns of the job that these events update."""
    changes: dict[str, Any] = {}
    for event in said:
        if isinstance(event, events.Started):
            changes |= {"total_steps": event.total_steps, "step": event.resumed_from or 0}
        elif isinstance(event, events.Step):
            pace = event.seconds / max(event.step, 1)
            total = changes.get("total_steps", Job.total_steps)
            changes |= {
                "step": event.step,
                "trained_tokens": event.trained_tokens,
                "seconds_left": func.greatest(total - event.step, 0) * pace,
            }
    return changes


def _checkpoint(session: Session, held: Claim, saved: events.Saved) -> None:
    """Record a verified checkpoint. A newer one than any before resets the count of deaths, because the job makes progress."""
    newest = session.scalar(select(func.max(Checkpoint.step)).where(Checkpoint.job_id == held.job_id))
    values = {
        "path": saved.path,
        "manifest_sha256": saved.manifest_sha256,
        "bytes": saved.bytes,
        "metrics": storable(saved.model_dump(mode="json")["metrics"], words=True),
        "best": saved.best,
        "deleted_at": None,
    }
    if saved.best:
        session.execute(update(Checkpoint).where(Checkpoint.job_id == held.job_id).values(best=False))
    session.execute(
        insert(Checkpoint)
        .values(id=uuid.uuid4(), job_id=held.job_id, step=saved.step, **values)
        .on_conflict_do_update(index_elements=["job_id", "step"], set_=values)
    )
    forgiven = {"deaths": 0} if newest is None or saved.step > newest else {}
    _beat(session, held, save_requested=False, **forgiven)


# How an attempt ends ------------------------------------------------------------------------------------------------


def _end(session: Session, held: Claim, status: str, **values: Any) -> None:
    """Change the held job, whose row the caller has locked, to `status`."""
    leases.finish_if_held(session, WORK, held.job_id, held.fence, status=status, seconds_left=None, **values)


def _mine(session: Session, held: Claim) -> Job | None:
    """The held job, locked. None when this very attempt ended it before, in whatever way, and the response was lost. Raises
    FenceLost when the job is no longer this attempt's."""
    job = leases.lock_if_held(session, WORK, held.job_id, held.fence)
    if job is None and not session.scalar(select(Job.id).where(Job.id == held.job_id, Job.fence == held.fence, Job.status != "running")):
        raise FenceLost
    return job


def finish(session: Session, held: Claim, finished: events.Finished) -> None:
    """The job succeeded: its state, its model and its metrics file in one transaction. Raises FenceLost.

    A cancel that was accepted before this wins: the job ends as cancelled and its result is deleted. A pause does not: nothing is
    left to resume, and the machine is free all the same.
    """
    from app.jobs import metrics_csv
    from app.models import service as models

    job = _mine(session, held)
    if job is None:
        return
    if job.cancel_requested:
        folder = get_settings().data_dir / finished.path
        db.on_commit(session, lambda: shutil.rmtree(folder, ignore_errors=True))
        _apply_request(session, job, finished.step, "asked for")
        return
    values = _QUIET | {
        "finished_at": now(),
        "error": None,
        "step": finished.step,
        "trained_tokens": finished.measured.trained_tokens,
        "measured": finished.measured.model_dump(mode="json"),
        "evaluation": storable(finished.evaluation, words=True) or None,
        "forgetting": storable(finished.forgetting, words=True),
    }
    _end(session, held, "succeeded", **values)
    session.refresh(job)
    models.register_tuned(session, job, finished)
    record_event(session, held.job_id, held.attempt, finished)
    session.flush()
    try:
        metrics_csv.write_results(session, job)
    except (OSError, Unavailable) as error:  # the model is what matters; its page draws the same metrics from the events
        log.warning("Job %s: the file of its metrics could not be written: %s", job.id, error)
        why = getattr(error, "message", None) or str(error)
        message = f"The metrics of the steps are not kept as a file. {why} They are on this page and can be downloaded from it."
        record_event(session, held.job_id, held.attempt, events.Log(level="warn", message=message))


def fail(session: Session, held: Claim, failed: events.Failed) -> None:
    """The attempt failed. A failure that another attempt may survive requeues the job; a full disk and a judge that is away
    pause it, since nothing is lost and it resumes from its checkpoint; any other ends it, with a reason and a hint. A job that was to be cancelled is
    cancelled, whatever its failure. Raises FenceLost."""
    job = _mine(session, held)
    if job is None:
        return None
    again = failed.kind in events.TRANSIENT or (failed.kind == "out_of_memory" and job.deaths == 0)
    # The trainer says so once: the next attempt recomputes every layer, unless the job's settings forbid it.
    recomputes = failed.kind == "cuda_out_of_memory" and failed.suggestion == {"gradient_checkpointing": "all"}
    if again or (recomputes and held.spec.run.gradient_checkpointing == "auto"):
        return _mark_attempt_dead(session, job, failed)
    if job.cancel_requested:
        _apply_request(session, job, failed.step, failed.message)
        return None
    if failed.kind in events.PAUSING:
        _end(session, held, "paused", error=_error(failed), **_QUIET)
        return record_event(session, held.job_id, held.attempt, events.Stopped(status="paused", step=failed.step, reason=failed.message))
    _end(session, held, "failed", finished_at=now(), error=_error(failed), **_QUIET)
    return record_event(session, held.job_id, held.attempt, failed)


_QUIET = {"cancel_requested": False, "pause_requested": False, "save_requested": False}


def _error(failed: events.Failed) -> dict[str, Any]:
    param = "training_file" if failed.kind == "bad_data" else "model" if failed.kind == "bad_model" else None
    said: dict[str, Any] = storable(
        {"code": failed.kind, "message": failed.message, "hint": failed.hint, "param": param}
        | {name: value for name in ("step", "line", "suggestion") if (value := getattr(failed, name)) is not None}
    )
    return said


def lost(session: Session, held: Claim, failed: events.Failed) -> None:
    """The trainer died in a way that another attempt may survive. Raises FenceLost."""
    job = _mine(session, held)
    if job is not None:
        _mark_attempt_dead(session, job, failed)


def stopped(session: Session, held: Claim, step: int | None, reason: str = "") -> None:
    """The trainer saved and left. The request decides: cancelled, paused, or, without one, requeued because its worker is
    shutting down. One that reached the step at which it pauses by itself is paused. Raises FenceLost."""
    job = _mine(session, held)
    if job is None:
        return
    if held.pause_at is not None and job.step == held.pause_at and not job.cancel_requested:
        job.pause_requested, reason = True, f"step {held.pause_at} is where its search looks at it"
    if not _apply_request(session, job, step, reason):
        _requeue(session, job, "worker_left")


def _apply_request(session: Session, job: Job, step: int | None, reason: str = "") -> bool:
    """Apply the pending request to a job that nobody runs any more. False when there is none. The caller holds its row."""
    if not (job.cancel_requested or job.pause_requested):
        return False
    status = "cancelled" if job.cancel_requested else "paused"
    job.status, job.lease_until, job.seconds_left = status, None, None
    job.cancel_requested = job.pause_requested = job.save_requested = False
    if status == "cancelled":
        job.finished_at = session.scalar(select(now()))
    session.flush()
    record_event(session, job.id, job.attempt, events.Stopped(status=status, step=step, reason=reason))
    return True


def _requeue(session: Session, job: Job, reason: Any) -> None:
    job.seconds_left, job.error = None, None
    leases.requeue(session, WORK, job)
    record_event(session, job.id, job.attempt, events.Queued(reason=reason))


def _mark_attempt_dead(session: Session, job: Job, failed: events.Failed) -> None:
    """An attempt is dead: requeue the job, or fail it at the maximum of deaths. The caller holds its row."""
    record_event(session, job.id, job.attempt, events.Lost(attempt=job.attempt, message=failed.message))
    job.deaths += 1  # since the newest checkpoint, see `_checkpoint`
    if _apply_request(session, job, job.step):
        return
    if job.deaths < MAX_DEATHS:
        return _requeue(session, job, "worker_lost" if failed.kind == "worker_lost" else "retry")
    job.status, job.lease_until, job.seconds_left = "failed", None, None
    job.finished_at = session.scalar(select(now()))
    job.cancel_requested = job.pause_requested = job.save_requested = False
    given_up = failed.model_copy(
        update={
            "message": f"{failed.message} The trainer crashed {job.deaths} times without progress, so the job failed.",
            "hint": failed.hint or "Look at the log of the last attempt, then resume the job or start it with less.",
        }
    )
    job.error = _error(given_up)
    session.flush()
    record_event(session, job.id, job.attempt, given_up)


def _died(session: Session, job: Job, how: str) -> None:
    log.warning("The lease of job %s, attempt %s, on worker %s has passed.", job.id, job.attempt, job.worker)
    _mark_attempt_dead(session, job, events.Failed(kind="worker_lost", message=f"Worker {job.worker} {how}"))


WORK = leases.Work(Job, queue.TRAIN, waits_as="queued", runs_as="running", since=Job.created_at, on_death=_died, due=has_rows())


# The reaper ---------------------------------------------------------------------------------------------------------


def resume_after_full_disk(session: Session) -> int:
    """Resume jobs that a full disk paused once there is room for two more of their checkpoints."""
    free = shutil.disk_usage(get_settings().data_dir).free
    size = select(func.max(Checkpoint.bytes)).where(Checkpoint.job_id == Job.id).scalar_subquery()
    room = 2 * func.coalesce(size, 0) + 256 * 2**20 < free
    waiting = session.scalars(
        select(Job).where(Job.status == "paused", Job.error["code"].astext == "disk_full", room).limit(20).with_for_update(skip_locked=True)
    ).all()
    for job in waiting:
        _requeue(session, job, "resumed")
    return len(waiting)


def sweep_outbox(session: Session) -> int:
    """Delete messages sent over a day ago."""
    old = now() - timedelta(days=1)
    return db.touched(session, delete(Outbox).where(Outbox.sent_at < old))
