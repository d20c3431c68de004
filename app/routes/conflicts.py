"""Contradictory rows, shown in groups with the actions that resolve them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response

from app import objectives
from app.datasets import conflicts, inspections, row_editor
from app.db import Db, transaction
from app.errors import BadField, Conflict
from app.languages import gettext
from app.routes.versions import dataset_of, path_of
from app.tables import User
from app.web.auth import CurrentUser
from app.web.pagination import MAX_NUMBER, PageNumber
from app.web.templates import flash, render

pages = APIRouter()
WAIT_SECONDS = 2.5


@pages.get("/datasets/{key}/conflicts")
def show(request: Request, user: CurrentUser, key: str, page: PageNumber = 1, line: PageNumber | None = None) -> Response:
    """A page of conflicts, or the one that includes a given line. While the version is still being parsed, the page says so and
    refreshes."""
    return _page(request, user, key, page, line)


def _page(request: Request, user: User, key: str, page: int, line: int | None, problem: BadField | Conflict | None = None) -> Response:
    with transaction() as session:
        dataset = dataset_of(session, user, key)
        if dataset.status == "error":
            return RedirectResponse(path_of(dataset), 303)
        groups, more = conflicts.groups(session, dataset, page, line) if dataset.status == "ready" else ([], False)
        asked = conflicts.ask(session, dataset, groups) if groups else None
    found = inspections.wait(asked.id, WAIT_SECONDS) if asked is not None else None
    return render(
        request,
        "conflicts.html",
        status_code=problem.status if problem else 200,
        dataset=dataset,
        key=key,
        groups=groups,
        rows={item["line"]: item for item in (found.result or {}).get("rows", [])} if found else {},
        fault=found.error if found else None,
        waiting=dataset.status == "reading" or (found is not None and found.status in ("waiting", "running")),
        parts=row_editor.parts,
        labels=list((dataset.report or {}).get("labels", {}))[:500] if objectives.get(dataset.task).classifies else [],
        page=page,
        more=more,
        line=line,
        problem=problem,
    )


@pages.post("/datasets/{key}/conflicts")
def resolve(
    request: Request,
    user: CurrentUser,
    session: Db,
    key: str,
    first: Annotated[int, Form(ge=1, le=MAX_NUMBER)],
    do: Annotated[str, Form(max_length=40)],
    label: Annotated[str, Form(max_length=1000)] = "",
) -> Response:
    """Resolve one conflict, then redirect to the remaining ones in the new version."""
    dataset = dataset_of(session, user, key)
    try:
        new = conflicts.resolve(session, user, dataset, first, do, label)
    except (BadField, Conflict) as error:
        return _page(request, user, key, 1, first, error)
    flash(request, gettext("Version %(new)s is created; version %(old)s is kept.", new=new.version, old=dataset.version))
    return RedirectResponse(f"{path_of(new)}/conflicts", 303)
