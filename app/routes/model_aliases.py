"""Model aliases of a user: `/v1/model_aliases`, and the forms on a model's page."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field

from app import schemas
from app.db import Db
from app.errors import StudioError
from app.models import aliases
from app.models import service as models
from app.routes.models import show_model
from app.schemas.openapi import answers
from app.web.auth import CurrentUser
from app.web.templates import flash

api = APIRouter(prefix="/v1", tags=["model_aliases"])
pages = APIRouter()


class AliasOrder(BaseModel, extra="forbid"):
    model: str = Field(min_length=1, max_length=512, description="The model that shall answer from now on.")


@api.get("/model_aliases", operation_id="list_model_aliases", responses=answers(schemas.list_of(schemas.ModelAlias)))
def list_aliases(session: Db, user: CurrentUser) -> dict[str, Any]:
    """Your aliases, by name."""
    return {"object": "list", "data": [aliases.to_json(one) for one in aliases.list_(session, user)], "has_more": False}


@api.put("/model_aliases/{alias:path}", operation_id="set_model_alias", responses=answers(schemas.ModelAlias, 404, 409))
def set_alias(session: Db, user: CurrentUser, alias: str, order: AliasOrder) -> dict[str, Any]:
    """Point an alias to a model, from the next request on. An existing alias is moved."""
    return aliases.to_json(aliases.set_(session, user, alias, order.model))


@api.delete("/model_aliases/{alias:path}", operation_id="delete_model_alias", responses=answers(schemas.Deleted, 404))
def delete_alias(session: Db, user: CurrentUser, alias: str) -> dict[str, Any]:
    """Remove an alias. The model is kept."""
    aliases.remove(session, user, alias)
    return {"id": alias, "object": "model.alias", "deleted": True}


@pages.post("/models/{key}/aliases")
def set_from_page(request: Request, session: Db, user: CurrentUser, key: str, alias: Annotated[str, Form(max_length=512)] = "") -> Response:
    """Create an alias of the model, or move one here."""
    model = models.get(session, user, key)
    try:
        with session.begin_nested():
            aliases.set_(session, user, alias.strip(), model.name)
    except StudioError as fault:
        return show_model(request, session, user, model, "use", fault, alias=alias)
    flash(request, f"{alias.strip()} points to {model.title} from now on.")
    return RedirectResponse(f"/models/{key}", status_code=303)


@pages.post("/models/{key}/aliases/remove")
def remove_from_page(request: Request, session: Db, user: CurrentUser, key: str, alias: Annotated[str, Form(max_length=512)]) -> Response:
    aliases.remove(session, user, alias)
    flash(request, f"The alias {alias} was removed.")
    return RedirectResponse(f"/models/{key}", status_code=303)
