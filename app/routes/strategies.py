"""`GET /v1/strategies`: every strategy, its settings as JSON schema, and whether this machine and model can run it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from app import models, orders
from app.accounts import CurrentUser
from app.db import Db
from app.shapes import Shape
from app.strategies import STRATEGIES, Strategy

api = APIRouter(prefix="/v1")
Json = dict[str, Any]


@api.get("/strategies")
def list_strategies(session: Db, user: CurrentUser, model: str | None = None, task: str | None = None) -> Json:
    """With `model`, `available` and `reason` say whether that model can be tuned so; with `task`, for that task."""
    shape = models.resolve(session, user, model).ref.shape if model else None
    return {"object": "list", "data": [strategy_json(cls, shape, task) for cls in STRATEGIES.values()], "has_more": False}


def strategy_json(cls: type[Strategy], shape: Shape | None = None, task: str | None = None) -> Json:
    reason = None
    if shape is not None:
        reason = cls().unavailable(shape, task=task or cls.tasks[0], cuda=orders.has_gpu())
    elif task is not None and task not in cls.tasks:
        reason = f"{cls.title} does not learn the task {task}; it learns {' and '.join(cls.tasks)}."
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
        "paper": {"citation": cls.paper[0], "url": cls.paper[1]} if cls.paper else None,
        "schema": cls.model_json_schema(),
        "available": reason is None,
        "reason": reason,
    }
