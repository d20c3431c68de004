"""What a page that stands open asks now and then, so that the menu around it stays true, and how jobs that are waited for stand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from app.db import Db
from app.jobs import service as jobs
from app.kit import ids
from app.tables import Job
from app.web import navigation
from app.web.auth import CurrentUser

pages = APIRouter()


@pages.get("/shell")
def look(request: Request, user: CurrentUser, session: Db, watch: Annotated[str, Query(max_length=1000)] = "") -> dict[str, Any]:
    """Counts, foot, and the status of each job named in `watch`; one that is not there any more is omitted."""
    wanted = [ids.parse(ids.JOB, text, param="watch") for text in watch.split(",") if text]
    found: Iterable[Job] = session.scalars(jobs.mine(user).where(Job.id.in_(wanted))) if wanted else ()
    watched = {ids.public(ids.JOB, job.id): {"name": job.name, "status": job.status} for job in found}
    return {**navigation.state(request), "jobs": watched}
