"""What still needs a model, which therefore cannot be deleted."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import exists, func, literal, select, text, union_all
from sqlalchemy.orm import Session

from app.kit.states import state_word
from app.languages import gettext, mark
from app.tables import DistillationRun, Evaluation, Export, Job, Model, ModelAlias

NAMED = 10
"""Of each kind of thing that needs a model so many are named."""


class Dependants(NamedTuple):
    """Why a model cannot be deleted, a sentence each, and how many further reasons there are."""

    reasons: list[str]
    more: int


def dependants(session: Session, model: Model) -> Dependants:
    """Jobs that still need the model, adapters on its weights, its aliases."""
    running = ("queued", "running")
    jobs = select(Job.name, Job.status).where(Job.deleted_at.is_(None), Job.status.in_((*running, "paused")))
    one = select(literal("").label("name"), literal("").label("status"))
    evaluation = exists().where(Evaluation.model_id == model.id, Evaluation.deleted_at.is_(None), Evaluation.status.in_(running))
    distillation = exists().where(DistillationRun.model_id == model.id, DistillationRun.status.in_(running))
    export = exists().where(Export.model_id == model.id, Export.deleted_at.is_(None), Export.status.in_(running))
    adapters = select(Model.name, literal("")).where(Model.base_id == model.id, Model.adapter, Model.deleted_at.is_(None))
    aliases = select(ModelAlias.name, literal("")).where(ModelAlias.model_id == model.id)
    needs = (
        (mark("The job “%(job)s” is %(status)s and fine-tunes it."), jobs.where(Job.model_id == model.id)),
        (mark("A grader of the job “%(job)s” asks it."), jobs.where(Job.spec["judges"].contains([{"model": {"id": str(model.id)}}]))),
        (mark("The job “%(job)s” distills it."), jobs.where(Job.spec["teacher"]["id"].astext == str(model.id))),
        (mark("An evaluation of it has not ended."), one.where(evaluation)),
        (mark("A distillation of it has not ended."), one.where(distillation)),
        (mark("An export of it has not ended."), one.where(export)),
        (mark("The fine-tuned model %(model)s is an adapter on its weights."), adapters),
        (mark("The alias %(alias)s points to it."), aliases),
    )
    parts = [
        some.add_columns(literal(place).label("place"), func.count().over().label("all")).order_by(text("1")).limit(NAMED).subquery()
        for place, (_, some) in enumerate(needs)
    ]
    found = session.execute(union_all(*(select(part) for part in parts))).all()
    told = [
        gettext(needs[place][0], job=name, model=name, alias=name, status=state_word(status) if status else "")
        for name, status, place, _ in sorted(found, key=lambda row: (row[2], row[0]))
    ]
    return Dependants(told[:NAMED], sum({row[2]: row[3] for row in found}.values()) - len(told[:NAMED]))
