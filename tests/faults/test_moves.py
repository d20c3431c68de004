"""Every order of moves of an evaluation and of an export that Hypothesis can think of: people, workers (also those that were taken for
dead), and the reaper, against a real database. `tests/jobs/test_lifecycle.py` has the same for a job."""

from __future__ import annotations

import itertools
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import func, select, update

from app import leases
from app.db import transaction
from app.errors import Conflict, NotFound
from app.evaluation import service as evaluations
from app.kit import ids
from app.models import exports, hub_upload
from app.settings import get_settings
from app.tables import Evaluation, Export, Outbox, User
from tests.factories import make_dataset

PROBLEM = {"code": "crashed", "message": "It did.", "hint": "Try again."}
SIZES = [(12, 30), pytest.param(300, 50, marks=[pytest.mark.fault, pytest.mark.timeout(1800)])]
"""(orders, moves in each)"""


@dataclass
class Believed:
    """What the row must look like now."""

    status: str = "queued"
    fence: int = 0
    deaths: int = 0
    deleted: bool = False
    files: bool = False
    hub: str | None = None

    @property
    def open(self) -> bool:
        return self.status in ("queued", "running") and not self.deleted


class LeasedMachine(RuleBasedStateMachine):
    """What an evaluation and an export have in common: claims, deaths and the reaper."""

    work: ClassVar[leases.Work[Any]]
    user: ClassVar[User]

    def __init__(self) -> None:
        super().__init__()
        self.id, self.now = self.make(), Believed()
        self.held: Any = None
        self.stale: list[Any] = []

    def make(self) -> uuid.UUID:
        raise NotImplementedError

    def claimed(self) -> Any:
        """What a claim gives; None where there is nothing to do."""
        raise NotImplementedError

    def gave_up(self) -> None:
        """The third death ended it."""
        self.now.status = "failed"

    def end(self, status: str) -> None:
        self.now.status = status
        if self.held is not None:
            self.stale.append(self.held)
        self.held = None

    def die(self) -> None:
        self.now.deaths += 1
        self.end("queued")
        if self.now.deaths >= leases.MAX_DEATHS:
            self.gave_up()

    @rule()
    def claim(self) -> None:
        held = self.claimed()
        assert (held is not None) == (self.now.status == "queued" and not self.now.deleted)
        if held is not None:
            self.now.status, self.now.fence = "running", self.now.fence + 1
            assert held.fence == self.now.fence
            self.held = held

    @precondition(lambda self: self.held)
    @rule(found_by=st.sampled_from(["claim", "reaper"]))
    def let_lapse(self, found_by: str) -> None:
        with transaction() as session:
            session.execute(update(self.work.table).where(self.work.table.id == self.id).values(lease_until=leases.OVER))
        self.die()
        if found_by == "claim":
            self.claim()
        else:
            with transaction() as session:
                assert leases.expire(session, self.work) == 1

    @rule()
    def reap(self) -> None:
        with transaction() as session:
            leases.reap(session, self.work)

    def asked(self, move: Any) -> bool:
        """A person's move; False where what they name is gone, which they are told."""
        if self.now.deleted:
            with pytest.raises(NotFound), transaction() as session:
                move(session, self.user, self.id)
            return False
        with transaction() as session:
            move(session, self.user, self.id)
        return True

    @invariant()
    def holds(self) -> None:
        with transaction() as session:
            row = session.get_one(self.work.table, self.id)
            assert (row.status, row.fence, row.deaths) == (self.now.status, self.now.fence, self.now.deaths)
            assert (row.deleted_at is not None) == self.now.deleted
            assert (row.lease_until is not None) == (row.status == "running")
            waiting = session.scalar(select(func.count()).select_from(Outbox).where(Outbox.key == self.id))
            assert row.status != "queued" or waiting, "one that is queued and that nobody speaks of"
            self.holds_too(row)

    def holds_too(self, row: Any) -> None:
        raise NotImplementedError

    def teardown(self) -> None:
        with transaction() as session:
            session.execute(update(self.work.table).where(self.work.table.id == self.id).values(deleted_at=leases.now()))


class EvaluationMachine(LeasedMachine):
    work = evaluations.WORK
    dataset: ClassVar[str]
    numbers: ClassVar[Any] = itertools.count(1)

    def make(self) -> uuid.UUID:
        asked = evaluations.read_order({"model": "tiny", "dataset_id": self.dataset, "rows": next(self.numbers)})
        with transaction() as session:
            return evaluations.create(session, self.user, asked).id

    def claimed(self) -> Any:
        with transaction() as session:
            return evaluations.claim(session, self.id)

    @precondition(lambda self: self.held)
    @rule()
    def beat(self) -> None:
        with transaction() as session:
            assert evaluations.heartbeat(session, self.held, 0.5, "Reading")

    @precondition(lambda self: self.held)
    @rule(failed=st.booleans())
    def finish(self, failed: bool) -> None:
        outcome = {"error": PROBLEM} if failed else {"result": {"rows": 1}}
        for first in (True, False):  # as after a COMMIT whose answer was lost
            with transaction() as session:
                assert evaluations.finish(session, self.held, **outcome) == first
        self.end("failed" if failed else "succeeded")

    @precondition(lambda self: self.held)
    @rule(died=st.booleans())
    def release(self, died: bool) -> None:
        with transaction() as session:
            evaluations.release(session, self.held, "Its process was killed." if died else "")
        if died:
            self.die()
        else:
            self.end("queued")

    @precondition(lambda self: self.stale)
    @rule(data=st.data(), move=st.sampled_from(["beat", "finish", "release"]))
    def stale_write(self, data: st.DataObject, move: str) -> None:
        old = data.draw(st.sampled_from(self.stale))
        with transaction() as session:
            if move == "release":
                evaluations.release(session, old, "It was late.")
            elif move == "finish":
                assert not evaluations.finish(session, old, result={"rows": 9})
            else:
                assert not evaluations.heartbeat(session, old, 0.9, "late")

    @rule()
    def cancel(self) -> None:
        if self.asked(evaluations.cancel) and self.now.open:
            self.end("cancelled")

    @rule()
    def delete(self) -> None:
        if self.asked(evaluations.delete):
            if self.now.open:
                self.end("cancelled")
            self.now.deleted = True

    def holds_too(self, row: Evaluation) -> None:
        assert (row.finished_at is not None) == (row.status in ("succeeded", "failed", "cancelled"))
        assert (row.error is not None) == (row.status == "failed")
        assert row.result == ({"rows": 1} if row.status == "succeeded" else None)


class ExportMachine(LeasedMachine):
    work = exports.WORK
    folder: ClassVar[Path]

    def make(self) -> uuid.UUID:
        with transaction() as session:
            return exports.create(session, self.user, "tiny", "gguf", ["F16"]).id

    def claimed(self) -> Any:
        with transaction() as session:
            found = leases.claim(session, exports.WORK, self.id)
            if found is None:
                return None
            return exports.Held(
                found.id, found.fence, exports.ExportSpec.model_validate(found.spec), found.model_id, found.files, found.hub
            )

    def gave_up(self) -> None:
        self.now.status, self.now.hub = ("succeeded", "failed") if self.now.files else ("failed", None)

    def written(self, held: exports.Held) -> Path:
        """The folder of an attempt that has written its file."""
        work = self.folder / f"{held.id}-{held.fence}"
        shutil.rmtree(work, ignore_errors=True)
        (work / "out").mkdir(parents=True)
        (work / "out" / "a.gguf").write_text(f"attempt {held.fence}")
        return work

    def outcome(self, held: exports.Held, failed: bool) -> dict[str, Any]:
        if failed:
            return held.failed(PROBLEM)
        if held.files:
            return {"status": "succeeded", "progress": 1.0, "hub": {**(held.hub or {}), "status": "succeeded", "commit": "a" * 40}}
        return {"status": "succeeded", "progress": 1.0, "files": [{"name": "a.gguf", "attempt": held.fence}], "parity": None}

    @precondition(lambda self: self.held)
    @rule(failed=st.booleans())
    def finish(self, failed: bool) -> None:
        held = self.held
        exports._finish(held, self.written(held), **self.outcome(held, failed))
        if held.files:
            self.now.hub = "failed" if failed else "succeeded"
            self.end("succeeded")
        else:
            self.now.files = not failed
            self.end("failed" if failed else "succeeded")

    @precondition(lambda self: self.held)
    @rule()
    def leave(self) -> None:
        """Its worker was asked to leave, as in `exports.run`."""
        with transaction() as session:
            row = leases.lock_if_held(session, exports.WORK, self.id, self.held.fence)
            assert row is not None and leases.requeue(session, exports.WORK, row)
        self.end("queued")

    @precondition(lambda self: self.stale)
    @rule(data=st.data(), failed=st.booleans())
    def stale_finish(self, data: st.DataObject, failed: bool) -> None:
        old = data.draw(st.sampled_from(self.stale))
        exports._finish(old, self.written(old), **self.outcome(old, failed))
        with transaction() as session:
            assert not leases.heartbeat(session, exports.WORK, self.id, old.fence, progress=0.9)

    def stopped(self) -> None:
        if self.now.open:
            self.now.hub = "cancelled" if self.now.files else None
            self.end("succeeded" if self.now.files else "cancelled")

    @rule()
    def cancel(self) -> None:
        if self.asked(exports.cancel):
            self.stopped()

    @rule()
    def delete(self) -> None:
        if self.asked(exports.delete):
            self.stopped()
            self.now.deleted = True

    @rule()
    def push(self) -> None:
        move = lambda session, user, key: exports.push(session, user, key, "lab/tiny", token="hf_words")  # noqa: E731
        if not self.now.deleted and self.now.status != "succeeded":
            with pytest.raises(Conflict), transaction() as session:
                move(session, self.user, self.id)
        elif self.asked(move):
            self.now.status, self.now.hub, self.now.deaths = "queued", "queued", 0

    def holds_too(self, row: Export) -> None:
        pushing = self.now.files and row.status in ("queued", "running")
        assert bool(row.files) == self.now.files
        assert (row.hub or {}).get("status") == self.now.hub
        assert (row.finished_at is not None) == (self.now.files or row.status in ("failed", "cancelled"))
        assert (row.error is not None) == (row.status == "failed")
        assert hub_upload.token_file(self.id).exists() == pushing, "a token stays as long as its push"
        kept = exports.folder_of(self.id)
        assert kept.exists() == (self.now.files and not self.now.deleted)
        if kept.exists():
            assert (kept / "a.gguf").read_text() == f"attempt {row.files[0]['attempt']}", (
                "the files are those of the attempt that is recorded"
            )


def tried(machine: type[LeasedMachine], orders: int, moves: int) -> None:
    chosen = settings(
        max_examples=orders, stateful_step_count=moves, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=chosen)


@pytest.fixture
def patient(monkeypatch):
    """Leases pass only when a move says so, however slow the machine."""
    monkeypatch.setattr(get_settings(), "lease_seconds", 3600.0)


@pytest.mark.long
@pytest.mark.parametrize(("orders", "moves"), SIZES)
def test_every_order_of_moves_of_an_evaluation(session, user, data_dir, tiny_registered, patient, orders, moves):
    made = ids.public(ids.DATASET, make_dataset(session, user, data_dir).id)
    session.commit()
    tried(type("Here", (EvaluationMachine,), {"user": user, "dataset": made}), orders, moves)


@pytest.mark.long
@pytest.mark.parametrize(("orders", "moves"), SIZES)
def test_every_order_of_moves_of_an_export(session, user, tiny_registered, patient, monkeypatch, tmp_path, orders, moves):
    monkeypatch.setattr(get_settings(), "offline", False)
    tried(type("Here", (ExportMachine,), {"user": user, "folder": tmp_path}), orders, moves)
