"""Jobs as people see them: created, listed, paused, resumed, cancelled. Running them is `app/jobs/lifecycle.py`, validating
requests `app/jobs/request.py` and `app/jobs/spec_builder.py`.

A request about a job that nobody runs is done at once by one UPDATE. For a running job it is stored in its row, where the next
heartbeat of its supervisor reads it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import uuid
from typing import Any

from sqlalchemy import Select, case, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import db, leases, limits, ownership, queue, trackers
from app import events as said
from app.errors import Conflict, Forbidden, StudioError
from app.jobs import checkpoint_folders, lifecycle, needs, split_leakage
from app.jobs.lifecycle import record_event
from app.jobs.request import JobRequest
from app.jobs.spec_builder import build_spec, estimate_of
from app.kit.states import state_word
from app.languages import english, gettext, mark
from app.models import service as models
from app.ownership import made, maker_of, owned
from app.settings import get_settings
from app.spec import JobSpec
from app.tables import Checkpoint, Dataset, Event, Job, Model, User
from app.tracking import service as tracking

log = logging.getLogger(__name__)

ENDED = ("succeeded", "failed", "cancelled")


# Ordering -----------------------------------------------------------------------------------------------------------


def create(session: Session, user: User, order: JobRequest, idempotency_key: str | None = None) -> Job:
    """A queued job and its message, in this transaction. The same idempotency key with the same request returns the existing job;
    with another request it raises Conflict. Raises BadField, NotFound, Forbidden, LimitReached."""
    asked = order.model_dump(mode="json", exclude_none=True)
    if idempotency_key is not None:
        earlier = _by_key(session, user, idempotency_key, asked)
        if earlier is not None:
            return earlier
    check_priority(user, order.priority)
    limits.check(session, user, "queued_jobs", more=1)
    limits.check(session, user, "gpu_hours_per_month")
    limits.check(session, user, "storage_bytes")
    chosen = trackers.read(order.integrations or [])
    spec = build_spec(session, user, order)
    with english():  # it is stored
        estimate = estimate_of(session, spec, order.resources)
    job_id = uuid.uuid4()
    inserted = session.scalar(
        insert(Job)
        .values(
            id=job_id,
            owner_id=user.id,
            project_id=user.project_id,
            name=spec.name,
            spec=spec.model_dump(mode="json"),
            model_id=spec.model.id,
            dataset_id=spec.dataset.id,
            validation_dataset_id=spec.validation.id if spec.validation else None,
            comparison_id=order.comparison_id,
            order=asked,
            priority=order.priority or "normal",
            user_metadata=order.metadata,
            idempotency_key=idempotency_key,
            estimate=estimate,
            **needs.columns(session, spec, order.resources),
        )
        .on_conflict_do_nothing(index_elements=["project_id", "owner_id", "idempotency_key"])
        .returning(Job.id)
    )
    if inserted is None:  # the same request came twice concurrently, and the other one won
        return _by_key(session, user, idempotency_key or "", asked) or create(session, user, order, idempotency_key)
    if _complete(spec):
        queue.enqueue(session, queue.TRAIN, job_id)
    job = made(session, session.get_one(Job, job_id))
    record_event(session, job_id, 0, said.Queued(reason="submitted"))
    tracking.begin(session, job_id, chosen)
    return job


def may_hurry(user: User) -> bool:
    return user.role == "admin" or get_settings().high_priority == "members"


def check_priority(user: User, priority: str | None) -> None:
    """Raises Forbidden for a high one that this person may not order."""
    if priority == "high" and not may_hurry(user):
        raise Forbidden(
            gettext("Only admins start runs of high priority."),
            hint=gettext("Use normal, or ask an admin."),
            param="priority",
            code="insufficient_permissions",
        )


def _by_key(session: Session, user: User, key: str, asked: dict[str, Any]) -> Job | None:
    job = session.scalar(select(Job).where(Job.project_id == user.project_id, Job.owner_id == user.id, Job.idempotency_key == key))
    if job is not None and job.order != asked:
        raise Conflict(
            gettext("This Idempotency-Key was used for another order."),
            hint=gettext("Send a new key with a new order, or the first order unchanged."),
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return job


def _complete(spec: JobSpec) -> bool:
    return spec.dataset.path != "" and (spec.validation is None or spec.validation.path != "")


# Looking ------------------------------------------------------------------------------------------------------------


def get(session: Session, user: User, job_id: uuid.UUID) -> Job:
    """One's own job. Raises NotFound, also for another person's."""
    return owned(session, Job, user, job_id)


def mine(user: User) -> Select[Job]:
    return ownership.mine(Job, user)


def mine_of(job: Job) -> Select[Job]:
    """The jobs of the person who created this one."""
    return select(Job).where(Job.project_id == job.project_id, Job.deleted_at.is_(None))


def list_(session: Session, user: User, *, limit: int | None = None, status: str | None = None) -> list[Job]:
    """This user's jobs, newest first."""
    query = mine(user).order_by(Job.created_at.desc(), Job.id.desc()).limit(limit)
    return list(session.scalars(query if status is None else query.where(Job.status == status)))


def events(session: Session, job: Job, after_id: int = 0, limit: int | None = None) -> list[Event]:
    """The job's events after `after_id`, in order."""
    return list(session.scalars(select(Event).where(Event.job_id == job.id, Event.id > after_id).order_by(Event.id).limit(limit)))


def checkpoints(session: Session, job: Job) -> list[Checkpoint]:
    """The checkpoints that were not deleted, newest first."""
    query = select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.deleted_at.is_(None))
    return list(session.scalars(query.order_by(Checkpoint.step.desc())))


def tuned_model(session: Session, job: Job) -> Model | None:
    return session.scalar(select(Model).where(Model.job_id == job.id, Model.step.is_(None), Model.deleted_at.is_(None)))


def reading(session: Session, job: Job) -> bool:
    """Queued, but its dataset is still being parsed: what the REST API calls validating_files."""
    return job.status == "queued" and not _complete(JobSpec.model_validate(job.spec))


# Asking -------------------------------------------------------------------------------------------------------------


def cancel(session: Session, user: User, job_id: uuid.UUID) -> Job:
    """Cancel the job: at once when nobody runs it, else at the next step boundary. It ends as cancelled and leaves no model, even
    when it finishes before it reads the request. Raises NotFound, Conflict."""
    return _stop(session, get(session, user, job_id), "cancelled", ("queued", "paused"))


def pause(session: Session, user: User, job_id: uuid.UUID) -> Job:
    """Let the job save and release the machine; `resume` continues from there. One that finishes before it reads the request ends
    as succeeded, since nothing is left to resume. Raises NotFound, Conflict."""
    return _stop(session, get(session, user, job_id), "paused", ("queued",))


def _stop(session: Session, job: Job, status: str, idle: tuple[str, ...]) -> Job:
    """`idle` are the states in which nobody holds the job, so that its state can be changed at once."""
    ended = {"finished_at": func.clock_timestamp()} if status == "cancelled" else {}
    moved = session.execute(
        update(Job)
        .where(Job.id == job.id, Job.status.in_(idle))
        .values(status=status, error=None, **ended)
        .returning(Job.attempt, Job.step)
    ).one_or_none()
    if moved is not None:
        record_event(session, job.id, moved.attempt, said.Stopped(status=status, step=moved.step or None, reason="asked for"))
    else:
        wish = {"cancel_requested": True} if status == "cancelled" else {"pause_requested": True}
        if db.touched(session, update(Job).where(Job.id == job.id, Job.status == "running").values(**wish)) == 0:
            session.refresh(job)
            if job.status != status:
                raise _state(job, _CANCELLED if status == "cancelled" else _PAUSED)
    queue.notify(session, "job", job.id)
    session.refresh(job)
    return job


def resume(session: Session, user: User, job_id: uuid.UUID) -> Job:
    """Queue a paused, failed or cancelled job again; it continues from its newest checkpoint, as if it had been paused. A
    cancelled job without one is refused, since there is nothing to continue from. Raises NotFound, Conflict."""
    job = get(session, user, job_id)
    models.reference(session, session.get_one(Model, job.model_id))  # raises where it was deleted or refused meanwhile
    if job.status in ("paused", "failed", "cancelled"):
        limits.check(session, maker_of(session, job), "queued_jobs", more=1)
        limits.check(session, maker_of(session, job), "gpu_hours_per_month")
    saved = select(Checkpoint.id).where(Checkpoint.job_id == job.id, Checkpoint.deleted_at.is_(None)).exists()
    moved = session.execute(
        update(Job)
        .where(Job.id == job.id, Job.status.in_(("paused", "failed")) | ((Job.status == "cancelled") & saved))
        .values(
            status="queued",
            deaths=0,
            error=None,
            finished_at=None,
            resumed_at=func.clock_timestamp(),
            pause_at=case((Job.pause_at > Job.step, Job.pause_at)),  # one that was reached is passed
            cancel_requested=False,
            pause_requested=False,
        )
        .returning(Job.attempt)
    ).one_or_none()
    if moved is not None:
        if lifecycle.is_complete(session, job.id):
            queue.enqueue(session, queue.TRAIN, job.id)
        record_event(session, job.id, moved.attempt, said.Queued(reason="resumed"))
    elif db.touched(
        session, update(Job).where(Job.id == job.id, Job.status == "running", Job.pause_requested).values(pause_requested=False)
    ):
        queue.notify(session, "job", job.id)  # the trainer may not have read the pause; if it has, it pauses all the same
    elif job.status == "cancelled":
        raise _state(job, mark("The job is %(status)s, so it cannot be resumed: it has no checkpoint."), gettext("Clone it to start anew."))
    elif job.status not in ("queued", "running"):
        raise _state(job, mark("The job is %(status)s, so it cannot be resumed."))
    session.refresh(job)
    return job


def save_now(session: Session, user: User, job_id: uuid.UUID) -> Job:
    """Request a checkpoint of a running job at its next step. Raises NotFound, Conflict."""
    job = get(session, user, job_id)
    if db.touched(session, update(Job).where(Job.id == job.id, Job.status == "running").values(save_requested=True)) == 0:
        raise _state(job, mark("The job is %(status)s, so it cannot be asked for a checkpoint."))
    session.refresh(job)
    return job


def delete(session: Session, user: User, job_id: uuid.UUID) -> None:
    """Delete an ended job. Its files are removed too, except what its model needs. Raises NotFound, Conflict."""
    job = get(session, user, job_id)
    moved = db.touched(
        session, update(Job).where(Job.id == job.id, Job.status.in_((*ENDED, "paused"))).values(deleted_at=func.clock_timestamp())
    )
    if not moved:
        raise _state(job, mark("The job is %(status)s, so it cannot be deleted."), gettext("Cancel it first."))
    session.execute(update(Checkpoint).where(Checkpoint.job_id == job.id).values(deleted_at=func.clock_timestamp()))
    folder = get_settings().data_dir / "runs" / str(job.id)
    if tuned_model(session, job) is None:
        db.on_commit(session, lambda: shutil.rmtree(folder, ignore_errors=True))
    else:

        def take_checkpoints() -> None:
            for old in folder.glob("a*/checkpoint-*"):
                shutil.rmtree(old, ignore_errors=True)

        db.on_commit(session, take_checkpoints)


def refuse_cancelled(job: Job) -> None:
    """For the API, which refuses a second cancel as OpenAI does; a second click on a page is no error. Raises Conflict."""
    if job.status == "cancelled":
        raise _state(job, mark("The job is %(status)s, so it cannot be cancelled again."))


_CANCELLED = mark("The job is %(status)s, so it cannot be cancelled.")
_PAUSED = mark("The job is %(status)s, so it cannot be paused.")


def _state(job: Job, why: str, hint: str = "") -> Conflict:
    said = gettext(why, status=state_word(job.status))
    return Conflict(said, hint=hint, param="fine_tuning_job_id", code="wrong_state")


# The reaper's round -------------------------------------------------------------------------------------------------


def reap(session: Session) -> dict[str, int]:
    """One round: expired leases are requeued or given up, lost messages redelivered."""
    return {
        "settled": resolve_waiting_jobs(session),
        "compared": split_leakage.resolve_waiting(session),
        "without_model": cancel_without_model(session),
        **leases.reap(session, lifecycle.WORK),
        "resumed": lifecycle.resume_after_full_disk(session),
        "swept": lifecycle.sweep_outbox(session),
        "folders": checkpoint_folders.sweep(session),
    }


def cancel_without_model(session: Session) -> int:
    """Cancel the jobs whose model was refused after they were created. Called by the task that refused it, and by the reaper."""
    waiting = select(Job).join(Model, Job.model_id == Model.id).where(Model.status == "error", Job.deleted_at.is_(None))
    found = 0
    for job in session.scalars(waiting.where(Job.status.in_(("queued", "paused", "running")), ~Job.cancel_requested)).all():
        with contextlib.suppress(Conflict):  # it ended meanwhile
            cancel(session, maker_of(session, job), job.id)
            found += 1
    return found


def resolve_waiting_jobs(session: Session, dataset_id: uuid.UUID | None = None) -> int:
    """Resolve jobs that waited for their dataset: one that is ready gives them their spec and their message, one with an error
    fails them. Called by the reaper, and by whatever makes a dataset ready. Returns how many."""
    waiting = (
        select(Job)
        .where(Job.status == "queued", Job.deleted_at.is_(None), ~lifecycle.has_rows())
        .where(
            select(Dataset.id)
            .where(Dataset.id.in_((Job.dataset_id, Job.validation_dataset_id)), Dataset.status == "reading")
            .exists()
            .is_(False)
        )
    )
    if dataset_id is not None:
        waiting = waiting.where((Job.dataset_id == dataset_id) | (Job.validation_dataset_id == dataset_id))
    found = session.scalars(waiting.limit(50).with_for_update(skip_locked=True).execution_options(populate_existing=True)).all()
    for job in found:
        _resolve_waiting_job(session, job)
    return len(found)


def _resolve_waiting_job(session: Session, job: Job) -> None:
    owner, order = maker_of(session, job), JobRequest.model_validate(job.order)
    try:
        with english():  # the error is stored
            spec = build_spec(session, owner, order)
    except StudioError as error:
        failed = said.Failed(kind="bad_data", message=error.message, hint=error.hint)
        job.status, job.finished_at = "failed", session.scalar(select(func.clock_timestamp()))
        job.error = {**error.as_problem(), "param": error.param}
        session.flush()
        record_event(session, job.id, job.attempt, failed)
        return
    if job.name == job.spec["name"]:  # nobody renamed it while it waited
        job.name = spec.name
    with english():
        job.spec, job.estimate = spec.model_dump(mode="json"), estimate_of(session, spec, order.resources)
    for name, value in needs.columns(session, spec, order.resources).items():
        setattr(job, name, value)
    # A file's id may stand for another version by now, where the one that was waited for failed.
    job.dataset_id, job.validation_dataset_id = spec.dataset.id, spec.validation.id if spec.validation else None
    session.flush()
    queue.enqueue(session, queue.TRAIN, job.id)
    queue.notify(session, "job", job.id)
