"""The tutorial: from a base model to an instruction and a dialogue model, one button per step."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from app.db import Db
from app.views import tutorial
from app.web.auth import CurrentUser
from app.web.renamed import page_moved
from app.web.templates import render

pages = APIRouter()


page_moved(pages, "/playground/kinds", tutorial.PAGE)


@pages.get(tutorial.PAGE)
def tutorial_page(request: Request, session: Db, user: CurrentUser) -> Response:
    steps = tutorial.steps(session, user)
    return render(
        request, "tutorial.html", steps=steps, together=[step.model.name for step in steps if step.model], question=tutorial.QUESTION
    )


@pages.post(tutorial.PAGE + "/instruction")
def tune(session: Db, user: CurrentUser) -> Response:
    tutorial.tune(session, user)
    return RedirectResponse(tutorial.PAGE, status_code=303)


@pages.post(tutorial.PAGE + "/dialogue")
def add_dialogue(session: Db, user: CurrentUser) -> Response:
    tutorial.add_dialogue(session)
    return RedirectResponse(tutorial.PAGE, status_code=303)
