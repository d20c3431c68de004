"""The order of a comparison, and its plan: the jobs that it would create with their estimates, and what is refused with the reason.

A plan is made for every base model on every dataset with every strategy. All jobs of one dataset have the same defaults, so that they
differ in what is compared alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from sqlalchemy.orm import Session

from app.errors import BadField, Conflict, StudioError
from app.jobs import request as job_request
from app.jobs import spec_builder
from app.jobs.defaults import usual_run
from app.jobs.request import DatasetId, JobRequest
from app.kit import once
from app.kit.forms import as_text
from app.kit.humanize import human_number, human_percent
from app.languages import gettext, ngettext
from app.objectives import Task
from app.run_settings import RunSettings
from app.spec import Split
from app.strategies import Strategy
from app.tables import JSON, User

Kind = Literal["strategies", "learning_curve", "models", "matrix"]
FRACTIONS = (0.25, 0.5, 1.0)
MAX_MODELS, MAX_DATASETS = 8, 8
"""Base models and datasets of one comparison."""
MAX_JOBS = 100
FROM_NOTHING: dict[str, Any] = {"name": "full", "weights": "random"}
"""The strategy of a job that trains the same shape from random weights."""


class SharedOrder(BaseModel):
    """The data and the settings that hold for all jobs of a comparison or a search."""

    model_config = ConfigDict(extra="forbid")

    strategies: list[str | dict[str, Any]] = Field(min_length=1, max_length=40)
    dataset_id: DatasetId | None = None
    training_file: str | None = None
    validation_dataset_id: DatasetId | None = None
    validation_file: str | None = None
    split: Split | None = None
    task: Task | None = None
    run: dict[str, Any] = Field(default_factory=dict)
    preference: dict[str, Any] | None = None
    name: Annotated[str, StringConstraints(max_length=200)] | None = None
    seed: int | None = Field(None, ge=0, le=2**31 - 1)


ONE_DATASET = ("dataset_id", "training_file", "validation_dataset_id", "validation_file", "split", "task", "preference")
"""Fields that belong to one dataset, which a matrix has none of."""


class ComparisonOrder(SharedOrder):
    """What is compared. `strategies` are names, or strategies with their settings as a job takes them; `run` holds for all. Several
    base models are named by `models` and the kind `models`; with the kind `matrix` each of them is run on every one of `dataset_ids`."""

    model: str | None = None
    models: list[str] | None = Field(None, min_length=1, max_length=MAX_MODELS)
    dataset_ids: list[DatasetId] | None = Field(None, min_length=2, max_length=MAX_DATASETS, description="The datasets of a matrix.")
    from_nothing: bool = Field(
        False, description="Also train each base model's shape from random weights, which shows what pre-training is worth."
    )
    kind: Kind = "strategies"
    fractions: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=list(FRACTIONS), min_length=2, max_length=8)

    @model_validator(mode="after")
    def _names_its_models(self) -> ComparisonOrder:
        if (self.kind in ("models", "matrix")) != (self.models is not None):
            raise ValueError("the kinds `models` and `matrix` compare the base models in `models`, and no other kind takes them")
        if self.kind == "models" and len(self.models or ()) < 2:
            raise ValueError("the kind `models` compares at least 2 base models")
        if (self.model is None) == (self.models is None):
            raise ValueError("name one base model in `model`, or several in `models` with the kind `models` or `matrix`")
        if self.models and len(set(self.models)) < len(self.models):
            raise ValueError("a base model is named twice in `models`")
        if (self.kind == "matrix") != (self.dataset_ids is not None):
            raise ValueError("the kind `matrix` compares on the datasets in `dataset_ids`, and no other kind takes them")
        if self.dataset_ids and any(getattr(self, name) is not None for name in ONE_DATASET):
            raise ValueError(f"`dataset_ids` names the data of a matrix, each with a split of its own: omit {', '.join(ONE_DATASET)}")
        if self.dataset_ids and len(set(self.dataset_ids)) < len(self.dataset_ids):
            raise ValueError("a dataset is named twice in `dataset_ids`")
        if self.from_nothing and self.kind == "learning_curve":
            raise ValueError("a learning curve is of one method: omit `from_nothing`")
        return self

    @property
    def bases(self) -> list[str]:
        """The base models that are compared: one, or several."""
        return self.models or [self.model or ""]

    def on_each_dataset(self) -> Iterator[ComparisonOrder]:
        """The order on one dataset at a time: itself, or of a matrix one for each of its datasets."""
        if self.dataset_ids is None:
            yield self
        for key in self.dataset_ids or ():
            yield self.model_copy(update={"dataset_id": key})


class Planned(NamedTuple):
    """One job that would be created, and its estimate."""

    model: str
    strategy: str
    title: str
    order: JobRequest
    estimate: JSON


class Plan(NamedTuple):
    dataset_name: str
    jobs: list[Planned]
    refused: list[JSON]  # {model, strategy, title, reason} of those that cannot run

    @property
    def seconds(self) -> float:
        """Of all jobs, in sequence."""
        seconds: float = sum(one.estimate["seconds"] for one in self.jobs)
        return seconds


# Planning -----------------------------------------------------------------------------------------------------------


def planned(session: Session, user: User, order: ComparisonOrder) -> Plan:
    """The jobs that would be created with their estimates, and the strategies that are refused, each with its reason.

    Raises NotFound, BadField or Conflict for an error of the request as a whole.
    """
    plan = Plan("", [], [])
    with once.remembered():
        for one in order.on_each_dataset():
            plan = plan._replace(dataset_name=_plan_on(session, user, one, plan))
    if not order.dataset_ids:
        return plan
    return plan._replace(dataset_name=ngettext("%(num)s dataset", "%(num)s datasets", len(order.dataset_ids)))


def refuse_many(plan: Plan) -> None:
    """Raises BadField for more runs than one comparison may have."""
    if len(plan.jobs) > MAX_JOBS:
        said = gettext("%(runs)s runs are more than the %(most)s of one comparison.", runs=len(plan.jobs), most=MAX_JOBS)
        raise BadField(said, hint=gettext("Compare fewer methods, models or datasets."), param="strategies")


def _plan_on(session: Session, user: User, order: ComparisonOrder, plan: Plan) -> str:
    """Put every job on one dataset, and every refusal, into the plan. Gives the dataset's name."""
    contexts = {name: spec_builder.context_of(session, user, _job_order(order, name, {}, None)) for name in order.bases}
    found = contexts[order.bases[0]]
    if found.dataset.status != "ready":
        raise Conflict(
            gettext("The dataset %(name)s is still being read, so it is not known yet which methods fit.", name=found.dataset.name),
            hint=gettext("Ask again in a moment."),
            param="dataset_ids" if order.dataset_ids else "dataset_id",
            code="still_reading",
        )
    usual = usual_run(found.dataset, order.run, validated_elsewhere=found.validation is not None)
    for name, context in contexts.items():
        _plan_jobs(session, order, name, context, usual, plan)
    return found.dataset.name


def _plan_jobs(session: Session, order: ComparisonOrder, model: str, found: spec_builder.OrderContext, usual: JSON, plan: Plan) -> None:
    """Put every job of a base model that can be had, and every refusal, into the plan."""
    blank = job_request.read_strategy(FROM_NOTHING)
    for strategy in [*read_strategies(order), *([blank] if order.from_nothing else [])]:
        for fraction in sorted(set(order.fractions)) if order.kind == "learning_curve" else (None,):
            asked = {"name": strategy.name, **strategy.model_dump(mode="json", exclude_defaults=True)}
            one = _job_order(order, model, asked, fraction, usual)
            title = title_of(strategy) if fraction is None else _title_on_a_part(strategy, fraction)
            parts = [found.dataset.name if order.dataset_ids else "", model if order.models else "", title]
            title = ", ".join(part for part in parts if part)
            reason, estimate = _try(session, found, one)
            if estimate is None:
                plan.refused.append({"model": model, "strategy": strategy.name, "title": title, "reason": reason})
            else:
                plan.jobs.append(Planned(model, strategy.name, title, one, estimate))


def read_strategies(order: ComparisonOrder) -> list[Strategy]:
    """The strategies with their settings. Raises BadField naming the index in the list."""
    found: list[Strategy] = []
    for place, named in enumerate(order.strategies):
        try:
            strategy = job_request.read_strategy({"name": named} if isinstance(named, str) else named)
        except BadField as error:
            error.param = f"strategies.{place}.{(error.param or '').removeprefix('strategy.')}"
            raise
        if strategy in found:
            raise BadField(
                gettext("%(method)s is named twice with the same settings.", method=title_of(strategy)),
                hint=gettext("Remove one of them, or give it other settings."),
                param=f"strategies.{place}",
            )
        found.append(strategy)
    return found


def _job_order(
    order: ComparisonOrder, model: str, strategy: JSON, fraction: float | None, usual: Mapping[str, Any] | None = None
) -> JobRequest:
    """One job of the comparison. None stops early, so that all read the same tokens; each keeps its best checkpoint. `usual` are
    the defaults for the whole dataset, the same for every job."""
    run: dict[str, Any] = {"early_stopping_patience": 0, **(usual or {}), **order.run}
    if fraction is not None:
        run |= _same_tokens(run, fraction)
    return JobRequest(
        model=model,
        dataset_id=order.dataset_id,
        training_file=order.training_file,
        validation_dataset_id=order.validation_dataset_id,
        validation_file=order.validation_file,
        split=order.split,
        task=order.task,
        strategy=strategy,
        run=run,
        preference=order.preference,
        seed=order.seed,
    )


def _same_tokens(run: Mapping[str, Any], fraction: float) -> dict[str, Any]:
    """Run settings with which a share of the rows is read for as many epochs as give the tokens of all rows."""
    fields = RunSettings.model_fields
    epochs, evaluations = (run.get(name, fields[name].default) for name in ("epochs", "evaluations_per_epoch"))
    if not isinstance(epochs, int | float) or not isinstance(evaluations, int | float):
        return {"data_fraction": fraction}  # errors in them are reported where the settings are parsed
    again = {"data_fraction": fraction, "epochs": epochs / fraction}
    return again if run.get("eval_steps") else again | {"evaluations_per_epoch": evaluations * fraction}


def _try(session: Session, found: spec_builder.OrderContext, order: JobRequest) -> tuple[str, JSON | None]:
    """(why this job cannot run, or ""; its estimate). Raises an error of the request as a whole."""
    try:
        spec = spec_builder.spec_on(found, order)
    except StudioError as error:
        if error.code in ("strategy_unavailable", "no_room", "setting_without_use", "needs_whole_weights"):
            return error.message, None
        raise
    cost = spec_builder.estimate_of(session, spec)
    assert cost is not None, "the rows were read"
    if not cost["fits"]:
        reason = gettext(
            "%(method)s needs %(size)s GB of memory, which this machine does not have. Choose a shorter length or fewer tokens per batch.",
            method=gettext(spec.strategy.title),
            size=human_number(cost["memory_bytes"] / 1e9, 1),
        )
        return reason, None
    return "", cost


def title_of(strategy: Strategy) -> str:
    """Its title, with the settings that differ from the defaults: `LoRA (rank 4)`. From random weights it is no fine-tuning."""
    changed = strategy.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    if changed == {"weights": "random"}:
        return gettext("From nothing")
    words = ", ".join(f"{name.replace('_', ' ')} {as_text(value)}" for name, value in changed.items())
    title = gettext(strategy.title)
    return f"{title} ({words})" if words else title


def _title_on_a_part(strategy: Strategy, fraction: float) -> str:
    return gettext("%(method)s, %(share)s of the rows", method=gettext(strategy.title), share=human_percent(fraction, 0))
