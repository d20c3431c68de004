"""What the machine that trains is, told with the workers' words of life."""

from __future__ import annotations

import time

import pytest

from app.jobs import spec_builder
from app.machines import hardware, heartbeats
from app.machines.hardware import Machine, Pace
from app.queue import get_redis

HERE = Machine(cores=2, memory_bytes=24 * 2**30, processor="a processor")
CARD = Machine(cores=16, memory_bytes=128 * 2**30, gpu_name="a card", gpu_memory_bytes=80 * 2**30, bf16_pays=True)
PACED = CARD.model_copy(update={"paces": {"a card · lora": Pace(operations_per_second=1e12, fixed_seconds=3.0)}})


@pytest.fixture(autouse=True)
def nobody(session):
    get_redis().delete(heartbeats.MACHINES)


def test_jobs_are_reckoned_for_the_machine_that_trains():
    assert heartbeats.training_machine() == hardware.this_machine() and not spec_builder.has_gpu()
    heartbeats.say_machine(PACED, name="far")
    assert heartbeats.training_machine() == PACED and spec_builder.has_gpu()


def test_of_several_the_least_is_reckoned_with():
    heartbeats.say_machine(CARD, name="far")
    heartbeats.say_machine(HERE, name="near")
    assert heartbeats.training_machine() == HERE


def test_a_machine_that_fell_silent_counts_only_where_no_other_speaks(monkeypatch):
    heartbeats.say_machine(HERE, name="near")
    later = heartbeats.clock() + 3600
    monkeypatch.setattr(heartbeats, "clock", lambda: later)
    assert heartbeats.training_machine() == HERE, "its worker may only be restarting"
    heartbeats.say_machine(CARD, name="far")
    assert heartbeats.training_machine() == CARD
    monkeypatch.setattr(heartbeats, "clock", lambda: later + 2 * heartbeats.FORGOTTEN_SECONDS)
    assert heartbeats.training_machine() == hardware.this_machine()


def test_a_word_of_another_version_is_passed_over():
    get_redis().hset(heartbeats.MACHINES, "old", '{"seen_at": 1e12, "machine": {"cores": "many"}}')
    get_redis().hset(heartbeats.MACHINES, "torn", '{"seen_at"')
    assert heartbeats.training_machine() == hardware.this_machine()


def test_a_train_worker_tells_its_machine_and_no_other_does():
    for queue, told in (("data", False), ("train", True)):
        stop = heartbeats.keep_saying(queue)
        try:
            until = time.monotonic() + 10
            while not (words := get_redis().hlen(heartbeats.MACHINES)) and told and time.monotonic() < until:
                time.sleep(0.02)
        finally:
            stop.set()
        assert bool(words) is told
