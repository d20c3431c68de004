"""F9: people change their minds at random moments of a job: while it waits, is claimed, takes steps, saves. Whatever they ask for is done
soon and exactly, nothing is left running, and the job ends with the weights of one that nobody disturbed."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import func, select

from app.db import transaction
from app.errors import Conflict
from app.jobs import service as jobs
from app.settings import get_settings
from app.tables import Event, Job, Model
from tests.conftest import wait_until
from tests.warm import warm_attempts  # noqa: F401  # a fixture
from tests.worker.supervision.test_train_attempt import (  # noqa: F401  # fixtures among them
    new_job,
    now_of,
    processes,
    running_trainers,
    said,
    trainers,
)
from worker.supervision import job_turn

SETTLES_SECONDS = 10.0
"""How soon a wish is fulfilled, beside the time that a save is given."""
EPOCHS = 20
MOMENTS = ("queued", "claimed", "starting", "step", "save")


@contextlib.contextmanager
def worker_here(job: Job) -> Iterator[Callable[[], int]]:
    """A worker in this process, that looks at the job again and again as messages would make it. Gives how many trainers there are."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            if now_of(job).status == "queued":
                job_turn.work(job.id)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: len(trainers())
    finally:
        over.set()
        thread.join(60)
        assert not thread.is_alive(), "the worker is caught"


@contextlib.contextmanager
def worker_beside(job: Job) -> Iterator[Callable[[], int]]:
    """The worker and the relay of `processes`, which run already."""
    yield lambda: len(running_trainers(job))


class Person:
    """Somebody who asks for one thing after another, each at a moment that is drawn."""

    def __init__(self, seed: int, user, job: Job, count: Callable[[], int]) -> None:
        self.draw, self.user, self.job, self.trainers = random.Random(seed), user, job, count
        self.told: list[str] = []

    def ask(self, wish: Callable[..., Job]) -> bool:
        """Whether the studio took it; a job that has ended refuses."""
        try:
            with transaction() as session:
                wish(session, self.user, self.job.id)
        except Conflict:
            assert now_of(self.job).status in jobs.ENDED, f"{wish.__name__} was refused: {self.told}"
            return False
        return True

    def count(self, kind: str) -> int:
        with transaction() as session:
            query = select(func.count()).where(Event.job_id == self.job.id, Event.type == kind)
            return session.scalar(query) or 0

    def moment(self) -> None:
        """Wait for a drawn moment of the attempt that begins or runs."""
        name, attempt = self.draw.choice(MOMENTS), now_of(self.job).attempt
        steps, saves = self.count("step"), self.count("saved")
        more = self.draw.randrange(1, 6)
        reached = {
            "queued": lambda: True,
            "claimed": lambda: now_of(self.job).status == "running",
            "starting": lambda: self.trainers() > 0,
            "step": lambda: self.count("step") >= steps + more,
            "save": lambda: self.count("saved") > saves,
        }[name]
        self.told.append(f"{name} in attempt {attempt}")
        wait_until(lambda: reached() or self.ended() or self.paused(), what=f"{name} after {self.told}", seconds=90)
        if self.paused():  # a pause that was taken back after the trainer had read it
            self.ask(jobs.resume)
        time.sleep(self.draw.choice((0.0, 0.02, 0.2)))

    def ended(self) -> bool:
        return now_of(self.job).status in jobs.ENDED

    def paused(self) -> bool:
        return now_of(self.job).status == "paused"

    def settled(self, wish: Callable[..., Job], status: str) -> None:
        """The wish was fulfilled as `status` in time, and nothing runs any more. A job may have ended by itself before it was heard."""
        began = time.monotonic()
        seconds = SETTLES_SECONDS + get_settings().stop_grace_seconds
        wait_until(lambda: now_of(self.job).status == status or self.ended(), what=f"{status} after {self.told}", seconds=seconds)
        self.told.append(f"{wish.__name__}: {now_of(self.job).status} after {time.monotonic() - began:.1f} s")
        wait_until(lambda: self.trainers() == 0, what="the end of its processes", seconds=5)
        row = now_of(self.job)
        assert not (row.cancel_requested or row.pause_requested or row.save_requested), self.told
        assert row.lease_until is None and row.deaths == 0, self.told

    def pause_and_resume(self) -> None:
        if not self.ask(jobs.pause):
            return
        if self.draw.random() < 0.2:  # at once, which may or may not come before the trainer has read the first wish
            self.ask(jobs.resume)
            self.told.append("took it back")
            return
        self.settled(jobs.pause, "paused")
        if not self.ended():
            self.ask(jobs.resume)

    def cancel_and_resume(self) -> None:
        if not self.ask(jobs.cancel):
            return
        self.settled(jobs.cancel, "cancelled")
        assert self.result() is None, "a cancelled job left a model"
        if now_of(self.job).status == "cancelled" and self.count("saved"):
            with transaction() as session:
                jobs.resume(session, self.user, self.job.id)

    def save(self) -> None:
        if now_of(self.job).status == "running":
            with contextlib.suppress(Conflict), transaction() as session:  # it may stand still by now
                jobs.save_now(session, self.user, self.job.id)

    def result(self) -> str | None:
        with transaction() as session:
            return session.scalar(select(Model.adapter_sha256).where(Model.job_id == self.job.id, Model.deleted_at.is_(None)))


def disturbed(person: Person, wishes: int) -> None:
    """Ask for so many things, then let the job come to its end."""
    for number in range(wishes):
        person.moment()
        if person.ended():
            break
        kinds = [person.pause_and_resume, person.save, *([person.cancel_and_resume] if person.count("saved") else [])]
        kinds[number % len(kinds) if number < len(kinds) else person.draw.randrange(len(kinds))]()
    wait_until(lambda: person.ended() or person.paused(), what=f"the end after {person.told}", seconds=120)
    if person.paused():
        person.ask(jobs.resume)
        wait_until(person.ended, what=f"the end after {person.told}", seconds=120)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("warm_attempts")
@pytest.mark.parametrize(("seed", "wishes"), [(1, 3), *(pytest.param(seed, 12, marks=pytest.mark.fault) for seed in range(2, 8))])
def test_wishes_at_random_moments_are_fulfilled_and_change_no_result(new_job, user, seed, wishes):  # noqa: F811
    calm, job = new_job(epochs=EPOCHS), new_job(epochs=EPOCHS)
    job_turn.work(calm.id)
    with worker_here(job) as count:
        person = Person(seed, user, job, count)
        disturbed(person, wishes)
    same_result(calm, job, person)


@pytest.mark.fault
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_wishes_at_random_moments_of_a_real_worker(new_job, user, processes, seed):  # noqa: F811
    """The same with a worker, a relay and a broker, whose messages may come late or twice."""
    calm = new_job(epochs=EPOCHS)
    wait_until(lambda: now_of(calm).status == "succeeded", what="the calm job", seconds=120)
    job = new_job(epochs=EPOCHS)
    with worker_beside(job) as count:
        person = Person(seed, user, job, count)
        disturbed(person, 12)
    same_result(calm, job, person)


def same_result(calm: Job, job: Job, person: Person) -> None:
    row = now_of(job)
    assert row.status == "succeeded", (row.status, row.error, person.told)
    assert len(said(job, "finished")) == 1 and person.trainers() == 0
    losses = [{e.data["step"]: e.data["loss"] for e in said(one, "step")} for one in (calm, job)]
    assert losses[0] == losses[1], person.told
    with transaction() as session:
        found = {one.id: session.scalars(select(Model.adapter_sha256).where(Model.job_id == one.id)).all() for one in (calm, job)}
    assert len(found[job.id]) == 1 and found[job.id] == found[calm.id], person.told


@pytest.mark.long
@pytest.mark.parametrize(("seed", "jobs_"), [(1, 12), pytest.param(2, 200, marks=[pytest.mark.fault, pytest.mark.timeout(900)])])
def test_a_cancel_before_anybody_looks_is_done_at_once(new_job, user, seed, jobs_):  # noqa: F811
    """Of jobs that wait, a cancel or a pause takes effect in its own transaction, and no later message starts them."""
    draw = random.Random(seed)
    for _ in range(jobs_):
        job, wish = new_job(), draw.choice((jobs.cancel, jobs.pause))
        for _ in range(draw.randrange(1, 4)):  # asked for twice is asked for once
            with transaction() as session:
                wish(session, user, job.id)
        assert now_of(job).status == ("cancelled" if wish is jobs.cancel else "paused")
        job_turn.work(job.id)
        assert now_of(job).attempt == 0 and not trainers()
