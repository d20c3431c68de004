"""What the web processes share of an upload that is not complete yet.

Without an object storage they all see one data folder, and the upload's file in it says everything. With one the bytes that came are
stored in pieces (`uploads/<upload>/<piece>`), and rows say which, so that any process goes on where another one was. A row is added
after its bytes are stored, and only one of two requests that send the same bytes adds it.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import and_, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.db import transaction
from app.errors import NotFound, StudioError
from app.languages import gettext
from app.storage import objects, places
from app.storage.atomic import disk_errors
from app.tables import Upload, UploadPiece

PIECE_BYTES = objects.PART_BYTES
"""As much is sent before it is stored: what a process that dies takes along at most."""


class Locked(StudioError):
    """Another request is appending to this upload."""

    status, code, type = 423, "locked", "invalid_request_error"

    def __init__(self) -> None:
        said = gettext("Another request is sending bytes of this upload.")
        super().__init__(said, hint=gettext("Wait a moment, and ask with HEAD where to go on."))


class Gone(NotFound):
    """The upload has expired, or was stopped."""

    status, code = 410, "expired"


class KeptPart(NamedTuple):
    """A part whose place in the file is not known yet."""

    id: uuid.UUID
    bytes: int


def are_shared() -> bool:
    return objects.storage() is not None


def received(session: Session, upload_id: uuid.UUID) -> int:
    """Bytes of the file that are stored; pieces follow each other without a gap."""
    end = func.coalesce(func.max(UploadPiece.start + UploadPiece.bytes), 0)
    return int(session.scalar(select(end).where(UploadPiece.upload_id == upload_id)) or 0)


def parts(upload_id: uuid.UUID) -> list[KeptPart]:
    with transaction() as session:
        query = select(UploadPiece.id, UploadPiece.bytes).where(UploadPiece.upload_id == upload_id, UploadPiece.start.is_(None))
        return [KeptPart(*row) for row in session.execute(query)]


def keep(upload_id: uuid.UUID, source: Path, size: int, start: int | None = None, key: uuid.UUID | None = None) -> None:
    """Store the bytes of a file as a piece, and say so. Raises Locked where another request has stored this part of the file, Gone
    where the upload was stopped meanwhile, StorageAway."""
    key = key or uuid.uuid4()
    place = place_of(upload_id, key)
    places.push(place, source=source)
    made = insert(UploadPiece).values(id=key, upload_id=upload_id, start=start, bytes=size, path=place)
    try:
        with transaction() as session:
            added = session.scalar(made.on_conflict_do_nothing(index_elements=["upload_id", "start"]).returning(UploadPiece.id))
    except IntegrityError:
        raise Gone(gettext("This upload was stopped."), hint=gettext("Begin again.")) from None
    if added is None:
        raise Locked


def keep_range(upload_id: uuid.UUID, file: Path, start: int, end: int) -> None:
    """The same of the bytes `start` to `end` of the upload's file on this machine."""
    piece = file.with_name(f"upload-{uuid.uuid4().hex}")  # swept by this name where this process dies
    try:
        with file.open("rb") as whole, piece.open("xb") as part, disk_errors():
            whole.seek(start)
            part.write(whole.read(end - start))
        keep(upload_id, piece, end - start, start)
    finally:
        piece.unlink(missing_ok=True)


def catch_up(upload_id: uuid.UUID, handle: int) -> None:
    """Give the upload's file on this machine, open at its end, the bytes that are stored, and no others: what came here and was not
    stored may differ from what another process took in its place. Raises Gone, and Locked where it has become a file meanwhile."""
    with transaction() as session:
        columns = (Upload.file_id, UploadPiece.start, UploadPiece.bytes, UploadPiece.path)
        query = select(*columns).outerjoin(UploadPiece, and_(UploadPiece.upload_id == Upload.id, UploadPiece.start.is_not(None)))
        found = session.execute(query.where(Upload.id == upload_id).order_by(UploadPiece.start)).all()
    if not found:
        raise Gone(gettext("This upload was stopped."), hint=gettext("Begin again."))
    if found[0].file_id is not None:
        raise Locked  # it is complete: on this machine the bytes may be those of the file now, and are not touched
    pieces: list[tuple[int, int, str]] = [(row.start, row.bytes, row.path) for row in found if row.start is not None]
    here = os.fstat(handle).st_size
    known = max((start + size for start, size, _ in pieces if start + size <= here), default=0)
    os.ftruncate(handle, known)
    for start, _, place in pieces:
        if start >= known:
            write(handle, brought(place).read_bytes())
            places.drop(place)


def brought(place: str) -> Path:
    """The file of a piece, brought to this machine. Raises Gone where it is in the storage no longer."""
    path = places.path(place)
    if not path.is_file():
        raise Gone(gettext("Some bytes of this upload are gone from the object storage."), hint=gettext("Begin again."))
    return path


def place_of(upload_id: uuid.UUID, key: uuid.UUID) -> str:
    return f"uploads/{upload_id.hex}/{key.hex}"


def write(handle: int, data: bytes | bytearray) -> int:
    """Write all of it, and return its length. Raises DiskFull."""
    with disk_errors():
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
    return len(data)


def forget_old(folder: Path, older_than_seconds: float) -> None:
    """Remove the files of uploads that were gone on with on another machine, and have expired since."""
    for path in folder.glob("tus-*"):
        try:
            if path.stat().st_mtime < time.time() - older_than_seconds:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue
