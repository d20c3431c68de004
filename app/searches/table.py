"""A search as the API and its page show it."""

from __future__ import annotations

import uuid
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.evaluation.comparison_table import score_columns
from app.kit import ids
from app.languages import gettext
from app.searches import halving, service, space, trials
from app.searches.space import SearchOrder
from app.searches.trials import TrialJob
from app.tables import JSON, Comparison, Model, User

Status = Literal["queued", "running", "waiting", "pruned", "stopped", "succeeded", "failed", "cancelled"]


def to_json(session: Session, search: Comparison) -> JSON:
    """A `search` of `/v1/searches`."""
    found, state, order = trials.read(session, search), service.state_of(search), service.order_of(search)
    score = score_columns(found[0].job.spec["task"] if found else "generation")[0]
    tuned = _tuned(session, found)
    return {
        "id": ids.public(ids.SEARCH, search.id),
        "object": "search",
        "created_at": int(search.created_at.timestamp()),
        "ended_at": state.get("ended_at"),
        "name": search.name,
        "status": state["status"],
        "model": order.model,
        "order": _asked(search.order),
        "score": {"key": score.key, "title": score.title, "less": score.less},
        "trials": service.wanted(search, found),
        "seconds": round(sum(one.seconds for one in found), 1),
        "minutes": order.minutes,
        "data": [_entry(one, tuned) for one in found],
        "winner": state.get("winner"),
        "best": state.get("best"),
        "says": gettext(state.get("why") or state.get("waits") or "") or None,
        "refused": search.refused,
    }


def _asked(order: JSON) -> JSON:
    """The request with public ids."""
    keys = {name: ids.public(ids.DATASET, uuid.UUID(order[name])) for name in ("dataset_id", "validation_dataset_id") if order.get(name)}
    return order | keys


def plan_json(session: Session, user: User, asked: SearchOrder) -> JSON:
    """What a search would try, and its time."""
    found, methods = service.plan(session, user, asked)
    run = service.mean_seconds(methods)
    limit = asked.minutes * 60 if asked.minutes else None
    first = space.first_level(methods)
    count = halving.affordable(halving.Budget(0.0, run, limit, first), asked.trials)
    return {
        "object": "search.plan",
        "trials": count,
        "rungs": halving.going(count, first),
        "epochs": space.epochs_of(asked, methods),
        "seconds": halving.halved_cost(count, run, first) + run,
        "refused": found.refused,
    }


def _tuned(session: Session, found: list[TrialJob]) -> dict[object, tuple[str, bool]]:
    query = select(Model.job_id, Model.name, Model.kept).where(Model.job_id.in_([one.job.id for one in found]))
    return {key: (name, kept) for key, name, kept in session.execute(query.where(Model.step.is_(None), Model.deleted_at.is_(None)))}


def _entry(one: TrialJob, tuned: dict[object, tuple[str, bool]]) -> JSON:
    job, facts, metric = one.job, one.job.trial or {}, trials.metric_of(one.job.spec["task"])
    level = max(one.trial.scores, default=0)
    model, kept = tuned.get(job.id, (None, None))
    return {
        "number": one.trial.number,
        "job": ids.public(ids.JOB, job.id),
        "status": status_of(one),
        "repeats": one.trial.repeats,
        "title": facts["title"],
        "strategy": job.spec["strategy"]["name"],
        "params": {name: value for name, value in one.params.items() if name != "method"},
        "seed": job.spec["run"]["seed"],
        "step": job.step,
        "total_steps": job.total_steps,
        "rung": level,
        "score": trials.written(metric, one.trial.scores[level]) if level else None,
        "loss": one.trial.scores[level][1] if level else None,
        "scores": {str(rung): trials.written(metric, score) for rung, score in one.trial.scores.items()},
        "seconds": round(one.seconds, 1),
        "reason": gettext(facts.get("out") or "") or ((job.error or {}).get("message") if job.status == "failed" else None),
        "model": model,
        "kept": kept,
    }


def status_of(one: TrialJob) -> Status:
    facts = one.job.trial or {}
    if facts.get("out"):
        return "pruned" if facts.get("pruned") else "stopped"
    if one.job.status == "paused":
        return "waiting" if one.trial.at else "stopped"
    found: Status = one.job.status  # type: ignore[assignment]
    return found
