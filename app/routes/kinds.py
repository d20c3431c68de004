"""The recipe of the three kinds, as a page with one button for each step."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from app import kinds
from app.accounts import CurrentUser
from app.db import Db
from app.web import render

pages = APIRouter()


@pages.get(kinds.PAGE)
def kinds_page(request: Request, session: Db, user: CurrentUser) -> Response:
    steps = kinds.steps(session, user)
    return render(request, "kinds.html", steps=steps, together=[step.model.name for step in steps if step.model], question=kinds.QUESTION)


@pages.post(kinds.PAGE + "/instruction")
def tune(session: Db, user: CurrentUser) -> Response:
    kinds.tune(session, user)
    return RedirectResponse(kinds.PAGE, status_code=303)


@pages.post(kinds.PAGE + "/dialogue")
def add_dialogue(session: Db, user: CurrentUser) -> Response:
    kinds.add_dialogue(session)
    return RedirectResponse(kinds.PAGE, status_code=303)
