"""The home page: what is running and what to do next; and the offer of a first model, which other pages show too."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.db import Db
from app.evaluation import verdict
from app.kit import ids
from app.languages import mark
from app.models import first_model
from app.routes.accounts import safe_next
from app.views import overview as views_overview
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.templates import render

pages = APIRouter()
MENU = (MenuPage(mark("Home"), "/", "start", 10),)
STARTING_SECONDS = 60
"""Seconds after the start of the web process during which workers that are not online yet are no problem."""


@pages.get("/")
def overview(request: Request, user: CurrentUser, session: Db) -> Response:
    seen = views_overview.overview(session, user)
    troubles = [duty for duty in views_overview.duties() if not duty.alive]
    starting = bool(troubles) and views_overview.seconds_up() < STARTING_SECONDS
    bad = [check for check in views_overview.checks(session) if not check.good]
    return render(
        request,
        "overview.html",
        steps=seen.steps,
        jobs=seen.jobs,
        verdict_of=verdict.of_job,
        datasets=seen.datasets,
        models=seen.models,
        troubles=[] if starting else troubles,
        starting=starting,
        bad=bad,
        offer=first_model.offer(session, user),
        ids=ids,
    )


@pages.get("/first-model")
def first_model_part(request: Request, user: CurrentUser, session: Db, next: str = "/") -> Response:
    """The offer alone, for pages that follow a download; once there is a model the page is reloaded."""
    offer = first_model.offer(session, user)
    answer = render(request, "parts/first_model.html", offer=offer, next=safe_next(next))
    if offer is None:
        answer.headers["hx-refresh"] = "true"
    return answer
