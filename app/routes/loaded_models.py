"""Which models are loaded: `/v1/models/loaded`, and the fragment that shows it. This module is included before `models`, whose
`/models/{key}` would match the path otherwise."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app import schemas
from app.db import Db
from app.inference import residency
from app.schemas.openapi import answers
from app.web.auth import CurrentUser
from app.web.renamed import deprecated_path, page_moved
from app.web.templates import render

api = APIRouter(prefix="/v1", tags=["models"])
pages = APIRouter()


@api.get("/models/loaded", operation_id="list_loaded_models", responses=answers(schemas.LoadedModels))
def list_loaded_models(session: Db, user: CurrentUser) -> dict[str, Any]:
    """The models that each generate worker has loaded, and its eviction rule."""
    rows = [residency.to_json(session, user, one) for one in residency.everyone()]
    return {"object": "list", "data": rows, "has_more": False, "rule": residency.rule()}


deprecated_path(api, "/standby", list_loaded_models)


page_moved(pages, "/standby", "/models/loaded")


@pages.get("/models/loaded")
def part(request: Request, session: Db, user: CurrentUser, chip: bool = False) -> Response:
    """The list or its chip alone, which open pages poll."""
    return render(request, "parts/loaded.html" if chip else "parts/loaded_models.html", **residency.part(session, user))
