"""What open pages poll: the counts of the menu, the footer, and the status of jobs that they watch."""

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
    """Counts, footer, and the status of each job named in `watch`; deleted jobs are omitted."""
    wanted = [ids.parse(ids.JOB, text, param="watch") for text in watch.split(",") if text]
    found: Iterable[Job] = session.scalars(jobs.mine(user).where(Job.id.in_(wanted))) if wanted else ()
    watched = {ids.public(ids.JOB, job.id): {"name": job.name, "status": job.status} for job in found}
    return {**navigation.state(request), "jobs": watched}
