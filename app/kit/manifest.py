"""Manifests: a folder's files with their sizes and SHA-256, by which a model or checkpoint is known to be complete.

A folder is filled under a temporary name, given its manifest last, and renamed into place. So a folder under its final name
without a manifest that verifies was not written by us, or was changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.errors import BadData
from app.languages import gettext

NAME = "manifest.json"
SEEN = ".verified.json"
"""Next to the manifest: size, times and inode of each file when it was last read in full, and when that was. Not part of the model."""

READ_AGAIN_SECONDS = 86_400.0
"""A disk loses bytes without changing a file's times, so files are read in full again after a day."""

_PIECE = 4 * 2**20  # bytes read at a time
_seen: dict[Path, Any] = {}
"""The same as SEEN for this process, where the folder is read-only."""


def sha256_of(path: Path, beat: Callable[[], object] = lambda: None) -> str:
    """SHA-256 of a file; `beat` is called after each piece read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            beat()
    return digest.hexdigest()


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """`{relative path: {"bytes", "sha256"}}` of every file in the folder except the manifest itself."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (NAME, SEEN))
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in found}


def revision_of(files: dict[str, dict[str, Any]]) -> str:
    """One SHA-256 over names and hashes, in the order of the names: equal for equal folders."""
    lines = "".join(f"{name}\0{entry['sha256']}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def write(folder: Path, files: dict[str, dict[str, Any]] | None = None, **facts: Any) -> dict[str, Any]:
    """Hash every file of a finished folder, unless `files` has the hashes already, and write its manifest. `facts` are stored in it too."""
    files = files_of(folder) if files is None else files
    manifest = {"version": 1, "revision": revision_of(files), "bytes": sum(f["bytes"] for f in files.values()), "files": files, **facts}
    with (folder / NAME).open("w") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    return manifest


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest as written, without checking the files; None when there is none or it is unreadable."""
    try:
        manifest = json.loads((folder / NAME).read_text())
        return manifest if isinstance(manifest["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verify(folder: Path, *, deep: bool = True, beat: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """The manifest, after checking every file's size (and SHA-256, when `deep`).

    Raises BadData naming the first file that is missing or different, and OSError for one that cannot be read.
    """
    manifest = read(folder)
    if manifest is None:
        message = gettext("The folder has no readable manifest, so its files cannot be trusted.")
        raise BadData(message, hint=gettext("Add the model again."))
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or (deep and sha256_of(path, beat) != entry["sha256"]):
            message = gettext("The file %(name)s is missing or differs from what was written.", name=name)
            raise BadData(message, hint=gettext("Add the model again."))
    return manifest


def check(folder: Path, beat: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """`verify`, but without reading files that are unchanged since they were last read in full.

    Unchanged means the same size, times and inode: a write changes these, and so does replacing a file. Raises as `verify` does.
    """
    manifest = read(folder)
    lies = _lies(folder, manifest) if manifest else None
    if manifest is None or not _is_known(folder, lies):
        manifest = verify(folder, beat=beat)
        if lies is not None:
            _remember(folder, {"lies": lies, "read_at": time.time()})
    return manifest


def _lies(folder: Path, manifest: dict[str, Any]) -> dict[str, list[int] | None]:
    found: dict[str, list[int] | None] = {}
    for name in (NAME, *manifest["files"]):
        try:
            at = (folder / name).stat()
            found[name] = [at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino]
        except OSError:
            found[name] = None
    return found


def _is_known(folder: Path, lies: Any) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        seen = _seen.get(folder) or json.loads((folder / SEEN).read_text())
        return bool(seen["lies"] == lies) and 0 <= time.time() - seen["read_at"] < READ_AGAIN_SECONDS
    return False


def _remember(folder: Path, seen: dict[str, Any]) -> None:
    """Written without fsync: a record truncated by a crash reads as none, which costs one more reading."""
    _seen[folder] = seen
    with contextlib.suppress(OSError):
        (folder / SEEN).write_text(json.dumps(seen))
