"""Object storage: the bytes of files as objects named by their SHA-256, and manifests that say which objects a file is made of.

    <LUTHIER_STORAGE_URL>/objects/ab/<sha256>     a part of a file, PART_BYTES or less; most files are one part
    …/manifests/models/<id>.json                  one place of the data folder: its files, each with its parts; written last
    …/studio.json                                 whose storage it is (`app/storage/collect.py`)

A place without a manifest was never stored. A part that is there already is not sent again, so an upload that broke off goes on
where it was; a download verifies each part, and what of it lies on the disk is not fetched again. Which places there are, and
where they lie on this machine, is the business of `app/storage/places.py`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from app.errors import BadData, StudioError, Unavailable
from app.kit import manifest
from app.languages import gettext
from app.settings import get_settings
from app.storage._parallel import Parallel
from app.storage.atomic import disk_errors, sync, write_atomically

T = TypeVar("T")
Beat = Callable[[], object]
Octets = bytes  # the name of a size here

PART_BYTES = 16 * 2**20
PARALLEL = 4
"""Parts in flight at once, each of them in memory."""
PARTIAL = ".partial"
RETRY_SECONDS = 60.0
"""How long a request is tried again while the storage does not answer."""
TRUSTED_SECONDS = 1800.0
"""An object younger than this is taken as it is. An older one is written again under a name of its own, since the sweep may be about to
remove it."""
KEPT_SECONDS = 3 * 3600.0
"""An object that no manifest names is removed at this age. An upload must be complete before what it found can be so old."""
EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure", "file": ""}
"""What a URL may begin with, and the extra of the package that it needs."""


class StorageAway(Unavailable):
    """The object storage does not answer, or answers with errors that pass."""

    code = "storage_unavailable"


class StorageRefuses(Unavailable):
    """The object storage cannot be used as it is configured: no package, no permission, no such bucket."""

    code = "storage_refused"


class ObjectDamaged(BadData):
    """An object is missing, or holds other bytes than its name says."""

    code = "object_damaged"


@dataclass(frozen=True, slots=True)
class StoredFile:
    bytes: int
    sha256: str
    parts: tuple[str, ...]  # names of objects, as `ab/<sha256>`, each of `part_bytes` of its place but the last


@dataclass(frozen=True, slots=True)
class StoredPlace:
    """A manifest: the files of a folder by their paths in it; the only name of a single file is empty."""

    files: Mapping[str, StoredFile]
    part_bytes: int

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(part for file in self.files.values() for part in file.parts)

    def to_json(self) -> Octets:
        files = {name: {"bytes": file.bytes, "sha256": file.sha256, "parts": list(file.parts)} for name, file in self.files.items()}
        return json.dumps({"version": 1, "part_bytes": self.part_bytes, "files": files}, indent=1).encode()

    @classmethod
    def from_json(cls, data: Octets) -> StoredPlace:
        told = json.loads(data)
        files = {name: StoredFile(entry["bytes"], entry["sha256"], tuple(entry["parts"])) for name, entry in told["files"].items()}
        if wrong := next((name for name in files if name.startswith("/") or ".." in name.split("/")), None):
            raise ValueError(f"it names a file outside its folder: {wrong[:200]!r}")
        return cls(files, told["part_bytes"])


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object or a manifest in a listing."""

    name: str
    bytes: int
    age_seconds: float


def storage(retry_seconds: float | None = None) -> ObjectStorage | None:
    """The object storage of the settings; None where the data folder is all there is. Raises StorageRefuses."""
    url = get_settings().storage_url
    return _opened(url, RETRY_SECONDS if retry_seconds is None else retry_seconds, os.getpid()) if url else None


def check() -> None:
    """At the start of a program: that the storage can be used, where there is one. One that does not answer is no reason not to start,
    since it comes back by itself. Raises StorageRefuses."""
    with suppress(StorageAway):
        if (there := storage(0.0)) is not None:
            there.check()


@functools.lru_cache(maxsize=8)
def _opened(url: str, retry_seconds: float, process: int) -> ObjectStorage:
    """One for each process: a fork has none of its parent's threads and connections."""
    return ObjectStorage(url, retry_seconds)


class ObjectStorage:
    """One bucket, or a folder in it. Thread-safe."""

    def __init__(self, url: str, retry_seconds: float = RETRY_SECONDS) -> None:
        self.url, self.retry_seconds = url.rstrip("/"), retry_seconds
        self._files, self._root = _open(self.url)

    # Places -----------------------------------------------------------------------------------------------------------

    def put(self, source: Path, place: str, beat: Beat = lambda: None) -> StoredPlace:
        """Store a file or a folder as this place; what is there already is not sent again. `beat` is called about once a second.

        Raises FileNotFoundError when something of it goes away meanwhile, StorageAway, StorageRefuses.
        """
        began = time.monotonic()
        sent: dict[str, _Sending] = {}
        with Parallel(beat, PARALLEL) as pool:
            for name, path in _files_below(source):
                sent[name] = _Sending(path)
                for piece in sent[name].pieces():
                    sent[name].parts.append(pool.start(functools.partial(self._put_part, piece)))
            stored = StoredPlace({name: one.sent(pool.wait) for name, one in sent.items()}, PART_BYTES)
            if time.monotonic() - began > KEPT_SECONDS - 2 * TRUSTED_SECONDS:
                message = gettext("%(place)s was sent too slowly to %(url)s: what was found there may be gone.", place=place, url=self.url)
                raise StorageAway(message, hint=gettext("It is sent again."))
            pool.wait(pool.start(lambda: self.write(f"manifests/{place}.json", stored.to_json())))
        return stored

    def get(self, stored: StoredPlace, target: Path, beat: Beat = lambda: None, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Fill the file or folder `target`. Each file appears under its name when it is whole, a folder's own manifest last; files
        with their sizes, and verified parts of others, are not fetched again.

        Raises ObjectDamaged, DiskFull, StorageAway, StorageRefuses.
        """
        for name in sorted(filter(wanted, stored.files), key=lambda name: (name == manifest.NAME, name)):
            file, path = stored.files[name], target / name
            if path.is_file() and path.stat().st_size == file.bytes:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk_errors():
                self._get_file(file, stored.part_bytes, path, beat)

    def find(self, place: str, beat: Beat | None = None) -> StoredPlace | None:
        """The manifest of a place; None when it is not stored. Raises StorageAway, ObjectDamaged for one that cannot be read."""
        name = f"manifests/{place}.json"
        if beat is None:
            data = self.read(name)
        else:
            with Parallel(beat, PARALLEL) as pool:
                data = pool.wait(pool.start(lambda: self.read(name)))
        if data is None:
            return None
        try:
            return StoredPlace.from_json(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = gettext("The manifest of %(place)s in %(url)s is damaged: %(reason)s", place=place, url=self.url, reason=error)
            raise ObjectDamaged(message, hint=gettext("Restore it from a backup.")) from error

    def forget(self, place: str) -> None:
        """Remove a place. Its objects go with the next sweep, unless another place has them too."""
        self.remove(f"manifests/{place}.json")

    def age(self, place: str) -> float:
        """Seconds since a place was stored; 0 for none."""
        info = self._tried("look", lambda: self._info(f"manifests/{place}.json"))
        return _age(info) if info is not None else 0.0

    def places(self, below: str = "") -> Iterator[ListedObject]:
        """What is stored, or what of it is below a folder."""
        for found in self._listed(f"manifests/{below}"):
            yield ListedObject(f"{below}/{found.name}".lstrip("/").removesuffix(".json"), found.bytes, found.age_seconds)

    def objects(self) -> Iterator[ListedObject]:
        """Every object, named as in `StoredFile.parts`."""
        yield from self._listed("objects")

    # Parts ------------------------------------------------------------------------------------------------------------

    def _put_part(self, piece: bytes) -> str:
        digest = hashlib.sha256(piece).hexdigest()
        name = f"{digest[:2]}/{digest}"
        info = self._tried("look", lambda: self._info(f"objects/{name}"))
        if info is not None and info["size"] == len(piece):
            if _age(info) < TRUSTED_SECONDS:
                return name
            name = f"{name}-{int(time.time()):x}"
        self.write(f"objects/{name}", piece)
        return name

    def _get_file(self, file: StoredFile, part_bytes: int, path: Path, beat: Beat) -> None:
        draft = path.with_name(f".{path.name}{PARTIAL}")
        resumed = draft.exists()
        with draft.open("r+b" if resumed else "wb") as opened:
            opened.truncate(file.bytes)
        with Parallel(beat, PARALLEL) as pool:
            parts = []
            for index, part in enumerate(file.parts):
                size = min(part_bytes, file.bytes - index * part_bytes)
                if not (resumed and _has(draft, index * part_bytes, size, part)):
                    parts.append(pool.start(functools.partial(self._get_part, draft, index * part_bytes, part)))
            for one in parts:
                pool.wait(one)
        sync(draft)
        os.replace(draft, path)

    def _get_part(self, path: Path, offset: int, part: str) -> None:
        data = self.read(f"objects/{part}")
        if data is None or hashlib.sha256(data).hexdigest() != _digest(part):
            if data is None:
                message = gettext("The object %(name)s in %(url)s is missing.", name=part, url=self.url)
            else:
                message = gettext("The object %(name)s in %(url)s holds other bytes than were stored.", name=part, url=self.url)
            raise ObjectDamaged(message, hint=gettext("Restore it from a version or a copy of the bucket."))
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    # Requests ---------------------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """The bytes under a name below the root; None when there are none."""

        def cat() -> bytes | None:
            try:
                data: bytes = self._files.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
            return data

        return self._tried(f"read {name}", cat)

    def write(self, name: str, data: bytes) -> None:
        """Write it wholly or not at all: a request of its own where the storage is remote."""
        path, local = f"{self._root}/{name}", self.url.startswith("file:")
        self._tried(f"write {name}", lambda: write_atomically(Path(path), data) if local else self._files.pipe_file(path, data))

    def remove(self, name: str) -> None:
        def remove() -> None:
            with suppress(FileNotFoundError):
                self._files.rm_file(f"{self._root}/{name}")

        self._tried(f"remove {name}", remove)

    def check(self) -> None:
        """Write, read and remove a small object. Raises StorageAway and StorageRefuses, which say what is wrong."""
        name, data = f"checks/{os.getpid()}-{random.getrandbits(32):08x}", os.urandom(16)
        self.write(name, data)
        if self.read(name) != data:
            raise StorageRefuses(f"{self.url} does not give back what was written to it.", hint="Is it a bucket, and the right one?")
        self.remove(name)

    def _listed(self, folder: str) -> Iterator[ListedObject]:
        top = f"{self._root}/{folder}".rstrip("/")
        there = self._tried(f"list {folder}", lambda: self._files.find(top, detail=True))
        for path, info in there.items():
            name = path.removeprefix(top).lstrip("/")
            if name and not name.rpartition("/")[2].startswith("."):
                yield ListedObject(name, int(info["size"]), _age(info))

    def _info(self, name: str) -> dict[str, Any] | None:
        try:
            info: dict[str, Any] = self._files.info(f"{self._root}/{name}")
            return info if info["type"] == "file" else None
        except FileNotFoundError:
            return None

    def _tried(self, what: str, action: Callable[[], T]) -> T:
        """Try a request again for a while, with growing pauses."""
        deadline, pause = time.monotonic() + self.retry_seconds, 0.1
        while True:
            try:
                return action()
            except StudioError:
                raise
            except Exception as error:  # each vendor's package raises types of its own
                fault = self._fault(what, error)
                if isinstance(fault, StorageRefuses) or time.monotonic() > deadline:
                    raise fault from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 5.0)

    def _fault(self, what: str, error: Exception) -> StudioError:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        message = gettext("The object storage %(url)s cannot be used (%(what)s). %(said)s", url=self.url, what=what, said=said)
        if isinstance(error, PermissionError) or type(error).__name__ in _REFUSALS:
            hint = gettext("Check LUTHIER_STORAGE_URL and the keys of this process, as docs/deploy.md says; `luthier doctor` tries them.")
            return StorageRefuses(message, hint=hint)
        if isinstance(error, FileNotFoundError):  # of a write: reads and removals take it for an answer
            return StorageRefuses(message, hint=gettext("Make the bucket first."))
        return StorageAway(message, hint=gettext("Is it running, and can this machine reach it?"))


_REFUSALS = {
    "NoCredentialsError", "PartialCredentialsError", "ParamValidationError",
    "DefaultCredentialsError", "RefreshError", "ClientAuthenticationError",
}  # fmt: skip
"""Errors of botocore, google-auth and azure-core that no other try will change."""


def _open(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the root in it. Vendors' packages read keys and endpoints from their own variables."""
    scheme = url.partition(":")[0]
    if scheme not in EXTRAS:
        raise StorageRefuses(f"LUTHIER_STORAGE_URL={url} begins with no known scheme.", hint=f"Use {', '.join(f'{s}://' for s in EXTRAS)}.")
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True}
    if scheme != "file":
        options["use_listings_cache"] = False
    if scheme == "s3":  # this module has retries and checksums of its own, which every server that speaks S3 can do with
        options |= {"max_concurrency": 1, "config_kwargs": _S3}
    try:
        files, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise StorageRefuses(
            f"LUTHIER_STORAGE_URL={url} needs a package that is not installed: {error}",
            hint=f'Install it in every process of the studio: `pip install "luthier[{EXTRAS[scheme]}]"`.',
        ) from error
    files.retries = 1
    return files, str(root).rstrip("/")


_S3: dict[str, Any] = {
    "connect_timeout": 5,
    "read_timeout": 60,
    "retries": {"total_max_attempts": 1},
    "max_pool_connections": 2 * PARALLEL,
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}


@dataclass(slots=True)
class _Sending:
    """One file that is being sent."""

    path: Path
    bytes: int = 0
    parts: list[Future[str]] = field(default_factory=list)
    _hash: Any = field(default_factory=hashlib.sha256)

    def pieces(self) -> Iterator[Octets]:
        with self.path.open("rb") as file:
            while piece := file.read(PART_BYTES):
                self._hash.update(piece)
                self.bytes += len(piece)
                yield piece

    def sent(self, wait: Callable[[Future[str]], str]) -> StoredFile:
        return StoredFile(self.bytes, self._hash.hexdigest(), tuple(map(wait, self.parts)))


def _files_below(source: Path) -> list[tuple[str, Path]]:
    """(name, path) of each plain file, but for half-fetched ones and this machine's notes of what was verified."""
    if not source.is_dir():
        return [("", source)]
    plain = (path for path in sorted(source.rglob("*")) if path.is_file() and not path.is_symlink())
    return [(path.relative_to(source).as_posix(), path) for path in plain if path.name != manifest.SEEN and path.suffix != PARTIAL]


def _digest(part: str) -> str:
    """The SHA-256 in an object's name, which may end with a number that tells it from an older one."""
    return part.partition("/")[2].partition("-")[0]


def _has(path: Path, offset: int, size: int, part: str) -> bool:
    with path.open("rb") as file:
        file.seek(offset)
        return hashlib.sha256(file.read(size)).hexdigest() == _digest(part)


def _age(info: dict[str, Any]) -> float:
    """Seconds since an object was written, by the store's word; vendors' packages each call it something else."""
    for key in ("LastModified", "last_modified", "mtime", "updated", "created"):
        if isinstance(when := info.get(key), datetime):
            return time.time() - when.timestamp()
        if isinstance(when, str) and when:
            return time.time() - datetime.fromisoformat(when).timestamp()
        if isinstance(when, int | float):
            return time.time() - when
    return 0.0
