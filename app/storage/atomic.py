"""Files that are written completely or not at all. Without the database, so that a trainer imports it in no time."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import DiskFull
from app.kit.humanize import human_number
from app.languages import gettext
from app.settings import get_settings


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file completely or not at all: temporary file, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with disk_errors():
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Make the bytes of a file, or the renames in a folder, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns the system's error about a full disk into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(get_settings().data_dir).free
            told = {"folder": get_settings().data_dir, "free": human_number(free)}
            raise DiskFull(
                gettext("The disk of %(folder)s is full (%(free)s bytes left); nothing was saved.", **told),
                hint=gettext("Make room there, delete files or models, then try again."),
            ) from error
        raise
