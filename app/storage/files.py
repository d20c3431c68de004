"""Stores bytes: uploads once by their SHA-256, and files atomically.

data_dir/tmp/upload-…      while the bytes arrive
data_dir/blobs/ab/<sha256> afterwards; several File rows may refer to one blob

With an object storage a blob is in it before there is a row of it, whichever machine took the upload.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import ColumnElement, func, select, text
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import limits
from app.errors import BadField, NotFound, TooLarge, Unavailable
from app.kit import ids
from app.kit.humanize import human_number
from app.languages import gettext
from app.ownership import mine, owned
from app.settings import get_settings
from app.storage import places
from app.storage.atomic import disk_errors, sync
from app.storage.objects import Beat
from app.tables import File, User

UPLOAD_PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
"""Purposes of uploads."""
RESULTS, BATCH_OUTPUT = "fine-tune-results", "batch_output"
PURPOSES = (*UPLOAD_PURPOSES, RESULTS, BATCH_OUTPUT, "assistants_output")

_WRITE_BYTES = 1 << 20
_UNUSED_SECONDS = 600.0
"""A blob without a row is kept this long, because its row may not be committed yet."""


class Blob(NamedTuple):
    sha256: str
    bytes: int


# Bytes --------------------------------------------------------------------------------------------------------------


def blob_path(sha256: str) -> Path:
    """The path of the blob with this SHA-256. Only hexadecimal digits pass, so no path can be injected."""
    return get_settings().data_dir / _place(sha256)


def _place(sha256: str) -> str:
    if len(sha256) != 64 or not all(c in "0123456789abcdef" for c in sha256):
        raise ValueError("not a SHA-256")
    return f"blobs/{sha256[:2]}/{sha256}"


def brought(sha256: str, beat: Beat = lambda: None) -> Path:
    """The path of a blob, brought from the object storage where it is there and not here. It need not exist."""
    return places.path(_place(sha256), beat=beat)


def is_kept(sha256: str) -> bool:
    """Whether the bytes are here, or in the object storage."""
    return places.exists(_place(sha256))


def store_away(blob: Blob) -> None:
    """Put a blob into the object storage, where there is one. Raises StorageAway, StorageRefuses."""
    places.push(_place(blob.sha256))


class BlobWriter:
    """Writes bytes as they arrive, hashing them; `finish` returns the blob, `discard` leaves no trace. `passing` bytes stay on this
    machine: they become part of another blob.

    Raises TooLarge beyond `limit` bytes and DiskFull when the disk is full.
    """

    def __init__(self, limit: int, passing: bool = False) -> None:
        self.limit, self.passing = limit, passing
        self.bytes = 0
        self._hash = hashlib.sha256()
        with disk_errors():
            handle, name = tempfile.mkstemp(prefix="upload-", dir=get_settings().folder("tmp"))
        self._path = Path(name)
        self._file = os.fdopen(handle, "wb", buffering=0)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.bytes += len(data)
        if self.bytes > self.limit:
            raise TooLarge(
                gettext("The file is larger than %(most)s bytes.", most=human_number(self.limit)),
                hint=gettext("Split it, or raise LUTHIER_UPLOAD_LIMIT_BYTES and start the studio again."),
                param="file",
            )
        self._hash.update(data)
        with disk_errors():
            view = memoryview(data)
            while view:  # an unbuffered write may take fewer bytes than it was given
                view = view[self._file.write(view) :]

    def finish(self) -> Blob:
        """The blob, synced to disk under its name. An equal blob that exists is kept, and marked as in use."""
        blob = Blob(self._hash.hexdigest(), self.bytes)
        target = blob_path(blob.sha256)
        with disk_errors():
            os.fsync(self._file.fileno())
            self._file.close()
            get_settings().folder("blobs", blob.sha256[:2])
            os.replace(self._path, target)
            sync(target.parent)
        if not self.passing:
            store_away(blob)
        return blob

    def discard(self) -> None:
        """Remove what was written. No effect after `finish`."""
        self._file.close()
        self._path.unlink(missing_ok=True)


async def store(chunks: AsyncIterator[bytes], limit: int | None = None) -> Blob:
    """Store a stream in constant memory. `limit` in bytes, by default the studio's upload limit."""
    writer = BlobWriter(limit or get_settings().upload_limit_bytes)
    try:
        buffer = bytearray()
        async for chunk in chunks:
            buffer += chunk
            if len(buffer) >= _WRITE_BYTES:
                await run_in_threadpool(writer.write, buffer)
                buffer = bytearray()
        if buffer:
            await run_in_threadpool(writer.write, buffer)
        return await run_in_threadpool(writer.finish)
    finally:
        writer.discard()


def adopt(path: Path, blob: Blob) -> Blob:
    """Turn a file that was written here, with a known hash, into a blob: it is moved, not copied."""
    target = blob_path(blob.sha256)
    with disk_errors():
        with path.open("rb") as written:
            os.fsync(written.fileno())
        get_settings().folder("blobs", blob.sha256[:2])
        os.replace(path, target)
        os.utime(target)  # a blob without a row is swept by its age
        sync(target.parent)
    store_away(blob)
    return blob


def store_bytes(data: bytes) -> Blob:
    writer = BlobWriter(get_settings().upload_limit_bytes)
    try:
        writer.write(data)
        return writer.finish()
    finally:
        writer.discard()


# Rows ---------------------------------------------------------------------------------------------------------------


def create(
    session: Session, user: User, blob: Blob, filename: str, purpose: str, expires_after: int | None = None, *, reserved: bool = False
) -> File:
    """A File row for stored bytes. `expires_after` in seconds, 3,600 to 2,592,000 (OpenAI's range). `reserved`: an upload that was begun
    has counted them as storage since then.

    Raises BadField for a purpose or time that is not allowed, LimitReached, Unavailable when the blob was swept meanwhile.
    """
    check_purpose(purpose)
    if expires_after is not None and not 3600 <= expires_after <= 2_592_000:
        raise BadField(
            f"“expires_after[seconds]” is {expires_after}.", hint="It must be from 3600 to 2592000.", param="expires_after[seconds]"
        )
    if purpose not in (RESULTS, BATCH_OUTPUT) and not reserved:  # what the studio itself writes of work that was allowed to run
        limits.check(session, user, "storage_bytes", more=blob.bytes)
    _lock(session, blob.sha256)
    if not is_kept(blob.sha256):
        raise Unavailable(gettext("The uploaded bytes are gone."), hint=gettext("Upload the file again."))
    file = File(
        id=uuid.uuid4(),
        owner_id=user.id,
        project_id=user.project_id,
        sha256=blob.sha256,
        bytes=blob.bytes,
        filename=clean_name(filename),
        purpose=purpose,
        status="uploaded",
    )
    if expires_after is not None:
        file.expires_at = func.clock_timestamp() + timedelta(seconds=expires_after)
    if purpose != "fine-tune":
        file.status = "processed"  # nothing is parsed from it
    session.add(file)
    session.flush()
    session.refresh(file)
    return file


def check_purpose(purpose: str) -> None:
    """Raises BadField for an unknown purpose."""
    if purpose not in PURPOSES:
        raise BadField(
            f"“{purpose[:80]}” is not a purpose." if purpose else "The purpose is missing.",
            hint=f"Use one of {', '.join(UPLOAD_PURPOSES)}; a dataset to fine-tune on is “fine-tune”.",
            param="purpose",
        )


def check_upload_purpose(purpose: str) -> None:
    """Raises BadField for a purpose that people's files cannot have."""
    if purpose not in UPLOAD_PURPOSES:
        check_purpose("" if purpose in PURPOSES else purpose)


def clean_name(filename: str) -> str:
    """A file name to show: no folders, no control characters, at most 255 characters with its extensions. It never becomes a path."""
    name = filename.replace("\\", "/").rsplit("/", 1)[-1].encode("utf-8", "replace").decode()
    name = "".join(character for character in name if character.isprintable()).strip()
    kinds = "".join(Path(name).suffixes[-2:])[-20:]  # readers recognize the file type by it, so it is not truncated
    return name if 0 < len(name) <= 255 else name[: 255 - len(kinds)] + kinds or "unnamed"


def add_bytes(session: Session, user: User, data: bytes, filename: str, purpose: str) -> File:
    """Store small bytes and their row at once."""
    return create(session, user, store_bytes(data), filename, purpose)


def get(session: Session, user: User, file_id: uuid.UUID) -> File:
    """A file of this user. Raises NotFound, also for another person's."""
    return owned(session, File, user, file_id, _not_expired())


def _not_expired() -> ColumnElement[bool]:
    return File.expires_at.is_(None) | (File.expires_at > func.clock_timestamp())


def list_(session: Session, user: User, purpose: str | None = None, order: str = "desc") -> list[File]:
    """This user's files, newest first unless `order` is asc."""
    query = mine(File, user, _not_expired())
    if purpose:
        query = query.where(File.purpose == purpose)
    keys = (File.created_at, File.id)
    return list(session.scalars(query.order_by(*(key.asc() if order == "asc" else key.desc() for key in keys))))


def content(session: Session, user: User, file_id: uuid.UUID) -> Path:
    """The path of a file's bytes. Raises NotFound when they are missing."""
    path = brought(get(session, user, file_id).sha256)
    if not path.exists():
        message = gettext("The bytes of %(id)s are gone from the disk.", id=ids.public(ids.FILE, file_id))
        raise NotFound(message, hint=gettext("Upload the file again."))
    return path


def delete(session: Session, user: User, file_id: uuid.UUID) -> File:
    """Mark a file deleted. Its bytes are removed by the next sweep, once no other file shares them."""
    file = get(session, user, file_id)
    file.deleted_at = func.clock_timestamp()
    session.flush()
    return file


def sweep(session: Session, older_than_seconds: float = _UNUSED_SECONDS, at_most: int = 1000) -> int:
    """Remove expired files, blobs without a file, and temporary files of broken uploads. Returns the number of blobs removed."""
    session.execute(
        text(
            "UPDATE files SET deleted_at = clock_timestamp() WHERE deleted_at IS NULL AND expires_at IS NOT NULL AND expires_at <= clock_timestamp()"
        )
    )
    limit = time.time() - older_than_seconds
    for path in (get_settings().folder("tmp")).glob("upload-*"):
        _unlink_if_old(path, time.time() - max(older_than_seconds, 86_400))  # a slow upload may take hours
    for name, days in (("child-*", 1), ("bring-*", 1), ("hub-*", 7)):  # left by readers that were killed, and downloads nobody continued
        for path in get_settings().folder("tmp").glob(name):
            if max(map(_modified, [path, *path.glob("*")])) < time.time() - days * 86_400:
                shutil.rmtree(path, ignore_errors=True)
    removed = 0
    for path in get_settings().folder("blobs").glob("??/*"):
        if removed >= at_most:
            break
        if _modified(path) < limit and not _used(session, path.name):
            # The lock makes a new row of this blob wait, and then notice that it is gone.
            _lock(session, path.name)
            if not _used(session, path.name):
                removed += _unlink_if_old(path, limit)
    return removed


def discard_if_unused(session: Session, blob: Blob) -> None:
    """Remove the blob of a refused upload, unless a file needs it."""
    _lock(session, blob.sha256)
    if not _used(session, blob.sha256):
        blob_path(blob.sha256).unlink(missing_ok=True)
        places.forget(_place(blob.sha256))


def _used(session: Session, sha256: str) -> bool:
    return session.scalar(select(File.id).where(File.sha256 == sha256, File.deleted_at.is_(None)).limit(1)) is not None


def _lock(session: Session, sha256: str) -> None:
    """Lock this blob until the transaction ends, so that its last row and its bytes are removed together or not at all."""
    session.execute(select(func.pg_advisory_xact_lock(int(sha256[:15], 16))))


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _unlink_if_old(path: Path, limit: float) -> int:
    if _modified(path) >= limit:
        return 0
    path.unlink(missing_ok=True)
    return 1
