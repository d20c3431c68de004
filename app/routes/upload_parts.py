"""`/v1/uploads`: large files in parts, as OpenAI's client sends them (`client.uploads.upload_file_chunked`)."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from app import schemas
from app.datasets import resumable_upload, upload_parts
from app.db import transaction
from app.errors import BadField
from app.kit import ids
from app.routes import files as file_routes
from app.schemas.openapi import answers, takes
from app.storage import files
from app.tables import Upload, User
from app.web.auth import CurrentUser
from app.web.multipart import read_form

api = APIRouter(prefix="/v1/uploads")
Json = dict[str, Any]


@api.post("", operation_id="create_upload_in_parts", responses=answers(schemas.PartedUpload, 409, 415))
def create(user: CurrentUser, body: schemas.CreateUpload) -> Json:
    """Begin an upload of so many bytes; it expires after a day."""
    wishes = {"expires_after": str(body.expires_after.seconds)} if body.expires_after else {}
    with transaction() as session:
        return to_json(resumable_upload.begin(session, user, body.bytes, body.filename, body.purpose, wishes))


@api.post(
    "/{upload_id}/parts",
    operation_id="create_upload_part",
    responses=answers(schemas.UploadPart, 404, 409, 410),
    openapi_extra=takes(schemas.CreateUploadPart, "multipart/form-data"),
)
async def add(request: Request, user: CurrentUser, upload_id: str) -> Json:
    """Add a part of at most 64 MiB. Parts may come side by side and in any order."""
    held = resumable_upload.ticket(await run_in_threadpool(_find, user, upload_id))
    form = await read_form(request, upload_parts.MAX_PART_BYTES, "data", passing=True)
    if form.upload is None:
        raise BadField("The form has no part.", hint="Send the bytes in the field called “data”.", param="data")
    key = await run_in_threadpool(upload_parts.add, held, form.upload.blob)
    return {"id": ids.public(ids.PART, key), "object": "upload.part", "created_at": int(time.time()), "upload_id": upload_id}


@api.post("/{upload_id}/complete", operation_id="complete_upload", responses=answers(schemas.PartedUpload, 404, 409, 410, 415, 423))
def complete(user: CurrentUser, upload_id: str, body: schemas.CompleteUpload) -> Json:
    """Join the parts in the order of `part_ids` into a file; with the purpose fine-tune it becomes a dataset."""
    upload = _find(user, upload_id)
    keys = [ids.parse(ids.PART, part, param="part_ids") for part in body.part_ids]
    upload_parts.complete(user, resumable_upload.ticket(upload), keys, body.md5)
    with transaction() as session:
        found = session.get_one(Upload, upload.id)
        assert found.file_id is not None, "it has just become a file"
        return to_json(found) | {"file": file_routes.to_json(files.get(session, user, found.file_id))}


@api.post("/{upload_id}/cancel", operation_id="cancel_upload", responses=answers(schemas.PartedUpload, 404, 409, 410))
def cancel(user: CurrentUser, upload_id: str) -> Json:
    """Forget an upload and its parts."""
    upload = _find(user, upload_id)
    upload_parts.cancel(user, upload.id)
    return to_json(upload) | {"status": "cancelled"}


def _find(user: User, upload_id: str) -> Upload:
    with transaction() as session:
        return resumable_upload.get(session, user, ids.parse(ids.UPLOAD, upload_id, param="upload_id"))


def to_json(upload: Upload) -> Json:
    return {
        "id": ids.public(ids.UPLOAD, upload.id),
        "object": "upload",
        "bytes": upload.length,
        "created_at": int(upload.created_at.timestamp()),
        "expires_at": int(upload.expires_at.timestamp()),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": "completed" if upload.file_id else "pending",
        "file": None,
    }
