"""Which external server answers for which model: `/v1/engines`, and the form on a model's page."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from app import schemas
from app.db import Db, transaction
from app.errors import Forbidden, StudioError
from app.inference import external_server, external_servers, handover, playground
from app.inference.protocol import LLAMA_CPP
from app.kit.addresses import Address
from app.languages import gettext, localized
from app.models import service as models
from app.schemas.openapi import answers
from app.tables import JSON, Model, User
from app.web.auth import CurrentUser
from app.web.templates import flash

api = APIRouter(prefix="/v1", tags=["engines"])
pages = APIRouter()


class EngineOrder(BaseModel):
    model: str = Field(min_length=1, max_length=512, description="The model that the server shall answer for.")
    url: str = Field(
        min_length=1, max_length=512, description="One of the studio's engines, as GET /v1/engines lists them, or `llama.cpp`."
    )
    engine_model: str = Field(min_length=1, max_length=512, description="What that server calls the model; for llama.cpp a GGUF type.")
    via: str = Field("tokens", description="tokens: the studio renders the prompt; chat: the server does.")


def _may_change(user: User, model: Model | None = None) -> None:
    """Admins only: an external server receives every prompt that is sent to its models. llama.cpp runs here, so a model's owner may
    choose it, and leave it."""
    if user.role != "admin" and not (model is not None and model.project_id == user.project_id):
        raise Forbidden(gettext("Only an admin may choose the engine of a model."), hint=gettext("Ask an admin."), param="model")


@api.get("/engines", operation_id="list_engines", responses=answers(schemas.list_of(schemas.Engine), 403))
def list_engines(user: CurrentUser) -> dict[str, Any]:
    """Every engine of the settings with the models it serves, or the reason why it cannot be reached."""
    _may_change(user)
    return {"object": "list", "data": [look(address) for address in external_server.allowed().values()], "has_more": False}


def look(address: Address) -> JSON:
    try:
        return {"url": address.url, "object": "engine", "models": external_server.names(address), "error": None}
    except StudioError as error:
        return {"url": address.url, "object": "engine", "models": [], "error": {"code": error.code, "message": error.message}}


@api.post("/engines", operation_id="register_engine", responses=answers(schemas.EngineOfModel, 404, 409))
def register(session: Db, user: CurrentUser, order: EngineOrder) -> dict[str, Any]:
    """Have an engine of the settings answer for a model."""
    model = models.get(session, user, order.model)
    _may_change(user, model if order.url == LLAMA_CPP else None)
    external_servers.register(model, order.url, order.engine_model, order.via)
    return _said(model)


@api.post("/engines/{model:path}/check", operation_id="check_engine", responses=answers(schemas.EngineCheck, 400, 404, 503))
async def check(user: CurrentUser, model: str) -> dict[str, Any]:
    """Compare what the engine of a model answers with the weights that are here, so that one that answers with the base instead of the
    adapter is found out."""
    who = await run_in_threadpool(_speaker, user, model)
    return {"object": "engine.check", "id": who.name, "engine": who.engine.host if who.engine else "", **await handover.check(user, who)}


def _speaker(user: User, name: str) -> playground.ResolvedModel:
    with transaction() as session:
        return playground.speaker(session, user, name)


@pages.post("/models/{key}/engine/check")
async def check_from_page(request: Request, user: CurrentUser, key: str) -> Response:
    """The same from the page, which tells the result."""
    who = await run_in_threadpool(_speaker_of_key, user, key)
    found = await handover.check(user, who)
    if found["fault"]:
        flash(request, found["fault"]["message"])
    else:
        distance = localized(f"{found['distance']:.2g}")
        flash(request, gettext("It computes this model: %(distance)s nats per token apart.", distance=distance))
    return RedirectResponse(f"/models/{key}?tab=settings", status_code=303)


def _speaker_of_key(user: User, key: str) -> playground.ResolvedModel:
    with transaction() as session:
        return playground.speaker(session, user, models.get(session, user, key).name)


@api.delete("/engines/{model:path}", operation_id="remove_engine", responses=answers(schemas.EngineOfModel, 409))
def remove(session: Db, user: CurrentUser, model: str) -> dict[str, Any]:
    """Return a model to the built-in engine."""
    row = models.get(session, user, model)
    _may_change(user, None if row.answered_elsewhere else row)
    external_servers.remove(row)
    return _said(row) | {"deleted": True}


def _said(model: Model) -> dict[str, Any]:
    return {"object": "model.engine", "id": model.name, "engine": external_servers.to_json(model)}


@pages.post("/models/{key}/engine")
def from_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    key: str,
    url: Annotated[str, Form(max_length=512)] = "",
    engine_model: Annotated[str, Form(max_length=512)] = "",
    via: Annotated[str, Form(max_length=20)] = "tokens",
) -> Response:
    """Register a server; an empty URL returns the model to the built-in engine."""
    model = models.get(session, user, key)
    _may_change(user, model if url == LLAMA_CPP or not (url or model.answered_elsewhere) else None)
    if not url:
        external_servers.remove(model)
        flash(request, gettext("%(model)s runs on the built-in engine.", model=model.title))
    else:
        engine = external_servers.register(model, url, engine_model, via)
        flash(request, gettext("%(model)s runs on %(server)s from now on.", model=model.title, server=engine.host))
    return RedirectResponse(f"/models/{key}?tab=settings", status_code=303)
