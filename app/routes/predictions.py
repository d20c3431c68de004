"""`/v1/predictions`, and the page “Run on a file”: a model applied to all rows of a file, whose result is the file with columns
added."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from app import schemas
from app.datasets import readers
from app.db import Db, transaction
from app.errors import BadField, StudioError
from app.evaluation import predictions
from app.evaluation import service as evaluations
from app.evaluation.predictions import KINDS, Format, PredictionOrder, to_json
from app.kit import forms, ids
from app.languages import gettext
from app.models import service as models
from app.schemas.openapi import BYTES, answers
from app.settings import get_settings
from app.storage import files
from app.tables import Evaluation, User
from app.web import templates as web_templates
from app.web.auth import CurrentUser
from app.web.multipart import Form, read_form
from app.web.pagination import After, Limit, page

pages = APIRouter()
api = APIRouter(prefix="/v1/predictions")
Json = dict[str, Any]
PAGE = "/playground/batch"
CONTENT = answers(None, 409, description="The file with its columns added.")
CONTENT[200] |= {"content": {"application/octet-stream": {"schema": BYTES}}}


@api.post("", operation_id="create_prediction", responses=answers(schemas.Prediction, 404, 409, 415))
def create(session: Db, user: CurrentUser, order: PredictionOrder) -> Json:
    """Queue a run of a model over an uploaded file."""
    return to_json(predictions.create(session, user, order))


@api.get("", operation_id="list_predictions", responses=answers(schemas.page_of(schemas.Prediction)))
def list_predictions(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Runs, newest first."""
    return page(evaluations.mine(user, KINDS), after, limit, "desc", to_json, session=session, key=ids.parse_prediction)


@api.get("/{prediction_id}", operation_id="retrieve_prediction", responses=answers(schemas.Prediction))
def retrieve(session: Db, user: CurrentUser, prediction_id: str) -> Json:
    """One run, with its progress."""
    return to_json(evaluations.get(session, user, ids.parse_prediction(prediction_id), KINDS))


@api.post("/{prediction_id}/cancel", operation_id="cancel_prediction", responses=answers(schemas.Prediction))
def cancel(session: Db, user: CurrentUser, prediction_id: str) -> Json:
    """Cancel a run. One that has ended is unchanged."""
    return to_json(evaluations.cancel(session, user, ids.parse_prediction(prediction_id), KINDS))


@api.delete("/{prediction_id}", operation_id="delete_prediction", responses=answers(schemas.Deleted))
def delete(session: Db, user: CurrentUser, prediction_id: str) -> Json:
    """Delete a run and its content; one that has not ended is cancelled."""
    predictions.delete(session, user, ids.parse_prediction(prediction_id))
    return {"id": prediction_id, "object": "prediction", "deleted": True}


@api.get("/{prediction_id}/content", operation_id="retrieve_prediction_content", responses=CONTENT, response_class=StreamingResponse)
def content(session: Db, user: CurrentUser, prediction_id: str, format: Annotated[Format | None, Query()] = None) -> Response:
    """The file with its columns added, as CSV or JSON lines; by default in the format of the input."""
    return _download(evaluations.get(session, user, ids.parse_prediction(prediction_id), KINDS), format)


def _download(found: Evaluation, format: Format | None) -> Response:
    name = found.spec["dataset"]["name"]
    kind = format or predictions.usual_format(name)
    stem = PurePath(name).name.split(".")[0] or "file"
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in stem)
    headers = {"content-disposition": f'attachment; filename="{safe}-predictions.{kind}"', "x-content-type-options": "nosniff"}
    return StreamingResponse(predictions.content(found, kind), media_type="application/octet-stream", headers=headers)


# Pages ------------------------------------------------------------------------------------------------------------------


@pages.get(PAGE)
def batch_page(request: Request, session: Db, user: CurrentUser, model: str = "") -> Response:
    return _page(request, session, user, {"model": model})


def _page(request: Request, session: Db, user: CurrentUser, typed: dict[str, str], fault: StudioError | None = None) -> Response:
    usable = [m for m in models.offered(session, user, typed.get("model")) if m.status == "ready" and not m.answered_elsewhere]
    rows = session.scalars(evaluations.mine(user, KINDS).order_by(Evaluation.created_at.desc(), Evaluation.id).limit(50)).all()
    return web_templates.render(
        request,
        "batch.html",
        status_code=fault.status if fault else 200,
        models=usable,
        rows=[(to_json(row), row.created_at) for row in rows],
        moving=any(row.status in evaluations.OPEN for row in rows),
        typed={"model": "", "column": "", "max_tokens": "128"} | typed,
        accepted=readers.ACCEPTED,
        usual=predictions.usual_format,
        fault=fault,
    )


@pages.post(PAGE)
async def start(request: Request, user: CurrentUser) -> Response:
    form = await read_form(request, get_settings().upload_limit_bytes)
    try:
        await run_in_threadpool(_start, user, form)
    except StudioError as fault:
        return await run_in_threadpool(_again, request, user, form, fault)
    return RedirectResponse(PAGE, status_code=303)


def _start(user: User, form: Form) -> None:
    upload, fields = form.upload, form.fields
    if upload is None or not upload.filename:
        raise BadField(gettext("No file was chosen."), hint=gettext("Choose a file and send the form again."), param="file")
    most = forms.whole_number(fields.get("max_tokens", "128").strip() or "128")
    if most is None or not 1 <= most <= 1024:
        raise BadField(gettext("Max tokens is a whole number from 1 to 1024."), param="max_tokens")
    try:
        with transaction() as session:
            file = files.create(session, user, upload.blob, upload.filename, "user_data")
            order = {"model": fields.get("model", ""), "file": ids.public(ids.FILE, file.id), "max_tokens": most}
            predictions.create(session, user, PredictionOrder(**order, column=fields.get("column", "").strip()[:200] or None))
    except StudioError:
        with transaction() as session:  # if the run cannot be created, the uploaded bytes are deleted too
            files.discard_if_unused(session, upload.blob)
        raise


def _again(request: Request, user: User, form: Form, fault: StudioError) -> Response:
    with transaction() as session:
        return _page(request, session, user, {name: form.fields.get(name, "") for name in ("model", "column", "max_tokens")}, fault)


@pages.get(PAGE + "/{prediction_id}/download")
def download(session: Db, user: CurrentUser, prediction_id: str, format: Annotated[Format | None, Query()] = None) -> Response:
    return _download(evaluations.get(session, user, ids.parse_prediction(prediction_id), KINDS), format)


@pages.post(PAGE + "/{prediction_id}/cancel")
def cancel_page(session: Db, user: CurrentUser, prediction_id: str) -> Response:
    evaluations.cancel(session, user, ids.parse_prediction(prediction_id), KINDS)
    return RedirectResponse(PAGE, status_code=303)


@pages.post(PAGE + "/{prediction_id}/delete")
def delete_page(request: Request, session: Db, user: CurrentUser, prediction_id: str) -> Response:
    predictions.delete(session, user, ids.parse_prediction(prediction_id))
    web_templates.flash(request, gettext("The predictions were deleted."))
    return RedirectResponse(PAGE, status_code=303)
