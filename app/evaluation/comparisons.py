"""Comparisons: several jobs on the same data, split, seed and token budget, created together and shown in one table.

Several base models are compared on the same rows with each of the chosen strategies. Their tokenizers differ, so generation is judged
by bits per byte, not by the loss of a token.

A learning curve compares one strategy with itself, on a quarter, half and all of the training rows. The validation rows are the
same for all, and so is the number of tokens each job reads: with fewer rows there are more epochs, so that the data differs and
not the training time.

The table is computed in `app/evaluation/comparison_table.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from sqlalchemy import Select, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import ownership
from app.errors import BadField, Conflict, DoesNotFit, NotFound, StudioError
from app.jobs import request as job_request
from app.jobs import service as jobs
from app.jobs import spec_builder
from app.jobs.defaults import usual_run
from app.jobs.request import DatasetId, JobRequest, bad_field
from app.kit import ids, once
from app.kit.forms import as_text
from app.models import service as models
from app.objectives import Task
from app.ownership import owned
from app.run_settings import RunSettings
from app.spec import Split
from app.strategies import Strategy
from app.tables import JSON, Comparison, Job, Model, User

Kind = Literal["strategies", "learning_curve", "models"]
FRACTIONS = (0.25, 0.5, 1.0)
MAX_MODELS = 8
"""Base models of one comparison."""


class ComparisonOrder(BaseModel):
    """What is compared. `strategies` are names, or strategies with their settings as a job takes them; `run` holds for all. Several
    base models are named by `models` and the kind `models`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    models: list[str] | None = Field(None, min_length=2, max_length=MAX_MODELS)
    strategies: list[str | dict[str, Any]] = Field(min_length=1, max_length=40)
    dataset_id: DatasetId | None = None
    training_file: str | None = None
    validation_dataset_id: DatasetId | None = None
    validation_file: str | None = None
    split: Split | None = None
    task: Task | None = None
    kind: Kind = "strategies"
    fractions: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=list(FRACTIONS), min_length=2, max_length=8)
    run: dict[str, Any] = Field(default_factory=dict)
    preference: dict[str, Any] | None = None
    name: Annotated[str, StringConstraints(max_length=200)] | None = None
    seed: int | None = Field(None, ge=0, le=2**31 - 1)

    @model_validator(mode="after")
    def _names_its_models(self) -> ComparisonOrder:
        if (self.kind == "models") != (self.models is not None):
            raise ValueError("the kind `models` compares the base models in `models`, and no other kind takes them")
        if (self.model is None) == (self.models is None):
            raise ValueError("name one base model in `model`, or several in `models` with the kind `models`")
        if self.models and len(set(self.models)) < len(self.models):
            raise ValueError("a base model is named twice in `models`")
        return self

    @property
    def bases(self) -> list[str]:
        """The base models that are compared: one, or several."""
        return self.models or [self.model or ""]


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


def read_order(body: Mapping[str, Any]) -> ComparisonOrder:
    try:
        return ComparisonOrder.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise bad_field(error) from None


# Ordering -----------------------------------------------------------------------------------------------------------


def create(session: Session, user: User, order: ComparisonOrder, idempotency_key: str | None = None) -> Comparison:
    """A comparison and its queued jobs, in this transaction. A strategy that the model or machine cannot run is refused with the
    reason, and the others go on. Raises DoesNotFit when too few are left, and any error of the request."""
    asked = order.model_dump(mode="json", exclude_none=True)
    if idempotency_key is not None and (earlier := _by_key(session, user, idempotency_key, asked)) is not None:
        return earlier
    plan = planned(session, user, order)
    _check_enough(order, plan)
    name = (order.name or f"{_title(order, plan)} on {plan.dataset_name}")[:200]
    key = session.scalar(
        insert(Comparison)
        .values(
            id=uuid.uuid4(),
            owner_id=user.id,
            project_id=user.project_id,
            name=name,
            kind=order.kind,
            order=asked,
            refused=plan.refused,
            idempotency_key=idempotency_key,
        )
        .on_conflict_do_nothing(index_elements=["project_id", "owner_id", "idempotency_key"])
        .returning(Comparison.id)
    )
    if key is None:  # the same request came twice concurrently, and the other one won
        return _by_key(session, user, idempotency_key or "", asked) or create(session, user, order, idempotency_key)
    for one in plan.jobs:
        jobs.create(session, user, one.order.model_copy(update={"name": f"{name[:120]}: {one.title}", "comparison_id": key}))
    return session.get_one(Comparison, key)


def planned(session: Session, user: User, order: ComparisonOrder) -> Plan:
    """The jobs that would be created with their estimates, and the strategies that are refused, each with its reason.

    Raises NotFound, BadField or Conflict for an error of the request as a whole.
    """
    contexts = {name: spec_builder.context_of(session, user, _job_order(order, name, {}, None)) for name in order.bases}
    found = contexts[order.bases[0]]
    plan = Plan(found.dataset.name, [], [])
    if found.dataset.status != "ready":
        raise Conflict(
            f"The dataset {found.dataset.name} is still being read, so it is not known yet which methods fit.",
            hint="Ask again in a moment.",
            param="dataset_id",
            code="still_reading",
        )
    usual = usual_run(found.dataset, order.run, validated_elsewhere=found.validation is not None)
    with once.remembered():
        for name, context in contexts.items():
            _plan_jobs(session, order, name, context, usual, plan)
    return plan


def _plan_jobs(session: Session, order: ComparisonOrder, model: str, found: spec_builder.OrderContext, usual: JSON, plan: Plan) -> None:
    """Put every job of a base model that can be had, and every refusal, into the plan."""
    for strategy in _read_strategies(order):
        for fraction in sorted(set(order.fractions)) if order.kind == "learning_curve" else (None,):
            asked = {"name": strategy.name, **strategy.model_dump(mode="json", exclude_defaults=True)}
            one = _job_order(order, model, asked, fraction, usual)
            title = title_of(strategy) if fraction is None else f"{strategy.title}, {fraction:.0%} of the rows"
            if order.models:
                title = f"{model}, {title}"
            reason, estimate = _try(session, found, one)
            if estimate is None:
                plan.refused.append({"model": model, "strategy": strategy.name, "title": title, "reason": reason})
            else:
                plan.jobs.append(Planned(model, strategy.name, title, one, estimate))


def _read_strategies(order: ComparisonOrder) -> list[Strategy]:
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
                f"{title_of(strategy)} is named twice with the same settings.",
                hint="Remove one of them, or give it other settings.",
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
        return (
            f"{spec.strategy.title} needs {cost['memory_bytes'] / 1e9:.1f} GB of memory, which this machine does not have. "
            "Choose a shorter length or fewer tokens per batch.",
            None,
        )
    return "", cost


def _check_enough(order: ComparisonOrder, plan: Plan) -> None:
    """Raises DoesNotFit with the reasons when nothing is left to compare."""
    reasons = " ".join(dict.fromkeys(r["reason"] for r in plan.refused))
    if order.kind == "learning_curve" and len(order.strategies) != 1:
        raise BadField("A learning curve is drawn for one strategy.", hint="Name exactly one.", param="strategies")
    if not plan.jobs:
        raise DoesNotFit(
            f"No method of this comparison fits. {reasons[:1500]}",
            hint="Choose other methods, another model, or fewer tokens per batch.",
            param="strategies",
            code="no_strategy_fits",
        )
    if len(plan.jobs) < 2:
        raise DoesNotFit(
            f"Only {plan.jobs[0].title} is left to compare. {reasons[:1500]}".strip(),
            hint="Choose at least two methods or base models that can run, or create one job.",
            param="strategies",
            code="nothing_to_compare",
        )


def title_of(strategy: Strategy) -> str:
    """Its title, with the settings that differ from the defaults: `LoRA (rank 4)`."""
    changed = strategy.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    words = ", ".join(f"{name.replace('_', ' ')} {as_text(value)}" for name, value in changed.items())
    return f"{strategy.title} ({words})" if words else strategy.title


def _title(order: ComparisonOrder, plan: Plan) -> str:
    if order.kind == "learning_curve":
        return f"Learning curve of {_read_strategies(order)[0].title}"
    if order.models:
        return f"{len({one.model for one in plan.jobs})} base models"
    return f"{len(plan.jobs)} methods"


def _by_key(session: Session, user: User, key: str, asked: JSON) -> Comparison | None:
    found = session.scalar(
        select(Comparison).where(
            Comparison.project_id == user.project_id, Comparison.owner_id == user.id, Comparison.idempotency_key == key
        )
    )
    if found is not None and found.order != asked:
        raise Conflict(
            "This Idempotency-Key was used for another order.",
            hint="Send a new key with a new order, or the first order unchanged.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return found


# Looking ------------------------------------------------------------------------------------------------------------


def mine(user: User) -> Select[Comparison]:
    return ownership.mine(Comparison, user)


def get(session: Session, user: User, comparison_id: uuid.UUID) -> Comparison:
    """One's own comparison. Raises NotFound, also for another person's."""
    return owned(session, Comparison, user, comparison_id)


def jobs_of(session: Session, *found: Comparison) -> list[Job]:
    """The jobs of some comparisons in the order in which they were named, without deleted ones."""
    query = select(Job).where(Job.comparison_id.in_([c.id for c in found]), Job.deleted_at.is_(None))
    if found:
        query = query.where(Job.project_id == found[0].project_id)
    return list(session.scalars(query.order_by(Job.created_at, Job.id).execution_options(populate_existing=True)))


def status_of(found: Iterable[str]) -> str:
    """Status from those of its jobs: `queued`, `running` or `paused`; once every job has ended `succeeded` if one of them did,
    else `failed` or `cancelled`."""
    states = set(found)
    if states <= set(jobs.ENDED):
        return next((status for status in ("succeeded", "failed", "cancelled") if status in states), "cancelled")
    if states <= {"queued"}:
        return "queued"
    return "paused" if states <= {"paused", *jobs.ENDED} else "running"


# Asking -------------------------------------------------------------------------------------------------------------


def cancel(session: Session, user: User, comparison_id: uuid.UUID) -> Comparison:
    """Cancel every job of it that has not ended. Raises NotFound."""
    found = get(session, user, comparison_id)
    for job in jobs_of(session, found):
        if job.status not in jobs.ENDED:
            try:
                jobs.cancel(session, user, job.id)
            except Conflict:  # it ended between the two queries
                continue
    return found


def delete(session: Session, user: User, comparison_id: uuid.UUID) -> None:
    """Delete the comparison; its jobs and their models stay. Raises NotFound, Conflict while a job of it has not ended."""
    found = get(session, user, comparison_id)
    open_ = [job for job in jobs_of(session, found) if job.status not in jobs.ENDED]
    if open_:
        raise Conflict(
            f"{len(open_)} of its jobs {'has' if len(open_) == 1 else 'have'} not ended ({open_[0].name} is {open_[0].status}).",
            hint="Cancel the comparison first, or wait for its jobs.",
            param="comparison_id",
            code="wrong_state",
        )
    found.deleted_at = func.clock_timestamp()
    session.flush()


def keep(session: Session, user: User, comparison_id: uuid.UUID, job_id: uuid.UUID) -> Model:
    """Offer the result of one of its jobs wherever models are chosen. Raises NotFound, Conflict for a job without a model."""
    found = get(session, user, comparison_id)
    job = next((job for job in jobs_of(session, found) if job.id == job_id), None)
    if job is None:
        raise NotFound(f"No such job in this comparison: {ids.public(ids.JOB, job_id)}", param="job")
    model = jobs.tuned_model(session, job)
    if model is None:
        raise Conflict(f"{job.name} has no model that could be kept.", hint="Keep the result of a job that succeeded.", param="job")
    return models.keep(model)


def of_job(session: Session, job: Job) -> Comparison | None:
    """The comparison that a job belongs to, unless it was deleted."""
    if job.comparison_id is None:
        return None
    query = select(Comparison).where(Comparison.id == job.comparison_id, Comparison.project_id == job.project_id)
    return session.scalar(query.where(Comparison.deleted_at.is_(None)))
