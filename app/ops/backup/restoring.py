"""Restoring a backup into a folder that holds no studio, and checking one by doing so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app import migrate, relay
from app.db import get_engine, transaction
from app.errors import BadData, Conflict
from app.ops.backup import rows
from app.ops.backup.named import KEPT
from app.ops.backup.store import Store
from app.ops.embedded.places import Lock, make_data_dir, private_folder
from app.ops.embedded.up import beside
from app.settings import PROJECT, get_settings

SHARED_MODE = 0o755
"""Of the folders below the top ones, as trainers that run as another user need it."""


def restore(folder: Path, name: str | None = None, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Fill the data folder and the database of the settings from a backup. Returns its manifest.

    Every file is compared with its hash and every table with its own; where one differs, what was written is removed again. Raises
    Conflict for a folder or database that holds a studio and for a backup of a newer version, NotFound and BadData.
    """
    store, root = Store(folder), get_settings().data_dir
    told = store.manifest(name)
    name = name or store.snapshots()[-1]
    _refuse_newer(told)
    _refuse_full(root)
    make_data_dir(root)
    try:
        for path, entry in told["files"].items():
            _write(store, root, path, entry)
        say(f"{len(told['files']):,} files are restored and have their hashes.")
        for key, value in store.secrets(name).items():
            _write_key(root, key, bytes.fromhex(value))
        with beside(migrates=False):
            _load(store, told)
            say(f"{sum(table['rows'] for table in told['tables'].values()):,} rows in {len(told['tables'])} tables are restored and equal.")
            _open(told)
    except BaseException:
        _remove(root)
        raise
    return told


def _refuse_newer(told: dict[str, Any]) -> None:
    if told["schema"] not in migrate.steps():
        raise Conflict(
            f"The backup has the schema {told['schema']} of Luthier {told['luthier']}; this one knows those up to {migrate.newest()}.",
            hint="Install that version or a newer one, and restore with it.",
            code="newer_backup",
        )


def _refuse_full(root: Path) -> None:
    holder = Lock(root).holder() if root.exists() else None
    full = [name for name in ("postgres", *KEPT) if (root / name).is_dir() and any((root / name).iterdir())]
    if holder is not None or full:
        raise Conflict(
            f"{root} holds a studio already" + (f" ({', '.join(full)})." if full else "."),
            hint="Choose an empty or a new folder with --data-dir.",
            code="not_empty",
        )


def _write(store: Store, root: Path, path: str, entry: dict[str, Any]) -> None:
    top, *parts = path.split("/")
    if top not in KEPT or not parts or any(part in ("", ".", "..") for part in parts):
        raise BadData(f"The backup names {path!r}, which is no file of a studio.", hint="Take another backup.", param=path)
    private_folder(root / top)
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True, mode=SHARED_MODE)
    store.copy_out(entry["object"], entry["bytes"], target, path)
    target.chmod(entry["mode"] & 0o777)
    os.utime(target, ns=(entry["mtime_ns"], entry["mtime_ns"]))


def _write_key(root: Path, name: str, value: bytes) -> None:
    path = private_folder(root / "secrets") / Path(name).name
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(value)


def _load(store: Store, told: dict[str, Any]) -> None:
    with rows.connect() as connection:
        rows.refuse_full(connection)
    for table, entry in told["tables"].items():
        path = store.path_of(entry["object"])
        store.check(entry["object"], path.stat().st_size if path.exists() else -1, f"the table {table}")
    url = get_settings().database_url
    assert url is not None
    migrate.upgrade(url, told["schema"])
    with rows.connect() as connection:
        rows.load(connection, told["tables"], store.path_of, told["sequences"])


def _open(told: dict[str, Any]) -> None:
    """Bring the rows to this version, and end what only the other studio held: leases of its workers, uploads in progress."""
    url = get_settings().database_url
    assert url is not None
    migrate.upgrade(url)
    with rows.connect() as connection:
        connection.execute("DELETE FROM uploads WHERE file_id IS NULL")  # their bytes were still coming in
    with transaction() as session:
        relay.take_over(session)
    get_engine().dispose()


def _remove(root: Path) -> None:
    """Everything that was written: the folder held no studio before."""
    for name in (*KEPT, "postgres", "postgres.making", "valkey", "secrets", "run", "logs"):
        shutil.rmtree(root / name, ignore_errors=True)


def check(folder: Path, name: str | None = None, say: Callable[[str], None] = lambda text: None) -> None:
    """Restore a backup into a fresh folder with a database of its own, which compares all rows and hashes, and remove it again.

    In a process of its own, because this one is bound to the studio that it backs up. Raises BadData.
    """
    fresh = Path(tempfile.mkdtemp(prefix="luthier-check-", dir=folder))
    bound = ("LUTHIER_DATABASE_URL", "LUTHIER_REDIS_URL", "LUTHIER_STUDIO")
    environment = {key: value for key, value in os.environ.items() if key not in bound}
    command = [sys.executable, "-m", "app.cli", "restore", str(folder), "--data-dir", str(fresh / "data")]
    try:
        fresh.chmod(0o711)
        command += ["--snapshot", name] if name else []
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BadData(f"The backup cannot be restored: {done.stderr.strip()[-2000:]}", hint="Take another one into an empty folder.")
        say(done.stdout.strip())
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
