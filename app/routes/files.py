"""Files, as OpenAI's client calls them, and the dataset report of a file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool

from app import schemas
from app.datasets import readers
from app.datasets import service as datasets
from app.db import Db, transaction
from app.errors import BadField, StudioError, problem_json
from app.kit import ids
from app.schemas.openapi import BYTES, answers, takes
from app.settings import get_settings
from app.storage import files
from app.tables import Dataset, File, Finding, User
from app.web import pagination as cursor
from app.web.auth import CurrentUser
from app.web.multipart import Form, read_form

api = APIRouter(prefix="/v1")
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The bytes.", "content": {"application/octet-stream": {"schema": BYTES}}},
    206: {"description": "The bytes that a Range header asked for.", "content": {"application/octet-stream": {"schema": BYTES}}},
    416: {"description": "The file has no such range."},
}


def to_json(file: File) -> dict[str, Any]:
    return {
        "id": ids.public(ids.FILE, file.id),
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": file.status_details,
        "expires_at": int(file.expires_at.timestamp()) if file.expires_at else None,
    }


@api.post(
    "/files",
    operation_id="create_file",
    responses=answers(schemas.UploadedFile, 415),
    openapi_extra=takes(schemas.CreateFile, "multipart/form-data"),
)
async def create(request: Request, user: CurrentUser) -> dict[str, Any]:
    """Upload a file; with the purpose fine-tune it becomes a dataset. The body is streamed to disk, and no database connection is
    held meanwhile."""
    form = await read_form(request, get_settings().upload_limit_bytes)
    return await run_in_threadpool(_create, user, form)


def _create(user: User, form: Form) -> dict[str, Any]:
    if form.upload is None:
        raise BadField("The form has no file.", hint="Send the bytes in the part called “file”.", param="file")
    try:
        purpose = form.fields.get("purpose", "")
        files.check_upload_purpose(purpose)
        with transaction() as session:
            if purpose == "fine-tune":
                readers.kind_of(form.upload.filename)
            file = files.create(session, user, form.upload.blob, form.upload.filename, purpose, _expires_after(form.fields))
            if purpose == "fine-tune":
                _check_not_empty(file)
                datasets.create(session, user, file)
            return to_json(file)
    except StudioError:
        with transaction() as session:  # if the file cannot be recorded, its bytes are deleted too
            files.discard_if_unused(session, form.upload.blob)
        raise


def _check_not_empty(file: File) -> None:
    if file.bytes == 0:
        raise BadField(f"The file “{file.filename}” is empty.", hint="Upload a file with at least one row.", param="file")


def _expires_after(fields: dict[str, str]) -> int | None:
    """The form fields `expires_after[anchor]` and `expires_after[seconds]`."""
    text, anchor = fields.get("expires_after[seconds]"), fields.get("expires_after[anchor]")
    if anchor not in (None, "created_at"):
        raise BadField(f"The anchor “{anchor[:40]}” is not known.", hint="Use created_at.", param="expires_after[anchor]")
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise BadField(f"“{text[:40]}” is not a number of seconds.", hint="Use 3600 to 2592000.", param="expires_after[seconds]") from None


@api.get("/files", operation_id="list_files", responses=answers(schemas.page_of(schemas.UploadedFile)))
def list_(
    user: CurrentUser,
    session: Db,
    after: cursor.After = None,
    limit: cursor.Limit = 10_000,
    order: cursor.Order = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """Files, newest first."""
    return cursor.page(files.list_(session, user, purpose), after, limit, order, to_json)


@api.get("/files/{file_id}", operation_id="retrieve_file", responses=answers(schemas.UploadedFile))
def retrieve(user: CurrentUser, session: Db, file_id: str) -> dict[str, Any]:
    """The metadata of a file."""
    return to_json(files.get(session, user, ids.parse(ids.FILE, file_id, param="file_id")))


@api.delete("/files/{file_id}", operation_id="delete_file", responses=answers(schemas.Deleted, 409))
def delete(user: CurrentUser, session: Db, file_id: str) -> dict[str, Any]:
    """Delete a file and the datasets parsed from it. Refused while a job needs one."""
    file = files.get(session, user, ids.parse(ids.FILE, file_id, param="file_id"))
    datasets.delete_file(session, user, file.id)
    return {"id": file_id, "object": "file", "deleted": True}


@api.get("/files/{file_id}/content", operation_id="retrieve_file_content", responses=CONTENT)
def content(user: CurrentUser, session: Db, file_id: str) -> Response:
    """The content, byte for byte. It is always sent as a download, so that a browser never renders it as a page of the studio."""
    file = files.get(session, user, ids.parse(ids.FILE, file_id, param="file_id"))
    path = files.content(session, user, file.id)
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


@api.get("/files/{file_id}/report", operation_id="retrieve_file_report", responses=answers(schemas.FileReport))
def report(
    user: CurrentUser,
    session: Db,
    file_id: str,
    after: Annotated[int, Query(ge=0, le=cursor.MAX_NUMBER, description="Findings before the first one wanted.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    rule: str | None = None,
    severity: Literal["error", "warning", "note"] | None = None,
    sort: str = "line",
) -> dict[str, Any]:
    """The report of the file's newest dataset, with one page of its issues."""
    dataset = datasets.for_file(session, user, ids.parse(ids.FILE, file_id, param="file_id"))
    found, more = datasets.findings(session, dataset, rule, severity, sort, after, limit)
    later = datasets.failed_later(session, dataset)
    failed = later and {"dataset": ids.public(ids.DATASET, later.id), "version": later.version, "error": problem_json(later.error)}
    return report_json(dataset, found, more) | {"failed_later": failed}


def report_json(dataset: Dataset, found: list[Finding], more: bool) -> dict[str, Any]:
    stats = datasets.stats(dataset)
    return {
        "object": "dataset.report",
        "dataset": ids.public(ids.DATASET, dataset.id),
        "status": dataset.status,
        "progress": dataset.progress,
        "error": problem_json(dataset.error),
        "format": dataset.format,
        "task": dataset.task,
        "mapping": dataset.mapping,
        "reason": (dataset.report or {}).get("reason"),
        "rows": dataset.rows,
        "good_rows": dataset.good_rows,
        "characters": stats.characters,
        "tokens": stats.tokens,
        "trained_tokens": stats.trained_tokens,
        "longest": stats.longest,
        "new_tokens": [dict(zip(("text", "count", "saved"), one, strict=True)) for one in (dataset.report or {}).get("new_tokens", [])],
        "rules": datasets.rules(dataset),
        "unknown_roles": datasets.unknown_roles(dataset),
        "findings": [
            {key: getattr(finding, key) for key in ("id", "line", "column", "rule", "severity", "value", "message", "fix")}
            for finding in found
        ],
        "has_more": more,
    }
