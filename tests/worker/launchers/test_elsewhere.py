"""Jobs that are handed over to an engine: which, how often, and what comes of those that it does not start."""

from __future__ import annotations

import json
import os
import signal
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from app.db import transaction
from app.errors import BadField
from app.evaluation import train_queue
from app.jobs import service as jobs
from app.machines import hardware, heartbeats
from app.machines.placement import Needs
from app.settings import MachineKind, get_settings
from app.tables import Event, Job
from tests.conftest import forget_settings, wait_until
from tests.factories import make_dataset, make_job
from tests.test_limits import limited
from tests.warm import warm_attempts  # noqa: F401  # a fixture
from tests.worker.launchers.engine import StandInRay, serve
from tests.worker.supervision.test_train_attempt import RUN, now_of, said
from worker import launchers
from worker.launchers import _elsewhere, carry, ray
from worker.launchers._elsewhere import HandOver


@pytest.fixture
def engine(session, monkeypatch):
    with serve(StandInRay()) as running:
        monkeypatch.setenv("LUTHIER_LAUNCHER", "ray")
        monkeypatch.setenv("LUTHIER_LAUNCHER_URL", running.url)
        monkeypatch.setenv("LUTHIER_LAUNCHER_PYTHON", sys.executable)
        monkeypatch.setenv("LUTHIER_LEASE_SECONDS", "3")
        monkeypatch.setenv("LUTHIER_BEAT_SECONDS", "0.3")
        forget_settings()
        launchers._made.cache_clear()
        yield running
    launchers._made.cache_clear()


@pytest.fixture
def new_job(engine, session, user, data_dir, tiny_registered):
    dataset = make_dataset(session, user, data_dir)
    return lambda **run: make_job(session, user, tiny_registered, dataset, **(RUN | run))


def turn(key: uuid.UUID | None = None, leaving: bool = False) -> None:
    launchers.current().turn(key or uuid.uuid4(), None, lambda: leaving, ["train"])


def name_of(job: Job, fence: int = 1, number: int = 0) -> str:
    return _elsewhere.name_of(job.id, fence, number)


def test_what_is_next_is_handed_over_once_and_stays_as_it_is(engine, new_job, monkeypatch):
    monkeypatch.setattr(get_settings(), "launcher_waiting", 2)
    made = [new_job() for _ in range(3)]
    before = [(now_of(job).status, now_of(job).fence) for job in made]
    for _ in range(4):
        turn()
    assert list(engine.jobs) == [name_of(made[0]), name_of(made[1])], "more wait in the engine than may, or one is there twice"
    assert [(now_of(job).status, now_of(job).fence) for job in made] == before == [("queued", 0)] * 3
    engine.set(name_of(made[0]), "RUNNING", ended=False)  # its process has begun, and claims it in a moment
    turn()
    turn()
    assert list(engine.jobs) == [name_of(job) for job in made]
    engine.answer("POST", "/api/jobs/", engine.jobs[name_of(made[0])])  # another worker that asks at the same time
    launchers.current().hand_over(HandOver(made[0].id, name_of(made[0]), Needs(), 1, False))
    assert len(engine.jobs) == 3
    turn(leaving=True)


def test_what_is_wanted_no_longer_is_taken_back(engine, new_job, session, user):
    cancelled, waiting = new_job(), new_job()
    turn()
    turn()
    with transaction() as own:
        jobs.cancel(own, user, cancelled.id)
    turn()
    assert engine.stopped == [name_of(cancelled)] and engine.jobs[name_of(waiting)]["status"] == "PENDING"
    assert now_of(waiting).status == "queued"


def test_a_process_that_does_not_begin_is_asked_for_again_later_each_time(engine, new_job, monkeypatch):
    job = new_job()
    turn()
    engine.set(name_of(job), "FAILED", "Job entrypoint command failed with exit code 127: python: not found")
    turn()
    turn()
    assert list(engine.jobs) == [name_of(job)], "at once"
    (told,) = [event.data["message"] for event in said(job, "log")]
    assert told == "Ray could not begin with it (1 attempt): Job entrypoint command failed with exit code 127: python: not found"
    monkeypatch.setattr(_elsewhere, "AGAIN_SECONDS", 0.0)
    turn()
    assert list(engine.jobs) == [name_of(job), name_of(job, number=1)] and now_of(job).status == "queued"
    with transaction() as own:
        own.get_one(Job, job.id).fence = 5  # it was claimed and lost since: that is another attempt
    engine.set(name_of(job, number=1), "FAILED")
    turn()
    assert list(engine.jobs)[-1] == name_of(job, fence=6)


def test_a_limit_counts_what_the_engine_will_start(engine, new_job, session, user):
    limited(session, user, running_jobs=2)
    made = [new_job() for _ in range(3)]
    for _ in range(4):
        turn()
    assert list(engine.jobs) == [name_of(job) for job in made[:2]], "three would run where two may"


def test_a_job_on_two_machines_is_handed_over_twice_and_counts_once(engine, new_job, session, user, monkeypatch):
    monkeypatch.setattr(get_settings(), "launcher_waiting", 4)
    limited(session, user, running_jobs=1)
    job, other = new_job(), new_job()
    job.num_machines = 2
    session.commit()
    for _ in range(4):
        turn()
    assert list(engine.jobs) == [name_of(job), name_of(job, number=1)], "one for each machine, and no more may run"
    given = engine.jobs[name_of(job)]["runtime_env"]["env_vars"]
    assert given["LUTHIER_GATHER_SECONDS"] == "900", "the engine may have to make a machine first"
    assert now_of(other).status == now_of(job).status == "queued"


def test_an_engine_that_is_away_leaves_jobs_queued_and_says_so(engine, new_job):
    job = new_job()
    heartbeats.say_alive("train", 1.0)
    for status, words in ((503, "Ray answers 503. It is asked again."), (500, "Ray answers 500: it is broken. It is asked again.")):
        engine.broken = status
        turn()
        assert heartbeats.launcher_words() == f"Ray cannot take it now. {words}"
    with transaction() as session:
        assert train_queue.places(session)[job.id].waits_for == "Ray cannot take it now. Ray answers 500: it is broken. It is asked again."
    launchers.current().url = "http://127.0.0.1:9"
    turn()
    assert "Ray at http://127.0.0.1:9/api/jobs/ does not answer (ConnectError). Is it running?" in heartbeats.launcher_words()
    launchers.current().url, engine.broken = engine.url, None
    turn()
    assert list(engine.jobs) == [name_of(job)] and heartbeats.launcher_words() is None and now_of(job).status == "queued"


def test_only_ours_is_looked_at(engine, new_job):
    job = new_job()
    others = ["somebody-elses", f"luthier-0badcafe-{job.id.hex}-1-0", name_of(job) + "-x", None]
    for name in others:
        engine.jobs[str(name)] = {"submission_id": name, "status": "PENDING"}
    assert launchers.current().handed() == [] and len(name_of(job, fence=9999, number=99)) <= 63
    turn()
    assert engine.stopped == [], "what another studio waits for is taken back"
    assert list(engine.jobs)[-1] == name_of(job)


def test_what_a_worker_cannot_do_is_refused_at_its_start(engine, monkeypatch):
    launchers.current().check(["train"])
    with pytest.raises(BadField, match="hands jobs over and does nothing itself, and was started with evaluate, train"):
        launchers.current().check(["train", "evaluate"])
    monkeypatch.setattr(get_settings(), "launcher_url", "")
    with pytest.raises(BadField, match="needs LUTHIER_LAUNCHER_URL"):
        ray.RayLauncher()
    monkeypatch.setattr(get_settings(), "launcher", "slurm")
    with pytest.raises(BadField, match="slurm is no launcher") as refused:
        launchers.current()
    assert refused.value.hint == "Use one of kubernetes, local, ray."
    monkeypatch.setattr(get_settings(), "launcher", "local")
    launchers.current().check(["train", "evaluate"])


H100 = MachineKind(
    cores=64, memory_bytes=512 * 10**9, gpus=8, gpu_name="NVIDIA H100 80GB HBM3", gpu_memory_bytes=80 * 10**9, gpu_capability=9.0
)


def test_jobs_are_planned_for_and_matched_with_the_machine_that_is_described(engine, monkeypatch):
    monkeypatch.setattr(get_settings(), "launcher_machine", H100)
    machine = hardware.trained_on()
    assert machine.cuda and machine.gpu_name == "NVIDIA H100 80GB HBM3" and len(machine.cards) == 8 and machine.cores == 64
    heartbeats.say_machine(name="far")
    assert heartbeats.training_machine().gpu_memory_bytes == 80 * 10**9
    has = _elsewhere.capacity()
    assert has.fits(Needs(gpu_bytes=70 * 10**9, cpu_bytes=None, num_gpus=8, gpu_type="h100"))
    assert not has.fits(Needs(gpu_bytes=70 * 10**9, cpu_bytes=None, num_gpus=9))
    assert not has.fits(Needs(gpu_bytes=10**9, gpu_type="A100"))
    with pytest.raises(ValueError, match="gpu_memory_bytes is needed"):
        MachineKind(gpus=1)


def test_what_ray_is_asked_for_is_what_the_job_needs_and_holds_no_secret(engine, monkeypatch):
    monkeypatch.setenv("LUTHIER_LABELS", "lab")
    monkeypatch.setenv("LUTHIER_DATABASE_URL", "postgresql+psycopg://luthier:hush@db/luthier")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    key = uuid.uuid4()
    on_gpu = ray.request_of(HandOver(key, "luthier-x", Needs(70 * 10**9, 9, 4, "h100"), 4, on_gpu=True))
    assert on_gpu["entrypoint_num_gpus"] == on_gpu["entrypoint_num_cpus"] == 4 and "entrypoint_memory" not in on_gpu
    assert on_gpu["entrypoint_resources"] == {"accelerator_type:H100": 0.001}
    on_cpu = ray.request_of(HandOver(key, "luthier-x", Needs(None, 3 * 10**9), 2, on_gpu=False))
    assert on_cpu["entrypoint_memory"] == 6 * 10**9 and "entrypoint_num_gpus" not in on_cpu and "entrypoint_resources" not in on_cpu
    assert on_cpu["entrypoint"] == f"exec {sys.executable} -m worker.launchers.carry --job {key}"
    given = on_cpu["runtime_env"]["env_vars"]
    assert given["LUTHIER_LABELS"] == "lab" and given["LUTHIER_LAUNCHER"] == "local" and given["RAY_JOB_STOP_WAIT_TIME_S"] == "90"
    assert "hush" not in json.dumps(on_cpu)


# What the engine starts -----------------------------------------------------------------------------------------------


@pytest.fixture
def handlers():
    """What handles signals is put back: `carry` has its own, since it is a program."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("warm_attempts", "handlers")
def test_what_the_engine_starts_is_to_the_job_what_a_worker_is(engine, new_job):
    job = new_job(epochs=8, samples=0, forgetting=False, row_losses=False)
    turn()

    def leave() -> None:
        wait_until(lambda: len(said(job, "step")) > 3, what="some steps", seconds=90)
        row = now_of(job)
        assert row.status == "running" and row.worker.endswith(f":{os.getpid()}") and row.fence == 1
        turn()  # the engine has not heard that it has begun
        os.kill(os.getpid(), signal.SIGTERM)  # as an engine asks a process to leave

    with ThreadPoolExecutor(1) as beside:
        asked = beside.submit(leave)
        assert carry.main(["--job", str(job.id)]) == 0
        asked.result()
    assert list(engine.jobs) == [name_of(job)] and engine.stopped == [], "what runs is stopped, or handed over a second time"
    assert (now_of(job).status, now_of(job).deaths) == ("queued", 0)
    engine.set(name_of(job), "STOPPED")
    turn()
    assert list(engine.jobs) == [name_of(job), name_of(job, fence=2)]
    assert carry.main(["--job", str(job.id)]) == 0
    assert now_of(job).status == "succeeded" and now_of(job).attempt == 2
    assert said(job, "started")[1].data["resumed_from"] > 0
    with transaction() as session:
        assert session.scalars(select(Event.type).where(Event.job_id == job.id, Event.type == "claimed")).all() == ["claimed", "claimed"]


@pytest.mark.usefixtures("handlers")
def test_a_process_that_cannot_have_the_job_says_why(engine, new_job, monkeypatch, capsys):
    from worker.supervision import gpu_lease

    job = new_job()
    with monkeypatch.context() as busy:
        busy.setattr(gpu_lease, "of_job", lambda job: None)  # every GPU of the machine is another's
        assert carry.main(["--job", str(job.id)]) == carry.NOT_TAKEN
    assert "The job was not taken here: others use the GPUs that it needs." in capsys.readouterr().err
    assert now_of(job).status == "queued"
    with transaction() as session:
        session.get_one(Job, job.id).status = "cancelled"
    assert carry.main(["--job", str(job.id)]) == 0, "a process that comes too late leaves"
