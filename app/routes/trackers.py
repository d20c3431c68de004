"""Jobs in trackers: `/v1/fine_tuning/jobs/{job_id}/trackers`, and the buttons of a run's page."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field

from app import schemas, trackers
from app.db import Db
from app.jobs import service as jobs
from app.kit import ids
from app.languages import gettext
from app.schemas.openapi import answers
from app.tracking import service as tracking
from app.web.auth import CurrentUser
from app.web.templates import flash

api = APIRouter(prefix="/v1/fine_tuning")
pages = APIRouter()
Json = dict[str, Any]
PATH = "/jobs/{job_id}/trackers"


class AddTrackers(BaseModel, extra="forbid"):
    """Trackers, as a job's `integrations` name them."""

    integrations: list[dict[str, Any]] = Field(min_length=1, max_length=5)


@api.get(PATH, operation_id="list_job_trackers", responses=answers(schemas.list_of(schemas.JobTracker)))
def list_trackers(session: Db, user: CurrentUser, job_id: str) -> Json:
    """Trackers that a job is sent to, and how that goes."""
    return _listed(tracking.of_job(session, jobs.get(session, user, ids.parse_job(job_id))))


@api.post(PATH, operation_id="create_job_trackers", responses=answers(schemas.list_of(schemas.JobTracker), 404, 409))
def add(session: Db, user: CurrentUser, job_id: str, order: AddTrackers) -> Json:
    """Have a job sent to further trackers, from its beginning on, also when it has ended; or try now, where it is sent there already."""
    job = jobs.get(session, user, ids.parse_job(job_id))
    return _listed(tracking.add(session, job, trackers.read(order.integrations)))


def _listed(rows: list[Any]) -> Json:
    return {"object": "list", "data": [tracking.to_json(row) for row in rows], "has_more": False}


@pages.post(PATH)
def add_from_page(request: Request, session: Db, user: CurrentUser, job_id: str, kind: Annotated[str, Form(max_length=40)]) -> Response:
    """Have a run sent to a tracker with its usual settings, or try again now."""
    job = jobs.get(session, user, ids.parse_job(job_id))
    known = next((row.wish for row in tracking.of_job(session, job) if row.kind == kind), {})
    (row,) = tracking.add(session, job, trackers.read([{"type": kind, kind: known}]))
    flash(request, gettext("The run is sent to %(tracker)s in a moment.", tracker=trackers.TRACKERS[row.kind].title))
    return RedirectResponse(f"/jobs/{ids.public(ids.JOB, job.id)}?tab=config#trackers", status_code=303)
