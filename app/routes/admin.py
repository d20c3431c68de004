"""The page of the admins: the health of every part, what waits and for how long, devices, disk, errors, and what will be removed."""

from __future__ import annotations

import math
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse, Response

from app import limits, retention
from app.db import Db
from app.errors import BadField
from app.kit import ids
from app.languages import gettext, mark
from app.tables import Project, User
from app.views import operations, overview
from app.web import people, projects
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.templates import flash, render

pages = APIRouter()
MENU = (MenuPage(mark("Admin"), "/admin", "end", 30),)


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
        "limits": limits.LIMITS,
        "usage": _people(session, limits.used(session)["person"]),
        "retention": retention.preview(session),
    }
    return render(request, "admin.html", **values)


# Usage and limits -------------------------------------------------------------------------------------------------------

GIGA = 10**9
LIMITS_PAGE = "/admin/limits"


async def _form(request: Request) -> dict[str, str]:
    return {name: value for name, value in (await request.form(max_files=0, max_fields=20)).items() if isinstance(value, str)}


Form = Annotated[dict[str, str], Depends(_form)]


def _people(session: Db, used: limits.Usage) -> list[tuple[User, list[limits.LimitUse]]]:
    """Everybody who may sign in, with what they use."""
    return [(one, limits.lines(one.limits, used.get(one.id, {}), "person")) for one in people.list_(session) if one.disabled_at is None]


@pages.get(LIMITS_PAGE)
def show_limits(request: Request, session: Db, user: CurrentUser) -> Response:
    used = limits.used(session)
    every = session.scalars(projects.query().order_by(Project.personal, Project.name)).all()
    found = [(one, limits.lines(one.limits, used["project"].get(one.id, {}), "project")) for one in every]
    return render(request, "limits.html", people=_people(session, used["person"]), shown_projects=found, limits=limits.LIMITS, giga=GIGA)


@pages.post(f"{LIMITS_PAGE}/people/{{user_id}}")
def limit_person(request: Request, user: CurrentUser, session: Db, user_id: str, typed: Form) -> Response:
    person = people.get(session, ids.parse_user(user_id))
    limits.set_own(person, _numbers(typed))
    flash(request, gettext("The limits of %(name)s are changed.", name=person.name))
    return RedirectResponse(LIMITS_PAGE, 303)


@pages.post(f"{LIMITS_PAGE}/projects/{{project_id}}")
def limit_project(request: Request, user: CurrentUser, session: Db, project_id: str, typed: Form) -> Response:
    project = projects.get(session, ids.parse_project(project_id))
    limits.set_own(project, _numbers(typed))
    if typed.get("weight"):
        projects.set_weight(session, project, _number("weight", typed["weight"]) or 0.0)
    flash(request, gettext("The limits of %(name)s are changed.", name=project.name))
    return RedirectResponse(LIMITS_PAGE, 303)


def _numbers(form: dict[str, str]) -> dict[str, float | None]:
    """The limits of a posted form; an empty field takes one away. Storage is typed in GB."""
    found: dict[str, float | None] = {name: _number(name, form[name]) for name in limits.LIMITS if name in form}
    if found.get("storage_bytes") is not None:
        found["storage_bytes"] = round(float(found["storage_bytes"] or 0) * GIGA)
    return found


def _number(name: str, typed: str) -> float | None:
    if not typed.strip():
        return None
    try:
        value = float(typed)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        message = gettext("%(text)s is no number.", text=repr(typed[:60]))
        raise BadField(message, hint=gettext("Type a number, or leave it empty."), param=name)
    return int(value) if value.is_integer() else value
