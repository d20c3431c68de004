"""One attempt in a real process: the real trainer on the small model, and trainers that end in every other way."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import func, select, update

from app import events, queue
from app.db import get_engine, transaction
from app.evaluation import predictions
from app.evaluation import service as evaluations
from app.inference import residency
from app.jobs import checkpoints, lifecycle
from app.jobs import service as jobs
from app.kit import ids, manifest
from app.machines.hardware import this_machine
from app.models import service as models
from app.ops.embedded import sweep
from app.settings import get_settings
from app.storage import files
from app.tables import Checkpoint, Evaluation, Event, Job, Model, Outbox
from tests import warm
from tests.conftest import PROJECT, wait_until
from tests.factories import make_dataset, make_job
from tests.warm import warm_attempts  # noqa: F401  # a fixture
from worker.evaluation import attempt, train_turn
from worker.runtime import attendance
from worker.supervision import exit_codes, job_turn, train_attempt

RUN = {"epochs": 4, "max_tokens_per_step": 128, "evaluations_per_epoch": 2, "samples": 1, "sample_tokens": 4, "early_stopping_patience": 0}
ODD = Path(__file__).with_name("odd_trainer.py")


@pytest.fixture
def new_job(session, user, data_dir, tiny_registered):
    settings = get_settings()
    settings.lease_seconds, settings.beat_seconds, settings.stop_grace_seconds = 3.0, 0.2, 2.0
    dataset = make_dataset(session, user, data_dir)
    return lambda **run: make_job(session, user, tiny_registered, dataset, **(RUN | run))


@pytest.fixture
def odd(new_job, monkeypatch):
    """Start a job whose trainer behaves oddly; gives the job and the thread that supervises it."""

    def start(how: str) -> tuple[Job, threading.Thread]:
        monkeypatch.setattr(exit_codes, "trainer_command", lambda held, spec, fd, *_: [sys.executable, str(ODD), how, str(fd), held.folder])
        job = new_job()
        thread = threading.Thread(target=job_turn.work, args=(job.id,), daemon=True)
        thread.start()
        return job, thread

    return start


def now_of(job: Job) -> Job:
    with transaction() as session:
        return session.get_one(Job, job.id)


def said(job: Job, *types: str) -> list[Event]:
    with transaction() as session:
        found = jobs.events(session, job)
    return [e for e in found if not types or e.type in types]


def ended(job: Job, thread: threading.Thread, seconds: float = 30) -> Job:
    thread.join(seconds)
    assert not thread.is_alive(), "the supervisor did not come to an end"
    return now_of(job)


def trainers() -> list[psutil.Process]:
    return [
        *warm.alive("worker.run"),
        *(
            p
            for p in psutil.Process().children(recursive=True)
            if p.status() != psutil.STATUS_ZOMBIE and "--events-fd" in " ".join(p.cmdline())
        ),
    ]


@pytest.mark.long
def test_a_whole_job(new_job, session):
    job = new_job()
    job_turn.work(job.id)
    row = now_of(job)
    assert row.status == "succeeded", row.error
    types = [e.type for e in said(job) if e.type != "log"]
    assert types[:2] == ["claimed", "started"] and types[-1] == "finished" and types.count("step") == row.total_steps
    losses = [e.data["loss"] for e in said(job, "step")]
    assert losses[-1] < losses[0]
    with transaction() as s:
        model = s.scalars(select(Model).where(Model.job_id == job.id)).one()
        assert (
            s.scalar(select(func.count()).select_from(Checkpoint).where(Checkpoint.deleted_at.is_(None)))
            <= get_settings().keep_checkpoints + 1
        )
    assert (get_settings().data_dir / model.path / "manifest.json").is_file()
    assert row.measured["peak_memory_bytes"] > 0 and row.result_file_id
    job_turn.work(job.id)  # the same message again
    assert now_of(job).attempt == 1 and not trainers()
    assert "torch" not in (PROJECT / "worker" / "supervision" / "train_attempt.py").read_text().split('"""')[2]


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_killed_trainers_change_nothing_about_the_result(new_job):
    calm, beaten = new_job(), new_job()
    job_turn.work(calm.id)
    thread = threading.Thread(target=lambda: [job_turn.work(beaten.id) for _ in range(3)], daemon=True)
    thread.start()
    for saves in (1, 2):
        wait_until(lambda n=saves: len(said(beaten, "saved")) >= n and trainers(), what="a checkpoint", seconds=60)
        [p.kill() for p in trainers()]
        wait_until(lambda n=saves: now_of(beaten).attempt > n or now_of(beaten).status != "running", what="the next attempt", seconds=30)
    thread.join(120)
    row = now_of(beaten)
    assert row.status == "succeeded" and row.attempt == 3, (row.status, row.attempt, row.error)
    with transaction() as session:
        first, second = [session.scalars(select(Model).where(Model.job_id == j.id)).one() for j in (calm, beaten)]
    assert first.adapter_sha256 == second.adapter_sha256
    last = {e.data["step"]: e.data["loss"] for e in said(beaten, "step")}
    assert last == {e.data["step"]: e.data["loss"] for e in said(calm, "step")}


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_pause_saves_and_resume_goes_on(new_job, user):
    job = new_job(epochs=30)
    with transaction() as session:
        session.get_one(Job, job.id).estimate = {"memory_bytes": 12345}
    thread = threading.Thread(target=job_turn.work, args=(job.id,), daemon=True)
    thread.start()
    wait_until(lambda: len(said(job, "step")) > 5, what="some steps", seconds=60)
    assert residency.room_asked(cuda=False) == 12345  # idle models of the playground make room
    with transaction() as session:
        jobs.pause(session, user, job.id)
    row = ended(job, thread)
    wait_until(lambda: residency.room_asked(cuda=False) == 0, what="the room given back", seconds=5)
    assert row.status == "paused" and not trainers()
    with transaction() as session:
        jobs.resume(session, user, job.id)
    thread = threading.Thread(target=job_turn.work, args=(job.id,), daemon=True)
    thread.start()
    wait_until(lambda: len(said(job, "started")) == 2, what="the second start", seconds=60)
    resumed_from = said(job, "started")[1].data["resumed_from"]
    assert resumed_from == max(e.data["step"] for e in said(job, "saved")) >= 5
    with transaction() as session:
        jobs.cancel(session, user, job.id)
    assert ended(job, thread).status == "cancelled" and not trainers()


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_a_cancelled_job_goes_on_from_any_checkpoint_as_if_nothing_had_happened_and_a_kept_one_stays(new_job, session, user):
    calm, job = new_job(epochs=12), new_job(epochs=12)
    job_turn.work(calm.id)
    thread = threading.Thread(target=job_turn.work, args=(job.id,), daemon=True)
    thread.start()
    wait_until(lambda: len(said(job, "saved")) > 1, what="two checkpoints", seconds=60)
    jobs.cancel(session, user, job.id)
    session.commit()
    assert ended(job, thread).status == "cancelled"

    newest, earlier = [row.step for row in jobs.checkpoints(session, now_of(job))[:2]]
    kept = checkpoints.keep(session, now_of(job), newest)
    assert checkpoints.keep(session, now_of(job), newest).id == kept.id and jobs.tuned_model(session, job) is None
    checkpoints.resume(session, user, job.id, earlier)
    session.commit()
    assert jobs.checkpoints(session, now_of(job))[0].step == earlier
    job_turn.work(job.id)
    row = now_of(job)
    assert row.status == "succeeded", row.error
    assert said(job, "started")[1].data["resumed_from"] == earlier
    last = {e.data["step"]: e.data["loss"] for e in said(job, "step")}
    assert last == {e.data["step"]: e.data["loss"] for e in said(calm, "step")}
    with transaction() as fresh:
        first, second = [jobs.tuned_model(fresh, j) for j in (calm, job)]
        assert first.adapter_sha256 == second.adapter_sha256 and second.id != kept.id
        assert models.resolve(fresh, user, kept.name).ref.adapters[-1].path == f"models/{kept.id}"
    manifest.verify(get_settings().data_dir / f"models/{kept.id}")


@pytest.mark.parametrize(
    ("how", "status", "code", "words"),
    [
        ("exit", "failed", "crashed", "the reason is here"),
        ("segfault", "failed", "crashed", "SIGSEGV"),
        ("killed", "queued", None, "SIGKILL"),
        ("disk", "paused", "disk_full", "disk"),
        ("memory", "queued", None, "memory"),
        ("liar", "failed", "crashed", "not whole"),
        ("garbage", "failed", "crashed", "exit code 3"),
        ("family", "failed", "crashed", "exit code 3"),
    ],
)
def test_every_exit_has_its_class(odd, how, status, code, words):
    job, thread = odd(how)
    row = ended(job, thread)
    assert row.status == status and (row.error or {}).get("code") == code
    texts = (row.error or {}).get("message", "") + "".join(e.data["message"] for e in said(job, "lost"))
    assert words in texts
    assert [e.data["step"] for e in said(job, "step")][:1] == [1], "what was said before the end is kept"
    if how == "garbage":
        assert len(said(job, "log")) == 2 and len(said(job, "step")) == 2
    if how == "family":
        log = get_settings().data_dir / f"runs/{job.id}/a1/trainer.log"
        child = int(log.read_text().split()[1])
        assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE, "its child trains on"


def test_the_lease_is_kept_while_a_large_model_is_read_and_a_lost_one_ends_it(odd, session, monkeypatch):
    def slow(ref, beat):
        while True:
            time.sleep(0.05)
            beat()

    monkeypatch.setattr(train_attempt.integrity, "check_model", slow)
    job, thread = odd("exit")
    wait_until(lambda: now_of(job).lease_until is not None, what="the claim")
    first = now_of(job).lease_until
    wait_until(lambda: now_of(job).lease_until > first, what="a beat")
    session.execute(update(Job).values(fence=Job.fence + 1))
    session.commit()
    assert ended(job, thread).status == "running"
    assert not (get_settings().data_dir / f"runs/{job.id}").exists(), "a trainer was started for a job of somebody else"


@pytest.mark.long
def test_the_log_of_a_trainer_that_writes_without_end_stays_within_its_limit(odd, monkeypatch):
    monkeypatch.setattr(train_attempt, "LOG_LIMIT_BYTES", 100_000)
    job, thread = odd("chatty")
    row = ended(job, thread)
    assert row.error["code"] == "crashed" and "the reason is here" in row.error["message"]
    logs = list((get_settings().data_dir / f"runs/{job.id}/a1").glob("trainer.log*"))
    written, kept = 400 * 10_000, sum(log.stat().st_size for log in logs)
    assert len(logs) == 2 and kept < written / 2, kept


def test_the_trainer_knows_no_secret(odd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-1")
    monkeypatch.setenv("LUTHIER_ADMIN_PASSWORD", "canary-2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("LUTHIER_KEEP_CHECKPOINTS", "7")
    monkeypatch.setenv("CC", "a-compiler")
    monkeypatch.setenv(sweep.MARK, "here:1")
    job, thread = odd("environment")
    assert ended(job, thread).status == "queued"  # it left with 75 and nobody had asked: its worker is going down
    known = json.loads(said(job, "log")[0].data["message"])
    assert known["HF_HUB_OFFLINE"] == "1" and known["MALLOC_MMAP_MAX_"] == "0" and known["CUDA_VISIBLE_DEVICES"] == "1"
    assert known["LUTHIER_KEEP_CHECKPOINTS"] == "7" and known["CC"] == "a-compiler"
    assert known[sweep.MARK] == "here:1", "the warden would not know it"
    assert not any("canary" in v for v in known.values()) and not {"LUTHIER_DATABASE_URL", "LUTHIER_REDIS_URL"} & set(known)


@pytest.mark.long
def test_a_trainer_that_does_not_leave_is_killed(odd, user):
    job, thread = odd("stubborn")
    wait_until(lambda: said(job, "log"), what="the trainer")
    with transaction() as session:
        jobs.cancel(session, user, job.id)
    began = time.monotonic()
    assert ended(job, thread).status == "cancelled" and time.monotonic() - began < 6


def test_a_trainer_that_hangs_is_stopped_and_tried_again(odd, monkeypatch):
    monkeypatch.setattr(train_attempt, "FIRST_STEP_SECONDS", 0.5)
    job, thread = odd("hang")
    row = ended(job, thread)
    assert row.status == "queued" and row.deaths == 1 and "hung" in said(job, "lost")[0].data["message"]


def stop_in_its_own_work(second: psutil.Process, folder: Path) -> None:
    """Stop a process of two where the other one has to wait for it; within an exchange it would have come as far as that one."""
    for _ in range(50):
        second.suspend()
        time.sleep(0.3)
        if attendance.waited_for(attendance.read(folder), 2):
            return
        second.resume()
        time.sleep(0.05)
    raise AssertionError("it was never behind")


@pytest.mark.long
@pytest.mark.parametrize("how", ["killed", *(pytest.param(how, marks=pytest.mark.fault) for how in ("hangs", "fenced off"))])
def test_a_job_of_two_processes_that_loses_one_ends_soon_and_names_it(new_job, monkeypatch, how):
    """All of them end: one that ended is told by the launcher, one that hangs by what the others wait for, and with the fence nobody stays."""
    get_settings().gpus_per_job = 2
    monkeypatch.setattr(train_attempt, "MIN_PATIENCE_SECONDS", 5.0)
    job = new_job(epochs=500)
    thread = threading.Thread(target=job_turn.work, args=(job.id,), daemon=True)
    thread.start()
    wait_until(lambda: len(said(job, "step")) > 5, what="steps of two processes", seconds=90)
    (second,) = [p for p in trainers() if p.environ().get("RANK") == "1"]
    if how == "fenced off":
        with transaction() as session:
            session.execute(update(Job).where(Job.id == job.id).values(fence=Job.fence + 1))
    elif how == "killed":
        second.kill()
    else:
        stop_in_its_own_work(second, get_settings().data_dir / f"runs/{job.id}/a1")
    began = time.monotonic()
    row = ended(job, thread, 60)
    assert time.monotonic() - began < 30 and not trainers()
    if how != "fenced off":
        message = said(job, "lost")[0].data["message"]
        assert row.status == "queued" and row.deaths == 1
        assert (
            "Process 1 of 2: The trainer was killed by SIGKILL" in message if how == "killed" else "wait for process 1 of 2" in message
        ), message


@pytest.mark.fault
@pytest.mark.flaky(reason="a trainer that gets no processor for two seconds is as silent as one that hangs")
def test_scoring_that_takes_longer_than_the_patience_is_no_hang(new_job, monkeypatch):
    """Validation, and base and result on every training row, say how far they are; each takes several times the patience."""
    patience = 2.5
    monkeypatch.setattr(train_attempt, "MIN_PATIENCE_SECONDS", patience)
    whole = exit_codes.trainer_command
    monkeypatch.setattr(
        exit_codes, "trainer_command", lambda *given: [sys.executable, "-m", "tests.worker.supervision.slow_trainer", *whole(*given)[3:]]
    )
    job = new_job(epochs=1, evaluations_per_epoch=1, max_tokens_per_step=64, samples=0, forgetting=False)
    job_turn.work(job.id)
    row = now_of(job)
    assert (row.status, row.attempt) == ("succeeded", 1), said(job, "lost")[0].data
    last_step = said(job, "step")[-1]
    silent = [e for e in said(job) if e.id > last_step.id and e.type != "progress"]
    assert (silent[-1].created_at - last_step.created_at).total_seconds() > 3 * patience
    assert max((b.created_at - a.created_at).total_seconds() for a, b in itertools.pairwise(silent)) > patience
    shares = [e.data["share"] for e in said(job, "progress") if e.data["what"] == "Comparing base and result"]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 0.95 and len(shares) > 8
    assert any(e.data["what"] == "Scoring the validation rows" for e in said(job, "progress"))


def odd_trainers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if ODD.name in " ".join(p.cmdline())]


def test_the_fence_is_lost_and_the_trainer_with_it(odd):
    job, thread = odd("polite")
    wait_until(lambda: said(job, "log"), what="the trainer")
    with transaction() as session:
        session.execute(Job.__table__.update().where(Job.id == job.id).values(fence=9))
    ended(job, thread)
    assert not odd_trainers()
    assert not said(job, "stopped", "failed", "lost")


@pytest.mark.parametrize("how", ["polite", "slow"])
def test_a_save_is_asked_for_once(odd, user, how):
    """Also of one that has not started, which would die of the signal."""
    job, thread = odd(how)
    wait_until(lambda: said(job, "log") if how == "polite" else now_of(job).status == "running" and odd_trainers(), what="the trainer")
    with transaction() as session:
        jobs.save_now(session, user, job.id)
    wait_until(lambda: said(job, "saved"), what="the checkpoint")
    assert not now_of(job).save_requested
    with transaction() as session:
        jobs.cancel(session, user, job.id)
    ended(job, thread)
    assert len(said(job, "saved")) == 1 and now_of(job).attempt == 1 and not said(job, "lost")


def test_a_worker_that_goes_down_gives_the_job_back(new_job, monkeypatch):
    monkeypatch.setattr(
        exit_codes, "trainer_command", lambda held, spec, fd, *_: [sys.executable, str(ODD), "polite", str(fd), held.folder]
    )
    job, leaving = new_job(), threading.Event()
    thread = threading.Thread(target=job_turn.work, args=(job.id, leaving.is_set), daemon=True)
    thread.start()
    wait_until(lambda: said(job, "log"), what="the trainer")
    leaving.set()
    row = ended(job, thread)
    assert (row.status, row.deaths) == ("queued", 0)


@pytest.mark.long
def test_while_the_database_is_away_training_goes_on_and_nothing_is_lost(odd, user, postgres):
    """The database refuses this studio for a while, and cuts the connections it has."""
    job, thread = odd("polite")
    wait_until(lambda: said(job, "log"), what="the trainer")
    name = get_engine().url.database
    from sqlalchemy import NullPool, create_engine, text

    admin = create_engine(postgres.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with admin.connect() as c:
        c.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        c.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name})
        time.sleep(1.5)
        c.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    time.sleep(1.5)
    with transaction() as session:
        jobs.cancel(session, user, job.id)
    row = ended(job, thread)
    steps = [e.data["step"] for e in said(job, "step")]
    assert row.status == "cancelled" and row.attempt == 1
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 100


# A real worker, relay and broker --------------------------------------------------------------------------------------


class Processes:
    """A real train worker and a real relay beside this test's database and broker."""

    def __init__(self, folder: Path) -> None:
        self.log = (folder / "processes.log").open("wb")
        settings = get_settings()
        self.env = os.environ | {
            "LUTHIER_LEASE_SECONDS": "3", "LUTHIER_BEAT_SECONDS": "0.5", "LUTHIER_REAP_SECONDS": "0.5", "LUTHIER_ANNOUNCE_AGAIN_SECONDS": "2",
            "LUTHIER_DEAF_SECONDS": "4", "LUTHIER_STOP_GRACE_SECONDS": "20",
            "LUTHIER_DATABASE_URL": settings.database_url, "LUTHIER_REDIS_URL": settings.redis_url,
        }  # fmt: skip
        self.started: list[subprocess.Popen] = []
        self.relay = self.start("-m", "app.relay")
        self.worker = self.start_worker()

    def start(self, *command: str) -> subprocess.Popen:
        made = subprocess.Popen([sys.executable, *command], cwd=PROJECT, env=self.env, stdout=self.log, stderr=self.log)
        self.started.append(made)
        return made

    def start_worker(self) -> subprocess.Popen:
        self.worker = self.start(
            "-m", "celery", "-A", "worker.main", "worker", "-Q", "train,evaluate", "--pool=prefork", "-c", "1", "--without-gossip"
        )
        return self.worker

    def stop(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.terminate()
        for process in self.started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        self.log.close()


@pytest.fixture
def processes(new_job, tmp_path) -> Iterator[Processes]:
    running = Processes(tmp_path)
    yield running
    running.stop()
    print((tmp_path / "processes.log").read_text(errors="replace")[-8000:])


def running_trainers(job: Job) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "worker.run" in line and str(job.id) in line:
            found.append(process)
    return found


def order_predictions(session, user, rows: int, tokens: int) -> uuid.UUID:
    file = files.add_bytes(session, user, ("text\n" + "What carries the strings?\n" * rows).encode(), "a.csv", "user_data")
    wanted = predictions.PredictionOrder(model="tiny", file=ids.public(ids.FILE, file.id), max_tokens=tokens)
    made = predictions.create(session, user, wanted)
    session.commit()
    return made.id


def order_evaluation(session, user, job: Job) -> uuid.UUID:
    """Of the base of a job, on the job's data."""
    asked = {"model": "tiny", "dataset_id": ids.public(ids.DATASET, job.dataset_id), "rows": 3, "answers": 0, "forgetting": False}
    made = evaluations.create(session, user, evaluations.read_order(asked))
    session.commit()
    return made.id


def row_of(key: uuid.UUID) -> Evaluation:
    with transaction() as session:
        return session.get_one(Evaluation, key)


GENERATE_WORKER = ("-m", "celery", "-A", "worker.main", "worker", "-Q", "generate", "--pool=threads", "-c", "4", "--without-gossip")


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_predictions_are_made_while_a_job_trains_and_go_on_after_a_restart_of_their_worker(new_job, processes, session, user):
    job = new_job(epochs=1000)
    queue.enqueue(session, queue.TRAIN, job.id)
    session.commit()
    wait_until(lambda: now_of(job).step > 0, what="a step", seconds=180)
    worker = processes.start(*GENERATE_WORKER)
    short = order_predictions(session, user, rows=3, tokens=2)
    wait_until(lambda: row_of(short).status == "succeeded", what="the predictions", seconds=180)
    assert now_of(job).status == "running" and running_trainers(job)

    long, next_one = (order_predictions(session, user, rows=20_000, tokens=200) for _ in range(2))
    wait_until(lambda: (row_of(long).progress or 0) > 0, what="the first rows", seconds=180)
    assert residency.room_asked(cuda=this_machine().cuda) > 0 and row_of(next_one).status == "queued"
    time.sleep(6)  # three times announce_again_seconds
    with transaction() as other:
        told = other.scalar(select(func.count()).where(Outbox.key == next_one))
    assert told == 1, "what waits in the worker was announced again and again"
    worker.terminate()
    worker.wait(30)
    assert (row_of(long).status, row_of(long).deaths) == ("queued", 0), "a worker that leaves gives back what it has"
    processes.start(*GENERATE_WORKER)
    wait_until(lambda: "running" in {row_of(key).status for key in (long, next_one)}, what="the second try", seconds=180)
    for key in (long, next_one):
        evaluations.cancel(session, user, key, predictions.KINDS)
    session.commit()
    last = order_predictions(session, user, rows=1, tokens=1)
    wait_until(lambda: row_of(last).status == "succeeded", what="what was ordered after those cancelled", seconds=180)
    jobs.cancel(session, user, job.id)
    session.commit()
    wait_until(lambda: now_of(job).status == "cancelled", what="the end of the job", seconds=60)


EVALUATE_WORKER = ("-m", "celery", "-A", "worker.main", "worker", "-Q", "evaluate", "--pool=threads", "-c", "1", "--without-gossip")


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_an_evaluation_ends_while_a_job_trains(new_job, processes, session, user):
    job, waits = new_job(epochs=1000), new_job()
    for one in (job, waits):
        queue.enqueue(session, queue.TRAIN, one.id)
    session.commit()
    wait_until(lambda: now_of(job).step > 0, what="a step", seconds=180)
    key = order_evaluation(session, user, job)
    time.sleep(3)  # longer than announce_again_seconds
    assert row_of(key).status == "queued", "the train worker is busy"
    processes.start(*EVALUATE_WORKER)
    wait_until(lambda: row_of(key).status == "succeeded", what="the evaluation", seconds=180)
    assert now_of(job).status == "running" and running_trainers(job)
    assert (now_of(waits).status, now_of(waits).attempt) == ("queued", 0), "an evaluate worker trains nothing"
    assert residency.room_asked(cuda=this_machine().cuda) == 0, (
        "a job without an estimate asks for none, and the evaluation gave its own back"
    )
    for one in (waits, job):
        jobs.cancel(session, user, one.id)
    session.commit()
    wait_until(lambda: now_of(job).status == "cancelled", what="the end of the job", seconds=60)


@pytest.mark.usefixtures("warm_attempts")
def test_an_evaluation_waits_for_room_beside_a_job_that_trains(new_job, session, user):
    job, here, other = new_job(), this_machine(), uuid.uuid4()
    key = order_evaluation(session, user, job)
    residency.ask_room(other, here.gpu_memory_bytes if here.cuda else here.memory_bytes)
    train_turn.take(key, None, lambda: False, train_turn.EVALUATE_WORKER)
    assert row_of(key).status == "queued" and residency.without_room([key, other]) == {key}
    residency.give_room_back(other)
    train_turn.take(key, None, lambda: False, train_turn.EVALUATE_WORKER)
    assert row_of(key).status == "succeeded", row_of(key).error
    assert now_of(job).attempt == 0


@pytest.mark.parametrize("queues, kinds", [("train", 2), ("train evaluate", 2), ("evaluate", 1), ("data evaluate", 1)])
def test_what_a_worker_takes_follows_from_its_queues(queues, kinds):
    assert len(train_turn.attempts_of(queues.split())) == kinds


@pytest.mark.usefixtures("warm_attempts")
def test_predictions_wait_for_room_beside_a_job_that_trains(new_job, session, user, monkeypatch):
    key = order_predictions(session, user, rows=1, tokens=1)
    here, job = this_machine(), uuid.uuid4()
    monkeypatch.setattr(attempt, "ROOM_SECONDS", 0.05)
    residency.ask_room(job, here.gpu_memory_bytes if here.cuda else here.memory_bytes)
    attempt.begin(key)
    time.sleep(0.5)
    assert row_of(key).status == "queued"
    residency.give_room_back(job)
    wait_until(lambda: row_of(key).status == "succeeded", what="the predictions", seconds=90)
    assert residency.room_asked(here.cuda) == 0


@pytest.mark.long
@pytest.mark.timeout(240)
def test_the_worker_is_killed_and_redis_is_wiped_and_the_job_finishes(new_job, processes):
    job = new_job(epochs=20)
    wait_until(lambda: said(job, "saved"), what="a checkpoint", seconds=90)
    (trainer,) = running_trainers(job)
    processes.worker.kill()  # the main process of the worker: its child and the trainer go with it
    processes.worker.wait()
    wait_until(lambda: not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE, what="the end of the orphan", seconds=5)
    processes.start_worker()
    queue.get_redis().flushall()
    wait_until(lambda: now_of(job).attempt == 2, what="the second attempt", seconds=60)
    queue.get_redis().flushall()
    wait_until(lambda: now_of(job).status == "succeeded", what="the end", seconds=120)
    assert [e.type for e in said(job, "lost", "finished")] == ["lost", "finished"]
    assert said(job, "started")[1].data["resumed_from"] > 0


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_warm_shutdown_saves_and_the_next_worker_goes_on_until_it_is_deaf(new_job, processes):
    job = new_job(epochs=12)
    wait_until(lambda: len(said(job, "step")) > 3, what="some steps", seconds=90)
    processes.worker.send_signal(signal.SIGTERM)
    processes.worker.wait(30)
    row = now_of(job)
    assert (row.status, row.deaths) == ("queued", 0) and not running_trainers(job)
    processes.start_worker()
    wait_until(lambda: now_of(job).status == "succeeded", what="the end", seconds=120)
    assert now_of(job).attempt == 2 and said(job, "started")[1].data["resumed_from"] > 0
    assert processes.worker.poll() is None

    queue.celery.control.cancel_consumer("train", reply=True, timeout=10)  # alive, and deaf from here on
    unheard = new_job(max_steps=2, samples=0, forgetting=False)
    assert processes.worker.wait(30) == 0, "a deaf worker ends, to be started again"
    assert now_of(unheard).attempt == 0


# Small parts ----------------------------------------------------------------------------------------------------------


def test_the_kernels_kill_is_told_from_anyone_elses():
    assert exit_codes.classify(-9, "", True).kind == "out_of_memory"
    assert exit_codes.classify(-9, "", False).kind == "worker_lost"
    assert exit_codes.classify(137, "", True).kind == "out_of_memory"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "cuda_out_of_memory"),
        ("terminate called after throwing an instance\n  what():  CUDA error: an illegal memory access was encountered", "gpu_fault"),
        ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", "gpu_fault"),
        ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp, remote process exited", "gpu_fault"),
        ("index out of bounds\nCUDA error: device-side assert triggered", "crashed"),
    ],
)
def test_a_gpu_that_failed_is_told_from_one_that_was_full(said, kind):
    found = exit_codes.classify(-signal.SIGABRT, said, False)
    assert found.kind == kind and said.splitlines()[-1] in found.message and found.hint
    assert (kind in events.TRANSIENT) == (kind == "gpu_fault"), "tried again in a process of its own"


def test_oom_kills_are_counted_in_both_versions_of_control_groups(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "memory.events").write_text("low 0\noom 1\noom_kill 3\n")
    (tmp_path / "a" / "b" / "memory.events").write_text("oom_kill 2\n")
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert exit_codes._highest(tmp_path, "/a/b", "memory.events") == 3
    assert exit_codes._highest(tmp_path, "/", "memory.oom_control") == 5


def test_patience_follows_the_pace(monkeypatch):
    from tests.jobs.test_lifecycle import step

    clock = [0.0]
    monkeypatch.setattr(exit_codes.time, "monotonic", lambda: clock[0])
    pace = exit_codes.HangDetector(first=100, least=5)
    assert pace.patience() == 100
    for n in range(1, 6):
        clock[0] += 2
        pace.note(step(n))
    assert pace.patience() == 20
    clock[0] += 19
    assert not pace.silent_too_long()
    clock[0] += 2
    assert pace.silent_too_long()


def test_the_worker_process_never_imports_torch():
    code = "import worker.main, sys; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_claims_end_to_end_uses_the_database_clock(new_job):
    job = new_job()
    with transaction() as session:
        assert lifecycle.claim(session, job.id, "w").attempt == 1
        left = session.scalar(select(func.extract("epoch", Job.lease_until - func.clock_timestamp())).where(Job.id == job.id))
    assert 2 < float(left) <= 3
