"""Taking a backup, from top to bottom."""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, cast

import psycopg

from app.errors import Unavailable
from app.kit import secret
from app.ops.backup import rows
from app.ops.backup.named import BackupContents, named, walk
from app.ops.backup.store import VERSION, Store
from app.settings import get_settings

TRIES = 5
"""Snapshots taken before giving up on files that are removed while they are copied; each finds more of them stored already."""


@dataclass
class BackupReport:
    """What a backup holds, and what it cost."""

    name: str
    tables: int = 0
    rows: int = 0
    files: int = 0
    bytes: int = 0
    written: int = 0
    """Bytes that were not in the folder before."""
    seconds: float = 0.0
    missing: list[str] = field(default_factory=list)
    """Files that the studio itself has lost."""
    damaged: list[str] = field(default_factory=list)
    """Files that differ from what the studio once wrote; they are stored as they are."""


def take(folder: Path, *, secrets: bool = True, keep: int = 7, say: Callable[[str], None] = lambda text: None) -> BackupReport:
    """Back up the studio that the settings name, while it runs. Raises Conflict, DiskFull, Unavailable."""
    store = Store(folder)
    with store.lock():
        started = time.monotonic()
        report, told = _taken(store, say)
        if secrets and secret.are_given():
            say("The secrets are given from outside (LUTHIER_SECRETS_DIR) and are not copied.")
        store.add(report.name, told, _secrets() if secrets else None)
        if freed := store.prune(keep):
            say(f"{freed:,} bytes of older backups were removed.")
        report.seconds = time.monotonic() - started
    return report


def _taken(store: Store, say: Callable[[str], None]) -> tuple[BackupReport, dict[str, Any]]:
    root, lost = get_settings().data_dir, None
    if url := get_settings().storage_url:
        say(f"The files are in {url} and are not copied: keep versions or a copy of it.")
    known = store.manifest()["files"] if store.snapshots() else {}
    written = 0
    for turn in range(TRIES):
        with rows.snapshot() as connection:
            report = BackupReport(_name(store))
            told = _rows(store, connection, report)
            found = named(connection, root) if not get_settings().storage_url else BackupContents()
        told["files"] = known = _files(store, root, found, report, known)
        written += report.written
        report.written = written
        if not report.missing or report.missing == lost:  # what is missing twice in a row is lost, and not just removed
            report.files, report.bytes = len(known), sum(entry["bytes"] for entry in known.values())
            return report, told
        lost = report.missing
        say(f"{len(lost)} files were removed while they were copied; snapshot {turn + 2} is taken.")
    raise Unavailable(
        "The studio removed files faster than they could be copied.",
        hint="Try again when fewer jobs save checkpoints, or raise LUTHIER_KEEP_CHECKPOINTS.",
    )


def _name(store: Store) -> str:
    name = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    return name if name not in store.snapshots() else f"{name}-{time.time_ns() % 10**9:09}"


def _rows(store: Store, connection: psycopg.Connection, report: BackupReport) -> dict[str, Any]:
    """The rows of every table as one object each, and what a restored database must look like."""
    told: dict[str, Any] = {
        "version": VERSION,
        "luthier": version("luthier"),
        "schema": rows.schema_of(connection),
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "tables": {},
    }
    if told["schema"] is None:
        raise Unavailable("The database holds no studio.", hint="Start it once with `luthier up`.")
    for table in rows.tables(connection):
        names = rows.columns(connection, table)
        # The same bytes for the same rows, so that a table that did not change is stored once: no time in the header.
        with store.writer() as target, gzip.GzipFile("", "wb", 1, cast(BinaryIO, target), mtime=0) as packed:
            hashed = rows.read(connection, table, packed.write, names)
        report.tables, report.rows, report.written = report.tables + 1, report.rows + hashed.rows, report.written + target.stored.written
        told["tables"][table] = {"rows": hashed.rows, "sha256": hashed.sha256, "columns": names, "object": target.stored.sha256}
    told["sequences"] = rows.sequences(connection)
    return told


def _files(store: Store, root: Path, found: BackupContents, report: BackupReport, known: dict[str, Any]) -> dict[str, Any]:
    """Store every file of this snapshot. One with the size and the time it had at the last backup is not read again."""
    kept: dict[str, Any] = {}
    missing = set(found.missing)
    for path in walk(found, root):
        expected = found.files.get(path)
        try:
            at = (root / path).stat()
            was = known.get(path, {})
            facts = {"bytes": at.st_size, "mtime_ns": at.st_mtime_ns, "mode": at.st_mode & 0o777}
            if {**was, **facts} == was and store.has(was["object"], at.st_size):
                kept[path] = was
            else:
                stored = store.put(root / path, at.st_size)
                report.written += stored.written
                kept[path] = {**facts, "bytes": stored.bytes, "object": stored.sha256}
        except FileNotFoundError:
            if path in found.files:
                missing.add(path)
            continue
        if expected not in (None, kept[path]["object"]):
            report.damaged.append(path)
    report.missing = sorted(missing)
    return kept


def _secrets() -> dict[str, str]:
    """The signing keys. The passwords of the servers stay: a restored studio makes its own."""
    folder = get_settings().data_dir / "secrets"
    return {path.name: path.read_bytes().hex() for path in sorted(folder.glob("*.key"))} if os.path.isdir(folder) else {}
