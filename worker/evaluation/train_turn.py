"""A worker's turn: it claims what `app.evaluation.claims` says is next and fits its machine, and does it.

A train worker takes jobs and evaluations, in one order. An evaluate worker takes evaluations alone, those that have room beside what
trains: a short one then does not wait until a long job ends.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import redis
from sqlalchemy.orm import Session

from app.evaluation import claims, train_queue
from app.evaluation.claims import NextInLine
from app.inference import residency
from app.kit import ids, tracing
from app.machines import heartbeats, placement
from app.machines.hardware import this_machine
from app.machines.placement import Capacity, Needs
from app.queue import EVALUATE, ROUTES, TRAIN
from worker.evaluation import attempt
from worker.supervision import gpu_lease, job_turn
from worker.supervision.claiming import ClaimedWork, ClaimOutcome, claimed


class Takes(NamedTuple):
    """How a worker claims one kind of work in an open transaction, and how it carries out what it claimed."""

    claim: Callable[[Session, uuid.UUID, Callable[[], bool]], Any]
    carry_out: Callable[[Any], object]


Attempts = Mapping[str, Takes]
TRAIN_WORKER: Attempts = {
    "jobs": Takes(job_turn.claim, job_turn.carry_out),
    "evaluations": Takes(attempt.claim, attempt.carry_out),
}
EVALUATE_WORKER: Attempts = {"evaluations": Takes(attempt.claim_beside_training, attempt.carry_out)}
"""What each kind of worker takes, by its table, and how."""


class Room(NamedTuple):
    """What a worker fills: what is free of it now, and all of it."""

    free: Callable[[], Capacity]
    whole: Callable[[], Capacity]


def attempts_of(queues: Container[str]) -> Attempts:
    """What a worker that reads these queues takes."""
    return EVALUATE_WORKER if ROUTES[EVALUATE] in queues and ROUTES[TRAIN] not in queues else TRAIN_WORKER


def take(
    key: uuid.UUID,
    message: Mapping[str, Any] | None,
    going_down: Callable[[], bool],
    attempts: Attempts = TRAIN_WORKER,
    room: Room | None = None,
) -> None:
    """One turn, for a message that named `key`, with `room` or, without, what is free of this machine. What another worker claimed
    meanwhile is passed over, and so is what does not fit into what is free now. What is left waiting is announced again: now to the other workers, if this one can do nothing, and by the reaper."""
    turn = WorkerTurn(key, message, going_down, attempts, room)
    while not going_down():
        found = claimed(turn.claim)
        turn.note()
        if not isinstance(found, ClaimOutcome):
            return turn.carry_out(found)
        if found is ClaimOutcome.NOTHING:
            return turn.tell_others()
    return None


class WorkerTurn:
    """What a worker has tried in this turn, and what is free of its machine."""

    def __init__(
        self,
        key: uuid.UUID,
        message: Mapping[str, Any] | None,
        going_down: Callable[[], bool],
        attempts: Attempts = TRAIN_WORKER,
        room: Room | None = None,
    ) -> None:
        self.key, self.message, self.going_down, self.attempts = key, message, going_down, attempts
        self.room = room or (Room(free_here, whole_here) if "jobs" in attempts else Room(beside_here, beside_here))
        self.tried: set[uuid.UUID] = set()
        self.reserved: list[Needs] = []
        self.chosen: NextInLine | None = None
        self.context: Mapping[str, Any] | None = None

    def claim(self, session: Session) -> ClaimedWork | ClaimOutcome:
        """Choose what is next, and claim it before anybody else sees it."""
        left = self.room.free()
        for needs in self.reserved:
            left = left.without_cards_for(needs)
        self.chosen = chosen = claims.choose(session, left, self.room.whole(), self.tried, self.attempts)
        if chosen is None:
            return ClaimOutcome.NOTHING
        if not chosen.fits:
            return ClaimOutcome.NO_GPU
        self.context = self.message if chosen.key == self.key else train_queue.message_of(session, chosen.key)
        found: ClaimedWork | ClaimOutcome = self.attempts[chosen.kind].claim(session, chosen.key, self.going_down)
        return found

    def note(self) -> None:
        """What was chosen is not tried again in this turn; GPUs that are kept for it are not free to others."""
        if self.chosen is not None:
            self.tried.add(self.chosen.key)
            if not self.chosen.fits:
                self.reserved.append(self.chosen.needs)

    def carry_out(self, found: ClaimedWork) -> None:
        """With the ids of the request that this work comes from in every log line."""
        chosen = self.chosen
        assert chosen is not None
        work = train_queue.WORK[chosen.kind]
        job = ids.public(ids.JOB, chosen.key) if chosen.kind == "jobs" else None
        with tracing.work(work.task or chosen.kind, self.context, job_id=job, key=None if job else str(chosen.key)):
            self.attempts[chosen.kind].carry_out(found)

    def tell_others(self) -> None:
        """The message came to a worker that cannot do what waits: it may fit another one."""
        if "jobs" in self.attempts:
            claims.tell_train_workers(self.key)


def whole_here() -> Capacity:
    """All of this machine that this worker may use."""
    return placement.capacity_of(heartbeats.machine_name(), this_machine())


def free_here() -> Capacity:
    """What is free of it now: GPUs that nobody has leased, and memory that no job on the CPU asked for."""
    whole = whole_here()
    try:
        taken = residency.room_asked(cuda=False)
    except redis.RedisError:
        taken = 0
    return replace(whole, cards=placement.kinds_of(gpu_lease.free_gpus()), memory_bytes=max(0, whole.memory_bytes - taken))


def beside_here() -> Capacity:
    """An evaluate worker takes any evaluation: whether there is room beside what trains is looked at when it claims one."""
    return Capacity(heartbeats.machine_name())
