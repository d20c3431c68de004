"""The list of a folder's files with their sizes and SHA-256: how a model or checkpoint is known to be whole.

A folder is filled under a temporary name, given its manifest last, and renamed into place. So a folder that stands
under its own name without a manifest that verifies was not written by us, or was touched since.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from app.errors import BadData

NAME = "manifest.json"
_PIECE = 4 * 2**20  # bytes read at a time


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """`{relative path: {"bytes", "sha256"}}` of every file in the folder but the manifest itself."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != NAME)
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in found}


def revision_of(files: dict[str, dict[str, Any]]) -> str:
    """One SHA-256 over names and hashes, in the order of the names: equal for equal folders."""
    lines = "".join(f"{name}\0{entry['sha256']}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def write(folder: Path, **facts: Any) -> dict[str, Any]:
    """Hash every file of a finished folder and write its manifest. `facts` are kept beside the list."""
    files = files_of(folder)
    manifest = {"version": 1, "revision": revision_of(files), "bytes": sum(f["bytes"] for f in files.values()), "files": files, **facts}
    with (folder / NAME).open("w") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    return manifest


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest as written, its files not looked at; None when there is none that can be read."""
    try:
        manifest = json.loads((folder / NAME).read_text())
        return manifest if isinstance(manifest["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verify(folder: Path, *, deep: bool = True) -> dict[str, Any]:
    """The manifest, once every file in it was found with its size (and its SHA-256, when `deep`).

    Raises BadData naming the first file that is missing or different.
    """
    manifest = read(folder)
    if manifest is None:
        raise BadData("The folder has no readable manifest, so its files cannot be trusted.", way_out="Add the model again.")
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or (deep and sha256_of(path) != entry["sha256"]):
            raise BadData(f"The file {name} is missing or differs from what was written.", way_out="Add the model again.")
    return manifest
