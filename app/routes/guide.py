"""The guide: how to use the studio, and a page per strategy rendered from its class, so that it cannot go stale."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import annotated_types
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic.fields import FieldInfo
from sqlalchemy import select

from app import models, orders
from app.accounts import CurrentUser
from app.db import Db
from app.errors import NotFound
from app.formats import FORMATS
from app.forms import Control, controls
from app.shapes import Shape
from app.strategies import STRATEGIES, Strategy
from app.tables import Job
from app.web import render

pages = APIRouter()

FAMILIES = {
    "feature": ("Feature extraction", "The model is frozen; a small classifier is trained on its vectors."),
    "partial": ("Partial re-training", "New layers, or the last ones, are trained; the rest is frozen."),
    "full": ("Full", "Every weight is trained."),
    "additive": ("Additive (adapters, soft prompts)", "Layers or vectors are added and trained; the model itself is frozen."),
    "selective": ("Selective", "Only the model's biases, norms or scales are trained."),
    "reparametrized": ("Reparametrized (LoRA family)", "The change of a layer is trained as something much smaller than the layer."),
}
"""Families in plain words. A family that is not here is shown under its own name."""

FORGETS = {
    "little": "Low: the base is unchanged, and the adapter can be removed.",
    "some": "Medium: parts of the model itself change. Check the general ability on the job's page.",
    "much": "High: every weight changes. Check the general ability on the job's page, and keep the learning rate low.",
}

WORDS = [
    ("File", "uploaded bytes, stored once; with the purpose fine-tune it becomes a dataset"),
    ("Dataset", "a file read as rows of one format, with a report on every row"),
    ("Format", "what a row looks like: plain text, completion, instruction, chat, preference, rated answers or classification"),
    ("Task", "what is trained: generation, classification or preference"),
    ("Model", "base or fine-tuned; its kind says what it does: generic, instruction, dialogue, classifier or encoder"),
    ("Method", "how a model is fine-tuned: what is frozen and what is trained; `strategy` in the API"),
    ("Job", "one fine-tuning run, and everything that happened to it; an attempt is one try of it"),
    ("Checkpoint", "a saved state that a job can go on from and that the playground can load"),
    ("Forgetting", "general ability that a fine-tuned model lost compared with its base"),
]


@pages.get("/guide")
def guide(request: Request, user: CurrentUser) -> Response:
    by_family = sorted(STRATEGIES.values(), key=lambda cls: list(FAMILIES).index(cls.family) if cls.family in FAMILIES else 99)
    families = [
        (family, *FAMILIES.get(family, (family.capitalize(), "")), list(group))
        for family, group in groupby(by_family, lambda cls: cls.family)
    ]
    return render(
        request, "guide.html", families=families, words=WORDS, formats=FORMATS.values(), name_of=name_of, address=str(request.base_url)
    )


@pages.get("/guide/{strategy}")
def strategy_page(request: Request, user: CurrentUser, session: Db, strategy: str) -> Response:
    cls = STRATEGIES.get(strategy)
    if cls is None:
        raise NotFound(f"There is no strategy {strategy[:60]!r}.", way_out="The guide lists every one.", param="strategy")
    done = select(Job).where(Job.owner_id == user.id, Job.deleted_at.is_(None), Job.status == "succeeded")
    jobs = session.scalars(done.where(Job.spec["strategy"]["name"].astext == strategy).order_by(Job.created_at.desc()).limit(5)).all()
    return render(
        request, "strategy.html", cls=cls, name=strategy, fields=[(c, bounds(c, cls.model_fields[c.name])) for c in controls(cls, "strategy")], jobs=jobs,
        forgets=FORGETS[cls.forgets], family=FAMILIES.get(cls.family, (cls.family, "")), costs=costs(session, user, cls),
        siblings=[other for other in STRATEGIES.values() if other.family == cls.family and other is not cls], name_of=name_of,
    )  # fmt: skip


def name_of(cls: type[Strategy]) -> str:
    return str(cls.model_fields["name"].default)


def bounds(control: Control, info: FieldInfo) -> str:
    """What may be written into a field: `1 to 1024`, `more than 0, up to 10`, or its choices."""
    if control.widget == "checkbox":
        return "yes or no"
    if control.choices:
        return ", ".join(choice or "automatic" for choice in control.choices)
    low = high = ""
    for rule in info.metadata:
        match rule:
            case annotated_types.Ge(ge=bound):
                low = f"{bound} or more"
            case annotated_types.Gt(gt=bound):
                low = f"more than {bound}"
            case annotated_types.Le(le=bound):
                high = f"up to {bound}"
            case annotated_types.Lt(lt=bound):
                high = f"less than {bound}"
    return ", ".join(part for part in (low, high) if part) or ("a number" if control.widget == "number" else "text")


def costs(session: Db, user: CurrentUser, cls: type[Strategy]) -> list[dict[str, Any]]:
    """How much of each base model here it would train, with its own settings: counted, not listed by hand."""
    found, cuda = [], orders.has_gpu()
    for model in models.list_(session, user):
        if model.shape and model.job_id is None and model.status == "ready":
            shape = Shape.model_validate(model.shape)
            task = cls.tasks[0]
            reason = cls().unavailable(shape, task=task, cuda=cuda)
            learns = None if reason else cls().learns(shape, task=task, labels=10)
            found.append({"model": model, "learns": learns, "share": learns / shape.parameters() if learns else None, "reason": reason})
    return found[:6]
