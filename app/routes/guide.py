"""The guide: how to use the studio, a learning path, and a page per method rendered from its class, so that it is always up to
date."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import annotated_types
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic.fields import FieldInfo
from sqlalchemy import select

from app.db import Db
from app.errors import NotFound
from app.formats import FORMATS
from app.jobs import spec_builder
from app.kit.forms import FormField, controls, whole_number
from app.kit.humanize import human_number
from app.languages import gettext, localized, mark
from app.learn import STOPS
from app.models import service as models
from app.planning import calculator
from app.shapes import Shape
from app.strategies import STRATEGIES, Strategy
from app.tables import Job
from app.views.glossary import GLOSSARY
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.templates import render

pages = APIRouter()
MENU = (MenuPage(mark("Guide"), "/guide", "end", 10),)

FAMILIES = {
    "feature": (mark("Feature extraction"), mark("The model is frozen; a small classifier is trained on its vectors.")),
    "partial": (mark("Partial re-training"), mark("New layers on top, or the last ones, are trained; the rest is frozen.")),
    "full": (mark("Full"), mark("Every weight is trained.")),
    "additive": (mark("Additive (adapters, soft prompts)"), mark("New layers or vectors are trained; the model itself is frozen.")),
    "selective": (mark("Selective"), mark("Only some of the model's own parameters are trained: biases, norms or scales.")),
    "reparametrized": (mark("Reparametrized (LoRA family)"), mark("The change of a weight matrix is trained in a much smaller form.")),
}
"""Titles of families of methods. A family that is not listed is shown under its own name."""

FORGETS = {
    "little": mark("Low: the base model stays unchanged, and the adapter can be removed."),
    "some": mark("Medium: parts of the model itself change. Check general ability on the run's page."),
    "much": mark("High: every weight changes. Check general ability on the run's page, and keep the learning rate low."),
}
EXAMPLES = ("1.5", "175")
"""Numbers of parameters, in billions, that the calculator offers."""


class CalculatorQuery(NamedTuple):
    """The calculator's input, and its table or the error."""

    parameters: str
    tokens: str
    shape: Shape | None = None
    rows: Sequence[calculator.MemoryRow] = ()
    fault: str = ""


@pages.get("/guide")
def guide(request: Request, user: CurrentUser, parameters: str = EXAMPLES[0], tokens: str = "2048") -> Response:
    by_family = sorted(STRATEGIES.values(), key=lambda cls: list(FAMILIES).index(cls.family) if cls.family in FAMILIES else 99)
    families = [
        (family, *FAMILIES.get(family, (family.capitalize(), "")), list(group))
        for family, group in groupby(by_family, lambda cls: cls.family)
    ]
    wanted = calculate(parameters, tokens)
    return render(
        request, "guide.html", status_code=400 if wanted.fault else 200, families=families, glossary=GLOSSARY, stops=list(STOPS.values()),
        formats=FORMATS.values(), name_of=name_of, address=str(request.base_url), wanted=wanted, bits=calculator.BITS, examples=EXAMPLES,
    )  # fmt: skip


def calculate(parameters: str, tokens: str) -> CalculatorQuery:
    """Memory for a model of so many billion parameters and so many tokens per batch."""
    asked = CalculatorQuery(parameters[:20], tokens[:20])
    try:
        billions = float(parameters.strip().removesuffix("B").strip())
    except ValueError:
        billions = math.nan
    if not calculator.LEAST <= billions <= calculator.MOST:
        least, most = human_number(calculator.LEAST, 2), human_number(calculator.MOST)
        fault = gettext("Parameters are a number of billions from %(least)s to %(most)s, such as 1.5.", least=least, most=most)
        return asked._replace(fault=fault)
    count = whole_number(tokens.strip())
    if count is None or not 16 <= count <= 131_072:
        return asked._replace(fault=gettext("Tokens per batch are a whole number from 16 to 131,072, such as 2048."))
    shape = calculator.shape_for(billions)
    return asked._replace(shape=shape, rows=calculator.table(shape, count))


@pages.get("/guide/{strategy}")
def strategy_page(request: Request, user: CurrentUser, session: Db, strategy: str) -> Response:
    cls = STRATEGIES.get(strategy)
    if cls is None:
        message = gettext("There is no method %(name)s.", name=repr(strategy[:60]))
        raise NotFound(message, hint=gettext("The guide lists every one."), param="strategy")
    done = select(Job).where(Job.project_id == user.project_id, Job.deleted_at.is_(None), Job.status == "succeeded")
    jobs = session.scalars(done.where(Job.spec["strategy"]["name"].astext == strategy).order_by(Job.created_at.desc()).limit(5)).all()
    return render(
        request, "strategy.html", cls=cls, name=strategy, fields=[(c, bounds(c, cls.model_fields[c.name])) for c in controls(cls, "strategy")], jobs=jobs,
        forgets=FORGETS[cls.forgets], family=FAMILIES.get(cls.family, (cls.family, "")), costs=costs(session, user, cls),
        siblings=[other for other in STRATEGIES.values() if other.family == cls.family and other is not cls], name_of=name_of,
    )  # fmt: skip


def name_of(cls: type[Strategy]) -> str:
    return str(cls.model_fields["name"].default)


def bounds(control: FormField, info: FieldInfo) -> str:
    """The valid values of a field: `1 to 1024`, `more than 0, up to 10`, or its choices."""
    if control.widget == "checkbox":
        return gettext("yes or no")
    if control.choices:
        return ", ".join(choice or gettext("automatic") for choice in control.choices)
    low = high = ""
    for rule in info.metadata:
        match rule:
            case annotated_types.Ge(ge=bound):
                low = gettext("%(bound)s or more", bound=localized(f"{bound}"))
            case annotated_types.Gt(gt=bound):
                low = gettext("more than %(bound)s", bound=localized(f"{bound}"))
            case annotated_types.Le(le=bound):
                high = gettext("up to %(bound)s", bound=localized(f"{bound}"))
            case annotated_types.Lt(lt=bound):
                high = gettext("less than %(bound)s", bound=localized(f"{bound}"))
    return ", ".join(part for part in (low, high) if part) or (gettext("a number") if control.widget == "number" else gettext("text"))


def costs(session: Db, user: CurrentUser, cls: type[Strategy]) -> list[dict[str, Any]]:
    """Trainable parameters of the method on each base model here, with default settings, for the first of its tasks that the
    model supports: computed, not listed by hand."""
    found, cuda = [], spec_builder.has_gpu()
    for model in models.offered(session, user):
        if model.shape and model.job_id is None and model.status == "ready":
            shape = Shape.model_validate(model.shape)
            reasons = {task: cls().unavailable(shape, task=task, cuda=cuda) for task in cls.tasks}
            task = next((task for task, reason in reasons.items() if reason is None), None)
            learns = cls().trainable_parameters(shape, task=task, labels=10) if task else None
            share = learns / shape.parameters() if learns else None
            found.append({"model": model, "learns": learns, "share": share, "task": task, "reason": next(iter(reasons.values()))})
    return found[:6]
