"""The recipe of the three kinds, as a page."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app import kinds
from app.accounts import CurrentUser
from app.db import Db
from app.web import render

pages = APIRouter()


@pages.get("/playground/kinds")
def kinds_page(request: Request, session: Db, user: CurrentUser) -> Response:
    steps = kinds.steps(session, user)
    return render(request, "kinds.html", steps=steps, together=[step.model.name for step in steps if step.model])
