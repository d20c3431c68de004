"""The state of the whole studio: its health, its numbers, and the owner's next step."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import redis
from pydantic import BaseModel, computed_field
from sqlalchemy import ColumnElement, ScalarSelect, func, or_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, defer

from app.db import get_engine
from app.errors import StudioError
from app.languages import gettext, mark
from app.machines.heartbeats import Worker, alive
from app.migrate import is_current, serves
from app.queue import cannot_write, get_redis
from app.settings import get_settings
from app.storage import objects, sweeping
from app.tables import Answer, Base, Dataset, Exchange, Job, Model, User

T = TypeVar("T")

# Health ---------------------------------------------------------------------------------------------------------------


class HealthCheck(BaseModel):
    """One part of the studio, and what to do when it is not well."""

    name: str
    good: bool
    message: str
    hint: str = ""

    @computed_field(json_schema_extra={"deprecated": True})
    def way_out(self) -> str:
        """What `hint` was called before. Removed in the next version."""
        return self.hint


def checks(session: Session | None = None) -> list[HealthCheck]:
    """The essential components: database, its schema, broker, and the object storage where there is one. Checked over `session` where
    there is one."""
    return [*_database(session), _broker(), *_storage_in_time()]


def _away(name: str) -> HealthCheck:
    hint = gettext("It comes back by itself when `luthier up` runs it.")
    return HealthCheck(name=name, good=False, message=gettext("does not respond"), hint=hint)


CHECK_SECONDS = 2.0
_checkers = ThreadPoolExecutor(4, thread_name_prefix="check")
_checking: dict[str, Future[Any]] = {}


async def checks_in_time() -> tuple[list[HealthCheck], list[Worker]]:
    """`checks` and the living workers, each in a dedicated thread with a timeout of two seconds."""
    database, broker, storage, workers = await asyncio.gather(
        _in_time("database", lambda: _database(None), [_away("database")]),
        _in_time("redis", _broker, _away("redis")),
        _in_time("storage", _storage, StorageAnswer()),
        _in_time("workers", alive, list[Worker]()),
    )
    return [*database, broker, *_storage_checks(storage)], workers


async def _in_time(name: str, ask: Callable[[], T], otherwise: T) -> T:
    """The result of `ask`, or `otherwise` after a timeout. A call that is still running is awaited again instead of started
    twice: there is one at a time, however many requests there are."""
    try:
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(_asked(name, ask))), CHECK_SECONDS)
    except TimeoutError:
        return otherwise


def _asked(name: str, ask: Callable[[], T]) -> Future[T]:
    asked = _checking.get(name)
    if asked is None or asked.done():
        asked = _checking[name] = _checkers.submit(ask)
    return asked


def _database(session: Session | None) -> list[HealthCheck]:
    try:
        if session is not None:
            current, good = is_current(session.connection()), serves(session.connection())
        else:
            with get_engine().connect() as connection:
                current, good = is_current(connection), serves(connection)
    except (SQLAlchemyError, RuntimeError):
        return [_away("database")]
    newer = gettext("newer, and serves this version too") if good else gettext("of another version")
    schema = gettext("up to date") if current else newer
    return [
        HealthCheck(name="database", good=True, message=gettext("online")),
        HealthCheck(name="migrations", good=good, message=schema, hint="" if good else gettext("`luthier up` brings it up to date.")),
    ]


def _broker() -> HealthCheck:
    try:
        get_redis().ping()
    except redis.RedisError as error:
        if cannot_write(error):
            return HealthCheck(name="redis", good=False, message=gettext("is read-only: its disk is full"), hint=gettext(MAKE_ROOM))
        return _away("redis")
    except RuntimeError:
        return _away("redis")
    return HealthCheck(name="redis", good=True, message=gettext("online"))


class StorageAnswer(NamedTuple):
    """Whether there is an object storage, whether it answers, and else why not. A thread asks it, which knows no language."""

    there: bool = True
    good: bool = False
    said: str = ""


def _storage() -> StorageAnswer:
    try:
        storage = objects.storage(0.0)
        if storage is not None:
            storage.read(sweeping.STUDIO)
    except StudioError as error:
        return StorageAnswer(said=error.message)
    return StorageAnswer(storage is not None, good=True)


def _storage_in_time() -> list[HealthCheck]:
    """The same for a page, which does not wait long for it."""
    if not get_settings().storage_url:
        return []
    try:
        return _storage_checks(_asked("storage", _storage).result(CHECK_SECONDS))
    except TimeoutError:
        return _storage_checks(StorageAnswer())


def _storage_checks(found: StorageAnswer) -> list[HealthCheck]:
    """None where the data folder is all there is."""
    if found.good:
        return [HealthCheck(name="storage", good=True, message=gettext("online"))] if found.there else []
    hint = gettext("Uploads are refused, and runs wait, until it answers; `luthier doctor` tries it.")
    return [HealthCheck(name="storage", good=False, message=gettext("does not respond"), hint=f"{found.said} {hint}".strip())]


MAKE_ROOM = mark("Make room on the disk of the data folder; all goes on by itself then.")


def no_room() -> bool:
    """Whether the disk of the data folder is so full that the database cannot write."""
    disk = os.statvfs(get_settings().data_dir)
    return disk.f_bavail * disk.f_frsize < 2**20


class WorkerRole(BaseModel):
    """One kind of worker: how many are alive, and what stands still when there are none."""

    queue: str
    title: str
    alive: int
    up_seconds: float | None
    stands_still: str


_DUTIES = {
    "train": (mark("Training"), mark("Runs stay queued.")),
    "evaluate": (mark("Evaluations"), mark("Evaluations stay queued.")),
    "data": (mark("Data workers"), mark("Datasets are not read.")),
    "import": (mark("Model downloads"), mark("Models are not downloaded.")),
    "export": (mark("Exports"), mark("Models are not exported.")),
    "generate": (mark("Inference"), mark("Models cannot answer, and predictions stay queued.")),
    "relay": (mark("Dispatcher"), mark("No new run starts.")),
}


def seconds_up() -> float:
    """Uptime of this web process."""
    return time.time() - psutil.Process().create_time()


def duties(workers: list[Worker] | None = None) -> list[WorkerRole]:
    workers = alive() if workers is None else workers
    return [_duty(queue, title, still, [w for w in workers if w.queue == queue]) for queue, (title, still) in _DUTIES.items()]


def _duty(queue: str, title: str, still: str, mine: list[Worker]) -> WorkerRole:
    longest = max((worker.up_seconds for worker in mine), default=None)
    return WorkerRole(queue=queue, title=gettext(title), alive=len(mine), up_seconds=longest, stands_still=gettext(still))


# The overview ---------------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """A person's progress on the way dataset → fine-tuned model → conversation. Each is the number done."""

    datasets: int
    reading: int
    jobs: int
    running: int
    tuned: int
    tried: int

    @property
    def next(self) -> int:
        """The next step, counted from 1."""
        if not self.datasets:
            return 1
        return 3 if self.tuned else 2


class Overview(NamedTuple):
    steps: Steps
    jobs: list[Job]
    datasets: list[Dataset]
    models: list[Model]


def overview(session: Session, user: User) -> Overview:
    """The newest of everything, and this person's progress."""
    return Overview(
        _steps(session, user),
        list(
            session.scalars(
                select(Job).where(Job.project_id == user.project_id, Job.deleted_at.is_(None)).order_by(Job.created_at.desc()).limit(5)
            )
        ),
        _newest_datasets(session, user),
        list(
            session.scalars(
                select(Model).where(_mine(user), Model.deleted_at.is_(None), Model.kept).order_by(Model.created_at.desc()).limit(5)
            )
        ),
    )


def _newest_datasets(session: Session, user: User) -> list[Dataset]:
    """One line for all versions of a dataset, as in the list of datasets: that of the newest."""
    lines: dict[tuple[object, str], Dataset] = {}
    query = select(Dataset).options(defer(Dataset.report)).where(Dataset.project_id == user.project_id, Dataset.deleted_at.is_(None))
    for dataset in session.scalars(query.order_by(Dataset.created_at.desc(), Dataset.id).limit(100)):
        lines.setdefault((dataset.file_id, dataset.name), dataset)
    return list(lines.values())[:5]


def _mine(user: User) -> ColumnElement[bool]:
    return or_(Model.project_id == user.project_id, Model.project_id.is_(None))


def _steps(session: Session, user: User) -> Steps:
    def count(table: type[Base], *conditions: ColumnElement[bool]) -> ScalarSelect[int]:
        return select(func.count()).select_from(table).where(*conditions).scalar_subquery()

    datasets, jobs = (
        (Dataset.project_id == user.project_id, Dataset.deleted_at.is_(None)),
        (Job.project_id == user.project_id, Job.deleted_at.is_(None)),
    )
    tuned = (Model.project_id == user.project_id, Model.job_id.is_not(None), Model.deleted_at.is_(None))
    tried = (Model.project_id == user.project_id, Model.job_id.is_not(None), Answer.model_id == Model.id, Answer.exchange_id == Exchange.id)
    lines = select(Dataset.file_id, Dataset.name).where(*datasets, Dataset.status == "ready").distinct()
    row = session.execute(
        select(
            select(func.count()).select_from(lines.subquery()).scalar_subquery(),
            count(Dataset, *datasets, Dataset.status == "reading"),
            count(Job, *jobs),
            count(Job, *jobs, Job.status == "running"),
            count(Model, *tuned),
            select(func.count(Answer.id)).where(*tried).scalar_subquery(),
        )
    ).one()
    return Steps(*row)


# The machine ----------------------------------------------------------------------------------------------------------

_LIBRARIES = ("luthier", "torch", "transformers", "peft", "fastapi", "sqlalchemy", "celery")


def versions() -> list[tuple[str, str]]:
    """Installed versions, found without importing the packages."""
    found = [("Python", platform.python_version())]
    for name in _LIBRARIES:
        try:
            found.append((name.capitalize() if name == "luthier" else name, version(name)))
        except PackageNotFoundError:
            found.append((name, gettext("not installed")))
    return found


_FOLDERS = (
    ("blobs", mark("Uploaded files")),
    ("rows", mark("Rows of datasets")),
    ("models", mark("Models")),
    ("runs", mark("Checkpoints and runs")),
    ("postgres", mark("Database")),
    ("logs", mark("Logs")),
    ("tmp", mark("Temporary files")),
)


class DiskSpace(NamedTuple):
    folders: list[tuple[str, int]]
    free_bytes: int
    total_bytes: int
    data_dir: Path


def space() -> DiskSpace:
    """Bytes of the data folder. Measured at most once a minute, since it looks at every file."""
    found = _space(get_settings().data_dir, int(time.monotonic() // 60))
    return found._replace(folders=[(gettext(title), size) for title, size in found.folders])


@lru_cache(maxsize=2)
def _space(folder: Path, _minute: int) -> DiskSpace:
    disk = os.statvfs(folder)
    sizes = [(title, size_of(folder / name)) for name, title in _FOLDERS]
    return DiskSpace(sizes, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize, folder)


def size_of(folder: Path) -> int:
    """Bytes of all files below; 0 for a folder that is missing or unreadable."""
    total, waiting = 0, [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except (FileNotFoundError, PermissionError):
            continue  # files come and go while a job runs, and the database's folder may belong to its own user
    return total
