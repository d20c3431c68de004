"""Counting a dataset's tokens after it was read: a studio's first datasets are often there before its first model.

The reaper orders it by the same message that orders reading; `count` takes it when there is nothing to read.
"""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from app import db, queue
from app.datasets import inspections
from app.kit import sandbox
from app.settings import get_settings
from app.tables import Dataset, Model, Outbox

SECONDS = 600
"""How long a count may hold its lease; it tells no progress."""


TASKS = ("generation", "preference", "classification")


def counting_model(session: Session, task: str = "generation") -> Model | None:
    """The model whose tokenizer counts: the oldest base that is ready, which is the starter model. Texts with a label are counted
    as the oldest encoder reads them, where there is one."""
    query = select(Model).where(Model.status == "ready", Model.base_id.is_(None), Model.path.is_not(None), Model.deleted_at.is_(None))
    able = [
        model
        for model in session.scalars(query.where(Model.kind != "classifier").order_by(Model.created_at))
        if model.path and (get_settings().data_dir / model.path / "tokenizer.json").exists()
    ]
    encoders, writers = ([model for model in able if (model.kind == "encoder") == wanted] for wanted in (True, False))
    return next(iter([*encoders, *writers] if task == "classification" else writers), None)


def counters(session: Session) -> dict[str, dict[str, Any]]:
    """For each task that a model can count for: what a child needs to count with it (`inspections.counting`), and its id."""
    models = {task: counting_model(session, task) for task in TASKS}
    return {task: {"model": str(model.id), **inspections.counting(session, model)} for task, model in models.items() if model is not None}


def _uncounted() -> ColumnElement[bool]:
    """Ready, and neither counted nor tried in vain."""
    found: ColumnElement[bool] = (
        (Dataset.status == "ready")
        & Dataset.deleted_at.is_(None)
        & ~Dataset.report.has_key("tokens")
        & ~Dataset.report.has_key("uncountable")
    )
    return found


def _free() -> ColumnElement[bool]:
    return or_(Dataset.lease_until.is_(None), Dataset.lease_until < func.clock_timestamp())


def order(session: Session) -> int:
    """Order the counts that can be made now. Returns how many."""
    if session.scalar(select(Dataset.id).where(_uncounted(), _free()).limit(1)) is None:
        return 0
    able = [task for task in TASKS if counting_model(session, task) is not None]
    waiting = select(Dataset.id).where(_uncounted(), _free(), Dataset.task.in_(able))
    quiet = func.clock_timestamp() - timedelta(seconds=get_settings().announce_again_seconds)
    spoken_of = select(Outbox.id).where(
        Outbox.key == Dataset.id, Outbox.task == queue.READ, or_(Outbox.sent_at.is_(None), Outbox.sent_at > quiet)
    )
    found = session.scalars(waiting.where(~spoken_of.exists()).order_by(Dataset.created_at).limit(20)).all()
    for key in found:
        queue.enqueue(session, queue.READ, key)
    return len(found)


def count(dataset_id: uuid.UUID) -> None:
    """Count one dataset's tokens in a limited child, unless that is done or being done."""
    with db.transaction() as session:
        model = counting_model(session, session.scalar(select(Dataset.task).where(Dataset.id == dataset_id)) or "generation")
        if model is None:
            return
        claim = update(Dataset).where(Dataset.id == dataset_id, _uncounted(), _free())
        claim = claim.values(fence=Dataset.fence + 1, lease_until=func.clock_timestamp() + timedelta(seconds=SECONDS))
        claimed = session.execute(claim.returning(Dataset.fence, Dataset.rows_path, Dataset.task)).one_or_none()
        if claimed is None:
            return
        data = get_settings().data_dir
        payload = {"rows": str(data / claimed.rows_path), "task": claimed.task, **inspections.counting(session, model)}
    limits = sandbox.Limits(seconds=SECONDS - 10, cpu_seconds=2 * SECONDS)
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
        )
    except (sandbox.Killed, sandbox.Refused) as error:
        fault = str(error)[:500]  # the data is good all the same: estimates go by its characters
    with db.transaction() as session:
        held = select(Dataset).where(Dataset.id == dataset_id, Dataset.fence == claimed.fence, Dataset.deleted_at.is_(None))
        dataset = session.scalars(held.with_for_update()).one_or_none()
        if dataset is None:
            return
        dataset.lease_until = None
        if counted is None:
            dataset.report = (dataset.report or {}) | {"uncountable": fault}
            return
        inspections.add_to_report(session, dataset, counted, said)
        if model is not None:
            inspections.keep_lengths(session, dataset, model, counted)
