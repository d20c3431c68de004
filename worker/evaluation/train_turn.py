"""A train worker's turn: it claims what `app.evaluation.train_queue` says is next, a job or an evaluation, and does it."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from app.db import transaction
from app.evaluation import train_queue
from app.jobs.fair_share import Waiting
from app.kit import ids, tracing
from worker.evaluation import attempt
from worker.supervision import train_attempt
from worker.supervision.train_attempt import ClaimOutcome
from worker.supervision.train_attempt import _retry_until_database as retry_until_database

ATTEMPTS: dict[str, Callable[[uuid.UUID, Callable[[], bool]], ClaimOutcome]] = {"jobs": train_attempt.work, "evaluations": attempt.work}


def take(key: uuid.UUID, message: Mapping[str, Any] | None, going_down: Callable[[], bool]) -> None:
    """One turn, for a message that named `key`. What another worker claimed meanwhile is passed over, and while no GPU is free what
    needs one. What is left waiting is announced again by the reaper."""
    tried: set[uuid.UUID] = set()
    gpu = True
    while not going_down() and (found := retry_until_database(functools.partial(_next, tried, gpu=gpu))) is not None:
        one, context = found
        tried.add(one.key)
        outcome = _attempt(one, message if one.key == key else context, going_down)
        gpu = gpu and outcome is not ClaimOutcome.NO_GPU
        if outcome is ClaimOutcome.DONE:
            return


def _next(tried: set[uuid.UUID], *, gpu: bool) -> tuple[Waiting, Mapping[str, Any] | None] | None:
    with transaction() as session:
        one = train_queue.next_one(session, tried, gpu=gpu)
        return None if one is None else (one, train_queue.message_of(session, one.key))


def _attempt(one: Waiting, message: Mapping[str, Any] | None, going_down: Callable[[], bool]) -> ClaimOutcome:
    """With the ids of the request that this work comes from in every log line."""
    work = train_queue.WORK[one.kind]
    job = ids.public(ids.JOB, one.key) if one.kind == "jobs" else None
    with tracing.work(work.task, message, job_id=job, key=None if job else str(one.key)):
        return ATTEMPTS[one.kind](one.key, going_down)
