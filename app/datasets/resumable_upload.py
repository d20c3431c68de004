"""Resumable uploads: tus 1.0 (https://tus.io/protocols/resumable-upload) with creation, termination and expiration.

    begin ─→ append, append, … ─→ finish        a File, and a dataset where it is one
               └ interrupted: the received bytes stay; `offset` says where to continue

The offset of an upload is the length of its file and nothing else, so nothing can disagree about it; with an object storage it is
what is stored there (`upload_pieces.py`), and the file is a copy of that. Bytes are written as they arrive, and hashed once they are
complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import formats, leases, limits
from app.datasets import readers, upload_pieces
from app.datasets import service as datasets
from app.datasets.upload_pieces import PIECE_BYTES, Gone, Locked, write
from app.db import on_commit, transaction
from app.errors import BadField, Conflict, TooLarge
from app.kit import ids
from app.kit.humanize import human_number
from app.languages import gettext
from app.ownership import owned
from app.settings import get_settings
from app.storage import atomic, files
from app.storage.atomic import disk_errors
from app.storage.files import Blob
from app.tables import Upload, UploadPiece, User

EXPIRES_SECONDS = 24 * 3600
MAX_OPEN = 50
"""Open uploads per person."""
_WRITE_BYTES = 1 << 20


class UploadHandle(NamedTuple):
    """What a sender needs: the path of the bytes, the expected length, the resulting file."""

    id: uuid.UUID
    path: Path
    length: int
    dataset: str | None
    file: str | None

    @property
    def offset(self) -> int:
        """Number of bytes received. With an object storage the database knows it."""
        if self.file:
            return self.length
        if upload_pieces.are_shared():
            with transaction() as session:
                return upload_pieces.received(session, self.id)
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0


def begin(
    session: Session, user: User, length: int, filename: str, purpose: str = "fine-tune", wishes: dict[str, str] | None = None
) -> Upload:
    """A new upload of `length` bytes. Whatever can be known to be wrong is refused before any byte is sent."""
    limit = get_settings().upload_limit_bytes
    if length > limit:
        said = gettext("The file is larger than %(limit)s bytes.", limit=human_number(limit))
        raise TooLarge(said, hint=gettext("Split it, or raise LUTHIER_UPLOAD_LIMIT_BYTES."), param="file")
    if length <= 0:
        raise BadField(gettext("The file is empty."), hint=gettext("Choose a file with at least one row."), param="file")
    files.check_upload_purpose(purpose)
    if purpose == "fine-tune":
        readers.kind_of(filename)
    wishes = {name: value for name, value in (wishes or {}).items() if name in ("name", "format", "expires_after") and value}
    if "format" in wishes:
        formats.get(wishes["format"])
    limits.check(session, user, "storage_bytes", more=length)
    open_ = session.scalar(select(func.count()).where(Upload.owner_id == user.id, Upload.file_id.is_(None)))
    if (open_ or 0) >= MAX_OPEN:
        said = gettext("%(count)s uploads are open already.", count=open_)
        raise Conflict(said, hint=gettext("Finish or stop some of them; each ends by itself after a day."))
    key = uuid.uuid4()
    path = get_settings().folder("tmp") / f"tus-{key.hex}"
    with disk_errors():
        path.touch(0o600, exist_ok=False)
    if upload_pieces.are_shared():
        upload_pieces.forget_old(path.parent, EXPIRES_SECONDS)
    upload = Upload(
        id=key,
        owner_id=user.id,
        project_id=user.project_id,
        filename=files.clean_name(filename),
        purpose=purpose,
        wishes=wishes,
        length=length,
        path=path.relative_to(get_settings().data_dir).as_posix(),
        expires_at=func.clock_timestamp() + timedelta(seconds=EXPIRES_SECONDS),
    )
    session.add(upload)
    session.flush()
    session.refresh(upload)
    return upload


def get(session: Session, user: User, upload_id: uuid.UUID) -> Upload:
    """An upload of this user. Raises NotFound, and Gone for one that has expired."""
    upload = owned(session, Upload, user, upload_id)
    if upload.file_id is None and session.scalars(select(leases.now())).one() >= upload.expires_at:
        raise Gone(gettext("This upload has expired."), hint=gettext("Begin again."))
    return upload


def ticket(upload: Upload) -> UploadHandle:
    return UploadHandle(
        upload.id,
        get_settings().data_dir / upload.path,
        upload.length,
        ids.public(ids.DATASET, upload.dataset_id) if upload.dataset_id else None,
        ids.public(ids.FILE, upload.file_id) if upload.file_id else None,
    )


async def append(held: UploadHandle, offset: int, chunks: AsyncIterator[bytes]) -> int:
    """Append bytes at `offset` and return the new one. Bytes received before a broken connection stay.

    Raises Conflict when `offset` is not the upload's, Locked when another request is appending, TooLarge beyond its length.
    """
    shared = upload_pieces.are_shared()
    with locked(held.path) as handle:
        if shared:
            await run_in_threadpool(upload_pieces.catch_up, held.id, handle)
        at = kept = os.fstat(handle).st_size
        if at != offset:
            said = gettext("The upload is at byte %(at)s, not %(offset)s.", at=human_number(at), offset=human_number(offset))
            raise Conflict(said, hint=gettext("Ask with HEAD where to go on."), param="Upload-Offset")
        buffer = bytearray()
        try:
            async for chunk in chunks:
                buffer += chunk
                if at + len(buffer) > held.length:
                    said = gettext("More bytes came than were announced.")
                    raise TooLarge(said, hint=gettext("Begin again with the right Upload-Length."))
                if len(buffer) >= _WRITE_BYTES:
                    at += await run_in_threadpool(write, handle, buffer)
                    buffer = bytearray()
                    while shared and at - kept >= PIECE_BYTES:
                        await run_in_threadpool(upload_pieces.keep_range, held.id, held.path, kept, kept + PIECE_BYTES)
                        kept += PIECE_BYTES
        finally:
            if buffer and at + len(buffer) <= held.length:
                at += write(handle, buffer)
        if shared and at > kept:
            await run_in_threadpool(upload_pieces.keep_range, held.id, held.path, kept, at)
        return at


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """The file, open at its end, locked by this request across the processes that see it. With an object storage it is made where
    the upload was begun on another machine."""
    shared = upload_pieces.are_shared()
    if shared:
        get_settings().folder("tmp")
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | (os.O_CREAT if shared else 0), 0o600)
    except FileNotFoundError:
        raise Gone(gettext("The bytes of this upload are gone."), hint=gettext("Begin again.")) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked from None
        yield handle
    finally:
        os.close(handle)


def finish(user: User, held: UploadHandle) -> str | None:
    """Turn the complete upload into a file, and a dataset; returns the dataset's id. Idempotent."""
    with transaction() as session:
        upload = session.get_one(Upload, held.id)
        if upload.file_id is not None:
            return ticket(upload).dataset
    blob = _store_blob(held)  # which may take long, so that no connection is held meanwhile
    with transaction() as session:
        upload = session.scalars(select(Upload).where(Upload.id == held.id).with_for_update()).one()
        if upload.file_id is not None:
            return ticket(upload).dataset
        expires_after = upload.wishes.get("expires_after")
        expires = int(expires_after) if expires_after else None
        file = files.create(session, user, blob, upload.filename, upload.purpose, expires, reserved=True)
        upload.file_id = file.id
        if upload.purpose == "fine-tune":
            made = datasets.create(session, user, file, upload.wishes.get("name"), upload.wishes.get("format"))
            upload.dataset_id = made.id
        session.execute(delete(UploadPiece).where(UploadPiece.upload_id == held.id))  # the hourly sweep removes their bytes
        session.flush()
        if upload_pieces.are_shared():
            on_commit(session, lambda: _forget_bytes(upload))  # the reaper may be on another machine
        return ticket(upload).dataset


def _store_blob(held: UploadHandle) -> Blob:
    """Store the bytes under their SHA-256. The name in tmp/ is removed by the next sweep."""
    digest = hashlib.sha256()
    with held.path.open("rb") as stream, disk_errors():
        while piece := stream.read(_WRITE_BYTES):
            digest.update(piece)
        os.fsync(stream.fileno())
        blob = Blob(digest.hexdigest(), held.length)
        target = files.blob_path(blob.sha256)
        get_settings().folder("blobs", blob.sha256[:2])
        # A hard link: whatever happens before the row is committed, the upload still has its bytes.
        with contextlib.suppress(FileExistsError):
            os.link(held.path, target)
        os.utime(target)  # a blob without a row is swept by its age
        atomic.sync(target.parent)
    files.store_away(blob)
    return blob


def stop(session: Session, upload: Upload) -> None:
    """Cancel an upload; the file it became stays."""
    _forget_bytes(upload)
    session.delete(upload)


def _forget_bytes(upload: Upload) -> None:
    """Remove the upload's name in tmp/, and its parts (`app/datasets/upload_parts.py`)."""
    path = get_settings().data_dir / upload.path
    for name in (path, *path.parent.glob(f"{path.name}.*")):
        name.unlink(missing_ok=True)


def sweep(session: Session) -> int:
    """Remove expired uploads, and the temporary names of complete ones. Returns how many."""
    expired = select(Upload).where(Upload.expires_at < func.clock_timestamp()).limit(200).with_for_update(skip_locked=True)
    found = session.scalars(expired).all()
    for upload in found:
        stop(session, upload)
    done = select(Upload).where(Upload.file_id.is_not(None)).limit(200)
    for upload in session.scalars(done):
        _forget_bytes(upload)
    return len(found)
