"""The page of the admins: the health of every part, what waits and for how long, devices, disk, errors, and what will be removed."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app import retention
from app.db import Db
from app.views import operations, overview
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.templates import render

pages = APIRouter()
MENU = (MenuPage("Admin", "/admin", "end", 30),)


@pages.get("/admin")
def show(request: Request, session: Db, user: CurrentUser) -> Response:
    waiting, broker = operations.waiting(session), operations.messages()
    values: dict[str, Any] = {
        "checks": overview.checks(session),
        "duties": overview.duties(),
        "waiting": [(one, broker.get(one.queue)) for one in waiting],
        "running": operations.running(session),
        "devices": operations.devices(),
        "space": overview.space(),
        "errors": operations.recent_errors(session),
        "retention": retention.preview(session),
    }
    return render(request, "admin.html", **values)
