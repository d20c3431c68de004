"""Sweeps the object storage: places that no row names any more, and objects that no place names; and this machine's cache of it.

Deleting is a matter of rows: whatever removes them, and whatever died before it removed the files too, the next round finds what
nobody owns. Only the studio that a storage was begun by removes anything from it (`studio.json` there), so that a restored copy of a
studio, or another one by mistake, does not take away what its own rows do not know.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from sqlalchemy import ARRAY, ColumnElement, String, Uuid, any_, literal, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.db import transaction
from app.errors import StudioError
from app.settings import get_settings
from app.storage import objects, places
from app.storage.objects import ObjectStorage
from app.tables import Checkpoint, Dataset, Evaluation, Export, File, Job, Model, UploadPiece

log = logging.getLogger(__name__)

EVERY_SECONDS = 3600.0
UNOWNED_SECONDS = 3600.0
"""A place is stored before its row is committed, so one without a row is kept this long."""
STUDIO = "studio.json"
RESULT = "final"
"""The name of a result in the folder of its attempt."""
TEMPORARY = "tmp"
"""The name of what only its processes need there."""


class Swept(NamedTuple):
    """What a round removed."""

    places: int
    objects: int
    bytes: int


def begin(stop: threading.Event, cache_only: bool = False) -> None:
    """Sweep in a thread every hour until `stop`, where there is a storage: this machine's cache, and in the relay the storage too."""
    if get_settings().storage_url:
        threading.Thread(target=_keep_sweeping, args=[stop, cache_only], name="sweep", daemon=True).start()


def _keep_sweeping(stop: threading.Event, cache_only: bool) -> None:
    while not stop.is_set():
        try:
            if not cache_only and (swept := sweep()) is not None and any(swept):
                log.info("removed from the object storage: %d places, %d objects of %d bytes", *swept)
            if not cache_only and (stored := store_what_is_here()):
                log.info("put into the object storage: %d places that this machine alone had", stored)
            _tidy()
        except (StudioError, SQLAlchemyError, OSError) as error:
            log.warning("the object storage was not swept: %s", str(error).splitlines()[0])
        stop.wait(EVERY_SECONDS)


def _tidy() -> None:
    """One process of each machine removes from its cache what was deleted elsewhere, and what is too much."""
    stamp = get_settings().folder(*places.NOTES) / ".swept"
    try:
        fresh = time.time() - stamp.stat().st_mtime < EVERY_SECONDS / 2
    except FileNotFoundError:
        fresh = False
    if not fresh:
        stamp.touch()
        os.utime(stamp)
        places.drop_deleted()
        places.make_room(0)


def sweep() -> Swept | None:
    """One round over the storage; None where there is none, or it is another studio's. Raises StorageAway, StorageRefuses."""
    storage = objects.storage()
    if storage is None or not is_ours(storage):
        return None
    there = list(storage.objects())  # before the manifests: what comes later is too young to be removed
    named = list(storage.places())
    with transaction() as session:
        owned = live(session, [found.name for found in named])
    gone = {found.name for found in named if found.name not in owned and found.age_seconds > UNOWNED_SECONDS}
    for name in gone:
        if storage.age(name) > UNOWNED_SECONDS:  # it may have been stored again since it was listed
            storage.forget(name)
    used = _parts(storage, [found.name for found in named if found.name not in gone])
    unused = [found for found in there if found.name not in used and found.age_seconds > objects.KEPT_SECONDS]
    for found in unused:
        storage.remove(f"objects/{found.name}")
    return Swept(len(gone), len(unused), sum(found.bytes for found in unused))


def store_what_is_here() -> int:
    """Store what rows name and this machine alone has: of a studio that had no object storage before, of a restored backup, of a worker
    that died between the two. Returns the number of places. Raises StorageAway, StorageRefuses."""
    if objects.storage() is None:
        return 0
    noted, old = {note.place for note in places.notes()}, time.time() - UNOWNED_SECONDS
    here = [name for name, written in _on_disk() if name not in noted and written < old]
    with transaction() as session:
        running = _ids(session, Job, (_part(name, 1) for name in here if name.startswith("runs/")), Job.lease_until.is_not(None))
        wanted = [name for name in sorted(live(session, here)) if not (name.startswith("runs/") and _part(name, 1) in running)]
    for name in wanted:
        with suppress(FileNotFoundError):  # it was deleted meanwhile
            places.push(name)
    return len(wanted)


def _on_disk() -> Iterator[tuple[str, float]]:
    """(place, when it was written) of everything in the data folder that may be stored."""
    root = get_settings().data_dir
    for top, depth in places.DEPTHS.items():
        for path in root.glob("/".join([top, *["*"] * (depth - 1)])):
            if not path.name.startswith(".") and path.name != TEMPORARY:
                with suppress(FileNotFoundError):
                    yield path.relative_to(root).as_posix(), path.stat().st_mtime


def is_ours(storage: ObjectStorage) -> bool:
    """Whether this studio began the storage, which it does with its first round. Otherwise nothing is removed, and the log says so."""
    with transaction() as session:
        ours = identity(session)
    told = storage.read(STUDIO)
    if told is None:
        storage.write(STUDIO, json.dumps({"studio": ours}).encode())
        return True
    whose = json.loads(told).get("studio")
    if whose != ours:
        log.warning("%s was begun by another studio (%s), so nothing is removed from it. See docs/deploy.md.", storage.url, whose)
    return bool(whose == ours)


def identity(session: Session) -> str:
    """Of the database, which is another one after a restore."""
    return str(session.scalar(text("SELECT system_identifier || '/' || current_database() FROM pg_control_system()")))


def _parts(storage: ObjectStorage, names: list[str]) -> set[str]:
    """All objects that these places need. One that was removed meanwhile needs none."""
    used: set[str] = set()
    with ThreadPoolExecutor(objects.PARALLEL) as pool:
        for stored in pool.map(storage.find, names):
            used |= stored.parts if stored is not None else frozenset()
    return used


# Who owns what --------------------------------------------------------------------------------------------------------


def live(session: Session, names: list[str]) -> set[str]:
    """Those of the places that a row names which is not deleted."""
    found: set[str] = set()
    for top, owned in _OWNERS.items():
        found |= set(owned(session, [name for name in names if name.startswith(f"{top}/")]))
    return found


def _paths(session: Session, column: Any, names: Iterable[str]) -> set[str]:
    """Those of the texts that a column has in a row that is not deleted."""
    wanted = column == any_(literal(list(names), ARRAY(String)))
    return set(session.scalars(select(column).where(wanted, column.class_.deleted_at.is_(None))))


def _ids(session: Session, table: type[Job | Export | Evaluation], keys: Iterable[str], *more: ColumnElement[bool]) -> set[str]:
    """Those of the ids, in either way of writing them, whose row is not deleted, and meets `more` conditions."""
    known = {}
    for key in keys:
        with suppress(ValueError):  # somebody else's file has no id in its name
            known[uuid.UUID(key)] = key
    wanted = table.id == any_(literal(list(known), ARRAY(Uuid)))
    return {known[key] for key in session.scalars(select(table.id).where(wanted, table.deleted_at.is_(None), *more))}


def _part(name: str, number: int) -> str:
    return name.split("/")[number].partition(".")[0]


def _blobs(session: Session, names: list[str]) -> Iterator[str]:
    there = _paths(session, File.sha256, (_part(name, 2) for name in names))
    return (name for name in names if _part(name, 2) in there)


def _rows(session: Session, names: list[str]) -> Iterator[str]:
    """A dataset may have the rows of another one, and beside them lies what its rules found."""
    paths = {name: f"{name.partition('.')[0]}.parquet" for name in names}
    there = _paths(session, Dataset.rows_path, paths.values())
    return (name for name, path in paths.items() if path in there)


def _models(session: Session, names: list[str]) -> set[str]:
    return _paths(session, Model.path, names)


def _runs(session: Session, names: list[str]) -> Iterator[str]:
    """What belongs to a job; its result for as long as it is a model; a checkpoint until it is swept."""
    jobs, results = _ids(session, Job, (_part(name, 1) for name in names)), _models(session, names)
    saved = _paths(session, Checkpoint.path, names)
    for name in names:
        own = _part(name, 3)
        if name in results or name in saved or (_part(name, 1) in jobs and own != RESULT and not own.startswith("checkpoint-")):
            yield name


def _exports(session: Session, names: list[str]) -> Iterator[str]:
    there = _ids(session, Export, (_part(name, 1) for name in names))
    return (name for name in names if _part(name, 1) in there)


def _predictions(session: Session, names: list[str]) -> Iterator[str]:
    there = _ids(session, Evaluation, (_part(name, 1) for name in names))
    return (name for name in names if _part(name, 1) in there)


def _uploads(session: Session, names: list[str]) -> set[str]:
    """Pieces of uploads that are not complete yet."""
    return set(session.scalars(select(UploadPiece.path).where(UploadPiece.path == any_(literal(names, ARRAY(String))))))


_OWNERS: dict[str, Callable[[Session, list[str]], Iterable[str]]] = {
    "blobs": _blobs,
    "rows": _rows,
    "models": _models,
    "runs": _runs,
    "exports": _exports,
    "predictions": _predictions,
    "uploads": _uploads,
}
