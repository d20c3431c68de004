"""The files that the rows of one snapshot name, and the others that lie next to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from app.kit import manifest
from app.ops.backup import rows

KEPT = ("blobs", "rows", "models", "runs", "evaluations", "predictions", "exports", "import")
"""Folders of the data folder that a backup may take from. The others can be computed again, or belong to this machine."""

_BLOBS = "SELECT DISTINCT 'blobs/' || left(sha256, 2) || '/' || sha256, sha256 FROM files WHERE deleted_at IS NULL"
_ROWS = "SELECT rows_path FROM datasets WHERE deleted_at IS NULL AND rows_path IS NOT NULL AND status = 'ready'"
_MODELS = "SELECT path FROM models WHERE deleted_at IS NULL AND path IS NOT NULL AND status = 'ready'"
_CHECKPOINTS = (
    "SELECT c.path FROM checkpoints c JOIN jobs j ON j.id = c.job_id "
    "WHERE c.deleted_at IS NULL AND j.deleted_at IS NULL ORDER BY c.created_at"
)
_LIVE = (("jobs", "runs/{}"), ("exports", "exports/{}"), ("evaluations", "evaluations/{}"), ("evaluations", "predictions/{0.hex}"))
"""Tables, and what lies on disk for each row that is not deleted."""


@dataclass
class BackupContents:
    """What to copy, in paths relative to the data folder. `files` has the SHA-256 where the rows or a manifest know it."""

    files: dict[str, str | None] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    """Named, and not there."""
    live: set[str] = field(default_factory=set)
    """Folders and files of objects that are not deleted, whose contents are copied as they are."""
    checkpoints: set[str] = field(default_factory=set)


def named(connection: psycopg.Connection, root: Path) -> BackupContents:
    """Read what the rows of this snapshot name. What is removed soonest, the checkpoints, comes first in `files`."""
    found, present = BackupContents(), set(rows.tables(connection))
    for (path,) in connection.execute(_CHECKPOINTS):
        found.checkpoints.add(path)
        _add_folder(found, root, path)
    found.files |= {path: sha256 for path, sha256 in connection.execute(_BLOBS)}
    for (path,) in connection.execute(_ROWS):
        found.files[path] = None  # the rows have a hash, and not their file
        found.live.add(str(Path(path).parent))
    for (path,) in connection.execute(_MODELS):
        _add_folder(found, root, path)
        found.live.add(path)
    for table, pattern in _LIVE:
        if table in present:
            live = "SELECT id FROM {} WHERE deleted_at IS NULL".format(table)  # noqa: S608, UP032  one of the names above
            found.live |= {pattern.format(key) for (key,) in connection.execute(live)}
    found.missing |= {path for path in found.files if not (root / path).is_file()}
    return found


def _add_folder(found: BackupContents, root: Path, path: str) -> None:
    """A folder with a manifest, which gives the SHA-256 of each file."""
    made = manifest.read(root / path)
    if made is None:
        found.missing.add(f"{path}/{manifest.NAME}")
        return
    found.files[f"{path}/{manifest.NAME}"] = None
    found.files |= {f"{path}/{name}": entry["sha256"] for name, entry in made["files"].items()}


def walk(found: BackupContents, root: Path) -> Iterator[str]:
    """Everything to copy: what is named, then what lies next to it, as the log and the curves of an attempt do."""
    yield from found.files
    for top in KEPT:
        for above, folders, names in os.walk(root / top):
            here = Path(above).relative_to(root).as_posix()
            folders[:] = sorted(name for name in folders if _enters(found, f"{here}/{name}"))
            for name in sorted(names):
                path = f"{here}/{name}"
                if path not in found.files and not _passing(name) and _is_live(found, path) and not Path(above, name).is_symlink():
                    yield path


def _passing(name: str) -> bool:
    """A temporary name, a lock, or a token for the hub."""
    return name.startswith(".") or name.endswith((".tmp", ".partial"))


def _enters(found: BackupContents, path: str) -> bool:
    if _passing(path.rpartition("/")[2]):
        return False
    _, _, last = path.rpartition("/")
    if path.startswith("runs/") and last.startswith("checkpoint-"):
        return path in found.checkpoints  # of a checkpoint that the rows do not know, the job would go on
    return True


def _is_live(found: BackupContents, path: str) -> bool:
    top, *parts = path.split("/")
    if top == "import":
        return True
    if top == "predictions":
        return f"predictions/{parts[-1].partition('.')[0]}" in found.live
    return any("/".join([top, *parts[:depth]]) in found.live for depth in range(1, len(parts) + 1))
