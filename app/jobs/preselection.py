"""The model and dataset a form begins with, where none was named: those used last, matched to each other's task."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from app import formats, objectives
from app.datasets.service import trainable
from app.kit import ids
from app.tables import Dataset, Job, Model, User

RECENT = 50
"""Jobs that are looked through for the pair used last."""


def pair(
    session: Session, user: User, models: Sequence[Model], datasets: Sequence[Dataset], model: str | None, dataset: str | None
) -> tuple[Model | None, Dataset | None]:
    """The named ones, None for an unknown name; the others as in the last job, else by suitability, among the models that are kept."""
    chosen = next((m for m in models if model in (m.name, ids.public(ids.MODEL, m.id))), None) if model else None
    data = next((d for d in datasets if ids.public(ids.DATASET, d.id) == dataset), None) if dataset else None
    if (model and chosen is None) or (dataset and data is None) or (chosen and data):
        return chosen or (None if model else next(iter(models), None)), data or (None if dataset else next(iter(datasets), None))
    models = [m for m in models if m.kept]
    for model_id, dataset_id in _recent(session, user):
        one = chosen or next((m for m in models if m.id == model_id), None)
        other = data or next((d for d in datasets if d.id == dataset_id), None)
        # A named one comes first: a job of another model or dataset is no guide.
        if one and other and (chosen is None or model_id == chosen.id) and (data is None or _alike(session, data, dataset_id)):
            return one, other
    able = [d for d in datasets if trainable(d)]
    data = data or next((d for d in able if chosen is None or _rank(chosen, d) < 9), next(iter([*able, *datasets]), None))
    return chosen or (min(models, key=lambda m: _rank(m, data)) if models else None), data


def _recent(session: Session, user: User) -> Sequence[Row[uuid.UUID, uuid.UUID]]:
    query = select(Job.model_id, Job.dataset_id).where(
        Job.project_id == user.project_id, Job.deleted_at.is_(None), Job.comparison_id.is_(None)
    )
    return session.execute(query.order_by(Job.created_at.desc(), Job.id.desc()).limit(RECENT)).all()


def _alike(session: Session, data: Dataset, dataset_id: object) -> bool:
    """Whether a model that was used with one dataset suits another."""
    other = session.get(Dataset, dataset_id)
    return other is not None and (other.task, formats.asks(other.format)) == (data.task, formats.asks(data.format))


def suits(model: Model, data: Dataset | None) -> bool:
    """Whether a model of its kind is usually trained on such data."""
    return _rank(model, data) < 9


def _rank(model: Model, data: Dataset | None) -> int:
    """The place of a model among those that suit the data: a base before what was made from it, 9 and more for the unsuited."""
    shape = formats.get(data.format) if data and data.format else None
    kinds = (shape and shape.model_kinds) or objectives.get(data.task if data else None).model_kinds
    if model.kind not in kinds:
        return 9
    return kinds.index(model.kind) + (4 if model.job_id else 0)
