"""Searches: `/v1/searches`, and the pages under `/searches`. Both call `app.searches.service`."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request
from fastapi.responses import RedirectResponse, Response

from app import naming, schemas
from app.db import Db
from app.errors import StudioError
from app.jobs.config_file import as_curl
from app.kit import ids
from app.languages import gettext, mark
from app.routes.naming import NewName
from app.schemas.openapi import answers, takes
from app.searches import service as searches
from app.searches import table
from app.views import search as search_view
from app.views import search_form
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.order_forms import Posted, once
from app.web.pagination import After, Limit, page
from app.web.templates import flash, render

api = APIRouter(prefix="/v1")
pages = APIRouter()
MENU = (MenuPage(mark("Search"), "/searches", "training", 32),)
Json = dict[str, Any]
ON_A_PAGE = 50


@api.post("/searches", operation_id="create_search", responses=answers(schemas.Search, 404, 409), openapi_extra=takes(schemas.CreateSearch))
def create(
    session: Db, user: CurrentUser, body: Annotated[Json, Body()], idempotency_key: Annotated[str | None, Header(max_length=255)] = None
) -> Json:
    """Search the best settings: trials of which the best third goes on at each rung, until the best is repeated with another seed."""
    return table.to_json(session, searches.create(session, user, searches.read_order(body), idempotency_key))


@api.post(
    "/searches/plan", operation_id="plan_search", responses=answers(schemas.SearchPlan, 404, 409), openapi_extra=takes(schemas.CreateSearch)
)
def plan(session: Db, user: CurrentUser, body: Annotated[Json, Body()]) -> Json:
    """What a search would try, and how long it takes. Nothing is queued."""
    return table.plan_json(session, user, searches.read_order(body))


@api.get("/searches", operation_id="list_searches", responses=answers(schemas.page_of(schemas.Search)))
def list_searches(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Searches, newest first."""
    query = searches.mine(user)
    return page(query, after, limit, "desc", lambda row: table.to_json(session, row), session=session, key=ids.parse_search)


@api.get("/searches/{search_id}", operation_id="retrieve_search", responses=answers(schemas.Search))
def retrieve(session: Db, user: CurrentUser, search_id: str) -> Json:
    """The trials of a search so far, and the winner once there is one."""
    return table.to_json(session, searches.get(session, user, ids.parse_search(search_id)))


@api.patch("/searches/{search_id}", operation_id="update_search", responses=answers(schemas.Search, 404))
def rename(session: Db, user: CurrentUser, search_id: str, change: NewName) -> Json:
    """Rename a search."""
    found = searches.get(session, user, ids.parse_search(search_id))
    naming.rename(session, found, change.name)
    session.flush()
    return table.to_json(session, found)


@api.post("/searches/{search_id}/cancel", operation_id="cancel_search", responses=answers(schemas.Search))
def cancel(session: Db, user: CurrentUser, search_id: str) -> Json:
    """Cancel a search and its runs that have not ended. One that has ended is unchanged."""
    return table.to_json(session, searches.cancel(session, user, ids.parse_search(search_id)))


@api.delete("/searches/{search_id}", operation_id="delete_search", responses=answers(schemas.Deleted, 409))
def delete(session: Db, user: CurrentUser, search_id: str) -> Json:
    """Delete a search. Its runs are kept. Refused while it runs."""
    searches.delete(session, user, ids.parse_search(search_id))
    return {"id": search_id, "object": "search", "deleted": True}


# Pages ----------------------------------------------------------------------------------------------------------------


@pages.get("/searches")
def list_page(request: Request, user: CurrentUser, session: Db, shown: Annotated[int, Query(ge=1, le=5000)] = ON_A_PAGE) -> Response:
    found = searches.newest(session, user, shown + 1)
    rows, more = search_view.rows(session, found[:shown]), shown + ON_A_PAGE if len(found) > shown else None
    return render(request, "searches.html", rows=rows, moving=any(row["status"] == "running" for row in rows), shown=shown, more=more)


@pages.get("/searches/new")
def new_search(request: Request, user: CurrentUser, session: Db) -> Response:
    return _form_page(request, session, user, request.query_params.multi_items())


@pages.post("/searches")
def order_search(request: Request, user: CurrentUser, session: Db, items: Posted) -> Response:
    form, typed = _read(session, user, items)
    if not form.ready or form.order is None:
        said = next(iter(form.errors.values()), gettext("something below is not right yet."))
        return _form_page(request, session, user, items, problem=said, status_code=400)
    order = form.order
    found = once(lambda key: searches.create(session, user, order, idempotency_key=key), typed.get("key") or uuid.uuid4().hex)
    return RedirectResponse(search_view.url(found), status_code=303)


def _read(session: Db, user: CurrentUser, items: list[tuple[str, str]]) -> tuple[search_form.SearchForm, dict[str, str]]:
    typed = {name: value for name, value in items if name != "strategy"}
    return search_form.search_form(session, user, typed, [value for name, value in items if name == "strategy"]), typed


def _form_page(
    request: Request, session: Db, user: CurrentUser, items: list[tuple[str, str]], *, problem: str | None = None, status_code: int = 200
) -> Response:
    form, typed = _read(session, user, items)
    command = ""
    if form.ready and form.order:
        command = as_curl(f"{str(request.base_url).rstrip('/')}/v1/searches", search_form.body_of(form.order))
    key = typed.get("key") or uuid.uuid4().hex
    answer = render(
        request, "new_search.html", status_code=status_code, form=form, key=key, problem=problem, command=command, ids=ids
    )  # fmt: skip
    if "hx-request" in request.headers:  # an estimate: the URL follows the form, so that Back and reload show the same
        answer.headers["hx-replace-url"] = form.address
    return answer


@pages.get("/searches/{search_id}")
def search_page(request: Request, user: CurrentUser, session: Db, search_id: str, part: str = "") -> Response:
    """The whole page; with `?part=live` the part that changes while it runs."""
    context = search_view.page(session, searches.get(session, user, ids.parse_search(search_id)))
    return render(request, "parts/search_live.html" if part == "live" else "search.html", **context)


@pages.post("/searches/{search_id}/cancel")
def stop_search(request: Request, user: CurrentUser, session: Db, search_id: str) -> Response:
    found = searches.cancel(session, user, ids.parse_search(search_id))
    flash(request, gettext("%(name)s is ended. Its runs that had not ended are being stopped.", name=found.name))
    return RedirectResponse(search_view.url(found), status_code=303)


@pages.post("/searches/{search_id}/delete")
def delete_search(request: Request, user: CurrentUser, session: Db, search_id: str) -> Response:
    found = searches.get(session, user, ids.parse_search(search_id))
    try:
        searches.delete(session, user, found.id)
    except StudioError as error:
        flash(request, str(error), "bad")
        return RedirectResponse(search_view.url(found), status_code=303)
    flash(request, gettext("%(name)s was deleted. Its runs and their models are still there.", name=found.name))
    return RedirectResponse("/searches", status_code=303)
