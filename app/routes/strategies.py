"""`GET /v1/strategies`: every strategy, its settings as JSON schema, and whether this machine and model support it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from app import schemas
from app.datasets import service as datasets
from app.db import Db
from app.evaluation import advice
from app.jobs import spec_builder
from app.kit import ids
from app.models import service as models
from app.objectives import Task
from app.planning import feasibility
from app.planning.advisor import Advice
from app.schemas.openapi import answers
from app.spec import ModelRef
from app.strategies import STRATEGIES, Strategy
from app.web.auth import CurrentUser

api = APIRouter(prefix="/v1")
Json = dict[str, Any]


@api.get("/strategies", operation_id="list_strategies", responses=answers(schemas.list_of(schemas.Strategy), 404, 409))
def list_strategies(session: Db, user: CurrentUser, model: str | None = None, dataset: str | None = None, task: Task | None = None) -> Json:
    """Every method with its settings. With `model`, `available` and `reason` say whether it can fine-tune that model; with
    `task`, for that task. With `dataset` (an id), for the dataset's task, with the memory and time on this machine and the
    recommendation."""
    chosen = models.resolve(session, user, model) if model else None
    data = datasets.get(session, user, ids.parse(ids.DATASET, dataset, param="dataset")) if dataset else None
    if data is not None:
        task = task or datasets.usual_task(data)
    ranking = {}
    if chosen is not None and data is not None and data.status == "ready" and task == datasets.usual_task(data):
        ranking = advice.rank(session, user, chosen.model.name, data)
    return {
        "object": "list",
        "data": [
            strategy_json(cls, chosen.ref if chosen else None, task) | _advised(ranking.get(name)) for name, cls in STRATEGIES.items()
        ],
        "has_more": False,
    }


def _advised(found: Advice | None) -> Json:
    """The advisor's result for a strategy on this data; None where no dataset was given."""
    if found is None:
        return {}
    cost = found.cost.model_dump(mode="json") if found.cost else None
    return {"available": found.available, "reason": found.reason, "advised": found.advised, "cost": cost}


def strategy_json(cls: type[Strategy], model: ModelRef | None = None, task: str | None = None) -> Json:
    reason = None
    if model is not None:
        reason = feasibility.why_not_tuned(model, task or "classification") or spec_builder.why_not(cls(), model.shape, task)
    elif task is not None:
        reason = cls.unsupported(task)
    return {
        "object": "strategy",
        "name": cls.model_fields["name"].default,
        "title": cls.title,
        "family": cls.family,
        "tasks": list(cls.tasks),
        "summary": cls.summary,
        "when_to_use": cls.when_to_use,
        "forgets": cls.forgets,
        "adapter": cls.adapter,
        "merges": cls.merges,
        "default_learning_rate": cls.default_learning_rate,
        "preference_learning_rate": cls.learning_rate_for("preference") if "preference" in cls.tasks else None,
        "paper": {"citation": cls.paper[0], "url": cls.paper[1]} if cls.paper else None,
        "schema": cls.model_json_schema(),
        "available": reason is None,
        "reason": reason,
    }
