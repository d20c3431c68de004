"""The folder of backups: objects by SHA-256, and one manifest per backup."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import BadData, Conflict, NotFound
from app.kit import manifest as hashes
from app.storage.atomic import disk_errors, sync, write_atomically

VERSION = 1
_PIECE = 4 * 2**20


class Stored(NamedTuple):
    sha256: str
    bytes: int
    written: int
    """Bytes that this call added; 0 where they were there."""


class Store:
    """A folder of backups. `lock` it before anything is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # Objects

    def path_of(self, sha256: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise BadData(f"The backup names {sha256[:80]!r}, which is not a SHA-256.", hint="Take another snapshot.")
        return self.folder / "objects" / sha256[:2] / sha256

    def has(self, sha256: str, size: int) -> bool:
        try:
            return self.path_of(sha256).stat().st_size == size
        except FileNotFoundError:
            return False

    def put(self, source: Path, most: int) -> Stored:
        """Store the first `most` bytes of a file; a log may grow meanwhile."""
        with disk_errors(), source.open("rb") as file, self.writer() as target:
            while most > 0 and (piece := file.read(min(_PIECE, most))):
                target.write(piece)
                most -= len(piece)
        return target.stored

    @contextmanager
    def writer(self) -> Iterator[ObjectWriter]:
        """Write a new object; its name is known at the end, in `stored`."""
        making = self.folder / "making"
        making.mkdir(mode=0o700, exist_ok=True)
        writer = ObjectWriter(making / secrets.token_hex(8))
        try:
            yield writer
            writer.flush()
            size, sha256 = writer.bytes, writer.digest.hexdigest()
            if self.has(sha256, size):
                writer.stored = Stored(sha256, size, 0)
                return
            os.fsync(writer.file.fileno())
            target = self.path_of(sha256)
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.replace(writer.path, target)
            writer.stored = Stored(sha256, size, size)
        finally:
            writer.file.close()
            writer.path.unlink(missing_ok=True)

    def copy_out(self, sha256: str, size: int, target: Path, name: str) -> None:
        """Write an object to `target`, checking it. Raises BadData, which says the file's `name`."""
        digest = hashlib.sha256()
        try:
            with disk_errors(), self.path_of(sha256).open("rb") as source, target.open("xb") as file:
                while piece := source.read(_PIECE):
                    digest.update(piece)
                    file.write(piece)
                found = file.tell()
        except FileNotFoundError:
            raise self._damaged(name, "is missing from the backup") from None
        if found != size or digest.hexdigest() != sha256:
            raise self._damaged(name, "is damaged in the backup")

    def check(self, sha256: str, size: int, name: str) -> None:
        if not self.has(sha256, size) or hashes.sha256_of(self.path_of(sha256)) != sha256:
            raise self._damaged(name, "is missing from the backup or damaged in it")

    def _damaged(self, name: str, how: str) -> BadData:
        return BadData(f"{name} {how}.", hint="Nothing was restored. Choose another snapshot, or another copy of the backup.", param=name)

    # Backups

    def snapshots(self) -> list[str]:
        """The names of the backups, oldest first."""
        return sorted(path.stem for path in (self.folder / "snapshots").glob("*.json"))

    def manifest(self, name: str | None = None) -> dict[str, Any]:
        """The manifest of a backup, by default of the newest. Raises NotFound, BadData."""
        there = self.snapshots()
        if not there or (name is not None and name not in there):
            raise NotFound(
                f"{self.folder} has no backup {name}." if name else f"{self.folder} holds no backup.",
                hint=f"It has: {', '.join(there)}." if there else "`luthier backup` makes one.",
            )
        path = self.folder / "snapshots" / f"{name or there[-1]}.json"
        try:
            told = json.loads(path.read_text())
            signed = told.pop("sha256")
        except (OSError, ValueError, KeyError, AttributeError):
            told, signed = {}, ""
        if _digest(told) != signed:
            raise BadData(f"{path} is damaged.", hint="Choose another snapshot, or another copy of the backup.")
        if told["version"] > VERSION:
            raise Conflict(f"{path} was written by a newer Luthier.", hint="Install that version first.", code="newer_backup")
        return dict(told)

    def add(self, name: str, told: dict[str, Any], keys: dict[str, str] | None) -> None:
        """Write a backup's manifest, last of all: before it, there is no backup of that name."""
        for made in (self.folder / "objects").glob("??"):
            sync(made)
        if keys is not None:
            (self.folder / "secrets").mkdir(mode=0o700, exist_ok=True)
            write_atomically(self.folder / "secrets" / f"{name}.json", json.dumps(keys))
        write_atomically(self.folder / "snapshots" / f"{name}.json", json.dumps(told | {"sha256": _digest(told)}, indent=1))

    def prune(self, keep: int) -> int:
        """Remove all but the newest `keep` backups, and the objects that none of them needs. Returns the bytes freed."""
        for name in self.snapshots()[:-keep]:
            (self.folder / "snapshots" / f"{name}.json").unlink()
            (self.folder / "secrets" / f"{name}.json").unlink(missing_ok=True)
        needed: set[str] = set()
        for name in self.snapshots():
            told = self.manifest(name)
            needed |= {entry["object"] for entry in (*told["files"].values(), *told["tables"].values())}
        freed = 0
        for path in (self.folder / "objects").glob("??/*"):
            if path.name not in needed:
                freed += path.stat().st_size
                path.unlink()
        return freed

    def secrets(self, name: str) -> dict[str, str]:
        try:
            return dict(json.loads((self.folder / "secrets" / f"{name}.json").read_text()))
        except FileNotFoundError:
            return {}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One backup at a time. Raises Conflict for a folder that holds something else."""
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / "backup.lock").exists():
            raise Conflict(f"{self.folder} is not empty, and holds no backup.", hint="Choose an empty or a new folder.", code="not_empty")
        with disk_errors():
            if not self.folder.exists():
                self.folder.mkdir(parents=True)
                self.folder.chmod(0o711)  # the database of a check must be able to pass through it
            (self.folder / "objects").mkdir(exist_ok=True, mode=0o700)
            (self.folder / "snapshots").mkdir(exist_ok=True, mode=0o700)
        descriptor = os.open(self.folder / "backup.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in (self.folder / "making", *self.folder.glob("luthier-check-*")):  # of a backup that was interrupted
                shutil.rmtree(left, ignore_errors=True)
            yield
        except BlockingIOError:
            raise Conflict(f"Another backup into {self.folder} is running.", hint="Wait for it to end.", code="backup_running") from None
        finally:
            os.close(descriptor)


class ObjectWriter:
    """A file to write a new object to."""

    stored: Stored

    def __init__(self, path: Path) -> None:
        self.path, self.bytes, self.digest = path, 0, hashlib.sha256()
        self.file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    def write(self, piece: bytes) -> int:
        self.digest.update(piece)
        self.bytes += len(piece)
        return self.file.write(piece)

    def flush(self) -> None:
        self.file.flush()


def _digest(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
