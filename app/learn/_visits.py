"""A person's visits to the stops, and the models that a stop takes where the person names none."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.errors import Conflict
from app.kit.json_safe import storable
from app.languages import SOURCE, current, english, gettext
from app.learn._base import Need, StartedStop, Stop, StopResult
from app.models import first_model, from_nothing, starters
from app.models import service as models
from app.ownership import mine, owned
from app.tables import Model, StopVisit, User

ENCODER = "all-minilm-l6-v2"
STARTERS: dict[Need, str] = {"writes": first_model.FIRST, "encoder": ENCODER}
"""The starter that is offered where no model of a kind is there."""


def bases(session: Session, user: User) -> list[Model]:
    """Models that are ready, were not fine-tuned here and are no random weights."""
    found = [m for m in models.offered(session, user) if m.status == "ready" and m.base_id is None and m.job_id is None]
    return [m for m in found if not from_nothing.is_blank(m)]


def model_for(need: Need, found: Sequence[Model]) -> Model | None:
    """The starter of a kind, or the first model that can take its place."""
    kinds = ("encoder",) if need == "encoder" else ("dialogue", "instruction", "generic")
    fitting = sorted((m for m in found if m.kind in kinds), key=lambda m: kinds.index(m.kind))
    return next((m for m in fitting if m.name == STARTERS[need]), None) or next(iter(fitting), None)


def take_model(session: Session, user: User, need: Need) -> Model:
    """The same. Raises Conflict where there is none."""
    found = model_for(need, bases(session, user))
    if found is None:
        title = starters.find(STARTERS[need]).title
        raise Conflict(
            gettext("This stop needs a model such as %(model)s.", model=title),
            hint=gettext("Add it on the page Models."),
            param="model",
            code="no_model",
        )
    return found


def missing(session: Session, user: User, stop: Stop) -> list[tuple[str, str, bool]]:
    """(name, title, whether it is being downloaded) of the starters that a stop lacks."""
    found = bases(session, user)
    lacking = [STARTERS[need] for need in stop.needs if model_for(need, found) is None]
    coming = {m.name for m in models.offered(session, user) if m.status == "fetching"}
    return [(name, starters.find(name).title, name in coming) for name in lacking]


def newest(session: Session, user: User, stop: str, limit: int = 6) -> list[StopVisit]:
    """This person's visits of a stop in the project, newest first."""
    query = mine(StopVisit, user).where(StopVisit.owner_id == user.id, StopVisit.stop == stop)
    return list(session.scalars(query.order_by(StopVisit.created_at.desc()).limit(limit)))


def done(session: Session, user: User) -> dict[str, StopVisit]:
    """The newest visit that came to its end, of each stop."""
    query = mine(StopVisit, user).where(StopVisit.owner_id == user.id, StopVisit.done_at.is_not(None)).order_by(StopVisit.created_at)
    return {visit.stop: visit for visit in session.scalars(query)}


def get(session: Session, user: User, key: uuid.UUID, stop: str) -> StopVisit:
    """A visit of this person. Raises NotFound, also for another person's."""
    return owned(session, StopVisit, user, key, StopVisit.owner_id == user.id, StopVisit.stop == stop)


def add(session: Session, user: User, stop: Stop, begun: StartedStop) -> StopVisit:
    visit = StopVisit(
        owner_id=user.id,
        project_id=user.project_id,
        stop=stop.name,
        refs=storable(begun.refs),
        **({"created_at": begun.at} if begun.at else {}),
    )
    session.add(visit)
    session.flush()
    session.refresh(visit)
    return visit


def settle(session: Session, user: User, stop: Stop, visit: StopVisit, result: StopResult) -> None:
    """Keep the headline of a visit that has ended, in English."""
    if result.ended and visit.done_at is None:
        kept = result.headline
        if current.get() != SOURCE:
            with english():
                kept = stop.look(session, user, visit).headline
        visit.headline, visit.done_at = kept, session.scalar(select(func.clock_timestamp()))
        session.flush()


def headline(session: Session, user: User, stop: Stop, visit: StopVisit) -> str:
    """The headline of a visit that has ended, in the reader's language: read anew from what was started, or as it was kept where that is gone."""
    if visit.headline is None or current.get() == SOURCE:
        return visit.headline or ""
    return stop.look(session, user, visit).headline or visit.headline
