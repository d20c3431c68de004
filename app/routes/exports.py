"""`/v1/exports` and `/v1/models/{model}/exports`: models written in formats for other programs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from app import schemas
from app.db import Db
from app.errors import StudioError
from app.kit import ids
from app.languages import gettext
from app.models import export_json, exports
from app.models import service as models
from app.ownership import mine, owned
from app.routes.models import show_model
from app.schemas.openapi import BYTES, answers
from app.tables import Export, Model
from app.web.auth import CurrentUser
from app.web.pagination import After, Limit, page
from app.web.templates import flash

pages = APIRouter()
api = APIRouter(prefix="/v1")
Json = dict[str, Any]
CONTENT = answers(None, 409, description="The bytes of the file.") | {
    206: {"description": "The bytes that a Range header asked for.", "content": {"application/octet-stream": {"schema": BYTES}}},
    416: {"description": "The file has no such range."},
}
CONTENT[200] |= {"content": {"application/octet-stream": {"schema": BYTES}}}


@api.post("/models/{model:path}/exports", operation_id="create_export", responses=answers(schemas.Export, 404, 409, 415, 507))
def create(session: Db, user: CurrentUser, model: str, order: schemas.CreateExport) -> Json:
    """Queue the files of a model, a checkpoint or a blend in a format. Each is run and compared with the model before it is handed out."""
    return export_json.to_json(exports.create(session, user, model, order.format, order.types, order.system or ""))


@api.get("/exports", operation_id="list_exports", responses=answers(schemas.page_of(schemas.Export)))
def list_exports(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Exports, newest first."""
    return page(mine(Export, user), after, limit, "desc", export_json.to_json, session=session, key=ids.parse_export)


@api.get("/exports/{export_id}", operation_id="retrieve_export", responses=answers(schemas.Export))
def retrieve(session: Db, user: CurrentUser, export_id: str) -> Json:
    """One export: how far it is, its files and their parity table."""
    return export_json.to_json(owned(session, Export, user, ids.parse_export(export_id)))


@api.post("/exports/{export_id}/cancel", operation_id="cancel_export", responses=answers(schemas.Export))
def cancel(session: Db, user: CurrentUser, export_id: str) -> Json:
    """Stop an export, or its push to the hub. One that has ended stays as it is."""
    return export_json.to_json(exports.cancel(session, user, ids.parse_export(export_id)))


@api.post("/exports/{export_id}/push", operation_id="push_export", responses=answers(schemas.Export, 409, 503))
def push(session: Db, user: CurrentUser, export_id: str, order: schemas.PushExport) -> Json:
    """Push the files of an export that has succeeded to the Hugging Face hub. `hub` tells how far it is. A push that broke off goes on where
    it was when it is asked for again."""
    return export_json.to_json(exports.push(session, user, ids.parse_export(export_id), order.repo, order.private, order.token))


@api.delete("/exports/{export_id}", operation_id="delete_export", responses=answers(schemas.Deleted))
def delete(session: Db, user: CurrentUser, export_id: str) -> Json:
    """Delete an export and its files; one that has not ended is stopped."""
    exports.delete(session, user, ids.parse_export(export_id))
    return {"id": export_id, "object": "export", "deleted": True}


@api.get("/exports/{export_id}/files/{name:path}", operation_id="retrieve_export_file", responses=CONTENT, response_class=FileResponse)
def file(session: Db, user: CurrentUser, export_id: str, name: str) -> Response:
    """One file. A Range header gives a part of it, so a broken download can go on."""
    path = exports.file_path(owned(session, Export, user, ids.parse_export(export_id)), name)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name, headers={"x-content-type-options": "nosniff"})


# The page of the model ------------------------------------------------------------------------------------------------


@pages.post("/models/{key}/exports")
def create_from_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    key: str,
    format: Annotated[str, Form()] = "",
    types: Annotated[list[str] | None, Form()] = None,
    system: Annotated[str, Form()] = "",
) -> Response:
    model = models.get(session, user, key)
    try:
        exports.create(session, user, model.name, format, types, system)
    except StudioError as fault:
        return show_model(request, session, user, model, "export", fault)
    return _back(model)


@pages.post("/exports/{export_id}/cancel")
def cancel_from_page(session: Db, user: CurrentUser, export_id: str) -> Response:
    return _back(session.get_one(Model, exports.cancel(session, user, ids.parse_export(export_id)).model_id))


@pages.post("/exports/{export_id}/push")
def push_from_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    export_id: str,
    repo: Annotated[str, Form(max_length=200)] = "",
    token: Annotated[str, Form(max_length=500)] = "",
    public: Annotated[str, Form()] = "",
) -> Response:
    model = session.get_one(Model, owned(session, Export, user, ids.parse_export(export_id)).model_id)
    try:
        exports.push(session, user, ids.parse_export(export_id), repo.strip(), not public, token.strip() or None)
    except StudioError as fault:
        return show_model(request, session, user, model, "export", fault)
    return _back(model)


@pages.post("/exports/{export_id}/delete")
def delete_from_page(request: Request, session: Db, user: CurrentUser, export_id: str) -> Response:
    found = owned(session, Export, user, ids.parse_export(export_id))
    exports.delete(session, user, found.id)
    flash(request, gettext("The export was deleted."))
    return _back(session.get_one(Model, found.model_id))


def _back(model: Model) -> Response:
    return RedirectResponse(f"/models/{ids.public(ids.MODEL, model.id)}?tab=export#exports", status_code=303)
