"""Aliases: names that a person chose for models. `model=` takes one wherever it takes a model's name, and it can be pointed to
another model at any time: a request uses the model that its alias points to when it arrives.

An alias and a model cannot have the same name. Should two concurrent requests create both, the model's own name wins.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from typing import NamedTuple

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.errors import Conflict, NotFound
from app.models import imports, starters
from app.models import service as models
from app.tables import JSON, Model, ModelAlias, User


class AliasTarget(NamedTuple):
    """An alias, and the model that it points to."""

    alias: ModelAlias
    model: Model


def list_(session: Session, user: User) -> list[AliasTarget]:
    """A person's aliases, by name."""
    query = select(ModelAlias, Model).join(Model, ModelAlias.model_id == Model.id).where(ModelAlias.project_id == user.project_id)
    return [AliasTarget(alias, model) for alias, model in session.execute(query.order_by(ModelAlias.name))]


def of_models(session: Session, user: User) -> dict[uuid.UUID, list[str]]:
    """The names of a person's aliases by the id of their model."""
    found: dict[uuid.UUID, list[str]] = defaultdict(list)
    for alias, model in list_(session, user):
        found[model.id].append(alias.name)
    return found


def set_(session: Session, user: User, name: str, model_name: str) -> AliasTarget:
    """Point an alias to a model, whether it is new or pointed to another one.

    Raises BadField for a name that no model could have, Conflict for the name of a model and for a model that is not ready, and
    NotFound as `models.get` does.
    """
    imports.good_name(name, param="alias")
    if name in starters.STARTERS or imports.is_a_model(session, name, user.project_id):
        raise Conflict(f"{name} is the name of a model.", hint="Choose another name for the alias.", param="alias")
    model = models.get(session, user, model_name)
    session.refresh(model, with_for_update={"read": True})  # locked, so that it is not deleted meanwhile
    models.reference(session, model)  # raises where its weights are not available
    order = insert(ModelAlias).values(owner_id=user.id, project_id=user.project_id, name=name, model_id=model.id)
    moved = {"model_id": model.id, "moved_at": func.clock_timestamp()}
    session.execute(order.on_conflict_do_update(index_elements=["project_id", "name"], set_=moved))
    return AliasTarget(session.get_one(ModelAlias, (user.project_id, name), populate_existing=True), model)


def remove(session: Session, user: User, name: str) -> None:
    """Delete an alias. Raises NotFound."""
    gone = session.execute(delete(ModelAlias).where(ModelAlias.project_id == user.project_id, ModelAlias.name == name.replace("\0", "")))
    if not gone.rowcount:  # type: ignore[attr-defined]
        raise NotFound(f"No such alias: {name[:120]!r}.", hint="GET /v1/model_aliases lists yours.", param="alias")


def to_json(named: AliasTarget) -> JSON:
    alias, model = named
    return {
        "id": alias.name,
        "object": "model.alias",
        "model": model.name,
        "created_at": int(alias.created_at.timestamp()),
        "moved_at": int(alias.moved_at.timestamp()),
    }
