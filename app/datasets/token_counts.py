"""Counts a dataset's tokens after it was parsed: a studio's first datasets are often there before its first model.

The reaper enqueues it by the same message as parsing; `count` takes it when there is nothing to parse.
"""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from app import db, leases, objectives, queue
from app.datasets import inspections
from app.kit import sandbox
from app.objectives import OBJECTIVES
from app.settings import get_settings
from app.storage import places
from app.tables import Dataset, Model

SECONDS = 590
"""Time limit of a count."""


def counting_model(session: Session, task: str | None = None) -> Model | None:
    """The model whose tokenizer counts: the oldest base that is ready, which is the starter model. Texts with a label are counted
    as the oldest encoder reads them, where there is one."""
    query = select(Model).where(Model.status == "ready", Model.base_id.is_(None), Model.path.is_not(None), Model.deleted_at.is_(None))
    able = [
        model
        for model in session.scalars(query.where(Model.kind.not_in(("classifier", "reward"))).order_by(Model.created_at))
        if model.path and places.exists(f"{model.path}/tokenizer.json")
    ]
    encoders, writers = ([model for model in able if (model.kind == "encoder") == wanted] for wanted in (True, False))
    return next(iter([*encoders, *writers] if objectives.get(task).classifies else writers), None)


def counters(session: Session) -> dict[str, dict[str, Any]]:
    """For each task that a model can count for: what a child needs to count with it (`inspections.counting`), and its id."""
    models = {task: counting_model(session, task) for task in OBJECTIVES}
    return {task: {"model": str(model.id), **inspections.counting(session, model)} for task, model in models.items() if model is not None}


def _uncounted() -> ColumnElement[bool]:
    """Neither counted nor failed to be."""
    return Dataset.counted.is_(False)


def _died(session: Session, dataset: Dataset, how: str) -> None:
    """Count again, or leave it uncounted: the data is valid, and estimates use its characters."""
    if not leases.requeue(session, WORK, dataset, died=True):
        dataset.report = (dataset.report or {}) | {"uncountable": f"The worker that counted {how} That was death {dataset.deaths}."}


WORK = leases.Work(Dataset, queue.READ, waits_as="ready", runs_as="ready", since=Dataset.created_at, on_death=_died, due=_uncounted())


def reap(session: Session) -> dict[str, int]:
    """Enqueue counts whose worker died, and those that can be made now."""
    lapsed = leases.expire(session, WORK)
    if session.scalar(select(Dataset.id).where(WORK.free()).limit(1)) is None:
        return {"lapsed": lapsed, "announced": 0}
    able = [task for task in OBJECTIVES if counting_model(session, task) is not None]
    return {"lapsed": lapsed, "announced": leases.redeliver(session, WORK, Dataset.task.in_(able))}


def count(dataset_id: uuid.UUID) -> None:
    """Count one dataset's tokens in a limited child, unless that is done or being done."""
    with db.transaction() as session:
        model = counting_model(session, session.scalar(select(Dataset.task).where(Dataset.id == dataset_id)))
        if model is None:
            return
        claimed = leases.claim(session, WORK, dataset_id)
        if claimed is None:
            return
        payload = {"rows": str(places.path(str(claimed.rows_path))), "task": claimed.task, **inspections.counting(session, model)}
    limits = sandbox.Limits(seconds=SECONDS, cpu_seconds=2 * SECONDS)
    said: list[dict[str, Any]] = []
    counted, fault = None, ""
    try:
        counted = sandbox.run(
            inspections.FUNCTIONS["lengths"],
            payload,
            limits,
            folder=get_settings().folder("tmp"),
            read=[payload["rows"], payload["tokenizer"]],
            on_message=lambda message: said.append(message["finding"]) if "finding" in message else None,
            keep_going=leases.Beat(WORK, dataset_id, claimed.fence),
        )
    except (sandbox.Killed, sandbox.Refused) as error:
        fault = str(error)[:500]  # the data is valid: estimates use its characters
    with db.transaction() as session:
        dataset = leases.lock_if_held(session, WORK, dataset_id, claimed.fence)
        if dataset is None:
            return
        dataset.lease_until, dataset.deaths = None, 0
        if counted is None:
            dataset.report = (dataset.report or {}) | {"uncountable": fault}
            return
        inspections.add_to_report(session, dataset, counted, said)
        if model is not None:
            inspections.keep_lengths(session, dataset, model, counted)
