"""The bodies of the Celery tasks, thin: each takes one id and calls the module that does the work."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from typing import Any

from app.kit import tracing
from app.queue import (
    DISTILL,
    EVALUATE,
    EXAMINE,
    EXPORT,
    FETCH,
    GENERATE,
    INSPECT,
    MAIL,
    PREDICT,
    PROMPT,
    READ,
    SEARCH,
    TRACK,
    TRAIN,
    WEBHOOK,
    celery,
)


def _never() -> bool:
    return False


going_down: Callable[[], bool] = _never
"""Whether this worker was asked to leave; `worker.main` sets its own here."""


def looks_at(name: str) -> Callable[[Callable[[str], None]], Any]:
    """A task whose message says "look at this id". What it logs has the id, and that of the request it comes from."""

    def register(body: Callable[[str], None]) -> Any:
        @functools.wraps(body)
        def run(task: Any, key: str) -> None:
            message = (task.request.headers or {}).get("luthier") or getattr(task.request, "luthier", None)
            with tracing.work(name, message, key=key):
                body(key)

        return celery.task(name=name, bind=True)(run)

    return register


def takes_a_turn(name: str) -> Any:
    """A task whose message says that there is work for a train or an evaluate worker: what is next then is done, whatever the message
    names."""

    def run(task: Any, key: str) -> None:
        from worker import launchers

        message = (task.request.headers or {}).get("luthier") or getattr(task.request, "luthier", None)
        launchers.current().turn(uuid.UUID(key), message, lambda: going_down(), list(task.app.amqp.queues.consume_from))

    return celery.task(name=name, bind=True)(run)


train = takes_a_turn(TRAIN)
evaluate = takes_a_turn(EVALUATE)


@looks_at(READ)
def read(key: str) -> None:
    from app.datasets import ingest_task
    from app.db import transaction
    from app.jobs import service as jobs

    ingest_task.read(uuid.UUID(key))
    with transaction() as session:
        jobs.resolve_waiting_jobs(session, uuid.UUID(key))  # jobs that waited for it


@looks_at(FETCH)
def fetch(key: str) -> None:
    from app.models import imports as model_imports

    model_imports.fetch(uuid.UUID(key))


@looks_at(EXAMINE)
def examine(key: str) -> None:
    from app.db import transaction
    from app.jobs import service as jobs
    from app.models import imports as model_imports

    model_imports.examine(uuid.UUID(key))
    with transaction() as session:
        jobs.cancel_without_model(session)


@looks_at(INSPECT)
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


@looks_at(PROMPT)
def prompt(key: str) -> None:
    from worker.evaluation import prompt_runs

    prompt_runs.begin(uuid.UUID(key), lambda: going_down())


@looks_at(DISTILL)
def distill(key: str) -> None:
    from worker.evaluation import distillations

    distillations.begin(uuid.UUID(key), lambda: going_down())


@looks_at(PREDICT)
def predict(key: str) -> None:
    from worker.evaluation import attempt

    attempt.begin(uuid.UUID(key), lambda: going_down())


@looks_at(EXPORT)
def export(key: str) -> None:
    from app.models import exports

    exports.run(uuid.UUID(key), lambda: going_down())


@looks_at(MAIL)
def mail(key: str) -> None:
    from app.jobs import mail as messages

    messages.send(uuid.UUID(key))


@looks_at(WEBHOOK)
def webhook(key: str) -> None:
    from app.webhooks import delivery

    delivery.send(uuid.UUID(key))


@looks_at(TRACK)
def track(key: str) -> None:
    from app.tracking import sending

    sending.send(uuid.UUID(key))


@looks_at(SEARCH)
def search(key: str) -> None:
    from app.db import transaction
    from app.searches import service as searches

    with transaction() as session:
        searches.advance(session, uuid.UUID(key))
