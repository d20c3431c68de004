"""Uploads in parts, as OpenAI's API has them: parts come in any order and side by side, and are joined in the order that the end names.

A part is a file beside the upload's own, and nothing else says that it is there; with an object storage it is a piece in it
(`upload_pieces.py`), whichever web process took it. What is joined goes the way of a resumable upload.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.datasets import resumable_upload, upload_pieces
from app.datasets.resumable_upload import UploadHandle
from app.db import transaction
from app.errors import BadField, Conflict, NotFound, TooLarge
from app.storage import files, places
from app.storage.atomic import disk_errors
from app.storage.files import Blob
from app.tables import User

MAX_PART_BYTES = 64 * 2**20
"""OpenAI's limit, which its client keeps to."""
MAX_PARTS = 10_000


def add(held: UploadHandle, blob: Blob) -> uuid.UUID:
    """Keep stored bytes as a part. Raises Conflict for an upload that has ended or has too many parts, TooLarge where the parts have
    more bytes than were announced."""
    try:
        _check_open(held)
        sizes = _sizes(held)
        if len(sizes) >= MAX_PARTS:
            raise Conflict(f"The upload has {len(sizes):,} parts.", hint="Send larger parts.")
        if sum(sizes) + blob.bytes > held.length:
            raise TooLarge(
                f"The parts have more bytes than the {held.length:,} announced.", hint="Create an upload of the right size.", param="data"
            )
        key = uuid.uuid4()
        if upload_pieces.are_shared():
            upload_pieces.keep(held.id, files.blob_path(blob.sha256), blob.bytes, key=key)
        else:
            with disk_errors():
                os.link(files.blob_path(blob.sha256), _path(held, key))
        return key
    finally:
        with transaction() as session:
            files.discard_if_unused(session, blob)


def complete(user: User, held: UploadHandle, parts: Sequence[uuid.UUID], md5: str | None) -> None:
    """Join the parts in this order into a file, and a dataset where it is one. Idempotent once it has succeeded.

    Raises Locked while another request does so, NotFound for a part of another upload, BadField where bytes are missing or the MD5
    (hexadecimal) is another.
    """
    if held.file is not None:
        return
    with resumable_upload.locked(held.path) as handle:
        with transaction() as session:
            ended = resumable_upload.get(session, user, held.id).file_id is not None
        if ended:  # by another request, while this one waited: the bytes are those of a file now, and must not be touched
            return
        _join(handle, held, parts, md5)
        resumable_upload.finish(user, held)
    for path in _parts(held):
        path.unlink(missing_ok=True)
    if upload_pieces.are_shared():
        for key in parts:
            places.drop(upload_pieces.place_of(held.id, key))


def _join(handle: int, held: UploadHandle, parts: Sequence[uuid.UUID], md5: str | None) -> None:
    """Write the parts into the upload's own file, open and locked as `handle`."""
    known = {part.id for part in upload_pieces.parts(held.id)} if upload_pieces.are_shared() else None
    if not all(key in known if known is not None else _path(held, key).is_file() for key in parts):
        raise NotFound("A part is not of this upload.", hint="Name the ids that the parts were answered with.", param="part_ids")
    paths = [_path(held, key) if known is None else upload_pieces.brought(upload_pieces.place_of(held.id, key)) for key in parts]
    size = sum(path.stat().st_size for path in paths)
    if size != held.length:
        raise BadField(
            f"The parts have {size:,} bytes, and {held.length:,} were announced.", hint="Send the missing parts.", param="part_ids"
        )
    digest = hashlib.md5(usedforsecurity=False)
    with disk_errors():
        os.ftruncate(handle, 0)
        for path in paths:
            with path.open("rb") as part:
                while piece := part.read(1 << 20):
                    digest.update(piece)
                    upload_pieces.write(handle, piece)
        if md5 is not None and digest.hexdigest() != md5.lower():
            os.ftruncate(handle, 0)
            raise BadField("The bytes have another MD5 than the one sent.", hint="Send the parts again.", param="md5")


def cancel(user: User, upload_id: uuid.UUID) -> UploadHandle:
    """Forget an upload and its parts. Raises Conflict for one that has become a file."""
    with transaction() as session:
        upload = resumable_upload.get(session, user, upload_id)
        held = resumable_upload.ticket(upload)
        _check_open(held)
        resumable_upload.stop(session, upload)
    return held


def _check_open(held: UploadHandle) -> None:
    if held.file is not None:
        raise Conflict("The upload is complete.", hint=f"Its file is {held.file}.")


def _sizes(held: UploadHandle) -> list[int]:
    """Bytes of each part that is there."""
    if upload_pieces.are_shared():
        return [part.bytes for part in upload_pieces.parts(held.id)]
    return [path.stat().st_size for path in _parts(held)]


def _parts(held: UploadHandle) -> Iterator[Path]:
    return held.path.parent.glob(f"{held.path.name}.*")


def _path(held: UploadHandle, key: uuid.UUID) -> Path:
    return held.path.with_name(f"{held.path.name}.{key.hex}")
