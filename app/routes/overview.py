"""The first page: what is going on, and what to do next."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app import ids, studio
from app.accounts import CurrentUser
from app.db import Db
from app.web import render

pages = APIRouter()


@pages.get("/")
def overview(request: Request, user: CurrentUser, session: Db) -> Response:
    seen = studio.overview(session, user)
    troubles = [duty for duty in studio.duties() if not duty.alive]
    bad = [check for check in studio.checks(session) if not check.good]
    return render(
        request,
        "overview.html",
        steps=seen.steps,
        jobs=seen.jobs,
        datasets=seen.datasets,
        models=seen.models,
        troubles=troubles,
        bad=bad,
        ids=ids,
    )
