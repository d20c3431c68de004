"""The checkpoints and the result of an attempt in the object storage: brought before it starts, stored beside its training.

A checkpoint is stored by a thread of the supervisor after the trainer has renamed it into place, from hard links, since the trainer
sweeps its own older ones meanwhile: no step waits for the network. Where checkpoints come faster than they are sent, those in
between are left out. One that is older is removed only when a newer one is stored. Without LUTHIER_STORAGE_URL nothing of this happens.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from app import events
from app.db import transaction
from app.errors import BadData, DiskFull
from app.evaluation.service import EvaluationSpec
from app.jobs import stored_checkpoints
from app.jobs.lifecycle import Claim
from app.kit import manifest
from app.settings import get_settings
from app.spec import JobSpec
from app.storage import objects, places
from app.storage.objects import Beat, StorageAway, StorageRefuses
from worker.runtime.failures import OUT_OF_MEMORY
from worker.supervision import confinement

log = logging.getLogger(__name__)
T = TypeVar("T")

AGAIN_SECONDS = 5.0
"""Pause before an upload is tried again that failed for a minute."""
CHECKPOINT = "checkpoint-"
BESIDE = (CHECKPOINT, "tmp")
"""What in an attempt's folder is not stored at its end: stored before, or needed by the trainer alone."""


def patiently(action: Callable[[], T], beat: Beat, say: Callable[[str], object]) -> T:
    """Try until the object storage does it. `beat` is called meanwhile, and raises to give up; `say` gets the first failure's words."""
    told = False
    while True:
        try:
            return action()
        except (StorageAway, StorageRefuses) as error:
            log.warning("%s", error.message)
            if not told:
                say(f"{error.message} {error.hint} It is tried until it succeeds.")
                told = True
            until = time.monotonic() + AGAIN_SECONDS
            while time.monotonic() < until:
                beat()
                time.sleep(0.2)


class Leaving(Exception):
    """An attempt ends before its process began, or before its result was stored: a person or this worker leaves no time for it."""


def bring(held: Claim, beat: Beat, say: Callable[[str], object], machines: int = 1, chosen: str | None = None) -> list[str]:
    """Bring what an attempt reads, where there is an object storage; returns the paths of it. Raises whatever `beat` raises. Of several
    `machines` the first chooses a checkpoint that all can have, and the others bring that one; empty for none."""
    return patiently(lambda: bring_spec(held.spec, beat) + _bring_checkpoints(held, beat, machines > 1, chosen), beat, say)


def bring_spec(spec: JobSpec | EvaluationSpec, beat: Beat) -> list[str]:
    """Bring the models and rows that a process reads; returns their paths."""
    wanted = confinement.reads(spec)
    for path in wanted:
        places.path(path, beat=beat)
    return wanted


def checkpoint_in(brought: Sequence[str]) -> str:
    """The checkpoint that an attempt goes on from, of what was brought; empty where there is none."""
    return next((path for path in brought if path.rpartition("/")[2].startswith(CHECKPOINT)), "")


def _bring_checkpoints(held: Claim, beat: Beat, shared: bool = False, chosen: str | None = None) -> list[str]:
    """Bring the checkpoint that the attempt goes on from, and the best one that it refers to."""
    if objects.storage() is None:
        return []
    places.below(f"runs/{held.job_id}", f"a*/{OUT_OF_MEMORY}")
    with transaction() as session:
        saved = stored_checkpoints.newest_first(session, held.job_id)
    if shared:  # not one that lies on this machine alone
        there = set(places.stored(f"runs/{held.job_id}", f"a*/{CHECKPOINT}*"))
        saved = [path for path in saved if path in there and chosen in (None, path)]
    for path in saved:
        try:
            folder = places.path(path, beat=beat)
            manifest.verify(folder, deep=False)
            best = json.loads((folder / "trainer" / "state.json").read_text()).get("best_path")
            return [path, *([best] if best and places.path(best, beat=beat).is_dir() else [])]
        except DiskFull:
            raise
        except (BadData, OSError, ValueError) as error:
            log.warning("Job %s: %s is passed over: %s", held.job_id, path, error)
    return []


class _Waiting(NamedTuple):
    """A checkpoint that is to be stored. `links` is a folder with its files under other names."""

    saved: events.Saved
    links: Path


class CheckpointStore:
    """Stores the checkpoints of one attempt in the order of their steps: the newest, and the best, of those that wait."""

    def __init__(self, held: Claim, say: Callable[[str], None]) -> None:
        self.held, self.say = held, say
        self.used = objects.storage() is not None
        self._waiting: dict[int, _Waiting] = {}
        self._left_out: set[int] = set()
        self._storing: int | None = None
        self._change = threading.Condition()
        self._ended = False
        self._thread: threading.Thread | None = None

    def saved(self, saved: events.Saved) -> None:
        """Have a checkpoint stored. Called when it is announced, before the trainer can sweep it."""
        if not self.used:
            return
        try:
            links = _linked(get_settings().data_dir / saved.path)
        except OSError as error:
            return self.say(f"The checkpoint of step {saved.step} is not put into the object storage. {error}")
        with self._change:
            self._waiting[saved.step] = _Waiting(saved, links)
            best = max((step for step, one in self._waiting.items() if one.saved.best), default=None)
            for step in set(self._waiting) - {saved.step, best, self._storing}:
                _remove(self._waiting.pop(step).links)
                self._left_out.add(step)
            self._change.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._store_all, name="checkpoints", daemon=True)
            self._thread.start()

    def finish(self, result: str | None, beat: Beat) -> None:
        """Wait until every checkpoint that was announced is stored, and the result with what lies beside it: once the end is recorded,
        other machines look for them there. Whatever `beat` raises ends the wait."""
        if not self.used:
            return
        while self._waiting:
            with self._change:
                self._change.wait(0.2)
            beat()
        patiently(lambda: _store_result(self.held, result, beat), beat, self.say)

    def end(self) -> None:
        """Store nothing more."""
        with self._change:
            self._ended = True
            for one in self._waiting.values():
                _remove(one.links)
            self._waiting.clear()
            self._change.notify_all()

    def _store_all(self) -> None:
        while (one := self._next()) is not None:
            try:
                self._store(one)
                self._sweep(one.saved.step)
            except _Ended:
                return
            except Exception:  # the next checkpoint is stored all the same
                log.exception("Job %s: the checkpoint of step %d could not be stored.", self.held.job_id, one.saved.step)
            _remove(one.links)
            with self._change:
                self._storing = None
                self._waiting.pop(one.saved.step, None)
                self._change.notify_all()

    def _next(self) -> _Waiting | None:
        with self._change:
            while not self._waiting and not self._ended:
                self._change.wait()
            if self._ended:
                return None
            self._storing = min(self._waiting)  # the best is not newer than the newest, which refers to it
            return self._waiting[self._storing]

    def _store(self, one: _Waiting) -> None:
        patiently(lambda: places.push(one.saved.path, source=one.links, beat=self._go_on), self._go_on, self.say)

    def _go_on(self) -> None:
        if self._ended:
            raise _Ended

    def _sweep(self, step: int) -> None:
        """Remove older checkpoints, now that this one is stored. A sweep that fails is made up for by the next."""
        waiting = set(self._waiting) - {step}
        try:
            with transaction() as session:
                gone = stored_checkpoints.sweep(session, self.held, step, waiting, self._left_out, get_settings().keep_checkpoints)
            for path in gone:
                places.forget(path)
        except (SQLAlchemyError, StorageAway, StorageRefuses) as error:
            log.warning("Job %s: older checkpoints stay for now: %s", self.held.job_id, error)


class _Ended(Exception):
    """The attempt is over, and nothing of it is stored any more."""


def _store_result(held: Claim, result: str | None, beat: Beat) -> None:
    """Store an attempt's result, and what lies beside it: its logs, the losses of its rows, its curves."""
    if result is not None and (get_settings().data_dir / result).is_dir():
        places.push(result, beat=beat)
    if (get_settings().data_dir / held.folder).is_dir():
        places.push_inside(held.folder, leave_out=BESIDE, beat=beat)


def _linked(folder: Path) -> Path:
    """The files of a checkpoint under other names on the same disk. Raises OSError for links and pipes, which a trainer has no business
    to make."""
    links = get_settings().folder("tmp") / f"store-{uuid.uuid4().hex}"
    shutil.copytree(folder, links, symlinks=True, copy_function=_link)
    if (odd := confinement.foreign(links)) is not None:
        _remove(links)
        raise OSError(f"{folder.name}/{odd.relative_to(links)} is no plain file.")
    return links


def _link(source: str, target: str) -> None:
    os.link(source, target, follow_symlinks=False)


def _remove(links: Path) -> None:
    shutil.rmtree(links, ignore_errors=True)
