"""Graders that are saved under a name in a project. What uses one copies it, so a change never changes what was ordered before."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from app import graders, ownership
from app.errors import BadField, NotFound
from app.graders import Grader
from app.kit import ids
from app.kit.json_safe import storable
from app.languages import gettext
from app.ownership import either, owned
from app.tables import JSON, SavedGrader, User

MAX_AT_ONCE = 8
"""Graders of one evaluation or job."""


def create(session: Session, user: User, grader: Grader) -> SavedGrader:
    made = SavedGrader(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, name=storable(grader.name), body=storable(graders.to_json(grader))
    )
    session.add(made)
    session.flush()
    session.refresh(made)
    return made


def change(session: Session, saved: SavedGrader, grader: Grader) -> SavedGrader:
    saved.name, saved.body, saved.updated_at = storable(grader.name), storable(graders.to_json(grader)), func.clock_timestamp()
    session.flush()
    session.refresh(saved)
    return saved


def mine(user: User) -> Select[SavedGrader]:
    return ownership.mine(SavedGrader, user)


_NEWEST = (SavedGrader.created_at.desc(), SavedGrader.id)
OFFERED = 80  # an older one is offered where a form names it


def newest(session: Session, user: User, limit: int) -> list[SavedGrader]:
    """Newest first."""
    return list(session.scalars(mine(user).order_by(*_NEWEST).limit(limit)))


def offered(session: Session, user: User, *typed: str | None) -> list[tuple[str, str]]:
    """(public id, name) of what a form offers, newest first: the newest, and those whose ids are among what was typed."""
    keys = [ids.parse_grader(text) for text in typed if text and re.fullmatch(r"grader-[0-9a-f]{32}", text)]
    last = mine(user).with_only_columns(SavedGrader.id).order_by(*_NEWEST).limit(OFFERED)
    named = select(SavedGrader.id).where(SavedGrader.id.in_(keys))
    found = mine(user).where(SavedGrader.id.in_(either(last, named))).with_only_columns(SavedGrader.id, SavedGrader.name)
    return [(ids.public(ids.GRADER, key), name) for key, name in session.execute(found.order_by(*_NEWEST))]


def get(session: Session, user: User, grader_id: uuid.UUID) -> SavedGrader:
    return owned(session, SavedGrader, user, grader_id)


def delete(session: Session, saved: SavedGrader) -> None:
    """It stays in what was ordered with it."""
    saved.deleted_at = func.clock_timestamp()
    session.flush()


def named(session: Session, user: User, given: Sequence[str | JSON], param: str = "graders") -> list[Grader]:
    """Graders by their ids, or as they are written in the request. Raises NotFound, and BadField for one that does not work, for too many,
    and for two of one name, whose results could not be told apart."""
    if len(given) > MAX_AT_ONCE:
        message = gettext("%(num)s graders were named; %(most)s is the most.", num=len(given), most=MAX_AT_ONCE)
        raise BadField(message, hint=gettext("Combine them, or measure twice."), param=param)
    found = []
    for place, one in enumerate(given):
        if isinstance(one, str):
            found.append(graders.parse(_saved(session, user, one, f"{param}.{place}").body))
        else:
            try:
                found.append(graders.read(one))
            except BadField as error:
                error.param = f"{param}.{place}{(error.param or '').removeprefix('grader')}"
                raise
    names = [grader.name for grader in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        message = gettext("Two graders are called %(name)s.", name=twice)
        raise BadField(message, hint=gettext("Give each a name of its own."), param=param)
    return found


def _saved(session: Session, user: User, public_id: str, param: str) -> SavedGrader:
    try:
        return get(session, user, ids.parse_grader(public_id))
    except NotFound as error:
        error.param = param
        raise


def to_json(saved: SavedGrader) -> dict[str, Any]:
    """A saved grader as the API returns it."""
    return {
        "id": ids.public(ids.GRADER, saved.id),
        "object": "grader",
        "name": saved.name,
        "grader": saved.body,
        "created_at": int(saved.created_at.timestamp()),
        "updated_at": int(saved.updated_at.timestamp()),
    }
