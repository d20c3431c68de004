"""`/v1/fine_tuning`: jobs, their events and checkpoints, as OpenAI's client calls them, with additional fields."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Request
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import schemas
from app.db import Db
from app.errors import BadField, NotFound
from app.jobs import checkpoints
from app.jobs import service as jobs
from app.jobs.request import read_order
from app.kit import ids, once
from app.models import service as models
from app.routes.models import to_json as model_json
from app.schemas.openapi import answers, takes
from app.tables import CheckpointPermission, Event, Job, Project, User
from app.views import job_json
from app.web import event_stream
from app.web.auth import CurrentUser
from app.web.pagination import MAX_NUMBER, METADATA, After, Limit, Offset, Order, Step, page, with_metadata

api = APIRouter(prefix="/v1/fine_tuning")
Json = dict[str, Any]


class ResumeJob(BaseModel, extra="forbid"):
    """The checkpoint to resume from; without a body the newest one."""

    step: int | None = Field(None, ge=0, le=MAX_NUMBER, description="Of one of its checkpoints. The later ones are deleted.")


# Jobs ---------------------------------------------------------------------------------------------------------------


@api.post("/jobs", operation_id="create_job", responses=answers(schemas.FineTuningJob, 404, 409), openapi_extra=takes(schemas.CreateJob))
def create(
    session: Db,
    user: CurrentUser,
    body: Annotated[Json, Body()],
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> Json:
    """Queue a fine-tuning job. With an `Idempotency-Key` the same request creates it once."""
    return job_json.of(session, jobs.create(session, user, read_order(body), idempotency_key))


@api.get(
    "/jobs", operation_id="list_jobs", responses=answers(schemas.page_of(schemas.FineTuningJob)), openapi_extra={"parameters": [METADATA]}
)
def list_jobs(session: Db, user: CurrentUser, request: Request, after: After = None, limit: Limit = 20) -> Json:
    """Jobs, newest first. `metadata[key]=value` filters by metadata, with all given pairs; `metadata=null` selects jobs without
    metadata."""
    query = with_metadata(jobs.mine(user), Job.user_metadata, request)
    with once.remembered():
        return page(query, after, limit, "desc", lambda job: job_json.of(session, job), session=session, key=ids.parse_job)


@api.get("/jobs/{job_id}", operation_id="retrieve_job", responses=answers(schemas.FineTuningJob))
def retrieve(session: Db, user: CurrentUser, job_id: str) -> Json:
    """One job with its current progress."""
    return job_json.of(session, jobs.get(session, user, ids.parse_job(job_id)))


@api.post("/jobs/{job_id}/cancel", operation_id="cancel_job", responses=answers(schemas.FineTuningJob, 409))
def cancel(session: Db, user: CurrentUser, job_id: str) -> Json:
    """Cancel a job. A running one stops at its next step; until then its `progress.asked` is `cancelling`. It ends as `cancelled`
    and leaves no model, even if it finishes before that step."""
    jobs.refuse_cancelled(jobs.get(session, user, ids.parse_job(job_id)))
    return job_json.of(session, jobs.cancel(session, user, ids.parse_job(job_id)))


@api.post("/jobs/{job_id}/pause", operation_id="pause_job", responses=answers(schemas.FineTuningJob, 409))
def pause(session: Db, user: CurrentUser, job_id: str) -> Json:
    """Pause a job: it saves a checkpoint and frees the machine. A running one does so at its next step; until then its
    `progress.asked` is `pausing`. One that finishes before that ends as `succeeded`."""
    return job_json.of(session, jobs.pause(session, user, ids.parse_job(job_id)))


@api.post("/jobs/{job_id}/resume", operation_id="resume_job", responses=answers(schemas.FineTuningJob, 409))
def resume(session: Db, user: CurrentUser, job_id: str, order: ResumeJob = ResumeJob()) -> Json:
    """Queue a paused, failed or cancelled job again, from its newest checkpoint or from the one of `step`, which deletes the
    later ones. A cancelled job without a checkpoint is refused."""
    return job_json.of(session, checkpoints.resume(session, user, ids.parse_job(job_id), order.step))


@api.get("/jobs/{job_id}/events", operation_id="list_job_events", responses=answers(schemas.page_of(schemas.FineTuningJobEvent)))
def list_events(session: Db, user: CurrentUser, job_id: str, after: After = None, limit: Limit = 20) -> Json:
    """Events of a job, newest first."""
    job = jobs.get(session, user, ids.parse_job(job_id))
    names = job_json.Names(session, job)
    query = select(Event).where(Event.job_id == job.id)
    return page(
        query,
        after,
        limit,
        "desc",
        lambda row: job_json.event_json(row, names),
        session=session,
        key=lambda text: _event_id(session, job, text),
    )


@api.get(
    "/jobs/{job_id}/stream",
    operation_id="stream_job_events",
    responses=answers(None, events=schemas.StreamedJobEvent, description="Events as they happen, until the job has ended."),
)
def stream(
    session: Db, user: CurrentUser, job_id: str, after: Offset = 0, last_event_id: Annotated[str | None, Header()] = None
) -> event_stream.EventStream:
    """Server-sent events, starting after `Last-Event-ID` or `after`. The database session of this request is closed before the
    stream begins."""
    job = jobs.get(session, user, ids.parse_job(job_id))
    return event_stream.EventStream(job.id, event_stream.after_id(last_event_id, after))


# Checkpoints --------------------------------------------------------------------------------------------------------


@api.get(
    "/jobs/{job_id}/checkpoints", operation_id="list_job_checkpoints", responses=answers(schemas.page_of(schemas.FineTuningCheckpoint))
)
def list_checkpoints(session: Db, user: CurrentUser, job_id: str, after: After = None, limit: Limit = 10) -> Json:
    """Checkpoints of a job, newest first."""
    job = jobs.get(session, user, ids.parse_job(job_id))
    losses = job_json.step_losses(session, job)
    return page(jobs.checkpoints(session, job), after, limit, "desc", lambda row: job_json.checkpoint_json(session, job, row, losses))


@api.post("/jobs/{job_id}/checkpoints/{step}/keep", operation_id="keep_job_checkpoint", responses=answers(schemas.Model, 404, 409))
def keep_checkpoint(session: Db, user: CurrentUser, job_id: str, step: Step) -> Json:
    """Register a checkpoint as a model that outlives the job. Repeated requests return the same model."""
    return model_json(session, checkpoints.keep(session, jobs.get(session, user, ids.parse_job(job_id)), step))


@api.post(
    "/checkpoints/{checkpoint:path}/permissions",
    operation_id="create_checkpoint_permissions",
    responses=answers(schemas.page_of(schemas.CheckpointPermission)),
    openapi_extra=takes(schemas.CreateCheckpointPermissions),
)
def allow(session: Db, user: CurrentUser, checkpoint: str, body: Annotated[Json, Body()]) -> Json:
    """Let other projects generate text with a fine-tuned model or a checkpoint, under its name. They see nothing else of it."""
    job = _job_of_checkpoint(session, user, checkpoint)
    projects = body.get("project_ids")
    if not isinstance(projects, list) or not projects or not all(isinstance(p, str) and 0 < len(p) <= 200 for p in projects):
        raise BadField("project_ids is not a list of project ids.", hint="Send at least one.", param="project_ids")
    for project in projects:
        if session.get(Project, ids.parse(ids.PROJECT, project, param="project_ids")) is None:
            raise NotFound(f"No such project: {project}", param="project_ids", hint="Settings, Projects shows the id of each of yours.")
    rows = [{"id": uuid.uuid4(), "job_id": job.id, "checkpoint": checkpoint, "project_id": project} for project in dict.fromkeys(projects)]
    session.execute(insert(CheckpointPermission).on_conflict_do_nothing(), rows)
    kept = select(CheckpointPermission).where(CheckpointPermission.checkpoint == checkpoint, CheckpointPermission.project_id.in_(projects))
    return page(kept, None, len(rows), "desc", job_json.permission_json, session=session)


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
    return page(query, after, limit, direction, job_json.permission_json, session=session, key=_permission_key)


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


# Small things -------------------------------------------------------------------------------------------------------


def _event_id(session: Session, job: Job, text: str) -> int:
    key = ids.parse(ids.EVENT, text, param="after")
    found = session.scalar(select(Event.id).where(Event.job_id == job.id, Event.key == key))
    if found is None:
        raise NotFound(f"No such event: {text[:80]}", param="after")
    return found


def _permission_key(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(hex=text.removeprefix("cp_"))
    except ValueError:
        raise NotFound(f"No such permission: {text[:80]}", param="permission_id") from None


def _job_of_checkpoint(session: Session, user: User, name: str) -> Job:
    """The job of a checkpoint or of a fine-tuned model named `ft:…`. Raises NotFound."""
    resolved = models.resolve(session, user, name)
    job_id = resolved.checkpoint.job_id if resolved.checkpoint is not None else resolved.model.job_id
    if job_id is None:
        raise NotFound(f"No such checkpoint: {name[:120]}", param="fine_tuned_model_checkpoint")
    return jobs.get(session, user, job_id)
