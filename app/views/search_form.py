"""The form of a new search: what is chosen so far, and what it would try and take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from sqlalchemy.orm import Session

from app.datasets import service as datasets
from app.errors import BadField, StudioError
from app.evaluation import comparison_plan
from app.jobs import preselection
from app.kit import ids, once
from app.languages import gettext
from app.models import service as models
from app.searches import service as searches
from app.searches import table
from app.searches.space import SearchOrder
from app.strategies import STRATEGIES
from app.strategies._advice import FAMILIES
from app.tables import JSON, Dataset, Model, User
from app.views.comparison_form import StrategyOption
from app.views.method_cards import ranking_of
from app.views.refusals import no_dataset, no_model

LISTS = {"rank": int, "epochs": float, "learning_rate": float}
"""Inputs of several numbers, and what these are."""
NUMBERS = {"trials": int, "minutes": float, "seed": int}
FIELDS = {"dataset_id": "dataset", "training_file": "dataset", "strategies": "strategy"}
"""Fields of a request → inputs of the form, where they differ."""


@dataclass(slots=True)
class SearchForm:
    typed: dict[str, str]
    models: list[Model]
    datasets: list[Dataset]
    model: Model | None
    dataset: Dataset | None
    picks: list[StrategyOption] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    order: SearchOrder | None = None
    plan: JSON | None = None

    @property
    def chosen(self) -> list[StrategyOption]:
        return [pick for pick in self.picks if pick.checked]

    @property
    def ready(self) -> bool:
        return self.order is not None and self.plan is not None and not self.errors

    def families(self) -> list[tuple[str, list[StrategyOption]]]:
        """The methods that can be searched, by family."""
        found = [
            (gettext(title), [pick for pick in self.picks if pick.cls.family == name and pick.estimate]) for name, title in FAMILIES.items()
        ]
        return [(gettext(title), picks) for title, picks in found if picks]

    @property
    def address(self) -> str:
        """The URL that opens this form again."""
        names = (*LISTS, *NUMBERS, "name")
        chosen: dict[str, Any] = {
            "dataset": ids.public(ids.DATASET, self.dataset.id) if self.dataset else self.typed.get("dataset"),
            "model": self.model.name if self.model else self.typed.get("model"),
            "strategy": [pick.name for pick in self.chosen],
            "shown": "yes",
            **{name: self.typed.get(name) for name in names},
        }
        return f"/searches/new?{urlencode({name: value for name, value in chosen.items() if value}, doseq=True)}"


def search_form(session: Session, user: User, typed: Mapping[str, str], strategies: Sequence[str] = ()) -> SearchForm:
    """The form for the current input, whatever it is. Never raises for it: errors are returned with their fields."""
    ready = [m for m in models.offered(session, user, typed.get("model")) if m.status == "ready"]
    usable = [d for d in datasets.offered(session, user, typed.get("dataset")) if d.status == "ready" and d.good_rows]
    model, dataset = preselection.pair(session, user, ready, usable, typed.get("model"), typed.get("dataset"))
    form = SearchForm(dict(typed), ready, usable, model, dataset)
    if typed.get("model") and model is None:
        form.errors["model"] = no_model(typed["model"])
    if typed.get("dataset") and dataset is None:
        form.errors["dataset"] = no_dataset(typed["dataset"])
    numbers = _numbers(form)
    if model and dataset and not form.errors.keys() & {"model", "dataset"}:
        with once.remembered():
            _fill_picks(session, user, form, strategies)
            _try(session, user, form, numbers)
    return form


def _numbers(form: SearchForm) -> dict[str, Any]:
    """The numbers that were typed; what is none becomes an error at its input."""
    found: dict[str, Any] = {}
    for name, kind in {**LISTS, **NUMBERS}.items():
        text = form.typed.get(name, "").strip()
        if not text:
            continue
        try:
            values = [kind(part) for part in text.replace(";", ",").split(",")]
        except ValueError:
            several = gettext("%(text)s is no list of numbers with commas between them.", text=text[:40])
            form.errors[name] = several if name in LISTS else gettext("%(text)s is no number.", text=text[:40])
            continue
        if name in NUMBERS and len(values) > 1:
            form.errors[name] = gettext("%(text)s is more than one number.", text=text[:40])
            continue
        found[name] = values if name in LISTS else values[0]
    return found


def _fill_picks(session: Session, user: User, form: SearchForm, strategies: Sequence[str]) -> None:
    """Every method with the estimate of one run. Initially the one that the advisor recommends is checked."""
    assert form.model and form.dataset
    order = comparison_plan.ComparisonOrder(model=form.model.name, dataset_id=form.dataset.id, strategies=list(STRATEGIES))
    try:
        plan = comparison_plan.planned(session, user, order)
    except StudioError as error:
        form.errors[FIELDS.get(error.param or "", error.param or "")] = str(error)
        return
    costs = {one.strategy: one.estimate for one in plan.jobs if STRATEGIES[one.strategy].recipe != "features"}
    reasons = {one["strategy"]: one["reason"] for one in plan.refused}
    advised = [name for name, found in ranking_of(session, user, form.model, form.dataset).items() if found.advised and name in costs]
    checked = list(strategies) if form.typed.get("shown") else (advised or list(costs)[:1])
    form.picks = [
        StrategyOption(cls, name in checked and name in costs, name in advised, reasons.get(name, ""), costs.get(name))
        for name, cls in STRATEGIES.items()
    ]


def _try(session: Session, user: User, form: SearchForm, numbers: dict[str, Any]) -> None:
    """The request for what is chosen, and its plan; errors become errors of the form."""
    if form.errors:
        return
    if not form.chosen:
        form.errors["strategy"] = gettext("Choose at least one method.")
        return
    assert form.model and form.dataset
    body = {"model": form.model.name, "dataset_id": ids.public(ids.DATASET, form.dataset.id), "strategies": [p.name for p in form.chosen]}
    try:
        form.order = searches.read_order({**body, **numbers, "name": form.typed.get("name", "").strip()[:200] or None})
        form.plan = table.plan_json(session, user, form.order)
    except BadField as error:
        param = (error.param or "").split(".")[0]
        form.errors[FIELDS.get(param, param)] = str(error)
    except StudioError as error:
        form.errors[FIELDS.get(error.param or "", error.param or "")] = str(error)


def body_of(order: SearchOrder) -> dict[str, Any]:
    """The body of `POST /v1/searches`."""
    body = order.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    more = {"strategies": order.strategies, "dataset_id": ids.public(ids.DATASET, order.dataset_id) if order.dataset_id else None}
    return body | {name: value for name, value in more.items() if value is not None}
