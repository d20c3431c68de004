"""API keys, and information about this studio."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse

from app.db import Db
from app.errors import NotFound
from app.kit import ids
from app.languages import gettext, mark
from app.tables import User
from app.views import overview
from app.web import auth, navigation, policy, projects
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.templates import flash, public_address, render

pages = APIRouter()
SCOPES = {
    "read": mark("Read everything"),
    "generate": mark("Run models"),
    "write": mark("Read, run and change"),
    "admin": mark("Everything"),
}
MENU = (MenuPage(mark("Settings"), "/settings", "end", 20),)


@pages.get("/settings")
def settings(request: Request, user: CurrentUser, session: Db) -> Response:
    return _page(request, user, session)


def _page(request: Request, user: User, session: Db, new_key: str | None = None) -> Response:
    values: dict[str, Any] = {
        "keys": auth.list_keys(session, user),
        "new_key": new_key,
        "own_projects": [one.project for one in projects.of_person(session, user.id)],
        "project_names": {one.id: one.name for one in session.scalars(projects.query())},
        "now": datetime.now(UTC),
        "key_scopes": [(one, title) for one, title in SCOPES.items() if policy.KEY_SCOPES[one] <= policy.ALLOWED[user.role]],
        "base_url": f"{public_address(request)}/v1",
        "duties": overview.duties(),
        "checks": overview.checks(session),
        "versions": overview.versions(),
        "space": overview.space(),
        "machine": navigation.machine_facts(),
    }
    return render(request, "settings.html", **values)


@pages.post("/settings/keys")
def create_key(
    request: Request,
    user: CurrentUser,
    session: Db,
    name: Annotated[str, Form()] = "",
    scope: Annotated[list[str] | None, Form()] = None,
    days: Annotated[Literal["", "30", "90", "365"], Form()] = "",
    project: Annotated[str, Form(max_length=80)] = "",
) -> Response:
    """The response is the page itself, because the key is shown once and stored nowhere, not even for a redirect."""
    _, text = auth.create_key(session, user, name, scope or (), float(days) if days else None, _project(session, user, project))
    return _page(request, user, session, new_key=text)


def _project(session: Db, user: User, text: str) -> uuid.UUID | None:
    return projects.membership(session, user, ids.parse_project(text)).project.id if text else None


@pages.post("/settings/keys/{key}/revoke")
def revoke_key(request: Request, user: CurrentUser, session: Db, key: str) -> Response:
    try:
        key_id = uuid.UUID(key)
    except ValueError:
        raise NotFound(gettext("No such API key.")) from None
    name = auth.revoke_key(session, user, key_id).name
    flash(request, gettext("The key “%(name)s” is revoked. Programs that use it have lost access.", name=name))
    return RedirectResponse("/settings#keys", 303)
