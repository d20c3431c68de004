"""Comparisons: `/v1/comparisons`, and the pages under `/compare`. Both call `app.evaluation.comparisons`."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request
from fastapi import Form as FormField
from fastapi.responses import RedirectResponse, Response
from sqlalchemy import ColumnElement

from app import schemas
from app.db import Db
from app.errors import StudioError
from app.evaluation import comparison_json, comparison_plan, comparisons
from app.jobs.config_file import as_curl
from app.kit import ids
from app.languages import gettext, mark
from app.schemas.openapi import answers, takes
from app.tables import Comparison
from app.views import comparison as comparison_view
from app.views import comparison_form, lists
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.order_forms import Posted, once
from app.web.pagination import After, Limit, page
from app.web.templates import flash, render

api = APIRouter(prefix="/v1")
pages = APIRouter()
MENU = (MenuPage(mark("Comparisons"), "/compare", "training", 30), MenuPage(mark("Learning curves"), "/compare/curves", "evaluation", 40))
Json = dict[str, Any]

Wish = Annotated[lists.ListQuery, Query()]


# JSON ---------------------------------------------------------------------------------------------------------------


@api.post(
    "/comparisons",
    operation_id="create_comparison",
    responses=answers(schemas.Comparison, 404, 409),
    openapi_extra=takes(schemas.CreateComparison),
)
def create(
    session: Db, user: CurrentUser, body: Annotated[Json, Body()], idempotency_key: Annotated[str | None, Header(max_length=255)] = None
) -> Json:
    """Queue one job for each strategy and base model, or for each share of the data."""
    return comparison_json.to_json(session, comparisons.create(session, user, comparisons.read_order(body), idempotency_key))


@api.post(
    "/comparisons/plan",
    operation_id="plan_comparison",
    responses=answers(schemas.ComparisonPlan, 404, 409),
    openapi_extra=takes(schemas.CreateComparison),
)
def plan(session: Db, user: CurrentUser, body: Annotated[Json, Body()]) -> Json:
    """The jobs that a comparison would queue and refuse, and their total duration when they run one after the other. Nothing is
    queued."""
    found = comparison_plan.planned(session, user, comparisons.read_order(body))
    comparison_plan.refuse_many(found)
    jobs = [{"model": one.model, "strategy": one.strategy, "title": one.title, "estimate": one.estimate} for one in found.jobs]
    return {"object": "comparison.plan", "data": jobs, "refused": found.refused, "seconds": found.seconds}


@api.get("/comparisons", operation_id="list_comparisons", responses=answers(schemas.page_of(schemas.Comparison)))
def list_comparisons(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Comparisons, newest first."""
    return page(
        comparisons.mine(user),
        after,
        limit,
        "desc",
        lambda row: comparison_json.to_json(session, row),
        session=session,
        key=ids.parse_comparison,
    )


@api.get("/comparisons/{comparison_id}", operation_id="retrieve_comparison", responses=answers(schemas.Comparison))
def retrieve(session: Db, user: CurrentUser, comparison_id: str) -> Json:
    """The table of a comparison, with the results of its jobs so far."""
    return comparison_json.to_json(session, comparisons.get(session, user, ids.parse_comparison(comparison_id)))


@api.post("/comparisons/{comparison_id}/cancel", operation_id="cancel_comparison", responses=answers(schemas.Comparison, 409))
def cancel(session: Db, user: CurrentUser, comparison_id: str) -> Json:
    """Cancel every job of a comparison that has not ended."""
    return comparison_json.to_json(session, comparisons.cancel(session, user, ids.parse_comparison(comparison_id)))


@api.delete("/comparisons/{comparison_id}", operation_id="delete_comparison", responses=answers(schemas.Deleted, 409))
def delete(session: Db, user: CurrentUser, comparison_id: str) -> Json:
    """Delete a comparison. Its jobs are kept. Refused while one of them has not ended."""
    comparisons.delete(session, user, ids.parse_comparison(comparison_id))
    return {"id": comparison_id, "object": "comparison", "deleted": True}


# Pages --------------------------------------------------------------------------------------------------------------


@pages.get("/compare")
def comparison_list(request: Request, user: CurrentUser, session: Db, wish: Wish) -> Response:
    return _list_page(request, session, user, "/compare", wish)


@pages.get("/compare/curves")
def learning_curves(request: Request, user: CurrentUser, session: Db, wish: Wish) -> Response:
    """The comparisons that are learning curves."""
    return _list_page(request, session, user, "/compare/curves", wish, Comparison.kind == "learning_curve")


def _list_page(
    request: Request, session: Db, user: CurrentUser, path: str, wish: lists.ListQuery, *wanted: ColumnElement[bool]
) -> Response:
    bar = lists.comparisons_bar(session, user, path, wish)
    found = session.scalars(lists.comparisons(user, bar, *wanted).limit(wish.shown + 1)).all()
    bar.more, rows = len(found) > wish.shown, comparison_view.rows(session, found[: wish.shown])
    return render(request, "comparisons.html", curves=path != "/compare", bar=bar, some=bool(rows) or bar.narrowed, rows=rows)


@pages.get("/compare/new")
def new_comparison(request: Request, user: CurrentUser, session: Db) -> Response:
    return _form_page(request, session, user, request.query_params.multi_items())


@pages.post("/compare")
def order_comparison(request: Request, user: CurrentUser, session: Db, items: Posted) -> Response:
    form, typed = _read(session, user, items)
    if form.unseen:
        return _form_page(request, session, user, items, problem=form.unseen, status_code=409)
    if not form.ready or form.order is None:
        said = next(iter(form.errors.values()), gettext("something below is not right yet."))
        return _form_page(request, session, user, items, problem=said, status_code=400)
    order = form.order
    found = once(lambda key: comparisons.create(session, user, order, idempotency_key=key), typed.get("key") or uuid.uuid4().hex)
    return RedirectResponse(comparison_view.url(found), status_code=303)


def _read(session: Db, user: CurrentUser, items: list[tuple[str, str]]) -> tuple[comparison_form.CompareForm, dict[str, str]]:
    """Of a repeated field the last value counts (a checkbox overrules the hidden field before it), except for the strategies, the
    base models and the datasets of a matrix, which are lists."""
    lists = {name: [value for key, value in items if key == name] for name in ("strategy", "base", "on")}
    typed = {name: value for name, value in items if name not in lists}
    return comparison_form.compare_form(session, user, typed, lists["strategy"], lists["base"], lists["on"]), typed


def _form_page(
    request: Request, session: Db, user: CurrentUser, items: list[tuple[str, str]], *, problem: str | None = None, status_code: int = 200
) -> Response:
    form, typed = _read(session, user, items)
    command = ""
    if form.ready and form.order:
        command = as_curl(f"{str(request.base_url).rstrip('/')}/v1/comparisons", comparison_form.body_of(form.order))
    answer = render(
        request,
        "new_comparison.html",
        status_code=status_code,
        form=form,
        key=typed.get("key") or uuid.uuid4().hex,
        problem=problem,
        command=command,
        ids=ids,
    )
    if "hx-request" in request.headers:  # an estimate: the URL follows the form, so that Back and reload show the same
        answer.headers["hx-replace-url"] = form.address
    return answer


@pages.get("/compare/{comparison_id}")
def comparison_page(
    request: Request,
    user: CurrentUser,
    session: Db,
    comparison_id: str,
    x: Annotated[str, Query(max_length=40)] = "",
    y: Annotated[str, Query(max_length=40)] = "",
    part: str = "",
) -> Response:
    """The whole page; with `?part=live` the part that changes while its jobs run. `x` and `y` are the columns of the plot."""
    found = comparisons.get(session, user, ids.parse_comparison(comparison_id))
    context = comparison_view.page(session, found, x, y)
    return render(request, "parts/comparison_live.html" if part == "live" else "comparison.html", **context)


@pages.post("/compare/{comparison_id}/keep")
def keep_result(request: Request, user: CurrentUser, session: Db, comparison_id: str, job: Annotated[str, FormField()]) -> Response:
    found = comparisons.get(session, user, ids.parse_comparison(comparison_id))
    model = comparisons.keep(session, found, ids.parse(ids.JOB, job, param="job"))
    said = gettext("The model of %(name)s is kept: it is listed under Models and can be chosen everywhere.", name=model.title)
    flash(request, said)
    return RedirectResponse(comparison_view.url(found), status_code=303)


@pages.post("/compare/{comparison_id}/cancel")
def stop_comparison(request: Request, user: CurrentUser, session: Db, comparison_id: str) -> Response:
    found = comparisons.cancel(session, user, ids.parse_comparison(comparison_id))
    flash(request, gettext("The runs of %(name)s that had not ended are being stopped.", name=found.name))
    return RedirectResponse(comparison_view.url(found), status_code=303)


@pages.post("/compare/{comparison_id}/delete")
def delete_comparison(request: Request, user: CurrentUser, session: Db, comparison_id: str) -> Response:
    found = comparisons.get(session, user, ids.parse_comparison(comparison_id))
    try:
        comparisons.delete(session, user, found.id)
    except StudioError as error:
        flash(request, str(error), "bad")
        return RedirectResponse(comparison_view.url(found), status_code=303)
    flash(request, gettext("%(name)s was deleted. Its runs and their models are still there.", name=found.name))
    return RedirectResponse("/compare", status_code=303)
