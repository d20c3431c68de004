"""The form of a new job: its input so far, the estimate, its errors, and the same as text to copy.

Input values are texts by the name of their input: `model`, `dataset`, `validation`, `strategy`, `name`, `strategy.rank`,
`run.epochs`, and `kept.rank` for settings of a previously chosen strategy, so that trying another one loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from sqlalchemy.orm import Session

from app import objectives, saved_graders
from app.errors import StudioError
from app.jobs import preselection, resources_form, spec_builder
from app.jobs import service as jobs
from app.jobs.defaults import rows_per_step, usual_run
from app.jobs.fair_share import PRIORITIES, Priority
from app.jobs.request import JobRequest
from app.jobs.resources_form import Offers
from app.kit import ids, once
from app.kit.forms import Filled, FormError, FormField, as_text, controls, fill, whole_number
from app.languages import gettext, mark, ngettext
from app.machines.placement import Resources
from app.models import service as models
from app.objectives import OBJECTIVES, DrawnSettings, ObjectiveSettings
from app.planning import feasibility
from app.planning.duration import FITS
from app.planning.schedule import DERIVED, GOVERNED, PRESETS, PresetName
from app.run_settings import RunSettings, displaced
from app.shapes import Shape
from app.spec import SILENT, JobSpec, ModelRef, Split, usual_learning_rate
from app.strategies import STRATEGIES, Strategy
from app.tables import Dataset, Model, User
from app.views import reward_form
from app.views.method_cards import StrategyCard, cards_of, ranking_of, shown_first
from app.views.refusals import why_not
from app.views.reward_form import from_json

FIELDS = {
    "dataset_id": "dataset",
    "training_file": "dataset",
    "validation_dataset_id": "validation",
    "task": "dataset",
    "split": "split.method",
    "strategy.name": "strategy",
}
"""Fields of a request → inputs of the form, where they differ."""
PLACES = {
    "model": "model",
    "dataset": "dataset",
    "validation": "validation",
    "strategy": "methods",
    "priority": "priority",
    "graders": "graders",
    "preference.grader": "preference-grader",
    "preference.teacher": "preference-teacher",
    "split.method": "split.method",
    "split.column": "split.column",
    **{name: name for name in resources_form.INPUTS.values()},
}
"""Inputs that are no settings → the ids of their elements."""


@dataclass(frozen=True, slots=True)
class PresetCard:
    """One preset to choose, with its estimate."""

    name: PresetName
    title: str
    summary: str
    chosen: bool
    estimate: dict[str, Any] | None = None


GROUPS = (mark("Data"), mark("Method"), mark("Optimization"), mark("Evaluation"), mark("Hardware"))
"""The headings of the advanced settings, in order."""


@dataclass(slots=True)
class OrderForm:
    typed: dict[str, str]
    task: str
    moved: bool  # data for another task was chosen than the form was shown for
    presets: list[PresetCard]
    models: list[Model]
    datasets: list[Dataset]
    model: Model | None
    dataset: Dataset | None
    validation: Dataset | None
    checking: list[Dataset]  # datasets that can be the validation set
    strategy: type[Strategy]
    cards: list[StrategyCard]
    more_cards: list[StrategyCard]
    strategy_controls: list[FormField]
    run_controls: list[FormField]
    preference_controls: list[FormField]  # the objective's own settings
    tasks: list[str]  # the objectives that train on the dataset's rows, its own first
    kept: dict[str, str]
    errors: dict[str, str] = field(default_factory=dict)
    order: JobRequest | None = None
    spec: JobSpec | None = None
    estimate: dict[str, Any] | None = None
    machine_bytes: int | None = None
    may_hurry: bool = False  # order a high priority
    resources: Resources | None = None
    offers: Offers | None = None  # what may be asked of a machine; None where there is nothing to choose from
    saved: list[tuple[str, str]] = field(default_factory=list)  # public ids and names of the saved graders
    coming: list[str] = field(default_factory=list)  # titles of models that are being added

    @property
    def ready(self) -> bool:
        """Whether the job can be started with the current input."""
        return self.order is not None and not self.errors

    @property
    def controls(self) -> list[FormField]:
        return [*self.strategy_controls, *self.preference_controls, *self.run_controls]

    @property
    def groups(self) -> list[tuple[str, list[FormField]]]:
        """The controls under each heading, which the page translates: its template looks for some of them by their name."""
        return [(title, [c for c in self.controls if c.group == title]) for title in GROUPS]

    @property
    def touched(self) -> bool:
        """Whether a setting was changed or is wrong, so that it must be visible."""
        places = {c.key for c in self.controls} | {"validation", "split.method", "split.column", "graders"}
        return (
            any(c.changed for c in self.controls)
            or any(self.typed.get(n) for n in ("validation", "split.column", *self.chosen))
            or bool(places & set(self.errors))
        )

    @property
    def chosen(self) -> list[str]:
        """Inputs of the graders that are chosen."""
        return [name for name, value in self.typed.items() if value and (name == "graders" or name.startswith("grader."))]

    @property
    def rewards(self) -> list[tuple[str, str]]:
        """Values and names of the rewards to choose from, where the objective needs one: usual ones, saved graders, and the cloned run's."""
        return reward_form.choices(self.saved, self.typed) if OBJECTIVES[self.task].rewards else []

    @property
    def teachers(self) -> list[tuple[str, str]] | None:
        """Names and titles of the other models that can be distilled, the largest first; None where the objective needs none."""
        if not OBJECTIVES[self.task].teaches:
            return None
        found = [m for m in self.models if m.kind not in SILENT and m.shape and not m.answered_elsewhere and m is not self.model]
        return [(m.name, m.title) for m in sorted(found, key=lambda m: -Shape.model_validate(m.shape).parameters())]

    @property
    def overruled(self) -> list[FormField]:
        """Settings of a preset that a person changed."""
        return [c for c in self.run_controls if c.name in GOVERNED and c.changed and c.value]

    @property
    def rows_per_step(self) -> int | None:
        """None where steps do not count rows, or that is not known yet."""
        if (
            self.spec is None
            or OBJECTIVES[self.task].draws
            or self.dataset is None
            or self.dataset.status != "ready"
            or type(self.spec.strategy).recipe == "features"
        ):
            return None
        return rows_per_step(self.dataset, self.spec.run)

    @property
    def preset(self) -> PresetName:
        return next(card.name for card in self.presets if card.chosen)

    @property
    def faults(self) -> list[FormError]:
        """The errors, each with the id of the element where it can be fixed; none for errors without an element."""
        places = PLACES | {c.key: c.id for c in self.controls}
        return [FormError(text, places.get(name)) for name, text in self.errors.items()]

    @property
    def priority(self) -> Priority:
        return next((name for name in PRIORITIES if name == self.typed.get("priority")), "normal")

    @property
    def method(self) -> str:
        return str(self.strategy.model_fields["name"].default)

    @property
    def unseen(self) -> str | None:
        """Why these are not the settings that the person saw when they pressed Start; None where they are."""
        if self.moved and self.dataset:
            told = gettext("You chose %(name)s, which is for another task, so nothing was started.", name=self.dataset.name)
            return f"{told} {gettext('Check the model and the method, then press Start.')}"
        shown = self.typed.get("shown", self.method)
        if shown == self.method:
            return None
        return gettext(
            "You chose %(method)s, and the page still showed the settings of %(before)s, so nothing was started. "
            "Now it shows those of %(method)s: check them, then press Start.",
            method=gettext(self.strategy.title),
            before=gettext(STRATEGIES[shown].title) if shown in STRATEGIES else shown[:60],
        )

    @property
    def address(self) -> str:
        """The URL that opens this form again: the choices, and every setting that differs from its default."""
        chosen = {
            "dataset": ids.public(ids.DATASET, self.dataset.id) if self.dataset else self.typed.get("dataset"),
            "model": self.model.name if self.model else self.typed.get("model"),
            "validation": self.typed.get("validation"),
            "strategy": self.method,
            "preset": self.preset if self.preset != "balanced" else "",
            **{name: self.typed.get(name) for name in ("split.method", "split.column", "split.seed")},
            **{name: self.typed[name] for name in self.chosen},
            **{c.key: c.value for c in self.controls if c.changed},
            **{name: self.typed.get(name) for name in ("objective", "preference.grader", "preference.teacher")},
            **self.kept,
            "name": self.typed.get("name"),
            "priority": self.priority if self.priority != "normal" else "",
            **{name: self.typed.get(name) for name in resources_form.INPUTS.values()},
        }
        return f"/jobs/new?{urlencode({name: value for name, value in chosen.items() if value})}"


def order_form(session: Session, user: User, typed: Mapping[str, str]) -> OrderForm:
    """The form for the current input, whatever it is. Never raises for it: errors are returned with their fields."""
    with once.remembered():
        return _order_form(session, user, typed)


def _order_form(session: Session, user: User, typed: Mapping[str, str]) -> OrderForm:
    from app.datasets import service as datasets

    typed = dict(typed)
    known = models.offered(session, user, typed.get("model"))
    ready = [m for m in known if m.status == "ready"]
    rows = datasets.offered(session, user, typed.get("dataset"), typed.get("validation"))
    usable = [d for d in rows if d.status in ("ready", "reading")]
    errors: dict[str, str] = {}
    moved = _moved(usable, typed)
    if moved:  # data for another task: the model and the method are matched again
        typed = {name: value for name, value in typed.items() if name not in ("model", "strategy")}
    model, dataset = preselection.pair(session, user, ready, usable, typed.get("model"), typed.get("dataset"))
    if typed.get("model") and model is None:
        errors["model"] = gettext("There is no model %(name)s. It may have been deleted; choose another.", name=typed["model"][:80])
    if typed.get("dataset") and dataset is None:
        errors["dataset"] = why_not(rows, typed["dataset"])
    if typed.get("strategy") and typed["strategy"] not in STRATEGIES:
        errors["strategy"] = gettext("There is no method %(name)s. Choose one of those below.", name=typed["strategy"][:80])
    tasks = objectives.of_rows(datasets.usual_task(dataset) if dataset else None, dataset.format if dataset else None)
    task = typed["objective"] if typed.get("objective") in tasks else tasks[0]
    own = OBJECTIVES[task].settings
    checking = [d for d in usable if dataset is not None and d.id != dataset.id and datasets.usual_task(d) == task]
    validation = next((d for d in checking if ids.public(ids.DATASET, d.id) == typed.get("validation")), None)
    # A valid choice of another kind was made before the dataset was changed: it is dropped.
    if typed.get("validation") and not any(ids.public(ids.DATASET, d.id) == typed["validation"] for d in usable):
        errors["validation"] = why_not(rows, typed["validation"])
    device = typed.get("run.device", "auto")
    ranking = ranking_of(session, user, model, dataset, device)
    resources = resources_form.asked(typed, errors)
    cards = cards_of(typed.get("strategy"), task, _reference(session, model), ranking, device, resources)
    strategy = next(card.cls for card in cards if card.chosen)
    asked = _carried(typed, strategy)
    preset: PresetName = next((name for name in PRESETS if name == typed.get("preset")), "balanced")
    if typed.get("preset") and typed["preset"] != preset:
        choices = ", ".join(PRESETS)
        errors["preset"] = gettext("There is no preset %(name)s. Choose one of %(choices)s.", name=typed["preset"][:80], choices=choices)
    filled, run = fill(strategy, asked, "strategy"), fill(RunSettings, typed, "run", keep=DERIVED)
    compared = fill(own, reward_form.left_out(typed), "preference", keep=own.derived) if own else None
    drawn = own.model_validate(compared.settings) if compared and own and issubclass(own, DrawnSettings) else None
    elsewhere = validation is not None
    usual = (
        usual_run(dataset, run.settings, validated_elsewhere=elsewhere, preset=preset, drawn=drawn, resources=resources) if dataset else {}
    )
    usual = RunSettings().model_dump(include={"early_stopping_patience", "validation_fraction"}) | usual
    errors |= {f"strategy.{name}": text for name, text in filled.errors.items()} | {
        f"run.{name}": text for name, text in run.errors.items()
    }
    learned = own.model_construct(None, **(compared.settings or compared.typed)) if own and compared else None
    errors |= {f"preference.{name}": text for name, text in compared.errors.items()} if compared else {}
    first, more = shown_first(cards)
    form = OrderForm(
        typed=typed,
        task=task,
        tasks=tasks,
        moved=moved,
        presets=[PresetCard(name, gettext(p.title), gettext(p.summary), name == preset) for name, p in PRESETS.items()],
        models=ready,
        datasets=usable,
        model=model,
        dataset=dataset,
        validation=validation,
        checking=checking,
        strategy=strategy,
        cards=first,
        more_cards=more,
        strategy_controls=controls(strategy, "strategy", typed=filled.typed, errors=filled.errors),
        run_controls=controls(
            RunSettings,
            "run",
            typed=run.typed,
            errors=run.errors,
            placeholders={
                "learning_rate": as_text(usual_learning_rate(strategy, task, run.settings.get("optimizer", "adamw"))),
                **dict.fromkeys(displaced(run.settings), ""),
                **{name: as_text(value) for name, value in usual.items()},
            },
        ),
        preference_controls=reward_form.without(_objective_controls(learned, compared)) if learned and compared else [],
        kept={key: value for key, value in asked.items() if key.startswith("kept.")},
        errors=errors,
        machine_bytes=_memory(device, resources),
        resources=resources,
        offers=resources_form.offers(typed),
        may_hurry=jobs.may_hurry(user),
        saved=saved_graders.offered(session, user, *typed.values()) if OBJECTIVES[task].graded else [],
        coming=[m.title for m in known if m.status == "fetching"],
    )
    if model and dataset and not errors:
        _try(session, user, form, filled, run, compared)
        for found in (form.strategy_controls, form.run_controls, form.preference_controls):
            found[:] = [replace(c, error=form.errors.get(c.key)) for c in found]
        form.run_controls[:] = with_rows(form.run_controls, form.rows_per_step)
    _hide_unused(form, strategy.model_construct(None, **filled.settings), learned)
    return form


def _objective_controls(settings: ObjectiveSettings, compared: Filled) -> list[FormField]:
    """The controls of an objective's settings. Those whose default depends on another setting are empty until a person changes them."""
    usual = dict.fromkeys(settings.derived, "") | {name: as_text(value) for name, value in settings.usual().items()}
    return controls(type(settings), "preference", typed=compared.typed, errors=compared.errors, placeholders=usual)


def _hide_unused(form: OrderForm, strategy: Strategy, learned: ObjectiveSettings | None) -> None:
    """Without the settings that have no effect here, but for those that a person changed: they are seen, and refused at their field."""
    own, run, objective = strategy.unused(), feasibility.without_effect(strategy), learned.unused() if learned else ()
    form.strategy_controls[:] = [c for c in form.strategy_controls if c.name not in own or c.changed]
    form.run_controls[:] = [c for c in form.run_controls if c.name not in run or c.changed]
    form.preference_controls[:] = [c for c in form.preference_controls if c.name not in objective or c.changed]


def _try(session: Session, user: User, form: OrderForm, filled: Filled, run: Filled, compared: Filled | None) -> None:
    """Build the job's spec and estimate; their errors become errors of the form."""
    assert form.model and form.dataset
    form.order = JobRequest(
        model=form.model.name,
        dataset_id=form.dataset.id,
        validation_dataset_id=form.validation.id if form.validation else None,
        name=form.typed.get("name", "").strip()[:200] or None,
        priority=form.priority if form.priority != "normal" else None,
        resources=form.resources,
        preset=form.preset if form.preset != "balanced" else None,
        strategy={"name": form.method, **filled.settings},
        run=run.settings,
        split=None if form.validation else _split_asked(form.typed),
        task=form.task if form.task != form.tasks[0] else None,
        preference=_preference_asked(form, compared),
        graders=_graders_asked(form.typed) if OBJECTIVES[form.task].graded else None,
    )
    try:
        jobs.check_priority(user, form.order.priority)
        found = spec_builder.context_of(session, user, form.order)
        form.spec = spec_builder.spec_on(found, form.order)
        form.estimate = spec_builder.estimate_of(session, form.spec, form.resources)
        form.machine_bytes = _memory(form.spec.run.device, form.resources, form.estimate)
        for place, card in enumerate(form.presets):
            spec = spec_builder.spec_on(found, form.order.model_copy(update={"preset": card.name}))
            form.presets[place] = replace(card, estimate=spec_builder.figures_of(session, spec, form.resources))
    except StudioError as error:
        param = "graders" if (error.param or "").startswith("graders") else error.param or ""
        form.errors[FIELDS.get(param, param)] = str(error)


def _preference_asked(form: OrderForm, compared: Filled | None) -> dict[str, Any] | None:
    settings = dict(compared.settings) if compared else {}
    if rewards := form.rewards:
        settings["grader"] = reward_form.asked(rewards, form.typed)
    if (teachers := form.teachers) is not None:
        settings["teacher"] = form.typed.get("preference.teacher") or next((name for name, _ in teachers), "")
    return settings or None


def _graders_asked(typed: Mapping[str, str]) -> list[str | dict[str, Any]] | None:
    """Saved graders that are ticked, and those of a cloned job or a file, which the form carries as JSON."""
    saved: list[str | dict[str, Any]] = [
        name.removeprefix("grader.") for name, value in typed.items() if name.startswith("grader.") and value
    ]
    carried = from_json(typed.get("graders") or "[]", [])
    return [*saved, *(one for one in carried if isinstance(one, dict))] or None


def _split_asked(typed: Mapping[str, str]) -> Split | None:
    """The validation split, unless it is random by the run's own seed."""
    method, column, seed = typed.get("split.method", ""), typed.get("split.column", "") or None, whole_number(typed.get("split.seed", ""))
    own = {"seed": seed} if seed is not None and seed < 2**31 else {}
    return Split(method=method, column=column, **own) if method in ("stratified", "grouped") else Split(**own) if own else None


def with_rows(found: list[FormField], rows: int | None) -> list[FormField]:
    """The controls, with the batch size in rows too, as other tools count it."""
    return [
        replace(c, unit=ngettext("≈ %(num)s row", "≈ %(num)s rows", rows)) if rows and c.name == "max_tokens_per_step" else c for c in found
    ]


def _moved(usable: list[Dataset], typed: Mapping[str, str]) -> bool:
    """Whether a dataset for another task was chosen after the form was shown for `task`."""
    from app.datasets import service as datasets

    dataset = next((d for d in usable if ids.public(ids.DATASET, d.id) == typed.get("dataset")), None)
    task = datasets.usual_task(dataset) if dataset else None
    return bool(typed.get("task") and task and task != typed["task"])


def _memory(device: str, resources: Resources | None = None, estimate: Mapping[str, Any] | None = None) -> int | None:
    """Bytes available to a job on the machine that it is planned for: the GPU's where there is one and it is used."""
    from app.machines import heartbeats

    there = [one.on(device).training_memory_bytes for one in heartbeats.training_machines(resources, device)]
    return next((size for size in there if estimate and estimate["memory_bytes"] <= FITS * size), there[-1 if estimate else 0])


def _reference(session: Session, model: Model | None) -> ModelRef | None:
    try:
        return models.reference(session, model) if model and model.shape else None
    except StudioError:
        return None  # a part of it is gone: building the job reports that at the field


def _carried(typed: Mapping[str, str], strategy: type[Strategy]) -> dict[str, str]:
    """Settings entered for this strategy. Those of the previous strategy are carried over where both have the field and a person
    changed it; others are kept for the way back."""
    before = STRATEGIES.get(typed.get("shown", ""), strategy)
    if before is strategy:
        return dict(typed)
    defaults = {name: as_text(info.get_default(call_default_factory=True)) for name, info in before.model_fields.items()}
    values = {key.removeprefix("kept."): value for key, value in typed.items() if key.startswith("kept.")}
    for key, value in typed.items():
        name = key.removeprefix("strategy.")
        if key.startswith("strategy.") and value != defaults.get(name):
            values[name] = value
        elif key.startswith("strategy."):
            values.pop(name, None)
    known = {f"strategy.{name}": value for name, value in values.items() if name in strategy.model_fields and name != "name"}
    return known | {f"kept.{name}": value for name, value in values.items() if name not in strategy.model_fields}
