"""Models of the Hugging Face hub: `GET /v1/hub/models`, and the page to search them and add one."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from app import schemas
from app.errors import StudioError
from app.machines.heartbeats import training_machine
from app.models import hub_search, hub_token
from app.schemas.openapi import answers
from app.settings import get_settings
from app.web import templates as web_templates
from app.web.auth import CurrentUser

pages = APIRouter()
api = APIRouter(prefix="/v1")
PAGE = "/models/hub"


@api.get("/hub/models", operation_id="list_hub_models", responses=answers(schemas.list_of(schemas.HubModel), 503))
def list_hub_models(user: CurrentUser, search: str, limit: Annotated[int, Query(ge=1, le=100)] = hub_search.LIMIT) -> dict[str, Any]:
    """Models of the hub with weights as safetensors, most downloaded first, and whether LoRA on them fits the machine that trains."""
    found = hub_search.search(search, training_machine(), limit)
    return {"object": "list", "data": [hub_search.to_json(one) for one in found], "has_more": False}


@pages.get(PAGE)
def hub_page(request: Request, user: CurrentUser, search: str = "") -> Response:
    return _page(request, user, search)


def _page(request: Request, user: CurrentUser, search: str = "", fault: StudioError | None = None) -> Response:
    found: list[hub_search.HubModel] | None = None
    offline = get_settings().offline
    if search and not offline and fault is None:
        try:
            found = hub_search.search(search, training_machine())
        except StudioError as error:
            fault = error
    return web_templates.render(
        request,
        "hub.html",
        status_code=fault.status if fault else 200,
        search=search,
        found=found,
        offline=offline,
        fault=fault,
        admin=user.role == "admin",
        token=hub_token.read() is not None,
        saved=hub_token.path().is_file(),
    )


@pages.post(f"{PAGE}/token")
def keep_token(request: Request, user: CurrentUser, token: Annotated[str, Form(max_length=300)] = "") -> Response:
    """Save the studio's token; an empty one forgets it."""
    try:
        hub_token.keep(token) if token.strip() else hub_token.forget()
    except StudioError as fault:
        return _page(request, user, fault=fault)
    return RedirectResponse(PAGE, status_code=303)
