"""Who holds a job: each move between the states, and then every order of them that hypothesis can think of."""

from __future__ import annotations

import json
import threading
import uuid
from dataclasses import dataclass
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import func, select, text, update

from app import events
from app.db import get_engine, transaction
from app.jobs import checkpoint_folders, checkpoints, lifecycle
from app.jobs import service as jobs
from app.leases import answering_since, expire, now, redeliver
from app.settings import get_settings
from app.storage import files
from app.tables import Checkpoint, Event, File, Job, Model, Outbox
from tests.conftest import wait_until
from tests.factories import make_dataset, make_job


def step(n: int) -> events.Step:
    return events.Step(
        step=n, epoch=n / 10, loss=2.0 / n, learning_rate=1e-4, grad_norm=1.0, tokens=n * 100, trained_tokens=n * 50,
        tokens_per_second=500.0, memory_bytes=1 << 20, seconds=n * 0.5,
    )  # fmt: skip


def saved(n: int, fence: int = 1, best: bool = False) -> events.Saved:
    return events.Saved(
        step=n, path=f"runs/x/a{fence}/checkpoint-{n}", bytes=1000, manifest_sha256="a" * 64, metrics={"loss": 1.0}, best=best
    )


STARTED = events.Started(
    device="cpu",
    precision="fp32",
    total_steps=20,
    train_rows=40,
    validation_rows=4,
    train_tokens=900,
    trainable_parameters=10,
    parameters=100,
)
FINISHED = events.Finished(
    reason="completed", step=20, path="runs/x/a1/final", bytes=5, revision="r" * 64, adapter_sha256="b" * 64, kind="dialogue",
    measured=events.Measured(peak_memory_bytes=1, seconds=9.0, tokens_per_second=2.0, tokens=20, trained_tokens=777, steps=20, device="cpu"),
)  # fmt: skip


@pytest.fixture
def leases(session, monkeypatch):
    """Leases pass only when a test says so, however slow the machine. The database of the tests has been up for longer
    than the lease that the reaper waits out after a restart."""
    get_settings().lease_seconds = 0.2
    monkeypatch.setattr("app.leases.lease", lambda: now() + timedelta(hours=1))


@pytest.fixture
def job(session, user, data_dir, tiny_registered, leases):
    return make_job(session, user, tiny_registered, make_dataset(session, user, data_dir))


def now_of(job_id: uuid.UUID) -> Job:
    with transaction() as session:
        return session.get_one(Job, job_id)


def take(job_id: uuid.UUID, worker: str = "w") -> lifecycle.Claim | None:
    with transaction() as session:
        return lifecycle.claim(session, job_id, worker)


def let_lapse(job_id: uuid.UUID) -> None:
    with transaction() as session:
        session.execute(
            update(Job).where(Job.id == job_id).values(lease_until=func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, 1))
        )


def said(job_id: uuid.UUID) -> list[str]:
    with transaction() as session:
        return list(session.scalars(select(Event.type).where(Event.job_id == job_id).order_by(Event.id)))


def test_one_message_or_three_one_claim(job):
    held = take(job.id)
    assert held is not None and (held.fence, held.attempt) == (1, 1)
    assert take(job.id) is None and take(job.id) is None
    assert take(uuid.uuid4()) is None
    assert said(job.id) == ["claimed"]
    assert held.folder == f"runs/{job.id}/a1"


def test_recording_moves_the_job_and_twice_is_once(job):
    held = take(job.id)
    batch = [STARTED, *[step(n) for n in range(1, 6)], saved(5)]
    for _ in range(2):  # as after a COMMIT whose answer was lost
        with transaction() as session:
            lifecycle.record(session, held, 0, batch)
    row = now_of(job.id)
    assert (row.step, row.total_steps, row.trained_tokens) == (5, 20, 250)
    assert row.seconds_left == pytest.approx(7.5)
    assert said(job.id) == ["claimed", "started", "step", "step", "step", "step", "step", "saved"]
    with transaction() as session:
        assert session.scalar(select(func.count()).select_from(Checkpoint)) == 1


def test_text_that_postgres_cannot_keep_is_kept_without_it(job):
    held = take(job.id)
    torn = events.Sampled(step=1, samples=[events.Sample(prompt="a\x00b", reference="\ud800", answer="ok")])
    with transaction() as session:
        lifecycle.record(session, held, 0, [torn, events.Log(message="NaN"), step(1).model_copy(update={"loss": float("nan")})])
    with transaction() as session:
        rows = jobs.events(session, session.get_one(Job, job.id))
    assert rows[1].data["samples"][0]["prompt"] == "a\ufffdb"
    again = events.from_row(rows[3].type, rows[3].data)
    assert again.loss != again.loss


def test_a_stale_worker_can_write_nothing(job):
    stale = take(job.id)
    let_lapse(job.id)
    fresh = take(job.id, "another")
    assert (fresh.fence, fresh.attempt) == (2, 2)
    for move in (
        lambda s: lifecycle.heartbeat(s, stale),
        lambda s: lifecycle.record(s, stale, 0, [step(1)]),
        lambda s: lifecycle.finish(s, stale, FINISHED),
        lambda s: lifecycle.fail(s, stale, events.Failed(kind="diverged", message="m")),
        lambda s: lifecycle.fail(s, stale, events.Failed(kind="worker_lost", message="m")),
        lambda s: lifecycle.stopped(s, stale, 3),
    ):
        with pytest.raises(lifecycle.FenceLost), transaction() as session:
            move(session)
    row = now_of(job.id)
    assert (row.status, row.fence, row.step) == ("running", 2, 0)
    assert said(job.id) == ["claimed", "lost", "queued", "claimed"]


def test_finish_makes_one_model_and_one_metrics_file(job, user):
    held = take(job.id)
    with transaction() as session:
        lifecycle.record(session, held, 0, [STARTED, step(1), step(2), events.Evaluated(step=2, loss=1.5)])
    for _ in range(2):
        with transaction() as session:
            lifecycle.finish(session, held, FINISHED)
    row = now_of(job.id)
    assert row.status == "succeeded" and row.trained_tokens == 777 and row.finished_at and row.lease_until is None
    with transaction() as session:
        model = session.scalars(select(Model).where(Model.job_id == job.id)).one()
        file = session.get_one(File, row.result_file_id)
        assert model.name.startswith("ft:tiny:") and file.purpose == "fine-tune-results"
        lines = files.content(session, user, file.id).read_text().splitlines()
    assert (
        lines[0].startswith("step,epoch,train_loss,valid_loss")
        and lines[1].startswith("1,0.1,2.0,,")
        and lines[2].startswith("2,0.2,1.0,1.5,")
    )
    assert said(job.id)[-1] == "finished"


def test_three_deaths_without_a_checkpoint_end_it_and_a_checkpoint_forgives(job):
    for n in (1, 2):
        assert take(job.id).attempt == n
        let_lapse(job.id)
    held = take(job.id)
    assert held is not None and now_of(job.id).deaths == 2
    with transaction() as session:
        lifecycle.record(session, held, 0, [saved(4, 3)])
    assert now_of(job.id).deaths == 0
    for _ in range(2):
        let_lapse(job.id)
        held = take(job.id)
        with transaction() as session:
            lifecycle.record(session, held, 0, [saved(4, held.fence)])  # the same step again is no progress
    let_lapse(job.id)
    assert take(job.id) is None
    row = now_of(job.id)
    assert row.status == "failed" and row.error["code"] == "worker_lost" and row.error["hint"]
    assert said(job.id)[-2:] == ["lost", "failed"]


@pytest.mark.parametrize("kind", ["out_of_memory", "no_progress", "disk_full", "crashed"])
def test_a_failure_told_again_changes_nothing(job, kind):
    held, failed = take(job.id), events.Failed(kind=kind, message="It did.")
    for _ in range(2):
        with transaction() as session:
            lifecycle.fail(session, held, failed)
    row = now_of(job.id)
    assert row.deaths == (kind in ("out_of_memory", "no_progress"))
    assert row.status == {"disk_full": "paused", "crashed": "failed"}.get(kind, "queued")


@pytest.mark.parametrize("kind", ["diverged", "bad_data", "bad_model", "cuda_out_of_memory", "crashed"])
def test_what_would_fail_again_is_not_tried_again(job, kind):
    held = take(job.id)
    with transaction() as session:
        lifecycle.fail(session, held, events.Failed(kind=kind, message="It did.", hint="Do this.", line=7))
    row = now_of(job.id)
    assert row.status == "failed" and (row.error["code"], row.error["line"], row.error["hint"]) == (kind, 7, "Do this.")
    assert take(job.id) is None


@pytest.mark.parametrize(
    ("suggestion", "status"), [({"gradient_checkpointing": "all"}, "queued"), ({"micro_batches": 2}, "failed"), (None, "failed")]
)
def test_a_full_gpu_is_tried_again_with_every_layer_recomputed(job, suggestion, status):
    """The trainer offers that once, so it is once that the job goes on by itself."""
    held = take(job.id)
    with transaction() as session:
        lifecycle.fail(session, held, events.Failed(kind="cuda_out_of_memory", message="It was full.", suggestion=suggestion))
    assert now_of(job.id).status == status


def test_out_of_memory_is_tried_once_more_and_a_hang_thrice(job):
    def die(kind):
        held = take(job.id)
        with transaction() as session:
            lifecycle.fail(session, held, events.Failed(kind=kind, message="It did."))
        return now_of(job.id).status

    assert [die("out_of_memory"), die("out_of_memory")] == ["queued", "failed"]
    with transaction() as session:
        jobs.resume(session, _owner(session, job), job.id)
    assert [die(kind) for kind in ("no_progress", "gpu_fault", "no_progress")] == ["queued", "queued", "failed"]


def _owner(session, job):
    from app.tables import User

    return session.get_one(User, job.owner_id)


def test_full_disk_pauses_and_goes_on_by_itself(job, monkeypatch):
    held = take(job.id)
    with transaction() as session:
        lifecycle.fail(session, held, events.Failed(kind="disk_full", message="No room."))
    assert now_of(job.id).status == "paused" and now_of(job.id).error["code"] == "disk_full"
    free = lifecycle.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(lifecycle.shutil, "disk_usage", lambda _: free)
    with transaction() as session:
        assert lifecycle.resume_after_full_disk(session) == 0
    monkeypatch.setattr(lifecycle.shutil, "disk_usage", lambda _: free._replace(free=2**40))
    with transaction() as session:
        assert lifecycle.resume_after_full_disk(session) == 1
    assert now_of(job.id).status == "queued" and now_of(job.id).error is None


def test_lost_messages_are_announced_again_and_a_long_queue_is_not_flooded(job):
    def announce(backlog=0):
        with transaction() as session:
            return redeliver(session, lifecycle.WORK, backlog=backlog)

    assert announce() == 0  # its message has not been sent yet
    with transaction() as session:
        session.execute(update(Outbox).values(sent_at=func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, 16)))
    assert announce(backlog=3) == 0
    assert announce() == 1
    assert announce() == 0


def test_the_database_says_since_when_it_lets_anybody_in(session):
    started, launched = session.execute(
        text("SELECT pg_postmaster_start_time(), max(backend_start) FROM pg_stat_activity WHERE backend_type LIKE '%launcher'")
    ).one()
    assert started < launched == session.scalar(select(answering_since()))


def test_the_reaper_waits_for_a_database_that_just_started(job):
    take(job.id)
    let_lapse(job.id)
    get_settings().lease_seconds = 1e6  # as if the server had started within the last lease
    with transaction() as session:
        assert expire(session, lifecycle.WORK) == 0
    get_settings().lease_seconds = 0.2
    with transaction() as session:
        assert expire(session, lifecycle.WORK) == 1


def test_checkpoints_are_swept_but_for_the_newest_and_the_best(job, data_dir):
    held = take(job.id)
    for n in (1, 2, 3, 4):
        (data_dir / f"runs/x/a1/checkpoint-{n}").mkdir(parents=True)
    with transaction() as session:
        lifecycle.record(session, held, 0, [saved(1), saved(2, best=True), saved(3), saved(4)])
        checkpoint_folders.keep_newest(session, job.id, keep=1)
    assert sorted(p.name for p in (data_dir / "runs/x/a1").iterdir()) == ["checkpoint-2", "checkpoint-4"]


# An end that a person asked for at the same moment ------------------------------------------------------------------


@pytest.fixture
def at_once(job, user, postgres):
    """Two moves on the job at the same moment, the first of them holding its row until the second waits for it."""

    def run(first, second) -> None:
        faults: list[Exception] = []

        def later() -> None:
            try:
                with transaction() as session:
                    second(session)
            except Exception as error:
                faults.append(error)

        with transaction() as session:
            first(session)
            session.flush()
            thread = threading.Thread(target=later, daemon=True)
            thread.start()
            waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            with get_engine().connect().execution_options(isolation_level="AUTOCOMMIT") as watching:
                wait_until(lambda: watching.scalar(text(waits)), what="the second move, waiting for the row")
        thread.join(20)
        if faults:
            raise faults[0]

    return run


@pytest.mark.parametrize("failed", [None, events.Failed(kind="bad_data", message="It did.")])
def test_a_cancel_that_was_accepted_wins_over_an_end(job, user, data_dir, at_once, failed):
    held = take(job.id)
    final = data_dir / FINISHED.path
    final.mkdir(parents=True)
    end = (lambda s: lifecycle.fail(s, held, failed)) if failed else (lambda s: lifecycle.finish(s, held, FINISHED))
    at_once(lambda s: jobs.cancel(s, user, job.id), end)
    with transaction() as session:
        end(session)  # once more, as after an answer that was lost
        row = session.get_one(Job, job.id)
        assert (row.status, row.error, row.cancel_requested) == ("cancelled", None, False) and row.finished_at
        assert jobs.tuned_model(session, row) is None and row.result_file_id is None
    assert said(job.id)[-1] == "stopped" and said(job.id).count("stopped") == 1
    assert final.exists() == bool(failed), "a result that is no model is left on the disk"


def test_a_cancel_that_came_after_the_end_is_refused(job, user, at_once):
    held = take(job.id)
    with pytest.raises(jobs.Conflict, match="succeeded"):
        at_once(lambda s: lifecycle.finish(s, held, FINISHED), lambda s: jobs.cancel(s, user, job.id))
    row = now_of(job.id)
    assert (row.status, row.cancel_requested) == ("succeeded", False)


def test_a_pause_that_meets_the_end_leaves_the_result(job, user, at_once):
    held = take(job.id)
    at_once(lambda s: jobs.pause(s, user, job.id), lambda s: lifecycle.finish(s, held, FINISHED))
    row = now_of(job.id)
    assert (row.status, row.pause_requested) == ("succeeded", False)


# Every order of moves -----------------------------------------------------------------------------------------------


@dataclass
class Believed:
    """What the job must look like now."""

    status: str = "queued"
    fence: int = 0
    deaths: int = 0
    newest: int = 0
    cancel: bool = False
    pause: bool = False
    results: int = 0


class JobMachine(RuleBasedStateMachine):
    """Moves by people, workers (also stale ones) and the reaper, in any order, against a real database."""

    make = None  # set by the test: makes a fresh job and gives its id and owner

    def __init__(self) -> None:
        super().__init__()
        self.id, self.user = self.make()
        self.now = Believed()
        self.held: lifecycle.Claim | None = None
        self.stale: list[lifecycle.Claim] = []
        self.number = 0

    def end(self, status: str) -> None:
        self.now.status, self.now.cancel, self.now.pause = status, False, False
        if self.held is not None:
            self.stale.append(self.held)
        self.held = None

    def die(self) -> None:
        self.now.deaths += 1
        if self.now.cancel or self.now.pause:
            self.end("cancelled" if self.now.cancel else "paused")
        else:
            self.end("queued" if self.now.deaths < lifecycle.MAX_DEATHS else "failed")

    @rule()
    def claim(self) -> None:
        held = take(self.id)
        assert (held is not None) == (self.now.status == "queued")
        if held is not None:
            self.now.status, self.now.fence = "running", self.now.fence + 1
            assert held.fence == self.now.fence
            self.held, self.number = held, 0

    @rule(lapse_first=st.booleans())
    def claim_after_lapse(self, lapse_first: bool) -> None:
        if self.now.status != "running":
            return
        let_lapse(self.id)
        self.die()
        if lapse_first:
            with transaction() as session:
                assert expire(session, lifecycle.WORK) == 1
        else:
            self.claim()

    @precondition(lambda self: self.held)
    @rule()
    def beat(self) -> None:
        with transaction() as session:
            wishes = lifecycle.heartbeat(session, self.held)
        assert (wishes.cancel, wishes.pause) == (self.now.cancel, self.now.pause)

    @precondition(lambda self: self.held)
    @rule(at=st.integers(1, 6), again=st.booleans())
    def save(self, at: int, again: bool) -> None:
        for _ in range(1 + again):
            with transaction() as session:
                lifecycle.record(session, self.held, self.number, [step(at), saved(at, self.held.fence)])
        self.number += 2
        if at > self.now.newest:
            self.now.newest, self.now.deaths = at, 0

    @precondition(lambda self: self.held)
    @rule(kind=st.sampled_from(["diverged", "worker_lost", "no_progress", "out_of_memory", "crashed"]), again=st.booleans())
    def fail(self, kind: str, again: bool) -> None:
        held, deaths = self.held, self.now.deaths
        for _ in range(1 + again):
            with transaction() as session:
                lifecycle.fail(session, held, events.Failed(kind=kind, message="It did."))
        if kind in events.TRANSIENT or (kind == "out_of_memory" and deaths == 0):
            self.die()
        else:
            self.end("cancelled" if self.now.cancel else "failed")

    @precondition(lambda self: self.held)
    @rule(again=st.booleans())
    def finish(self, again: bool) -> None:
        for _ in range(1 + again):
            with transaction() as session:
                lifecycle.finish(session, self.held, FINISHED)
        self.now.results = int(not self.now.cancel)
        self.end("cancelled" if self.now.cancel else "succeeded")

    @precondition(lambda self: self.held)
    @rule()
    def stop(self) -> None:
        with transaction() as session:
            lifecycle.stopped(session, self.held, 1)
        self.end("cancelled" if self.now.cancel else "paused" if self.now.pause else "queued")

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def stale_write(self, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from(self.stale))
        if old.fence == self.now.fence and self.now.status != "running":
            return  # its own last move again, which is no harm: see `again` above
        move = data.draw(st.sampled_from([lifecycle.heartbeat, lifecycle.finish, lifecycle.fail, lifecycle.stopped, lifecycle.record]))
        arguments = {
            lifecycle.heartbeat: (), lifecycle.finish: (FINISHED,), lifecycle.fail: (events.Failed(kind="crashed", message="late"),),
            lifecycle.stopped: (1,), lifecycle.record: (0, [step(9)]),
        }[move]  # fmt: skip
        with pytest.raises(lifecycle.FenceLost), transaction() as session:
            move(session, old, *arguments)

    @rule(wish=st.sampled_from(["cancel", "pause", "resume"]))
    def ask(self, wish: str) -> None:
        before = self.now.status
        allowed = {
            "cancel": {"queued", "running", "paused", "cancelled"},
            "pause": {"queued", "running", "paused"},
            "resume": {"queued", "running", "paused", "failed"} | ({"cancelled"} if self.now.newest else set()),
        }[wish]
        if before not in allowed:
            with pytest.raises(jobs.Conflict), transaction() as session:
                getattr(jobs, wish)(session, self.user, self.id)
            return
        with transaction() as session:
            getattr(jobs, wish)(session, self.user, self.id)
        if wish == "cancel":
            self.now.status, self.now.cancel = ("running", True) if before == "running" else ("cancelled", False)
        elif wish == "pause":
            self.now.status, self.now.pause = ("running", True) if before == "running" else ("paused", False)
        elif before in ("paused", "failed", "cancelled"):
            self.now.status, self.now.deaths = "queued", 0
        elif before == "running":
            self.now.pause = False

    @rule()
    def reap(self) -> None:
        with transaction() as session:
            jobs.reap(session)

    @invariant()
    def holds(self) -> None:
        with transaction() as session:
            row = session.get_one(Job, self.id)
            seen = (row.status, row.fence, row.deaths, row.cancel_requested, row.pause_requested)
            assert seen == (self.now.status, self.now.fence, self.now.deaths, self.now.cancel, self.now.pause)
            assert (row.lease_until is not None) == (row.status == "running")
            assert (row.finished_at is not None) == (row.status in jobs.ENDED)
            assert (row.error is not None) == (row.status == "failed")
            assert session.scalar(select(func.count()).select_from(Model).where(Model.job_id == self.id)) == self.now.results
            waiting = session.scalar(select(func.count()).select_from(Outbox).where(Outbox.key == self.id))
            assert row.status != "queued" or waiting, "a queued job that nobody speaks of"


class Mishap(Exception):
    """Whatever rolls a transaction back."""


@pytest.fixture
def failed_at_15(job, user, data_dir):
    """A failed job with checkpoints 5, 10 (the best) and 15 on disk; gives its id and their folders."""
    held, folders = take(job.id), {}
    for n in (5, 10, 15):
        folders[n] = data_dir / held.folder / f"checkpoint-{n}"
        (folders[n] / "trainer").mkdir(parents=True)
        (folders[n] / "trainer/state.json").write_text(json.dumps({"best_path": f"{held.folder}/checkpoint-{min(n, 10)}"}))
    with transaction() as session:
        told = [saved(n, best=n <= 10).model_copy(update={"path": f"{held.folder}/checkpoint-{n}"}) for n in folders]
        lifecycle.record(session, held, 0, [STARTED, *told])
        lifecycle.fail(session, held, events.Failed(kind="crashed", message="no reason"))
    return job.id, folders


def rows_of(job_id: uuid.UUID) -> dict[int, bool]:
    """Steps whose rows are not deleted, and whether each is the best."""
    with transaction() as session:
        query = select(Checkpoint.step, Checkpoint.best).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
        return dict(tuple(row) for row in session.execute(query))


def there(folders) -> list[int]:
    return [n for n, folder in folders.items() if folder.exists()]


def test_going_back_to_a_checkpoint_takes_the_later_ones_files_with_the_commit(failed_at_15, user):
    job_id, folders = failed_at_15
    with pytest.raises(Mishap), transaction() as session:
        checkpoints.resume(session, user, job_id, 5)
        assert there(folders) == [5, 10, 15]
        raise Mishap
    assert there(folders) == [5, 10, 15] and rows_of(job_id) == {5: False, 10: True, 15: False} and now_of(job_id).status == "failed"
    with transaction() as session:
        checkpoints.resume(session, user, job_id, 10)
    assert there(folders) == [5, 10] and rows_of(job_id) == {5: False, 10: True} and now_of(job_id).status == "queued"


def test_what_the_job_goes_back_to_remembers_which_one_is_the_best(failed_at_15, user):
    job_id, folders = failed_at_15
    with transaction() as session:
        checkpoints.resume(session, user, job_id, 5)
    assert there(folders) == [5] and rows_of(job_id) == {5: True}


@pytest.mark.parametrize("found_by", ["claim", "sweep"])
def test_files_left_by_a_death_after_the_commit_go_later(failed_at_15, user, session, found_by):
    job_id, folders = failed_at_15
    checkpoints.resume(session, user, job_id, 5)
    session.commit()  # and nothing after it, as when the process dies here
    assert there(folders) == [5, 10, 15] and rows_of(job_id) == {5: True}
    if found_by == "claim":
        assert take(job_id) is not None
    else:
        jobs.cancel(session, user, job_id)
        jobs.reap(session)
    assert there(folders) == [5]


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("orders", "moves"),
    [(24, 40), pytest.param(300, 50, marks=pytest.mark.fault)],
)
def test_every_order_of_moves(session, user, data_dir, tiny_registered, leases, orders, moves):
    dataset = make_dataset(session, user, data_dir)
    session.commit()

    class Here(JobMachine):
        @staticmethod
        def make():
            return make_job(session, user, tiny_registered, dataset).id, user

    chosen = settings(max_examples=orders, stateful_step_count=moves, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Here, settings=chosen)
