"""GPUs are leased: two jobs of one machine never share one, whatever their workers see, and a lease ends with the last process."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import event, update

from app.inference import residency
from app.kit import child_process
from app.machines import gpus, hardware
from app.tables import Job
from tests.conftest import wait_until
from tests.worker.supervision.test_train_attempt import new_job, now_of, order_evaluation, order_predictions, row_of  # noqa: F401  # a fixture
from worker.evaluation import attempt, train_turn
from worker.supervision import claiming, exit_codes, gpu_lease, job_turn, train_attempt

A, B = "GPU-aaaa1111-0000", "GPU-bbbb2222-0000"


def forget() -> None:
    """Look for the GPUs again."""
    for known in (gpus.all_cards, gpus._uuids, hardware._facts):
        known.cache_clear()


@pytest.fixture
def two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    listed = f"GPU 0: Tesla T4 (UUID: {A})\nGPU 1: Tesla T4 (UUID: {B})"
    cards = f"{A}, 7.5, 15360, Tesla T4\n{B}, 7.5, 15360, Tesla T4"
    tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] && exec echo "{listed}"\nexec echo "{cards}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    forget()
    yield
    forget()


@pytest.mark.usefixtures("two_cards")
def test_each_job_takes_cards_that_are_free(monkeypatch) -> None:
    first, second = gpu_lease.take(1), gpu_lease.take(1)
    assert (first.gpus, second.gpus, gpu_lease.take(1)) == ([A], [B], None)
    assert first.environment() == {"CUDA_VISIBLE_DEVICES": A}
    first.release()
    assert gpu_lease.take(2) is None, "one of two is no lease"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")  # another worker of the machine, which counts otherwise
    third = gpu_lease.take(1)
    assert third.gpus == [A]
    second.release(), third.release()
    both = gpu_lease.take(2)
    assert both.gpus == [B, A]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", A)
    assert gpu_lease.take(1) is None and gpu_lease.take(2).gpus == [], "a machine with too few cards leases none"
    both.release()


@pytest.mark.usefixtures("two_cards")
def test_a_lease_lasts_as_long_as_the_trainer(tmp_path) -> None:
    """Which may outlive the worker that took it by the time that its end takes."""
    lease = gpu_lease.take(2)
    with (tmp_path / "log").open("wb") as log:
        child = child_process.start([sys.executable, "-c", "import time; time.sleep(60)"], env={}, output=log, keeps=lease.files)
    lease.release()
    assert gpu_lease.take(1) is None
    child.end()
    assert gpu_lease.take(2).gpus == [A, B]


@pytest.mark.usefixtures("two_cards")
def test_a_job_waits_for_a_card_and_trains_on_that(new_job, tmp_path, monkeypatch) -> None:  # noqa: F811
    seen = tmp_path / "seen"
    program = f"import os, pathlib, time; pathlib.Path({str(seen)!r}).write_text(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(60)"
    monkeypatch.setattr(exit_codes, "trainer_command", lambda *_: [sys.executable, "-c", program])
    monkeypatch.setattr(train_attempt, "confined", lambda command, room: command)
    job, other = new_job(), gpu_lease.take(2)
    job_turn.work(job.id)
    assert (now_of(job).status, now_of(job).attempt) == ("queued", 0), "it was claimed without a card"
    other.release()
    held, other = gpu_lease.take(1), None
    going = threading.Event()
    thread = threading.Thread(target=job_turn.work, args=(job.id, going.is_set), daemon=True)
    thread.start()
    wait_until(lambda: seen.exists() and seen.read_text(), what="the trainer", seconds=30)
    assert (held.gpus, seen.read_text(), gpu_lease.take(1)) == ([A], B, None)
    going.set()
    thread.join(30)
    assert gpu_lease.take(1).gpus == [B]


@pytest.mark.usefixtures("two_cards")
def test_a_turn_takes_what_fits_the_cards_that_are_free(new_job, session, monkeypatch) -> None:  # noqa: F811
    """And what it claimed holds as many as it asked for; what fits no card of the machine is left alone."""
    taken = []

    def carry_out(attempt_) -> None:
        taken.append((attempt_.held.job_id, attempt_.lease.gpus, attempt_.held.processes))
        attempt_.lease.release()

    monkeypatch.setitem(train_turn.TRAIN_WORKER, "jobs", train_turn.Takes(job_turn.claim, carry_out))
    two, large, one = new_job(), new_job(), new_job()
    session.execute(update(Job).where(Job.id == two.id).values(num_gpus=2))
    session.execute(update(Job).where(Job.id == large.id).values(gpu_bytes=17 * 10**9))
    session.commit()
    other = gpu_lease.take(1)
    train_turn.take(two.id, None, lambda: False)
    assert taken == [(one.id, [B], 1)]
    train_turn.take(two.id, None, lambda: False)
    other.release()
    train_turn.take(large.id, None, lambda: False)
    train_turn.take(large.id, None, lambda: False)
    assert taken[1:] == [(two.id, [A, B], 2)] and now_of(large).status == "queued"


@pytest.mark.usefixtures("two_cards")
def test_a_claim_that_is_not_committed_holds_no_card(new_job) -> None:  # noqa: F811
    job = new_job()

    def claim(session):
        found = job_turn.claim(session, job.id)
        assert len(found.lease.files) == 1
        event.listen(session, "before_commit", lambda _: 1 / 0)
        return found

    with pytest.raises(ZeroDivisionError):
        claiming.claimed(claim)
    assert now_of(job).status == "queued" and gpu_lease.take(2).gpus == [A, B]


@pytest.mark.usefixtures("two_cards", "new_job")
def test_an_evaluation_waits_for_a_card_too(session, user) -> None:
    key, others = order_predictions(session, user, rows=1, tokens=1), gpu_lease.take(2)
    attempt.work(key)
    assert row_of(key).status == "queued" and row_of(key).fence == 0
    others.release()


@pytest.mark.usefixtures("two_cards")
def test_an_evaluate_worker_takes_a_free_card_and_else_room_beside_a_job(new_job, session, user, tmp_path, monkeypatch) -> None:  # noqa: F811
    seen, job = tmp_path / "seen", new_job()
    program = (
        f"import os, pathlib, sys; pathlib.Path({str(seen)!r}).write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))\n"
        "os.write(int(sys.argv[1]), b'{\"result\": {}}\\n')"
    )
    monkeypatch.setattr(attempt, "assess_command", lambda spec, pipe: [sys.executable, "-c", program, str(pipe)])
    monkeypatch.setattr(attempt, "confined", lambda command, room: command)

    def outcome() -> tuple[str, str]:
        seen.write_text("")
        key = order_evaluation(session, user, job)
        attempt.work_beside_training(key)
        return row_of(key).status, seen.read_text()

    first = gpu_lease.take(1)
    assert outcome() == ("succeeded", B), "a card is free"
    second = gpu_lease.take(1)
    residency.ask_room(job.id, 2**30, gpus=[A])
    assert outcome() == ("succeeded", "all"), "no card is free, and the first has room"
    residency.ask_room(job.id, 15 * 2**30, gpus=[A])
    assert outcome() == ("queued", ""), "no card is free, and the first is full"
    first.release(), second.release()


def test_without_the_drivers_tool_nothing_is_leased(data_dir, monkeypatch, tmp_path) -> None:
    forget()
    monkeypatch.setattr(gpus, "_output_lines", lambda *_, **__: [])
    assert gpu_lease.take(4) == gpu_lease.GpuLease([], [])
    forget()


def test_two_parts_of_a_card_are_two() -> None:
    """nvidia-smi's own words on a card that is cut."""
    program = (
        "from app.machines import gpus\n"
        "gpus.all_cards = lambda: [gpus.GpuCard('GPU-cccc', 8.0, 1, 'A100')]\n"
        "gpus._mig_instances = lambda: [(0, 'MIG-1', 1), (0, 'MIG-2', 1)]\n"
        "print([gpus._uuids(seen) for seen in (None, '0', 'MIG-2', 'MIG-2,MIG-1', '0,7,0', '')])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[('MIG-1',), ('MIG-1',), ('MIG-2',), ('MIG-2', 'MIG-1'), ('MIG-1',), ()]"
