"""Where what the tables name lies: in the data folder, brought there from the object storage first where it is not here yet.

Tables hold paths relative to the data folder. With LUTHIER_STORAGE_URL the data folder of each machine is a cache of the object
storage: what was written here is stored (`push`) before others hear of it, and what is read is brought (`path`). Without it the
functions of this module do nothing, and cost nothing.

    cache/stored/models/<id>.json    a note that this place is stored and here, and how large it is; its time is that of its last use
    cache/stored/models/<id>.use     locked while something relies on the place staying here (`held`)
    cache/stored/models/<id>.pull    locked while it is brought
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from app.errors import BadData
from app.kit import manifest
from app.languages import gettext
from app.settings import get_settings
from app.storage import objects
from app.storage.objects import Beat, ObjectStorage

DEPTHS = {"blobs": 3, "rows": 3, "models": 2, "runs": 4, "exports": 3, "predictions": 2, "uploads": 3}
"""How many parts of a path are one place: `models/<id>` with all its files, `runs/<job>/a1/checkpoint-5`, one file of an export."""
WEIGHTS = (".safetensors", ".gguf")
"""Files that only loading a model needs, as opposed to its settings and its tokenizer."""
NOTES = ("cache", "stored")
RECENT_SECONDS = 3600.0
"""What was used within this time is not removed from the cache, since it may still be read."""
CACHE_SHARE = 0.8
"""The part of the data folder's disk that the cache may take where no setting says another size."""


class CachedPlace(NamedTuple):
    """A place that is stored, and here."""

    place: str
    bytes: int
    used_at: float
    partial: bool
    """Without its weights."""


def place_of(path: str) -> str | None:
    """The place that a path of the data folder is in; None for what is never stored, such as caches and the folders above places."""
    parts = PurePosixPath(path).parts
    depth = DEPTHS.get(parts[0], 0) if parts else 0
    return "/".join(parts[:depth]) if 0 < depth <= len(parts) else None


# Reading ------------------------------------------------------------------------------------------------------------


def path(relative: str, *, weights: bool = True, beat: Beat = lambda: None) -> Path:
    """Where this lies on this machine, after bringing it where it is stored and not here. It need not exist. Without `weights` the
    weights of a model may be missing. Raises StorageAway, StorageRefuses, ObjectDamaged, DiskFull."""
    if (storage := objects.storage()) is not None and (place := place_of(relative)) is not None:
        _bring(storage, place, weights, beat)
    return get_settings().data_dir / relative


def exists(relative: str) -> bool:
    """Whether it is here or stored. A place is not brought for that; of a folder that a file is asked of, all but the weights are."""
    storage, place = objects.storage(), place_of(relative)
    if storage is None or place is None or (get_settings().data_dir / relative).exists():
        return (get_settings().data_dir / relative).exists()
    if relative == place:
        return storage.find(place) is not None
    if not relative.endswith(WEIGHTS):
        return path(relative, weights=False).exists()
    stored = storage.find(place)
    return stored is not None and relative.removeprefix(f"{place}/") in stored.files


def verified(relative: str) -> Path:
    """A folder with a manifest of its own whose files have their sizes. Its weights may be missing here: then they are in the object
    storage as the manifest says. Raises BadData where a file is not as it was written."""
    folder, storage = path(relative, weights=False), objects.storage()
    note = _note(relative)
    if storage is None or note is None or not note.partial:
        manifest.verify(folder, deep=False)
        return folder
    told, stored = manifest.read(folder), storage.find(relative)
    if told is None or stored is None:
        message = gettext("%(place)s has no readable manifest, so its files cannot be trusted.", place=relative)
        raise BadData(message, hint=gettext("Restore it in the object storage."))
    for name, entry in told["files"].items():
        there = stored.files.get(name)
        if there is None or there.sha256 != entry["sha256"]:
            message = gettext("The file %(name)s is missing in the object storage, or differs from what was written.", name=name)
            raise BadData(message, hint=gettext("Restore it there."))
    return folder


def stored(folder: str, pattern: str) -> list[str]:
    """Names of the places in a folder that are in the object storage and match a pattern."""
    storage = objects.storage()
    there = storage.places(folder) if storage is not None else ()
    return [found.name for found in there if PurePosixPath(found.name.removeprefix(f"{folder}/")).match(pattern)]


def below(folder: str, pattern: str = "*") -> list[Path]:
    """What is in a folder of the data folder and matches a pattern, as `a*/trainer.log`, brought where it is stored and not here."""
    for name in stored(folder, pattern):
        path(name)
    return list((get_settings().data_dir / folder).glob(pattern))


@contextmanager
def held(paths: Iterable[str | None], beat: Beat = lambda: None) -> Iterator[None]:
    """Bring these, and keep them here until the end: what works on them for long is not disturbed by the cache's limit."""
    wanted = [one for one in paths if one] if objects.storage() is not None else []
    with contextlib.ExitStack() as stack:
        for place in sorted({place for one in wanted if (place := place_of(one))}):
            stack.enter_context(_locked(place, "use", fcntl.LOCK_SH))
        for one in wanted:
            path(one, beat=beat)
        yield


def bring_again(relative: str, beat: Beat = lambda: None) -> bool:
    """Replace a place that is damaged here by what is stored; False where it is not."""
    storage, place = objects.storage(), place_of(relative)
    if storage is None or place is None or storage.find(place) is None:
        return False
    drop(place)
    path(relative, beat=beat)
    return True


def bring_all(folder: str) -> None:
    """Bring a place, or each place in a folder."""
    path(folder)
    if place_of(folder) is None:
        below(folder)


def _bring(storage: ObjectStorage, place: str, weights: bool, beat: Beat) -> None:
    if _is_here(place, weights):
        return
    with _locked(place, "pull", fcntl.LOCK_EX):
        stored = None if _is_here(place, weights) else storage.find(place, beat)
        if stored is None:
            return  # it came meanwhile; or it was made here and is not stored yet, or is nowhere
        make_room(stored.bytes)
        light = {name for name in stored.files if weights or not name.endswith(WEIGHTS)}
        storage.get(stored, get_settings().data_dir / place, beat, light.__contains__)
        _write_note(place, stored.bytes, partial=len(light) < len(stored.files))


def _is_here(place: str, weights: bool) -> bool:
    note = _note(place)
    if note is None or (note.partial and weights) or not (get_settings().data_dir / place).exists():
        return False
    with contextlib.suppress(FileNotFoundError):
        os.utime(_beside(place, "json"))
    return True


# Writing ------------------------------------------------------------------------------------------------------------


def push(relative: str, *, source: Path | None = None, beat: Beat = lambda: None) -> None:
    """Store what lies here under this path, which is a place; `source` is another name of it, which stays when this one goes.

    Raises FileNotFoundError, StorageAway, StorageRefuses.
    """
    storage = objects.storage()
    if storage is None:
        return
    assert place_of(relative) == relative, f"{relative} is no place"
    stored = storage.put(source or get_settings().data_dir / relative, relative, beat)
    if (get_settings().data_dir / relative).exists():
        _write_note(relative, stored.bytes)
    make_room(0)


def push_inside(folder: str, *, leave_out: tuple[str, ...] = (), beat: Beat = lambda: None) -> None:
    """Store each file and folder in a folder of the data folder, each as a place; temporary names and `leave_out`, beginnings of names,
    are passed over."""
    if objects.storage() is None:
        return
    for one in sorted((get_settings().data_dir / folder).iterdir()):
        if not one.name.startswith((".", *leave_out)) and not one.is_symlink() and (one.is_file() or one.is_dir()):
            push(f"{folder}/{one.name}", beat=beat)


def forget(relative: str) -> None:
    """Remove a place here and there."""
    storage = objects.storage()
    if storage is not None and place_of(relative) == relative:
        storage.forget(relative)
        drop(relative)


def drop(place: str) -> None:
    """Remove a place from this machine; what is stored stays. Its files go after the note that they are here."""
    _beside(place, "json").unlink(missing_ok=True)
    there = get_settings().data_dir / place
    if there.is_dir():
        shutil.rmtree(there, ignore_errors=True)
    else:
        there.unlink(missing_ok=True)


# The cache ----------------------------------------------------------------------------------------------------------


def cache_limit() -> int:
    limit = get_settings().storage_cache_bytes
    return int(shutil.disk_usage(get_settings().data_dir).total * CACHE_SHARE) if limit is None else limit


def make_room(more_bytes: int) -> int:
    """Remove what was used longest ago until this much more fits into the cache's limit. Never what is held or was used lately, so
    that the cache may be larger for a while. Returns the number of places removed."""
    there = notes()
    over = sum(note.bytes for note in there) + more_bytes - cache_limit()
    gone = 0
    for note in sorted(there, key=lambda note: note.used_at):
        if over <= 0 or time.time() - note.used_at < RECENT_SECONDS:
            break
        if _drop_unless_held(note.place):
            over, gone = over - note.bytes, gone + 1
    return gone


def drop_deleted() -> int:
    """Remove from this machine what is stored no longer, as it was deleted on another one. Returns the number of places."""
    if (storage := objects.storage()) is None:
        return 0
    there = notes()
    stored = {found.name for found in storage.places()} if there else set()
    return sum(_drop_unless_held(note.place) for note in there if note.place not in stored)


def notes() -> list[CachedPlace]:
    """Every place that is stored, and here. A note outlives the files when these are removed by whoever deletes their row."""
    root, found = get_settings().data_dir, []
    top = root.joinpath(*NOTES)
    for one in top.rglob("*.json"):
        note = _note(one.relative_to(top).as_posix().removesuffix(".json"))
        if note is not None and (root / note.place).exists():
            found.append(note)
        else:
            one.unlink(missing_ok=True)
    return found


def _drop_unless_held(place: str) -> bool:
    try:
        with _locked(place, "use", fcntl.LOCK_EX | fcntl.LOCK_NB):
            note = _note(place)
            if note is None or time.time() - note.used_at < RECENT_SECONDS:
                return False  # it was asked for since it was listed
            drop(place)
    except BlockingIOError:
        return False
    return True


def _note(place: str) -> CachedPlace | None:
    path = _beside(place, "json")
    try:
        told: dict[str, Any] = json.loads(path.read_text())
        return CachedPlace(place, told["bytes"], path.stat().st_mtime, told["partial"])
    except (OSError, ValueError, KeyError):
        return None


def _write_note(place: str, size: int, partial: bool = False) -> None:
    """Written without fsync: a lost note costs a look into the storage."""
    path = _beside(place, "json")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({"bytes": size, "partial": partial}))
    os.replace(draft, path)


@contextmanager
def _locked(place: str, kind: str, how: int) -> Iterator[None]:
    path = _beside(place, kind)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield


def _beside(place: str, kind: str) -> Path:
    path = get_settings().data_dir.joinpath(*NOTES, place)
    return path.with_name(f"{path.name}.{kind}")
