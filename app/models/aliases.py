"""Aliases: names that a person chose for models. `model=` takes one wherever it takes a model's name, and it can be pointed to
another model at any time: a request uses the model that its alias points to when it arrives. Each move is kept, and can be undone.
Whether one is allowed where the alias has a gate is decided before, by `app.evaluation.gates`.

An alias and a model cannot have the same name. Should two concurrent requests create both, the model's own name wins.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from typing import Any, NamedTuple

from sqlalchemy import Select, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.errors import Conflict, Forbidden, NotFound
from app.kit import ids
from app.kit.json_safe import storable
from app.languages import gettext
from app.models import imports, starters
from app.models import service as models
from app.tables import JSON, AliasMove, Model, ModelAlias, ProjectMember, User


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


def get(session: Session, user: User, name: str) -> AliasTarget:
    """Raises NotFound."""
    if (found := find(session, user, name)) is None:
        raise NotFound(
            gettext("No such alias: %(name)s.", name=repr(name[:120])), hint=gettext("GET /v1/model_aliases lists yours."), param="alias"
        )
    return found


def find(session: Session, user: User, name: str, *, lock: bool = False) -> AliasTarget | None:
    """An alias as it is in the database now; with `lock` nobody else moves it before this transaction ends."""
    query = select(ModelAlias).where(ModelAlias.project_id == user.project_id, ModelAlias.name == name.replace("\0", ""))
    query = query.with_for_update() if lock else query
    alias = session.scalar(query.execution_options(populate_existing=True))
    return None if alias is None else AliasTarget(alias, session.get_one(Model, alias.model_id))


def set_(
    session: Session, user: User, name: str, model_name: str, how: str = "set", reason: str | None = None, result: JSON | None = None
) -> AliasTarget:
    """Point an alias to a model, whether it is new or pointed to another one, and keep the move.

    Raises BadField for a name that no model could have, Conflict for the name of a model and for a model that is not ready, and
    NotFound as `models.get` does.
    """
    imports.good_name(name, param="alias")
    if name in starters.STARTERS or imports.is_a_model(session, name, user.project_id):
        raise Conflict(
            gettext("%(name)s is the name of a model.", name=name), hint=gettext("Choose another name for the alias."), param="alias"
        )
    model = models.get(session, user, model_name)
    session.refresh(model, with_for_update={"read": True})  # locked, so that it is not deleted meanwhile
    models.reference(session, model)  # raises where its weights are not available
    earlier = find(session, user, name, lock=True)
    order = insert(ModelAlias).values(owner_id=user.id, project_id=user.project_id, name=name, model_id=model.id)
    moved = {"model_id": model.id, "moved_at": func.clock_timestamp()}
    session.execute(order.on_conflict_do_update(index_elements=["project_id", "name"], set_=moved))
    if earlier is None or earlier.model.id != model.id:
        told = {"how": how, "reason": storable(reason), "result": storable(result)}
        _keep_move(session, user, name, earlier.model if earlier else None, model, told)
    return AliasTarget(session.get_one(ModelAlias, (user.project_id, name), populate_existing=True), model)


def _keep_move(session: Session, user: User, name: str, earlier: Model | None, model: Model, told: JSON) -> None:
    names: dict[str, Any] = {"from_id": earlier.id, "from_name": earlier.name} if earlier else {}
    names |= {"to_id": model.id, "to_name": model.name, "user_name": user.name}
    session.add(AliasMove(id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, alias=name, **names, **told))
    session.flush()


def remove(session: Session, user: User, name: str) -> None:
    """Delete an alias, and the history of its moves. Raises NotFound, and Forbidden where it has a gate that this person may not lift."""
    found = get(session, user, name)
    if found.alias.gate:
        check_may_override(session, user, found.alias)
    session.execute(delete(AliasMove).where(AliasMove.project_id == user.project_id, AliasMove.alias == found.alias.name))
    session.execute(delete(ModelAlias).where(ModelAlias.project_id == user.project_id, ModelAlias.name == found.alias.name))


# The gate and the way back ----------------------------------------------------------------------------------------------


def may_override(session: Session, user: User, alias: ModelAlias) -> bool:
    """Whether a person may change an alias's gate, or move the alias past it: who chose the name, and admins."""
    if user.role == "admin" or alias.owner_id == user.id:
        return True
    member = session.get(ProjectMember, (user.project_id, user.id))
    return member is not None and member.role == "admin"


def check_may_override(session: Session, user: User, alias: ModelAlias) -> None:
    """Raises Forbidden."""
    if not may_override(session, user, alias):
        raise Forbidden(
            gettext(
                "The gate of %(alias)s is changed, removed and passed by force only by the person who created the alias, and by admins.",
                alias=alias.name,
            ),
            hint=gettext("Ask one of them."),
            code="insufficient_permissions",
        )


def moves(user: User, name: str) -> Select[AliasMove]:
    return select(AliasMove).where(AliasMove.project_id == user.project_id, AliasMove.alias == name.replace("\0", ""))


def undoable(session: Session, user: User, name: str) -> AliasMove | None:
    """The move that going back undoes: the last one that was not undone yet. None where there is none."""
    done: list[AliasMove] = []
    for move in session.scalars(moves(user, name).order_by(AliasMove.created_at, AliasMove.id)):
        if move.how == "back":
            del done[-1:]
        elif move.from_name is not None:
            done.append(move)
    return done[-1] if done else None


def go_back(session: Session, user: User, name: str, reason: str | None = None) -> AliasTarget:
    """Point an alias to the model before, without asking its gate. Raises NotFound, and Conflict where there is none any more."""
    get(session, user, name)
    find(session, user, name, lock=True)
    move = undoable(session, user, name)
    if move is None:
        raise Conflict(
            gettext("%(name)s has always pointed to this model.", name=name), hint=gettext("Point it to another one."), param="alias"
        )
    earlier = session.get(Model, move.from_id) if move.from_id else None
    if earlier is None or earlier.deleted_at is not None:
        raise Conflict(
            gettext("%(model)s, to which %(name)s pointed before, was deleted.", model=move.from_name, name=name),
            hint=gettext("Point it to another model."),
            param="alias",
        )
    return set_(session, user, name, ids.public(ids.MODEL, earlier.id), "back", reason)


def to_json(named: AliasTarget) -> JSON:
    alias, model = named
    return {
        "id": alias.name,
        "object": "model.alias",
        "model": model.name,
        "gate": alias.gate,
        "created_at": int(alias.created_at.timestamp()),
        "moved_at": int(alias.moved_at.timestamp()),
    }


def move_json(move: AliasMove) -> JSON:
    return {
        "id": ids.public(ids.ALIAS_MOVE, move.id),
        "object": "model.alias.move",
        "alias": move.alias,
        "from": move.from_name,
        "to": move.to_name,
        "how": move.how,
        "by": move.user_name,
        "reason": move.reason,
        "result": move.result,
        "created_at": int(move.created_at.timestamp()),
    }
