"""`/v1/evals`, as OpenAI's clients call it, and its pages."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from app import schemas
from app.db import Db, on_commit
from app.errors import NotFound
from app.evals import service as evals
from app.kit import ids
from app.languages import gettext, mark
from app.schemas.openapi import answers
from app.tables import Eval, EvalItem, EvalRun, User
from app.web.auth import CurrentUser
from app.web.background import wake
from app.web.navigation import MenuPage
from app.web.pagination import After, Limit, Offset, Order, page
from app.web.templates import flash, render

pages = APIRouter()
MENU = (MenuPage(mark("API evals"), "/evals", "evaluation", 18),)
api = APIRouter(prefix="/v1/evals")
Json = dict[str, Any]
RUN = "/{eval_id}/runs/{run_id}"
ITEMS_ON_A_PAGE = 50


@api.post("", operation_id="create_eval", responses=answers(schemas.Eval, 404, 409, status=201), status_code=201)
def create(session: Db, user: CurrentUser, order: schemas.CreateEval) -> Json:
    """Criteria for the answers of models, which its runs are graded by."""
    made = evals.create(session, user, order.name or "", order.data_source_config, order.testing_criteria, order.metadata)
    return evals.to_json(made)


@api.get("", operation_id="list_evals", responses=answers(schemas.page_of(schemas.Eval)))
def list_evals(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20, order: Order = "asc", order_by: Literal["created_at", "updated_at"] = "created_at") -> Json:  # fmt: skip
    """Evals of the project. They do not change but by name, so both orders are that of their making."""
    return page(evals.mine(user), after, limit, order, evals.to_json, session=session, key=_eval_key)


@api.get("/{eval_id}", operation_id="retrieve_eval", responses=answers(schemas.Eval))
def retrieve(session: Db, user: CurrentUser, eval_id: str) -> Json:
    """One eval."""
    return evals.to_json(_get(session, user, eval_id))


@api.post("/{eval_id}", operation_id="update_eval", responses=answers(schemas.Eval))
def update(session: Db, user: CurrentUser, eval_id: str, order: schemas.ChangeEval) -> Json:
    """Change the name or the metadata of an eval."""
    found = _get(session, user, eval_id)
    found.name = order.name or found.name
    if "metadata" in order.model_fields_set:
        found.user_metadata = dict(order.metadata) if order.metadata is not None else None
    session.flush()
    return evals.to_json(found)


@api.delete("/{eval_id}", operation_id="delete_eval", responses=answers(schemas.DeletedEval))
def delete(session: Db, user: CurrentUser, eval_id: str) -> Json:
    """Delete an eval and its runs."""
    evals.delete_eval(session, _get(session, user, eval_id))
    return {"object": "eval.deleted", "deleted": True, "eval_id": eval_id}


@api.post("/{eval_id}/runs", operation_id="create_eval_run", responses=answers(schemas.EvalRun, 404, 409, status=201), status_code=201)
def create_run(request: Request, session: Db, user: CurrentUser, eval_id: str, order: schemas.CreateEvalRun) -> Json:
    """Queue a run: a model is asked about every item, or the items bring answers, and each answer is graded."""
    found = _get(session, user, eval_id)
    on_commit(session, lambda: wake(request.app))
    return evals.run_json(evals.create_run(session, user, found, order.name or "", order.data_source, order.metadata))


@api.get("/{eval_id}/runs", operation_id="list_eval_runs", responses=answers(schemas.page_of(schemas.EvalRun)))
def list_runs(
    session: Db,
    user: CurrentUser,
    eval_id: str,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
    status: Literal["queued", "in_progress", "completed", "canceled", "failed"] | None = None,
) -> Json:
    """Runs of an eval."""
    query = evals.runs_of(user, _get(session, user, eval_id), status)
    return page(query, after, limit, order, evals.run_json, session=session, key=_run_key)


@api.get(RUN, operation_id="retrieve_eval_run", responses=answers(schemas.EvalRun))
def retrieve_run(session: Db, user: CurrentUser, eval_id: str, run_id: str) -> Json:
    """One run: how far it is, and how many items passed."""
    return evals.run_json(_run(session, user, eval_id, run_id))


@api.post(f"{RUN}/cancel", operation_id="cancel_eval_run", responses=answers(schemas.EvalRun))
def cancel(session: Db, user: CurrentUser, eval_id: str, run_id: str) -> Json:
    """Cancel a run. What was graded is kept; one that has ended is unchanged."""
    return evals.run_json(evals.cancel(session, _run(session, user, eval_id, run_id)))


@api.post(RUN, operation_id="cancel_eval_run_of_older_clients", responses=answers(schemas.EvalRun))
def cancel_of_older_clients(session: Db, user: CurrentUser, eval_id: str, run_id: str) -> Json:
    """The same at the address that clients 1.x and 2.x call."""
    return cancel(session, user, eval_id, run_id)


@api.delete(RUN, operation_id="delete_eval_run", responses=answers(schemas.DeletedEvalRun))
def delete_run(session: Db, user: CurrentUser, eval_id: str, run_id: str) -> Json:
    """Delete a run and its output items."""
    evals.delete_run(session, _run(session, user, eval_id, run_id))
    return {"object": "eval.run.deleted", "deleted": True, "run_id": run_id}


@api.get(f"{RUN}/output_items", operation_id="list_eval_output_items", responses=answers(schemas.page_of(schemas.EvalOutputItem)))
def list_items(
    session: Db,
    user: CurrentUser,
    eval_id: str,
    run_id: str,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
    status: Literal["pass", "fail", "error"] | None = None,
) -> Json:
    """Graded items of a run, in the order in which they were graded."""
    run = _run(session, user, eval_id, run_id)
    return page(evals.items_of(run, status), after, limit, order, lambda row: evals.item_json(run, row), session=session, key=_item_key)


@api.get(f"{RUN}/output_items/{{output_item_id}}", operation_id="retrieve_eval_output_item", responses=answers(schemas.EvalOutputItem))
def retrieve_item(session: Db, user: CurrentUser, eval_id: str, run_id: str, output_item_id: str) -> Json:
    """One graded item."""
    run = _run(session, user, eval_id, run_id)
    row = session.scalar(evals.items_of(run).where(EvalItem.id == _item_key(output_item_id)))
    if row is None:
        raise NotFound(f"No such item of this run: {output_item_id[:80]}", param="output_item_id")
    return evals.item_json(run, row)


def _eval_key(text: str) -> Any:
    return ids.parse(ids.EVAL, text, param="eval_id")


def _run_key(text: str) -> Any:
    return ids.parse(ids.EVAL_RUN, text, param="run_id")


def _item_key(text: str) -> Any:
    return ids.parse(ids.EVAL_ITEM, text, param="output_item_id")


def _get(session: Db, user: User, text: str) -> Eval:
    return evals.get(session, user, _eval_key(text))


def _run(session: Db, user: User, eval_id: str, run_id: str) -> EvalRun:
    return evals.get_run(session, user, _get(session, user, eval_id).id, _run_key(run_id))


# Pages ------------------------------------------------------------------------------------------------------------------


@pages.get("/evals")
def evals_page(request: Request, session: Db, user: CurrentUser) -> Response:
    rows = session.scalars(evals.mine(user).order_by(Eval.created_at.desc(), Eval.id).limit(100)).all()
    newest = {one.id: session.scalar(_newest(user, one).limit(1)) for one in rows}
    shown = [(evals.to_json(one), one.created_at, newest[one.id] and _shown(newest[one.id])) for one in rows]
    return render(request, "evals.html", rows=shown)


@pages.get("/evals/{eval_id}")
def eval_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    eval_id: str,
    run: str = "",
    status: Literal["", "pass", "fail", "error"] = "",
    offset: Offset = 0,
) -> Response:
    found = _get(session, user, eval_id)
    rows = session.scalars(_newest(user, found).limit(50)).all()
    chosen = _run(session, user, eval_id, run) if run else next(iter(rows), None)
    items = _items(session, chosen, status, offset) if chosen else []
    return render(
        request,
        "eval.html",
        found=evals.to_json(found),
        runs=[_shown(one) for one in rows],
        chosen=_shown(chosen) if chosen else None,
        items=[evals.item_json(chosen, row) for row in items[:ITEMS_ON_A_PAGE]] if chosen else [],
        more=len(items) > ITEMS_ON_A_PAGE,
        status=status,
        offset=offset,
        step=ITEMS_ON_A_PAGE,
        moving=any(one.status in evals.OPEN for one in rows),
    )


def _newest(user: User, found: Eval) -> Any:
    return evals.runs_of(user, found).order_by(EvalRun.created_at.desc(), EvalRun.id)


def _items(session: Db, run: EvalRun, status: str, offset: int) -> list[EvalItem]:
    query = evals.items_of(run, status or None).order_by(EvalItem.place).offset(offset).limit(ITEMS_ON_A_PAGE + 1)
    return list(session.scalars(query))


def _shown(run: EvalRun) -> Json:
    return evals.run_json(run) | {"rate": evals.pass_rate(run), "at": run.created_at}


@pages.post("/evals/{eval_id}/delete")
def delete_from_page(request: Request, session: Db, user: CurrentUser, eval_id: str) -> Response:
    found = _get(session, user, eval_id)
    evals.delete_eval(session, found)
    flash(request, gettext("%(name)s was deleted.", name=found.name))
    return RedirectResponse("/evals", status_code=303)


@pages.post("/evals/{eval_id}/runs/{run_id}/{action}")
def act(request: Request, session: Db, user: CurrentUser, eval_id: str, run_id: str, action: Literal["cancel", "delete"]) -> Response:
    run = _run(session, user, eval_id, run_id)
    if action == "cancel":
        evals.cancel(session, run)
    else:
        evals.delete_run(session, run)
        flash(request, gettext("%(name)s was deleted.", name=run.name))
    return RedirectResponse(f"/evals/{eval_id}", status_code=303)
