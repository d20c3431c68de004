"""`/v1/fine_tuning`: jobs, their events and checkpoints, as the OpenAI client asks for them, with our own words beside."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Request
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import events, leases, schemas
from app.db import Db
from app.errors import BadField, NotFound, problem_json
from app.evaluation import verdict
from app.jobs import checkpoints, config_file
from app.jobs import service as jobs
from app.jobs.defaults import rows_per_step
from app.jobs.request import Hyperparameters, JobRequest, read_order
from app.kit import ids
from app.models import service as models
from app.routes.models import to_json as model_json
from app.schemas.openapi import answers, takes
from app.spec import JobSpec, usual_learning_rate
from app.tables import Checkpoint, CheckpointPermission, Dataset, Event, Job, User
from app.web import event_stream
from app.web.auth import CurrentUser
from app.web.pagination import MAX_NUMBER, After, Limit, Offset, Order, Step, page

api = APIRouter(prefix="/v1/fine_tuning")
Json = dict[str, Any]


class ResumeJob(BaseModel, extra="forbid"):
    """From where a job goes on; without a body from its newest checkpoint."""

    step: int | None = Field(None, ge=0, le=MAX_NUMBER, description="Of one of its checkpoints. The later ones are deleted.")


METADATA: Json = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "description": "Pairs that a job must carry.",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}


# Jobs ---------------------------------------------------------------------------------------------------------------


@api.post("/jobs", operation_id="create_job", responses=answers(schemas.FineTuningJob, 404, 409), openapi_extra=takes(schemas.CreateJob))
def create(
    session: Db,
    user: CurrentUser,
    body: Annotated[Json, Body()],
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> Json:
    """Queue a fine-tuning job. With an `Idempotency-Key` the same request creates it once."""
    return job_json(session, jobs.create(session, user, read_order(body), idempotency_key))


@api.get(
    "/jobs", operation_id="list_jobs", responses=answers(schemas.page_of(schemas.FineTuningJob)), openapi_extra={"parameters": [METADATA]}
)
def list_jobs(session: Db, user: CurrentUser, request: Request, after: After = None, limit: Limit = 20) -> Json:
    """Jobs, newest first. `metadata[key]=value` keeps the jobs that carry all these pairs, `metadata=null` those without metadata."""
    query = jobs.mine(user)
    if request.query_params.get("metadata") == "null":
        query = query.where(Job.user_metadata.is_(None))
    wanted = {name[9:-1]: value for name, value in request.query_params.items() if name.startswith("metadata[") and name.endswith("]")}
    if wanted:
        query = query.where(Job.user_metadata.contains(wanted))
    return page(query, after, limit, "desc", lambda job: job_json(session, job), session=session, key=job_key)


@api.get("/jobs/{job_id}", operation_id="retrieve_job", responses=answers(schemas.FineTuningJob))
def retrieve(session: Db, user: CurrentUser, job_id: str) -> Json:
    """One job, as far as it has got."""
    return job_json(session, jobs.get(session, user, job_key(job_id)))


@api.post("/jobs/{job_id}/cancel", operation_id="cancel_job", responses=answers(schemas.FineTuningJob, 409))
def cancel(session: Db, user: CurrentUser, job_id: str) -> Json:
    """End a job. A running one stops at its next step, until when its `progress.asked` is `cancelling`; whatever it reaches
    before that, it ends as `cancelled` and leaves no model."""
    jobs.refuse_cancelled(jobs.get(session, user, job_key(job_id)))
    return job_json(session, jobs.cancel(session, user, job_key(job_id)))


@api.post("/jobs/{job_id}/pause", operation_id="pause_job", responses=answers(schemas.FineTuningJob, 409))
def pause(session: Db, user: CurrentUser, job_id: str) -> Json:
    """Let a job save and leave the machine. A running one does so at its next step, until when its `progress.asked` is
    `pausing`; one that reaches its end before that ends as `succeeded`, since nothing is left to go on with."""
    return job_json(session, jobs.pause(session, user, job_key(job_id)))


@api.post("/jobs/{job_id}/resume", operation_id="resume_job", responses=answers(schemas.FineTuningJob, 409))
def resume(session: Db, user: CurrentUser, job_id: str, order: ResumeJob = ResumeJob()) -> Json:
    """Queue a paused, failed or cancelled job again, from its newest checkpoint, or from the one of `step`: then the later ones
    are deleted. A cancelled job without a checkpoint is refused."""
    return job_json(session, checkpoints.resume(session, user, job_key(job_id), order.step))


@api.get("/jobs/{job_id}/events", operation_id="list_job_events", responses=answers(schemas.page_of(schemas.FineTuningJobEvent)))
def list_events(session: Db, user: CurrentUser, job_id: str, after: After = None, limit: Limit = 20) -> Json:
    """What happened in a job, newest first."""
    job = jobs.get(session, user, job_key(job_id))
    names = _Names(session, job)
    query = select(Event).where(Event.job_id == job.id)
    return page(
        query, after, limit, "desc", lambda row: event_json(row, names), session=session, key=lambda text: _event_id(session, job, text)
    )


@api.get(
    "/jobs/{job_id}/stream",
    operation_id="stream_job_events",
    responses=answers(None, events=schemas.StreamedJobEvent, description="Events as they happen, until the job has ended."),
)
def stream(
    session: Db, user: CurrentUser, job_id: str, after: Offset = 0, last_event_id: Annotated[str | None, Header()] = None
) -> event_stream.EventStream:
    """Server-sent events, from after `Last-Event-ID` or `after`. The session of this request ends before the stream begins."""
    job = jobs.get(session, user, job_key(job_id))
    return event_stream.EventStream(job.id, event_stream.after_id(last_event_id, after))


# Checkpoints --------------------------------------------------------------------------------------------------------


@api.get(
    "/jobs/{job_id}/checkpoints", operation_id="list_job_checkpoints", responses=answers(schemas.page_of(schemas.FineTuningCheckpoint))
)
def list_checkpoints(session: Db, user: CurrentUser, job_id: str, after: After = None, limit: Limit = 10) -> Json:
    """Checkpoints of a job, newest first."""
    job = jobs.get(session, user, job_key(job_id))
    losses = _step_losses(session, job)
    return page(jobs.checkpoints(session, job), after, limit, "desc", lambda row: checkpoint_json(session, job, row, losses))


@api.post("/jobs/{job_id}/checkpoints/{step}/keep", operation_id="keep_job_checkpoint", responses=answers(schemas.Model, 404, 409))
def keep_checkpoint(session: Db, user: CurrentUser, job_id: str, step: Step) -> Json:
    """Keep a checkpoint as a model of its own, which stays when the job goes. Asked twice it is kept once."""
    return model_json(session, checkpoints.keep(session, jobs.get(session, user, job_key(job_id)), step))


@api.post(
    "/checkpoints/{checkpoint:path}/permissions",
    operation_id="create_checkpoint_permissions",
    responses=answers(schemas.page_of(schemas.CheckpointPermission)),
    openapi_extra=takes(schemas.CreateCheckpointPermissions),
)
def allow(session: Db, user: CurrentUser, checkpoint: str, body: Annotated[Json, Body()]) -> Json:
    """Note the projects that may use a checkpoint."""
    job = _job_of_checkpoint(session, user, checkpoint)
    projects = body.get("project_ids")
    if not isinstance(projects, list) or not projects or not all(isinstance(p, str) and 0 < len(p) <= 200 for p in projects):
        raise BadField("project_ids is not a list of project names.", hint="Send at least one.", param="project_ids")
    rows = [{"id": uuid.uuid4(), "job_id": job.id, "checkpoint": checkpoint, "project_id": project} for project in dict.fromkeys(projects)]
    session.execute(insert(CheckpointPermission).on_conflict_do_nothing(), rows)
    kept = select(CheckpointPermission).where(CheckpointPermission.checkpoint == checkpoint, CheckpointPermission.project_id.in_(projects))
    return page(kept, None, len(rows), "desc", permission_json, session=session)


@api.get(
    "/checkpoints/{checkpoint:path}/permissions",
    operation_id="list_checkpoint_permissions",
    responses=answers(schemas.page_of(schemas.CheckpointPermission)),
)
def list_permissions(
    session: Db,
    user: CurrentUser,
    checkpoint: str,
    after: After = None,
    limit: Limit = 10,
    order: str = "descending",
    project_id: str | None = None,
) -> Json:
    """The projects that may use a checkpoint."""
    _job_of_checkpoint(session, user, checkpoint)
    query = select(CheckpointPermission).where(CheckpointPermission.checkpoint == checkpoint)
    if project_id is not None:
        query = query.where(CheckpointPermission.project_id == project_id)
    direction: Order = "asc" if order.startswith("asc") else "desc"
    return page(query, after, limit, direction, permission_json, session=session, key=_permission_key)


@api.delete(
    "/checkpoints/{checkpoint:path}/permissions/{permission_id}",
    operation_id="delete_checkpoint_permission",
    responses=answers(schemas.Deleted),
)
def forbid(session: Db, user: CurrentUser, checkpoint: str, permission_id: str) -> Json:
    """Delete a permission."""
    _job_of_checkpoint(session, user, checkpoint)
    row = session.get(CheckpointPermission, _permission_key(permission_id))
    if row is None or row.checkpoint != checkpoint:
        raise NotFound(f"No such permission: {permission_id[:80]}", param="permission_id")
    session.delete(row)
    return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}


# Shapes of the answers ----------------------------------------------------------------------------------------------


def job_json(session: Session, job: Job) -> Json:
    """A `fine_tuning.job`, with our `strategy`, `estimate`, `measured`, `forgetting`, `progress` and a few more."""
    order = JobRequest.model_validate(job.order)
    tuned = jobs.tuned_model(session, job)
    return {
        "object": "fine_tuning.job",
        "id": ids.public(ids.JOB, job.id),
        "created_at": seconds(job.created_at),
        "finished_at": seconds(job.finished_at),
        "estimated_finish": _estimated_finish(session, job),
        "model": order.model,
        "fine_tuned_model": tuned.name if tuned is not None else None,
        "organization_id": f"org-{models.ORGANIZATION}",
        "status": "validating_files" if jobs.reading(session, job) else job.status,
        "training_file": order.training_file or _file_of(session, job.dataset_id),
        "validation_file": order.validation_file,
        "result_files": [ids.public(ids.FILE, job.result_file_id)] if job.result_file_id else [],
        "trained_tokens": job.trained_tokens,
        "seed": job.spec["run"]["seed"],
        "hyperparameters": hyperparameters(session, job, order.asked()),
        "method": method_json(session, job, order),
        "integrations": order.integrations or [],
        "metadata": job.user_metadata,
        "error": problem_json({"param": None, **job.error}) if job.error else None,
        "user_provided_suffix": order.suffix,
        # Ours.
        "name": job.name,
        "tags": job.tags,
        "task": job.spec["task"],
        "strategy": job.spec["strategy"],
        "run": job.spec["run"],
        "preference": job.spec.get("preference"),
        "dataset": ids.public(ids.DATASET, job.dataset_id),
        "estimate": job.estimate,
        "measured": job.measured,
        "evaluation": job.evaluation,
        "forgetting": job.forgetting,
        "verdict": verdict_json(session, job, order),
        "progress": progress_json(job),
    }


def verdict_json(session: Session, job: Job, order: JobRequest) -> Json | None:
    """The verdict on a job that has ended. `order` of a suggestion is a whole body for POST /v1/fine_tuning/jobs."""
    found = verdict.of_job(job)
    if found is None:
        return None
    body = config_file.body_of(session, session.get_one(Dataset, job.dataset_id), order)
    orders = [{**body, "run": {**body.get("run", {}), **s.order["run"]}} for s in found.suggestions]
    told = [{"label": s.label, "order": one} for s, one in zip(found.suggestions, orders, strict=True)]
    return {**found.model_dump(mode="json"), "suggestions": told}


def progress_json(job: Job) -> Json:
    asked = "cancelling" if job.cancel_requested else "pausing" if job.pause_requested else None
    return {
        "step": job.step,
        "total_steps": job.total_steps,
        "fraction": min(job.step / job.total_steps, 1.0) if job.total_steps else 0.0,
        "seconds_left": job.seconds_left,
        "attempt": job.attempt,
        "asked": asked,
    }


def hyperparameters(session: Session, job: Job, asked: Hyperparameters) -> Json:
    """OpenAI's settings as they were asked for. Once the job has begun, "auto" is what it came to."""
    settings = asked.model_dump(include={"n_epochs", "batch_size", "learning_rate_multiplier"})
    if not job.attempt:
        return settings
    spec = JobSpec.model_validate(job.spec)
    rate = usual_learning_rate(spec.strategy, spec.task, spec.run.optimizer)
    dataset = session.get_one(Dataset, job.dataset_id)
    came_to = {
        "n_epochs": max(1, round(spec.run.epochs)),
        "batch_size": rows_per_step(dataset, spec.run),
        "learning_rate_multiplier": float(f"{(spec.run.learning_rate or rate) / rate:.6g}"),
    }
    return {name: came_to[name] if value == "auto" else value for name, value in settings.items()}


def method_json(session: Session, job: Job, order: JobRequest) -> Json:
    """The method as it was asked for; where nobody said, the one that follows from the data."""
    kind = order.method.type if order.method else "dpo" if job.spec["task"] == "preference" else "supervised"
    settings = hyperparameters(session, job, order.asked())
    if kind == "dpo":
        beta = order.asked().beta
        settings["beta"] = job.spec["preference"]["beta"] if beta == "auto" and job.attempt and job.spec.get("preference") else beta
    return {"type": kind, kind: {"hyperparameters": settings}}


def event_json(row: Event, names: _Names) -> Json:
    """A `fine_tuning.job.event`: the sentence people read, and the whole event as `data`."""
    event = events.from_row(row.type, row.data)
    level, message = sentence(event, names)
    data = {**row.data, "event": row.type, "attempt": row.attempt}
    if isinstance(event, events.Failed):
        data = problem_json(data) or {}
    elif isinstance(event, events.Step):
        data |= {"train_loss": event.loss}
    elif isinstance(event, events.Evaluated):
        data |= {"valid_loss": event.loss}
    return {
        "object": "fine_tuning.job.event",
        "id": ids.public(ids.EVENT, row.key),
        "created_at": seconds(row.created_at),
        "level": level,
        "type": "metrics" if isinstance(event, events.Step | events.Evaluated) else "message",
        "message": message,
        "data": data,
    }


def sentence(event: events.JobEvent, names: _Names) -> tuple[str, str]:
    """The level of an event and what a person reads."""
    match event:
        case events.Queued(reason="submitted"):
            return "info", f"Created fine-tuning job: {names.job}"
        case events.Queued(reason="resumed"):
            return "info", "The job was resumed and waits for a worker."
        case events.Queued():
            return "warn", "The job goes back to the queue and will go on from its newest checkpoint."
        case events.Claimed():
            return "info", f"Attempt {event.attempt} begins on {event.worker}."
        case events.Started():
            where = f" from step {event.resumed_from}" if event.resumed_from else ""
            return "info", f"Training started{where}: {event.total_steps} steps over {event.train_rows} rows on {event.device}."
        case events.Step():
            return "info", f"Step {event.step}/{names.total_steps or '?'}: training loss={event.loss:.4g}"
        case events.Evaluated():
            return "info", f"Step {event.step}/{names.total_steps or '?'}: validation loss={event.loss:.4g}"
        case events.Sampled():
            return "info", f"Wrote {len(event.samples)} sample answers at step {event.step}."
        case events.Saved():
            return "info", f"Checkpoint created at step {event.step}."
        case events.Finished():
            return "info", f"New fine-tuned model created: {names.model}. Fine tuning job successfully completed."
        case events.Failed():
            return "error", f"{event.message} {event.hint}".strip()
        case events.Lost():
            return "warn", f"Attempt {event.attempt} was lost: {event.message}"
        case events.Stopped():
            return "info", f"The job was {event.status}{f': {event.reason}' if event.reason and event.reason != 'asked for' else ''}."
        case events.TaskProgress():
            return "info", f"{event.what}: {event.share:.0%}."
        case events.Log():
            return event.level, event.message


class _Names:
    """What the sentences about one job call things."""

    def __init__(self, session: Session, job: Job) -> None:
        self.job = ids.public(ids.JOB, job.id)
        self.total_steps = job.total_steps
        tuned = jobs.tuned_model(session, job)
        self.model = tuned.name if tuned is not None else ""


def checkpoint_json(session: Session, job: Job, row: Checkpoint, losses: dict[int, float]) -> Json:
    """A `fine_tuning.job.checkpoint`. `metrics` has the client's own names; null is what was not measured. The held-out rows are
    always scored whole, so `valid_…` and `full_valid_…` agree. Everything that was measured stands under `scores`."""
    loss, accuracy = row.metrics.get("loss"), row.metrics.get("token_accuracy")
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": ids.public(ids.CHECKPOINT, row.id),
        "created_at": seconds(row.created_at),
        "fine_tuned_model_checkpoint": models.checkpoint_name(session, job, row.step),
        "fine_tuning_job_id": ids.public(ids.JOB, job.id),
        "step_number": row.step,
        "metrics": {
            "step": row.step,
            "train_loss": losses.get(row.step),
            "train_mean_token_accuracy": None,
            "valid_loss": loss,
            "valid_mean_token_accuracy": accuracy,
            "full_valid_loss": loss,
            "full_valid_mean_token_accuracy": accuracy,
        },
        # Ours.
        "scores": row.metrics,
        "best": row.best,
        "bytes": row.bytes,
    }


def permission_json(row: CheckpointPermission) -> Json:
    return {
        "object": "checkpoint.permission",
        "id": f"cp_{row.id.hex}",
        "created_at": seconds(row.created_at),
        "project_id": row.project_id,
    }


# Small things -------------------------------------------------------------------------------------------------------


def job_key(text: str) -> uuid.UUID:
    return ids.parse(ids.JOB, text, param="fine_tuning_job_id")


def seconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())


def _estimated_finish(session: Session, job: Job) -> int | None:
    if job.status != "running" or job.seconds_left is None:
        return None
    return int(session.scalars(select(leases.now())).one().timestamp() + job.seconds_left)


def _file_of(session: Session, dataset_id: uuid.UUID) -> str:
    file_id = session.scalar(select(Dataset.file_id).where(Dataset.id == dataset_id))
    return ids.public(ids.FILE, file_id) if file_id else ids.public(ids.DATASET, dataset_id)


def _event_id(session: Session, job: Job, text: str) -> int:
    key = ids.parse(ids.EVENT, text, param="after")
    found = session.scalar(select(Event.id).where(Event.job_id == job.id, Event.key == key))
    if found is None:
        raise NotFound(f"No such event: {text[:80]}", param="after")
    return found


def _step_losses(session: Session, job: Job) -> dict[int, float]:
    """The training loss at each checkpoint's step, as said last."""
    steps = [row.step for row in jobs.checkpoints(session, job)]
    if not steps:
        return {}
    step = Event.data["step"].as_integer()
    rows = session.execute(
        select(step, Event.data["loss"].as_float()).where(Event.job_id == job.id, Event.type == "step", step.in_(steps)).order_by(Event.id)
    )
    return {row[0]: row[1] for row in rows}


def _permission_key(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(hex=text.removeprefix("cp_"))
    except ValueError:
        raise NotFound(f"No such permission: {text[:80]}", param="permission_id") from None


def _job_of_checkpoint(session: Session, user: User, name: str) -> Job:
    """The job of a checkpoint or tuned model named `ft:…`. Raises NotFound."""
    resolved = models.resolve(session, user, name)
    job_id = resolved.checkpoint.job_id if resolved.checkpoint is not None else resolved.model.job_id
    if job_id is None:
        raise NotFound(f"No such checkpoint: {name[:120]}", param="fine_tuned_model_checkpoint")
    return jobs.get(session, user, job_id)
