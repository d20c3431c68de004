"""A worker's turn: it claims what `app.evaluation.train_queue` says is next, and does it.

A train worker takes jobs and evaluations, in one order. An evaluate worker takes evaluations alone, those that have room beside what
trains: a short one then does not wait until a long job ends.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Container, Mapping
from typing import Any

from app.db import transaction
from app.evaluation import train_queue
from app.jobs.fair_share import Waiting
from app.kit import ids, tracing
from app.queue import EVALUATE, ROUTES, TRAIN
from worker.evaluation import attempt
from worker.supervision import train_attempt
from worker.supervision.train_attempt import ClaimOutcome
from worker.supervision.train_attempt import _retry_until_database as retry_until_database

Attempts = Mapping[str, Callable[[uuid.UUID, Callable[[], bool]], ClaimOutcome]]
TRAIN_WORKER: Attempts = {"jobs": train_attempt.work, "evaluations": attempt.work}
EVALUATE_WORKER: Attempts = {"evaluations": attempt.work_beside_training}
"""What each kind of worker takes, by its table, and how."""


def attempts_of(queues: Container[str]) -> Attempts:
    """What a worker that reads these queues takes."""
    return EVALUATE_WORKER if ROUTES[EVALUATE] in queues and ROUTES[TRAIN] not in queues else TRAIN_WORKER


def take(key: uuid.UUID, message: Mapping[str, Any] | None, going_down: Callable[[], bool], attempts: Attempts = TRAIN_WORKER) -> None:
    """One turn, for a message that named `key`. What another worker claimed meanwhile is passed over, and so is what needs a GPU while
    none is free, or room that what trains does not leave. What is left waiting is announced again by the reaper."""
    tried: set[uuid.UUID] = set()
    gpu = True
    while not going_down() and (found := retry_until_database(functools.partial(_next, tried, attempts, gpu=gpu))) is not None:
        one, context = found
        tried.add(one.key)
        outcome = _attempt(attempts, one, message if one.key == key else context, going_down)
        gpu = gpu and outcome is not ClaimOutcome.NO_GPU
        if outcome is ClaimOutcome.DONE:
            return


def _next(tried: set[uuid.UUID], kinds: Container[str], *, gpu: bool) -> tuple[Waiting, Mapping[str, Any] | None] | None:
    with transaction() as session:
        one = train_queue.next_one(session, tried, gpu=gpu, kinds=kinds)
        return None if one is None else (one, train_queue.message_of(session, one.key))


def _attempt(attempts: Attempts, one: Waiting, message: Mapping[str, Any] | None, going_down: Callable[[], bool]) -> ClaimOutcome:
    """With the ids of the request that this work comes from in every log line."""
    work = train_queue.WORK[one.kind]
    job = ids.public(ids.JOB, one.key) if one.kind == "jobs" else None
    with tracing.work(work.task or one.kind, message, job_id=job, key=None if job else str(one.key)):
        return attempts[one.kind](one.key, going_down)
