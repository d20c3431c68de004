"""The bodies of the Celery tasks, thin: each takes one id and calls the module that does the work."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from app.queue import EVALUATE, EXAMINE, EXPORT, FETCH, GENERATE, INSPECT, PREDICT, PROMPT, READ, TRAIN, celery


def _never() -> bool:
    return False


going_down: Callable[[], bool] = _never
"""Whether this worker was asked to leave; `worker.main` sets its own here."""


@celery.task(name=TRAIN)
def train(key: str) -> None:
    from worker.supervision.train_attempt import work

    work(uuid.UUID(key), lambda: going_down())


@celery.task(name=EVALUATE)
def evaluate(key: str) -> None:
    from worker.evaluation.attempt import work

    work(uuid.UUID(key), lambda: going_down())


@celery.task(name=READ)
def read(key: str) -> None:
    from app.datasets import ingest_task
    from app.db import transaction
    from app.jobs import service as jobs

    ingest_task.read(uuid.UUID(key))
    with transaction() as session:
        jobs.resolve_waiting_jobs(session, uuid.UUID(key))  # jobs that waited for it


@celery.task(name=FETCH)
def fetch(key: str) -> None:
    from app.models import imports as model_imports

    model_imports.fetch(uuid.UUID(key))


@celery.task(name=EXAMINE)
def examine(key: str) -> None:
    from app.db import transaction
    from app.jobs import service as jobs
    from app.models import imports as model_imports

    model_imports.examine(uuid.UUID(key))
    with transaction() as session:
        jobs.cancel_without_model(session)


@celery.task(name=INSPECT)
def inspect(key: str) -> None:
    from app.datasets import inspections
    from app.db import transaction
    from app.jobs import split_leakage

    inspections.answer(uuid.UUID(key))
    with transaction() as session:
        split_leakage.resolve_waiting(session)


@celery.task(name=GENERATE)
def generate(request: dict[str, Any]) -> None:
    from worker.inference import task as engine

    engine.generate(request)


@celery.task(name=PROMPT)
def prompt(key: str) -> None:
    from worker.evaluation import prompt_runs

    prompt_runs.begin(uuid.UUID(key), lambda: going_down())


@celery.task(name=PREDICT)
def predict(key: str) -> None:
    from worker.evaluation import attempt

    attempt.begin(uuid.UUID(key), lambda: going_down())


@celery.task(name=EXPORT)
def export(key: str) -> None:
    from app.models import exports

    exports.run(uuid.UUID(key), lambda: going_down())
