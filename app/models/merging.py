"""The merged form of an adapter: a model of its own, with plain weights."""

from __future__ import annotations

import uuid

from sqlalchemy.orm import Session

from app.errors import Conflict
from app.languages import gettext
from app.models import service as models
from app.models.imports import order
from app.strategies import STRATEGIES
from app.tables import Model, User


def merged_id(model: Model) -> uuid.UUID:
    """The id of the merged form of an adapter: derived from the adapter's, so that merging is idempotent."""
    return uuid.uuid5(model.id, f"merged:{model.adapter_sha256}")


def can_merge(session: Session, model: Model) -> bool:
    """Whether every adapter in the lineage can be merged into the weights."""
    parts = [part for part in models.lineage(session, model) if part.adapter]
    return model.adapter and all(part.strategy in STRATEGIES and STRATEGIES[part.strategy].merges for part in parts)


def merge(session: Session, user: User, model: Model) -> Model:
    """Request the merged form of an adapter: plain weights that need no peft. Done by the task FETCH.

    Raises Conflict for a whole model, and for a strategy whose result cannot be merged into the weights.
    """
    if not can_merge(session, model):
        raise Conflict(
            gettext("%(model)s cannot be merged.", model=model.name),
            hint=gettext(
                "A whole model needs no merging; a strategy that adds layers or prompts of its own cannot be folded into the weights."
            ),
            param="model",
        )
    ref = models.reference(session, model)
    merged = session.get(Model, merged_id(model), with_for_update=True)
    if merged is not None and merged.deleted_at is None and merged.status in ("ready", "fetching"):
        return merged
    if merged is None:
        merged = Model(
            id=merged_id(model),
            owner_id=user.id,
            project_id=user.project_id,
            name=f"{model.name}:merged",
            base_id=model.id,
            strategy=model.strategy,
        )
        session.add(merged)
    merged.title, merged.kind, merged.license, merged.labels = f"{model.title}, merged"[:120], model.kind, model.license, model.labels
    merged.shape, merged.deleted_at, merged.path = model.shape, None, None
    merged.source = {"from": "merge", "model": model.name, "ref": ref.model_dump(mode="json")}
    return order(session, merged)
