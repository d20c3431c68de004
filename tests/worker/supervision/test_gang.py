"""One job on several machines: a data folder and an object storage between them, real torchrun on gloo."""

import contextlib
import signal
import subprocess
import sys
from datetime import timedelta

import psutil
import pytest
from sqlalchemy import update

from app import events, leases
from app.db import transaction
from app.jobs import gangs, lifecycle
from app.jobs.gangs import Offered
from app.settings import get_settings
from app.storage import places
from app.tables import Job, JobPlace
from tests.conftest import PROJECT, wait_until
from tests.factories import make_dataset, make_job
from tests.s3 import own_storage, running_server  # noqa: F401  # fixtures
from tests.worker.supervision.test_storing import at, now_of, result_of, said  # noqa: F401  # `at` is a fixture

SUPERVISE = """
import signal, sys, time, threading, uuid
from worker.supervision import job_turn, train_attempt
from worker.supervision.claiming import ClaimOutcome
leaving = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: leaving.set())
while job_turn.work(uuid.UUID(sys.argv[1]), leaving.is_set) in (ClaimOutcome.NO_GPU, ClaimOutcome.DONE) and not leaving.is_set():
    time.sleep(0.2)
"""
RUN = {
    "epochs": 8, "max_tokens_per_step": 128, "evaluations_per_epoch": 1, "samples": 0, "early_stopping_patience": 0, "forgetting": False,
    "row_losses": False,
}  # fmt: skip


@pytest.fixture
def new_job(at, session, user, data_dir, tiny_registered):  # noqa: F811
    dataset = make_dataset(session, user, data_dir)
    for place in (dataset.rows_path, tiny_registered.path):
        places.push(place)

    def order(strategy=None, **run):
        job = make_job(session, user, tiny_registered, dataset, **(RUN | run))
        job.num_machines = 2
        if strategy:
            job.spec = job.spec | {"strategy": strategy}
        session.commit()
        return job

    return order


class Machine:
    def __init__(self, at, name, job):  # noqa: F811
        self.folder = at(name)
        with (self.folder / "worker.log").open("wb") as log:
            command = [sys.executable, "-c", SUPERVISE, str(job.id)]
            self.process = subprocess.Popen(command, cwd=PROJECT, start_new_session=True, stdout=log, stderr=log)

    def end(self):
        if self.process.poll() is None:
            self.everything(signal.SIGKILL)
        self.process.wait(20)

    def everything(self, number):
        """The machine is lost: its worker and all that it started."""
        for one in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    def trainer(self):
        """The process of its rank."""
        found = [
            one
            for one in psutil.Process(self.process.pid).children(recursive=True)
            if "worker.run" in one.cmdline() and "torch.distributed.run" not in one.cmdline()
        ]
        return found[-1]


@pytest.fixture
def machines(at, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = []

    def start(name, job):
        found.append(Machine(at, name, job))
        return found[-1]

    yield start
    for one in found:
        one.end()


def ended(job, log=None, seconds=240):
    wait_until(lambda: now_of(job).status in ("succeeded", "failed"), what="the end of the job", log=log, seconds=seconds)
    return now_of(job)


@pytest.mark.long
def test_two_machines_train_one_job_and_what_they_save_is_resumed_by_two_others(new_job, machines, at):  # noqa: F811
    calm, job = new_job({"name": "full"}), new_job({"name": "full"})
    one, two = machines("one", calm), machines("two", calm)
    row = ended(calm, one.folder / "worker.log")
    assert row.status == "succeeded", (
        row.error,
        (one.folder / "worker.log").read_text()[-2000:],
        (two.folder / "worker.log").read_text()[-2000:],
    )
    assert any("2 machines train it" in line["message"] for line in said(calm, "log"))
    one.end(), two.end()
    # The same again, and the machine that leads is lost behind a checkpoint, with its disk.
    one, two = machines("three", job), machines("four", job)
    wait_until(lambda: places.stored(f"runs/{job.id}", "a1/checkpoint-*"), what="a stored checkpoint", seconds=120)
    leader = next(m for m in (one, two) if (m.folder / "runs" / str(job.id) / "a1" / "spec.json").exists() and led(job) == m.process.pid)
    leader.everything(signal.SIGKILL)
    five = machines("five", job)
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job.id).values(lease_until=leases.OVER))
        leases.reap(session, lifecycle.WORK)
    row = ended(job)
    assert row.status == "succeeded" and row.attempt == 2, (row.error, (five.folder / "worker.log").read_text()[-2000:])
    assert said(job, "started")[-1]["resumed_from"] > 0
    at("one")
    first, second = places.path(result_of(calm).path), places.path(result_of(job).path)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def led(job):
    return int(now_of(job).worker.split(":")[1])


@pytest.mark.long
def test_a_process_that_is_killed_on_one_machine_is_named_by_the_other(new_job, machines):
    job = new_job(epochs=60)
    one, two = machines("one", job), machines("two", job)
    wait_until(lambda: said(job, "step"), what="a step", seconds=120)
    member = one if led(job) == two.process.pid else two
    member.trainer().kill()
    wait_until(lambda: now_of(job).attempt == 2 or now_of(job).status == "failed", what="the second attempt", seconds=60)
    retried = [line["message"] for line in said(job, "lost")]
    assert any("process 1 of 2" in line and "SIGKILL" in line for line in retried), retried


@pytest.mark.long
def test_a_machine_that_is_to_leave_has_the_job_saved_and_queued_again(new_job, machines):
    job = new_job(epochs=60)
    one, two = machines("one", job), machines("two", job)
    wait_until(lambda: said(job, "step"), what="a step", seconds=120)
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job.id).values(save_requested=True))
    wait_until(lambda: not now_of(job).save_requested, what="the checkpoint that was asked for", seconds=60)
    assert now_of(job).attempt == 1 and now_of(job).status == "running", "torchrun died of the signal to save"
    member = one if led(job) == two.process.pid else two
    member.process.terminate()
    wait_until(lambda: now_of(job).status == "queued", what="the job in the queue", seconds=60)
    assert now_of(job).deaths == 0 and said(job, "saved"), "it is no death"


# Gathering ------------------------------------------------------------------------------------------------------------


def offer(session, job, worker):
    found = gangs.gather(session, session.get_one(Job, job.id, populate_existing=True), worker, f"machine of {worker}")
    session.commit()
    return found


def test_as_many_as_are_needed_or_none(new_job, session):
    job = new_job()
    job.num_machines = 3
    session.commit()
    first, second = offer(session, job, "a"), offer(session, job, "b")
    assert isinstance(first, Offered) and isinstance(second, Offered) and now_of(job).status == "queued"
    assert offer(session, job, "c") == 2, "the last one claims it"
    held = lifecycle.claim(session, job.id, "c")
    together = gangs.assign(session, held, "c", "machine of c", "10.0.0.1:29500", 3)
    session.commit()
    assert (together.place, together.machines) == (0, 3)
    places_of = {worker: gangs.waiting(session, one) for worker, one in (("a", first), ("b", second))}
    assert {worker: found[1].place for worker, found in places_of.items()} == {"a": 1, "b": 2}
    assert places_of["a"][0].fence == held.fence and places_of["a"][1].address == "10.0.0.1:29500"
    late = gangs.waiting(session, Offered(job.id, held.fence, "nobody"))
    assert late is False


def test_only_one_job_gathers_at_a_time(new_job, session):
    job, other = new_job(), new_job()
    assert isinstance(offer(session, job, "a"), Offered)
    assert offer(session, other, "b") is None
    session.execute(update(JobPlace).values(seen_at=leases.now() - timedelta(hours=1)))
    assert isinstance(offer(session, other, "b"), Offered), "a worker that died gathers no more"


def test_an_offer_in_vain_is_not_made_again_at_once(new_job, session):
    job = new_job()
    found = offer(session, job, "a")
    assert gangs.withdraw(session, found)
    session.commit()
    assert offer(session, job, "a") is None
    assert isinstance(offer(session, job, "b"), Offered), "another one may"
    session.execute(update(JobPlace).values(seen_at=leases.now() - timedelta(seconds=get_settings().gather_seconds + 1)))
    assert isinstance(offer(session, job, "a"), Offered)


def test_a_place_that_was_taken_just_now_cannot_be_withdrawn(new_job, session):
    job = new_job()
    found = offer(session, job, "a")
    held = lifecycle.claim(session, job.id, "b")
    gangs.assign(session, held, "b", "machine of b", "10.0.0.1:29500", 2)
    assert not gangs.withdraw(session, found)


def test_what_the_leader_sees_of_the_others(new_job, session):
    job = new_job()
    offer(session, job, "a")
    held = lifecycle.claim(session, job.id, "b")
    gangs.assign(session, held, "b", "machine of b", "10.0.0.1:29500", 2)
    state = gangs.look(session, held, 2)
    assert not state.ready and state.fault is None and not state.over
    gangs.beat(session, held, "a", [7], True)
    assert gangs.look(session, held, 2) == gangs.GangState(True, None, {1: [7]})
    gangs.end(session, held, "a", events.Failed(kind="out_of_memory", message="No memory.").model_dump(mode="json"))
    fault = gangs.look(session, held, 2).fault
    assert fault.kind == "out_of_memory" and fault.message == "On machine of a (process 1 of 2): No memory."
    session.execute(update(JobPlace).where(JobPlace.worker == "a").values(ended=None, seen_at=leases.now() - timedelta(hours=1)))
    lost = gangs.look(session, held, 2).fault
    assert lost.kind == "worker_lost" and "Nothing was heard of machine of a (process 1 of 2) for" in lost.message
    session.execute(update(Job).where(Job.id == job.id).values(fence=Job.fence + 1))
    with pytest.raises(lifecycle.FenceLost):
        gangs.beat(session, held, "a", [8], True)
