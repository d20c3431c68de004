"""The form of a new comparison: its input so far, and every strategy with its estimate or why it cannot run.

Input values are texts by the name of their input, as in `app/views/job_form.py`; `strategy` occurs once for each that is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args
from urllib.parse import urlencode

from sqlalchemy.orm import Session

from app.errors import StudioError
from app.evaluation import comparison_plan
from app.evaluation.comparison_plan import ComparisonOrder, Kind
from app.jobs import preselection
from app.jobs.defaults import rows_per_step, usual_run
from app.kit import ids, once
from app.kit.forms import FormError, FormField, as_text, controls, fill
from app.kit.humanize import human_number
from app.languages import gettext
from app.machines import heartbeats
from app.models import from_nothing
from app.models import service as models
from app.planning.schedule import DERIVED
from app.run_settings import RunSettings, displaced
from app.strategies import STRATEGIES, Strategy
from app.strategies._advice import FAMILIES
from app.tables import JSON, Dataset, Model, User
from app.views.job_form import with_rows
from app.views.method_cards import ranking_of
from app.views.refusals import no_dataset, no_model

NOT_ASKED = ("data_fraction", "early_stopping_patience")
"""Run settings that a comparison decides itself."""


@dataclass(frozen=True, slots=True)
class StrategyOption:
    """One strategy to choose. Without an estimate it cannot run, and `reason` says why."""

    cls: type[Strategy]
    checked: bool
    advised: bool
    reason: str
    estimate: JSON | None

    @property
    def name(self) -> str:
        return str(self.cls.model_fields["name"].default)


@dataclass(slots=True)
class CompareForm:
    typed: dict[str, str]
    kind: Kind
    models: list[Model]
    datasets: list[Dataset]
    model: Model | None
    dataset: Dataset | None
    picks: list[StrategyOption]
    run_controls: list[FormField]
    errors: dict[str, str] = field(default_factory=dict)
    order: ComparisonOrder | None = None
    memory_bytes: int = 0
    rows_per_step: int = 0
    asked: list[str] = field(default_factory=list)  # strategies that were checked in the request
    bases: list[Model] = field(default_factory=list)  # base models that are compared, where there are several
    on: list[Dataset] = field(default_factory=list)  # datasets of a matrix
    from_nothing: bool = False

    @property
    def chosen(self) -> list[StrategyOption]:
        return [pick for pick in self.picks if pick.checked]

    @property
    def seconds(self) -> float:
        """Estimate for all jobs in sequence."""
        seconds: float = sum(pick.estimate["seconds"] for pick in self.chosen if pick.estimate)
        return seconds + self.nothing_seconds

    @property
    def nothing_seconds(self) -> float:
        """Estimate for the jobs from random weights, which are those of full fine-tuning; 0 where none is asked for or it does not fit."""
        full = next((pick.estimate for pick in self.picks if pick.name == "full" and pick.estimate), None)
        return float(full["seconds"]) if full and self.from_nothing else 0.0

    @property
    def jobs(self) -> int:
        if self.kind == "learning_curve":
            return len(self.chosen) * len(comparison_plan.FRACTIONS)
        blank = [pick for pick in self.picks if pick.name == "full" and pick.estimate and self.from_nothing]
        runs: int = sum(pick.estimate["runs"] for pick in [*self.chosen, *blank] if pick.estimate)
        return runs

    @property
    def several(self) -> bool:
        """Whether it compares several base models."""
        return self.kind in ("models", "matrix")

    @property
    def peak_bytes(self) -> int:
        peak: int = max(pick.estimate["memory_bytes"] for pick in self.chosen if pick.estimate)
        return peak

    @property
    def steps(self) -> str:
        """Optimizer steps of the jobs: one number, or a range."""
        found = sorted({pick.estimate["steps"] for pick in self.chosen if pick.estimate and pick.cls.recipe != "features"})
        return "–".join(human_number(n) for n in (found[:1] + found[-1:] if len(found) > 1 else found)) or "0"

    @property
    def warnings(self) -> list[str]:
        return list(dict.fromkeys(text for pick in self.chosen if pick.estimate for text in pick.estimate.get("warnings", [])))

    @property
    def ready(self) -> bool:
        """Whether the comparison can be started with the current input."""
        return self.order is not None and not self.errors

    @property
    def faults(self) -> list[FormError]:
        """The errors, each with the id of the element where it can be fixed."""
        places = {"model": "models" if self.several else "model", "dataset": "datasets" if self.kind == "matrix" else "dataset"}
        places |= {"strategy": "methods"} | {c.key: c.id for c in self.run_controls}
        return [FormError(text, places.get(name)) for name, text in self.errors.items()]

    @property
    def unseen(self) -> str | None:
        """Why these are not the jobs that the person saw when they pressed Start; None where they are."""
        gone = [pick for pick in self.picks if pick.name in self.asked and not pick.checked]
        if not gone:
            return None
        return gettext(
            "%(method)s cannot be part of it. %(reason)s Check what is chosen now, then press Start.",
            method=gettext(gone[0].cls.title),
            reason=gone[0].reason,
        )

    @property
    def address(self) -> str:
        """The URL that opens this form again: the choices, and every setting that differs from its default."""
        chosen = {
            "kind": self.kind,
            "shown": self.kind,
            "dataset": ids.public(ids.DATASET, self.dataset.id) if self.dataset else self.typed.get("dataset"),
            "model": (self.model.name if self.model else self.typed.get("model")) if not self.several else None,
            "base": [model.name for model in self.bases],
            "on": [ids.public(ids.DATASET, dataset.id) for dataset in self.on],
            "from_nothing": "true" if self.from_nothing else None,
            "strategy": [pick.name for pick in self.chosen] or self.asked,
            **{c.key: c.value for c in self.run_controls if c.changed},
            "name": self.typed.get("name"),
        }
        return f"/compare/new?{urlencode({name: value for name, value in chosen.items() if value}, doseq=True)}"

    def families(self) -> list[tuple[str, list[StrategyOption]]]:
        """The strategies by family, available ones first."""
        found = [(gettext(title), [pick for pick in self.picks if pick.cls.family == name]) for name, title in FAMILIES.items()]
        return [(gettext(title), sorted(picks, key=lambda pick: pick.estimate is None)) for title, picks in found if picks]


def compare_form(
    session: Session,
    user: User,
    typed: Mapping[str, str],
    strategies: Sequence[str] = (),
    bases: Sequence[str] = (),
    on: Sequence[str] = (),
) -> CompareForm:
    """The form for the current input, whatever it is: `bases` are names of base models, `on` public ids of the datasets of a matrix. Never
    raises for it: errors are returned with their fields."""
    with once.remembered():
        return _compare_form(session, user, typed, strategies, bases, on)


def _compare_form(
    session: Session, user: User, typed: Mapping[str, str], strategies: Sequence[str], bases: Sequence[str], on: Sequence[str]
) -> CompareForm:
    from app.datasets import service as datasets

    typed = dict(typed)
    kind: Kind = next((one for one in get_args(Kind) if one == typed.get("kind")), "strategies")
    ready = [m for m in models.offered(session, user, typed.get("model")) if m.status == "ready"]
    usable = [d for d in datasets.offered(session, user, typed.get("dataset")) if d.status == "ready" and d.good_rows]
    errors: dict[str, str] = {}
    model, dataset = preselection.pair(session, user, ready, usable, typed.get("model"), typed.get("dataset"))
    if typed.get("model") and model is None:
        errors["model"] = no_model(typed["model"])
    if typed.get("dataset") and dataset is None:
        errors["dataset"] = no_dataset(typed["dataset"])
    run = fill(RunSettings, {key: value for key, value in typed.items() if key.removeprefix("run.") not in NOT_ASKED}, "run", keep=DERIVED)
    usual = {"validation_fraction": RunSettings().validation_fraction} | (usual_run(dataset, run.settings) if dataset else {})
    errors |= {f"run.{name}": text for name, text in run.errors.items()}
    form = CompareForm(
        typed=typed,
        kind=kind,
        models=ready,
        datasets=usable,
        model=model,
        dataset=dataset,
        picks=[],
        run_controls=_controls(run.typed, run.errors, usual),
        errors=errors,
        memory_bytes=heartbeats.training_machine().on(run.settings.get("device", "auto")).training_memory_bytes,
        asked=[name for name in strategies if name in STRATEGIES],
    )
    form.from_nothing = kind != "learning_curve" and typed.get("from_nothing") == "true"
    if form.several:
        form.bases = _bases(form, bases)
    if kind == "matrix":
        form.on = _datasets(form, on)
    if model and dataset and not run.errors:
        form.rows_per_step = rows_per_step(dataset, RunSettings(**{**usual, **run.settings}))
        form.run_controls = with_rows(form.run_controls, form.rows_per_step)
        _fill_picks(session, user, form, run.settings)
        _try(form, run.settings)
    return form


def _bases(form: CompareForm, asked: Sequence[str]) -> list[Model]:
    """The base models that are checked; initially the untuned ones that suit the data."""
    if form.typed.get("shown") != form.kind and not asked:
        known = [m for m in form.models if m.kept and m.job_id is None and not from_nothing.is_blank(m)]
        fitting = [m for m in known if preselection.suits(m, form.dataset)]
        return fitting[: comparison_plan.MAX_MODELS]
    unknown = set(asked) - {model.name for model in form.models}
    if unknown:
        form.errors["model"] = no_model(min(unknown))
    found = [model for model in form.models if model.name in asked]
    if len(found) > comparison_plan.MAX_MODELS:
        form.errors["model"] = gettext(
            "At most %(most)s base models can be compared, and %(chosen)s are chosen.", most=comparison_plan.MAX_MODELS, chosen=len(found)
        )
    return found


def _datasets(form: CompareForm, asked: Sequence[str]) -> list[Dataset]:
    """The datasets that are checked; initially the chosen one and another for the same task."""
    if form.typed.get("shown") != form.kind and not asked:
        return sorted(form.datasets, key=lambda d: form.dataset is None or d.task != form.dataset.task)[:2]
    found = [d for d in form.datasets if ids.public(ids.DATASET, d.id) in asked]
    if len(found) < len(set(asked)):
        form.errors["dataset"] = gettext("One of the datasets is not there or not ready. It may have been deleted; choose another.")
    if len(found) > comparison_plan.MAX_DATASETS:
        form.errors["dataset"] = gettext(
            "At most %(most)s datasets can be compared on, and %(chosen)s are chosen.", most=comparison_plan.MAX_DATASETS, chosen=len(found)
        )
    return found


def _controls(typed: Mapping[str, str], errors: Mapping[str, str], usual: Mapping[str, Any]) -> list[FormField]:
    """Run settings for all jobs, with the budget visible. One learning rate for all is rarely meant, so it is collapsed."""
    empty = {"learning_rate": gettext("each method’s default"), "max_steps": gettext("no limit")}
    empty |= {name: as_text(value) for name, value in usual.items()}
    empty |= {name: "" for name in displaced({key: value for key, value in typed.items() if value}) if name not in empty}
    found = controls(RunSettings, "run", typed=typed, errors=errors, placeholders=empty)
    says = {"epochs": gettext("Passes over the data, unless a number of steps ends it before.")}
    basic = {"epochs": True, "max_steps": True, "max_tokens_per_step": True, "learning_rate": False}
    return [replace(c, basic=basic.get(c.name, c.basic), help=says.get(c.name, c.help)) for c in found if c.name not in NOT_ASKED]


def _fill_picks(session: Session, user: User, form: CompareForm, run: JSON) -> None:
    """Every strategy with the estimate of its jobs. Initially each family's first that fits is checked."""
    if form.kind == "models" and len(form.bases) < 2:
        form.errors.setdefault("model", gettext("Choose at least two base models to compare."))
    if form.kind == "matrix" and not form.bases:
        form.errors.setdefault("model", gettext("Choose at least one base model."))
    if form.kind == "matrix" and len(form.on) < 2:
        form.errors.setdefault("dataset", gettext("Choose at least two datasets."))
    if form.errors.get("model") or form.errors.get("dataset"):
        return
    everything = _order(form, list(STRATEGIES), run).model_copy(update={"from_nothing": False})
    try:
        plan = comparison_plan.planned(session, user, everything)
    except StudioError as error:
        form.errors[{"dataset_id": "dataset", "dataset_ids": "dataset"}.get(error.param or "", error.param or "")] = str(error)
        return
    costs = {name: [one.estimate for one in plan.jobs if one.strategy == name] for name in STRATEGIES}
    reasons = {r["strategy"]: r["reason"] for r in plan.refused}
    advised = [name for name, a in ranking_of(session, user, form.model, form.dataset).items() if a.advised]
    fits = [name for name in STRATEGIES if costs[name] and (name not in reasons or form.several)]
    were_shown = form.typed.get("shown") == form.kind and not form.typed.get("no_methods")
    everywhere = [name for name in fits if len(costs[name]) == max(map(len, costs.values()))]  # on every base model and dataset
    checked = form.asked if were_shown or form.asked else _by_default(form.kind, everywhere if form.several else fits, advised)
    for name, cls in STRATEGIES.items():
        cost = _together(costs[name]) if name in fits else None
        form.picks.append(StrategyOption(cls, name in checked and cost is not None, name in advised, reasons.get(name, ""), cost))


def _by_default(kind: Kind, fits: list[str], advised: list[str]) -> list[str]:
    best = [name for name in fits if name in advised]
    if kind != "strategies":
        return (best or fits)[:1]
    families = {STRATEGIES[name].family: name for name in reversed(fits)}
    return [*families.values(), *best]


def _together(costs: list[JSON]) -> JSON:
    """Several jobs in sequence: the largest memory, the sum of the times, and how many `runs` they are."""
    return {**max(costs, key=lambda cost: cost["memory_bytes"]), "seconds": sum(cost["seconds"] for cost in costs), "runs": len(costs)}


def _order(form: CompareForm, strategies: list[str], run: JSON) -> ComparisonOrder:
    assert form.model and form.dataset
    return ComparisonOrder(
        model=None if form.several else form.model.name,
        models=[model.name for model in form.bases] if form.several else None,
        dataset_id=form.dataset.id if form.kind != "matrix" else None,
        dataset_ids=[dataset.id for dataset in form.on] if form.kind == "matrix" else None,
        from_nothing=form.from_nothing,
        strategies=list(strategies),
        kind=form.kind,
        run=run,
        name=form.typed.get("name", "").strip()[:200] or None,
    )


def _try(form: CompareForm, run: JSON) -> None:
    """The request for what is checked; errors of the choice become errors of the form."""
    if form.errors:
        return
    names = [pick.name for pick in form.chosen]
    if not any(pick.estimate for pick in form.picks):
        form.errors["strategy"] = gettext("No method fits this model, this data and this machine; each shows the reason.")
    elif form.kind == "learning_curve" and len(names) != 1:
        form.errors["strategy"] = gettext("A learning curve is for one method. Choose one.")
    elif form.several and not names:
        form.errors["strategy"] = gettext("Choose at least one method.")
    elif form.jobs > comparison_plan.MAX_JOBS:
        form.errors["strategy"] = gettext(
            "%(runs)s runs are more than %(most)s. Choose fewer methods, models or datasets.", runs=form.jobs, most=comparison_plan.MAX_JOBS
        )
    elif len(names) + form.from_nothing < 2 and form.kind == "strategies":
        form.errors["strategy"] = gettext("Choose at least two methods to compare.")
    else:
        form.order = _order(form, names, run)


def body_of(order: ComparisonOrder) -> dict[str, Any]:
    """The body of `POST /v1/comparisons`."""
    body = order.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    named = {"dataset_id": order.dataset_id and ids.public(ids.DATASET, order.dataset_id)}
    several: dict[str, Any] = {"dataset_ids": [ids.public(ids.DATASET, key) for key in order.dataset_ids or ()]}
    return body | {name: value for name, value in (named | several).items() if value}
