"""`/v1/batches`, as OpenAI's clients call it, and the page Batches."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from app import schemas
from app.batches import service as batches
from app.batches.service import ENDPOINTS, BatchOrder, to_json
from app.db import Db, on_commit, transaction
from app.errors import BadField, NotFound, StudioError
from app.kit import ids
from app.languages import gettext
from app.schemas.openapi import answers
from app.settings import get_settings
from app.storage import files
from app.tables import File, RequestBatch, User
from app.web import templates as web_templates
from app.web.auth import CurrentUser
from app.web.background import wake
from app.web.multipart import Form, read_form
from app.web.pagination import After, Limit, page

pages = APIRouter()
api = APIRouter(prefix="/v1/batches")
Json = dict[str, Any]
PAGE = "/playground/batches"


@api.post("", operation_id="create_batch", responses=answers(schemas.Batch, 404))
def create(request: Request, session: Db, user: CurrentUser, order: BatchOrder) -> Json:
    """Queue the requests of an uploaded file. They are answered with the lowest priority, within 24 hours."""
    on_commit(session, lambda: wake(request.app))
    return to_json(batches.create(session, user, order))


@api.get("", operation_id="list_batches", responses=answers(schemas.page_of(schemas.Batch)))
def list_batches(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Batches, newest first."""
    return page(batches.mine(user), after, limit, "desc", to_json, session=session, key=ids.parse_batch)


@api.get("/{batch_id}", operation_id="retrieve_batch", responses=answers(schemas.Batch))
def retrieve(session: Db, user: CurrentUser, batch_id: str) -> Json:
    """One batch, with how many of its requests were answered."""
    return to_json(batches.get(session, user, ids.parse_batch(batch_id)))


@api.post("/{batch_id}/cancel", operation_id="cancel_batch", responses=answers(schemas.Batch))
def cancel(session: Db, user: CurrentUser, batch_id: str) -> Json:
    """Send no further request of a batch. What was answered is kept in its files; one that has ended is unchanged."""
    return to_json(batches.cancel(session, user, ids.parse_batch(batch_id)))


# The page ---------------------------------------------------------------------------------------------------------------


@pages.get(PAGE)
def batches_page(request: Request, session: Db, user: CurrentUser) -> Response:
    return _page(request, session, user)


def _page(request: Request, session: Db, user: CurrentUser, endpoint: str = "", fault: StudioError | None = None) -> Response:
    query = batches.mine(user).join(File, File.id == RequestBatch.input_file_id).add_columns(File.filename)
    rows = session.execute(query.order_by(RequestBatch.created_at.desc(), RequestBatch.id).limit(50)).all()
    return web_templates.render(
        request,
        "batches.html",
        status_code=fault.status if fault else 200,
        rows=[(to_json(row), filename, row.created_at) for row, filename in rows],
        moving=any(row.status == "open" for row, _ in rows),
        endpoints=ENDPOINTS,
        endpoint=endpoint,
        fault=fault,
    )


@pages.post(PAGE)
async def start(request: Request, user: CurrentUser) -> Response:
    form = await read_form(request, get_settings().upload_limit_bytes)
    try:
        await run_in_threadpool(_start, user, form)
    except StudioError as fault:
        return await run_in_threadpool(_again, request, user, form, fault)
    wake(request.app)
    return RedirectResponse(PAGE, status_code=303)


def _start(user: User, form: Form) -> None:
    upload, endpoint = form.upload, form.fields.get("endpoint", "")
    if upload is None or not upload.filename:
        raise BadField(gettext("No file was chosen."), hint=gettext("Choose a file and send the form again."), param="file")
    if endpoint not in ENDPOINTS:
        message = gettext("No such endpoint: %(endpoint)s", endpoint=endpoint[:80])
        raise BadField(message, hint=gettext("Choose one of %(names)s.", names=", ".join(ENDPOINTS)), param="endpoint")
    try:
        with transaction() as session:
            file = files.create(session, user, upload.blob, upload.filename, "batch")
            order = {"input_file_id": ids.public(ids.FILE, file.id), "endpoint": endpoint, "completion_window": "24h"}
            batches.create(session, user, BatchOrder.model_validate(order))
    except StudioError:
        with transaction() as session:  # if the batch cannot be created, the uploaded bytes are deleted too
            files.discard_if_unused(session, upload.blob)
        raise


def _again(request: Request, user: User, form: Form, fault: StudioError) -> Response:
    with transaction() as session:
        return _page(request, session, user, form.fields.get("endpoint", ""), fault)


@pages.post(PAGE + "/{batch_id}/cancel")
def cancel_from_page(session: Db, user: CurrentUser, batch_id: str) -> Response:
    batches.cancel(session, user, ids.parse_batch(batch_id))
    return RedirectResponse(PAGE, status_code=303)


@pages.get(PAGE + "/{batch_id}/{which}")
def download(session: Db, user: CurrentUser, batch_id: str, which: str) -> Response:
    """The output file, or the file of errors."""
    batch = batches.get(session, user, ids.parse_batch(batch_id))
    key = {"output": batch.output_file_id, "errors": batch.error_file_id}.get(which)
    if key is None:
        raise NotFound(gettext("The batch has no such file."), hint=gettext("Its page shows the files that it has."))
    path, file = files.content(session, user, key), files.get(session, user, key)
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename, headers={"x-content-type-options": "nosniff"})
