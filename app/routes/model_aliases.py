"""Model aliases of a project: `/v1/model_aliases`, the page of an alias, and the forms on a model's page."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from app import schemas
from app.db import Db
from app.errors import StudioError
from app.evaluation import gates, train_queue
from app.kit import ids
from app.languages import gettext, ngettext
from app.models import aliases
from app.models import service as models
from app.routes.models import show_model
from app.schemas.openapi import answers
from app.tables import User
from app.views import alias as alias_view
from app.web.auth import CurrentUser
from app.web.pagination import After, Limit, page
from app.web.templates import flash, render

api = APIRouter(prefix="/v1", tags=["model_aliases"])
pages = APIRouter()
Json = dict[str, Any]


class AliasReturn(BaseModel, extra="forbid"):
    reason: str | None = Field(None, min_length=1, max_length=1000, description="Why, for the history.")


NO_REASON = AliasReturn(reason=None)


class AliasCandidate(BaseModel, extra="forbid"):
    model: str = Field(min_length=1, max_length=512, description="The model that the alias shall be moved to.")


@api.get("/model_aliases", operation_id="list_model_aliases", responses=answers(schemas.list_of(schemas.ModelAlias)))
def list_aliases(session: Db, user: CurrentUser) -> Json:
    """Your aliases, by name."""
    return {"object": "list", "data": [aliases.to_json(one) for one in aliases.list_(session, user)], "has_more": False}


@api.put("/model_aliases/{alias:path}", operation_id="set_model_alias", responses=answers(schemas.ModelAlias, 404, 409))
def set_alias(session: Db, user: CurrentUser, alias: str, order: gates.AliasOrder) -> Json:
    """Point an alias to a model, from the next request on, set its gate, or both. An existing alias is moved; where it has a gate, only to a model that passes it."""
    return aliases.to_json(gates.apply(session, user, alias, order))


@api.post("/model_aliases/{alias:path}/back", operation_id="set_model_alias_back", responses=answers(schemas.ModelAlias, 404, 409))
def back(session: Db, user: CurrentUser, alias: str, order: AliasReturn = NO_REASON) -> Json:
    """Point an alias to the model before its last move, without asking its gate. Called again, it goes one move further back."""
    return aliases.to_json(aliases.go_back(session, user, alias, order.reason))


@api.post(
    "/model_aliases/{alias:path}/evaluations",
    operation_id="create_model_alias_evaluations",
    responses=answers(schemas.list_of(schemas.Evaluation), 404, 409),
)
def evaluate(session: Db, user: CurrentUser, alias: str, order: AliasCandidate) -> Json:
    """Start the evaluations that the gate of an alias needs before it is moved to this model, and that do not exist yet."""
    target, model = aliases.get(session, user, alias), models.get(session, user, order.model)
    made = gates.start(session, user, target, model)
    return {"object": "list", "data": [train_queue.evaluation_json(session, one) for one in made], "has_more": False}


@api.get(
    "/model_aliases/{alias:path}/moves",
    operation_id="list_model_alias_moves",
    responses=answers(schemas.page_of(schemas.ModelAliasMove), 404),
)
def list_moves(session: Db, user: CurrentUser, alias: str, after: After = None, limit: Limit = 20) -> Json:
    """Where an alias pointed, newest first: from, to, who, why and what its gate measured."""
    aliases.get(session, user, alias)
    return page(aliases.moves(user, alias), after, limit, "desc", aliases.move_json, session=session, key=ids.parse_alias_move)


@api.delete("/model_aliases/{alias:path}", operation_id="delete_model_alias", responses=answers(schemas.Deleted, 404))
def delete_alias(session: Db, user: CurrentUser, alias: str) -> Json:
    """Remove an alias and the history of its moves. The model is kept."""
    aliases.remove(session, user, alias)
    return {"id": alias, "object": "model.alias", "deleted": True}


# On a model's page ------------------------------------------------------------------------------------------------------


@pages.post("/models/{key}/aliases")
def set_from_page(request: Request, session: Db, user: CurrentUser, key: str, alias: Annotated[str, Form(max_length=512)] = "") -> Response:
    """Create an alias of the model, or move one here. Where a gate refuses, the page of the alias shows what it needs."""
    model = models.get(session, user, key)
    try:
        with session.begin_nested():
            gates.apply(session, user, alias.strip(), gates.AliasOrder(model=key))
    except StudioError as fault:
        if fault.code in ("evaluations_missing", "gate_not_passed"):
            return RedirectResponse(_url(alias.strip(), model=key), status_code=303)
        return show_model(request, session, user, model, "use", fault, alias=alias)
    flash(request, gettext("%(alias)s points to %(model)s from now on.", alias=alias.strip(), model=model.title))
    return RedirectResponse(f"/models/{key}", status_code=303)


@pages.post("/models/{key}/aliases/remove")
def remove_from_page(request: Request, session: Db, user: CurrentUser, key: str, alias: Annotated[str, Form(max_length=512)]) -> Response:
    aliases.remove(session, user, alias)
    flash(request, gettext("The alias %(alias)s was removed.", alias=alias))
    return RedirectResponse(f"/models/{key}", status_code=303)


# The page of an alias ---------------------------------------------------------------------------------------------------


def _url(alias: str, **query: str) -> str:
    return f"/aliases/{quote(alias)}" + (f"?{urlencode(query)}" if query else "")


def _show(request: Request, session: Session, user: User, alias: str, fault: StudioError | None = None, **given: Any) -> Response:
    context = alias_view.context(session, user, alias, **given)
    return render(request, "alias.html", status_code=fault.status if fault else 200, fault=fault, **context)


@pages.get("/aliases/{alias:path}")
def alias_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    alias: str,
    model: Annotated[str, Query(max_length=512)] = "",
    shown: Annotated[int, Query(ge=1, le=5000)] = alias_view.SHOWN,
) -> Response:
    """The model of an alias, its gate, and where it pointed before. With `model`, whether that one passes the gate."""
    return _show(request, session, user, alias, wanted=model, shown=shown)


@pages.post("/aliases/{alias:path}/model")
def move_from_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    alias: str,
    model: Annotated[str, Form(max_length=512)],
    force: Annotated[bool, Form()] = False,
    reason: Annotated[str, Form(max_length=1000)] = "",
) -> Response:
    try:
        with session.begin_nested():
            found = gates.apply(session, user, alias, gates.AliasOrder(model=model or None, force=force, reason=reason.strip() or None))
    except StudioError as fault:
        told = None if fault.code in ("evaluations_missing", "gate_not_passed") else fault  # those are shown with the model
        return _show(request, session, user, alias, told, wanted=model, reason=reason)
    flash(request, gettext("%(alias)s points to %(model)s from now on.", alias=alias, model=found.model.title))
    return RedirectResponse(_url(alias), status_code=303)


@pages.post("/aliases/{alias:path}/gate")
def gate_from_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    alias: str,
    dataset: Annotated[str, Form(max_length=100)] = "",
    grader: Annotated[str, Form(max_length=100)] = "",
    max_forgetting: Annotated[str, Form(max_length=20)] = "",
) -> Response:
    """Set the gate of an alias; without a dataset it is removed."""
    typed = {"dataset": dataset, "grader": grader, "max_forgetting": max_forgetting}
    try:
        with session.begin_nested():
            gates.apply(session, user, alias, gates.AliasOrder(gate=alias_view.gate_of(typed)))
    except StudioError as fault:
        return _show(request, session, user, alias, fault, typed=typed)
    said = gettext("The gate of %(alias)s was set.", alias=alias) if dataset else gettext("The gate of %(alias)s was removed.", alias=alias)
    flash(request, said)
    return RedirectResponse(_url(alias), status_code=303)


@pages.post("/aliases/{alias:path}/evaluations")
def evaluate_from_page(
    request: Request, session: Db, user: CurrentUser, alias: str, model: Annotated[str, Form(max_length=512)]
) -> Response:
    try:
        with session.begin_nested():
            made = gates.start(session, user, aliases.get(session, user, alias), models.get(session, user, model))
    except StudioError as fault:
        return _show(request, session, user, alias, fault, wanted=model)
    started = ngettext("%(num)s evaluation started.", "%(num)s evaluations started.", len(made))
    flash(request, started if made else gettext("Nothing is missing."))
    return RedirectResponse(_url(alias, model=model), status_code=303)


@pages.post("/aliases/{alias:path}/back")
def back_from_page(request: Request, session: Db, user: CurrentUser, alias: str) -> Response:
    try:
        with session.begin_nested():
            found = aliases.go_back(session, user, alias)
    except StudioError as fault:
        return _show(request, session, user, alias, fault)
    flash(request, gettext("%(alias)s points to %(model)s again.", alias=alias, model=found.model.title))
    return RedirectResponse(_url(alias), status_code=303)
