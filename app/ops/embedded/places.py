"""Sockets and secrets of an embedded studio, and the lock of its data folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from app.errors import Conflict, Forbidden

MAX_SOCKET_PATH_BYTES = 107
"""The kernel's limit on the path of a unix socket, less its terminating zero."""


def make_data_dir(data_dir: Path) -> None:
    """Create the data folder itself. Others may traverse it (the database's user must), but not list it."""
    if not data_dir.exists():
        data_dir.mkdir(parents=True)
        data_dir.chmod(0o711)


def private_folder(path: Path, owner: tuple[int, int] | None = None) -> Path:
    """A folder open to its owner alone; given to another user when `owner` is (uid, gid)."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise Forbidden(f"{path} is a symbolic link.", hint="Remove it: the studio wants a folder of its own there.")
    if owner is not None:
        os.chown(path, *owner)
    path.chmod(0o700)
    return path


def socket_path(data_dir: Path, name: str) -> Path:
    """The path of a server's socket; nothing is created."""
    folder = data_dir / "run" / name
    if len(os.fsencode(folder / ".s.PGSQL.5432.lock")) <= MAX_SOCKET_PATH_BYTES:
        return folder
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]
    return Path("/tmp") / f"luthier-{os.geteuid()}-{digest}-{name}"  # noqa: S108


def socket_folder(data_dir: Path, name: str, owner: tuple[int, int] | None = None) -> Path:
    """The 0700 folder of one server's socket: `<data_dir>/run/<name>`, or a short one when that path is too long.

    The short folder is derived from the data folder's path, so that every command finds it.
    """
    folder = socket_path(data_dir, name)
    if folder.is_relative_to(data_dir):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.parent.chmod(0o711)
    else:
        refuse_strangers(folder, owner)
    return private_folder(folder, owner)


def refuse_strangers(folder: Path, owner: tuple[int, int] | None) -> None:
    """A short folder is in a world-writable place: one that somebody else created first is refused."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return
    allowed = {os.geteuid(), *(owner[:1] if owner else ())}
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in allowed:
        raise Forbidden(f"{folder} belongs to somebody else.", hint="Remove it, or choose a data folder with a shorter path.")


def secret(data_dir: Path, name: str) -> str:
    """A secret of this studio, created at the first start and kept in a file only its owner can read."""
    path = private_folder(data_dir / "secrets") / name
    try:
        return path.read_text()
    except FileNotFoundError:
        _write_secret(path, value := secrets.token_urlsafe(32))
        return value


def password_file(data_dir: Path, name: str, role: str) -> Path:
    """A file in libpq's format with the password of `role`, so that no process has it in its environment or its arguments."""
    line, path = f"*:*:*:{role}:{secret(data_dir, name)}\n", data_dir / "secrets" / f"{name}.pgpass"
    if not path.exists() or path.read_text() != line:
        _write_secret(path, line)
    return path


def _write_secret(path: Path, value: str) -> None:
    """Atomic, and never readable by others."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(value)
        os.fsync(file.fileno())
    partial.rename(path)


class Lock:
    """One studio per data folder. The kernel releases the lock when its holder dies, however it dies.

    The file says who holds it and the studio's URL, for `luthier status` and other commands.
    """

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / "studio.lock"
        self.descriptor: int | None = None

    def take(self, **facts: Any) -> None:
        """Lock the folder, or raise Conflict that says who holds it."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            holder = self.holder() or {}
            raise Conflict(
                f"A studio is already running on {self.path.parent} (process {holder.get('pid', 'unknown')}, {holder.get('url', 'starting')}).",
                hint="Use that one, stop it with Ctrl-C, or choose another folder with --data-dir.",
                code="studio_running",
            ) from None
        self.descriptor = descriptor
        self.tell(**facts)

    def tell(self, **facts: Any) -> None:
        """Replace the contents of the file. Only the holder calls this."""
        assert self.descriptor is not None
        text = json.dumps({"pid": os.getpid(), **facts}).encode()
        os.pwrite(self.descriptor, text.ljust(4096), 0)

    def holder(self) -> dict[str, Any] | None:
        """What the running studio wrote about itself, or None when none runs."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 4096, 0).strip()
            return json.loads(text) if text else {}
        finally:
            os.close(descriptor)
        return None

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
