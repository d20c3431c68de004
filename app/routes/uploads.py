"""Resumable uploads over HTTP (tus 1.0), for any tus client; the upload page is one."""

from __future__ import annotations

import base64
import binascii
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from app.datasets import resumable_upload
from app.db import transaction
from app.errors import BadField, NotFound, StudioError, Unsupported
from app.schemas.openapi import BYTES, answers, header
from app.settings import get_settings
from app.tables import Upload, User
from app.web.auth import CurrentUser

VERSION = "1.0.0"
BASE = "/v1/tus"
ALWAYS = {"Tus-Resumable": VERSION, "Cache-Control": "no-store"}
"""Headers of every response, errors included."""


class OtherVersion(StudioError):
    """The client does not send `Tus-Resumable: 1.0.0`."""

    status, code, type = 412, "wrong_version", "invalid_request_error"
    headers = {"Tus-Version": VERSION}  # noqa: RUF012  # whoever adds to them makes a dict of their own


class TusRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except StudioError as fault:
                fault.headers = {**ALWAYS, **getattr(fault, "headers", {})}
                raise

        return answer


api = APIRouter(prefix="/v1", route_class=TusRoute)


# What the document says of the headers, in which all of tus is spoken ---------------------------------------------------

SPEAKS = header("Tus-Resumable", "1.0.0, the version of the protocol.")
LENGTH = header("Upload-Length", "Bytes of the whole file.", "integer")
OFFSET = header("Upload-Offset", "Bytes that are here already.", "integer")
METADATA = header("Upload-Metadata", "Pairs of a key and its value in Base64: filename, purpose, name and format.", required=False)


def _sends(**headers: str) -> dict[str, Any]:
    said = {"Tus-Resumable": "1.0.0"} | {name.replace("_", "-"): text for name, text in headers.items()}
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in said.items()}


EXPIRES, DATASET = "When the upload is forgotten.", "Id of the dataset that the file became."
ABILITIES = answers(None, status=204, headers=_sends(Tus_Version="1.0.0", Tus_Extension="What is spoken.", Tus_Max_Size="Bytes."))
BEGUN = answers(None, 412, 415, status=201, headers=_sends(Location="Where the bytes go.", Upload_Expires=EXPIRES))
HELD = answers(
    None,
    410,
    412,
    description="How far the upload is.",
    headers=_sends(Upload_Offset="Bytes.", Upload_Length="Bytes.", Upload_Expires=EXPIRES, Luthier_Dataset=DATASET),
)
APPENDED = answers(
    None, 409, 410, 412, 415, 423, status=204, headers=_sends(Upload_Offset="Bytes.", Upload_Expires=EXPIRES, Luthier_Dataset=DATASET)
)
STOPPED = answers(None, 410, 412, status=204, headers=_sends())
BODY = {"required": True, "content": {"application/offset+octet-stream": {"schema": BYTES}}}


def _answer(status: int, **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status_code=status, headers={**ALWAYS, **named})


def _check_version(request: Request) -> None:
    if request.headers.get("tus-resumable") != VERSION:
        raise OtherVersion("This address speaks tus 1.0.0.", hint="Send the header Tus-Resumable: 1.0.0.", param="Tus-Resumable")


def _number(request: Request, name: str) -> int:
    text = request.headers.get(name, "")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise BadField(f"The header {name} is missing or not a number.", hint="Send it as a whole number of bytes.", param=name)
    return int(text)


def _metadata(request: Request) -> dict[str, str]:
    """`filename d29ya3M=,name …`: comma-separated keys with base64 values."""
    found: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in request.headers.get("upload-metadata", "").split(","))):
        key, _, value = pair.partition(" ")
        try:
            found[key] = base64.b64decode(value, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise BadField(f"The value of “{key[:40]}” is not Base64 of UTF-8.", param="Upload-Metadata") from None
        if "\0" in found[key]:
            raise BadField(f"The value of “{key[:40]}” holds a NUL character.", hint="Remove it.", param="Upload-Metadata")
    return found


@api.options("/tus", operation_id="retrieve_upload_capabilities", responses=ABILITIES)
def abilities(user: CurrentUser) -> Response:
    """The protocol version, extensions and maximum size of this server."""
    limit = str(get_settings().upload_limit_bytes)
    return _answer(204, Tus_Version=VERSION, Tus_Extension="creation,expiration,termination", Tus_Max_Size=limit)


@api.post("/tus", status_code=201, operation_id="create_upload", responses=BEGUN, openapi_extra={"parameters": [SPEAKS, LENGTH, METADATA]})
def create(request: Request, user: CurrentUser) -> Response:
    """Create an upload. `Upload-Metadata` holds filename, and optionally purpose, name and format."""
    _check_version(request)
    said = _metadata(request)
    with transaction() as session:
        upload = resumable_upload.begin(
            session, user, _number(request, "upload-length"), said.get("filename", ""), said.get("purpose") or "fine-tune", said
        )
        return _answer(201, Location=f"{BASE}/{upload.id}", Upload_Expires=_when(upload))


def _when(upload: Upload) -> str:
    return upload.expires_at.astimezone(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")


def _find(user: User, key: str) -> tuple[resumable_upload.UploadHandle, str]:
    try:
        upload_id = uuid.UUID(key)
    except ValueError:
        raise NotFound("There is no such upload.", hint="Begin again.") from None
    with transaction() as session:
        upload = resumable_upload.get(session, user, upload_id)
        return resumable_upload.ticket(upload), _when(upload)


@api.head("/tus/{key}", operation_id="retrieve_upload", responses=HELD, openapi_extra={"parameters": [SPEAKS]})
def offset(request: Request, user: CurrentUser, key: str) -> Response:
    """The number of bytes received: the offset to resume from."""
    _check_version(request)
    held, when = _find(user, key)
    return _answer(200, Upload_Offset=str(held.offset), Upload_Length=str(held.length), Upload_Expires=when, **_became(held.dataset))


def _became(dataset: str | None) -> dict[str, str]:
    return {"Luthier_Dataset": dataset} if dataset else {}


@api.patch(
    "/tus/{key}",
    status_code=204,
    operation_id="append_upload",
    responses=APPENDED,
    openapi_extra={"parameters": [SPEAKS, OFFSET], "requestBody": BODY},
)
async def append(request: Request, user: CurrentUser, key: str) -> Response:
    """Append bytes. The request with the last bytes is answered when the dataset exists; the header Luthier-Dataset holds its id."""
    _check_version(request)
    if request.headers.get("content-type") != "application/offset+octet-stream":
        raise Unsupported("The bytes of an upload come as application/offset+octet-stream.", hint="Send that Content-Type.")
    start = _number(request, "upload-offset")
    held, when = await run_in_threadpool(_find, user, key)
    if held.file is None:
        at = await resumable_upload.append(held, start, _chunks(request))
    else:
        at = held.length
    if at < held.length:
        return _answer(204, Upload_Offset=str(at), Upload_Expires=when)
    dataset = await run_in_threadpool(resumable_upload.finish, user, held)
    return _answer(204, Upload_Offset=str(at), **_became(dataset))


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """The body in chunks; it ends where the client disconnects, and the bytes received are kept."""
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        return


@api.delete("/tus/{key}", status_code=204, operation_id="delete_upload", responses=STOPPED, openapi_extra={"parameters": [SPEAKS]})
def stop(request: Request, user: CurrentUser, key: str) -> Response:
    """Delete an incomplete upload."""
    _check_version(request)
    held, _ = _find(user, key)
    with transaction() as session:
        upload = session.get(Upload, held.id)
        if upload is not None:
            resumable_upload.stop(session, upload)
    return _answer(204)
