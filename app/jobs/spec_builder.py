"""Builds the spec of a job from a validated request, and estimates what the job costs.

Everything that can be known to be wrong is reported here, before a job exists: a missing model or file, a dataset with errors, a
setting out of range, a strategy the model cannot run.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from sqlalchemy.orm import Session

from app import graders, objectives, saved_graders
from app.errors import BadField, StudioError
from app.graders import Grader
from app.jobs import reinforcement_order
from app.jobs.defaults import mean_tokens, usual_run
from app.jobs.order_rows import check_dataset, split_of
from app.jobs.request import JobRequest, bad_field, read_objective_settings, read_strategy
from app.kit import ids
from app.kit.humanize import human_number
from app.kit.states import state_word
from app.languages import gettext
from app.machines.placement import Resources
from app.models import asked_models
from app.models.vocabulary import refuse_known_tokens
from app.objectives import OBJECTIVES, DrawnSettings, Task
from app.planning import data_warnings, feasibility
from app.planning.reinforcement import refuse_drawn, refuse_server
from app.run_settings import RunSettings
from app.settings import get_settings
from app.shapes import Shape
from app.spec import AskedModel, DatasetRef, JobSpec, ModelRef, usual_learning_rate
from app.strategies import Strategy
from app.tables import JSON, Dataset, Model, User

SUPERVISED = "supervised"


class OrderContext(NamedTuple):
    """The model and the data of a request, found and checked, on which every strategy can be planned."""

    model: ModelRef
    dataset: Dataset
    validation: Dataset | None
    task: Task
    graders: tuple[JSON, ...] = ()
    reward: JSON | None = None  # the grader of reinforcement
    judges: tuple[AskedModel, ...] = ()  # the models that both ask
    teacher: ModelRef | None = None
    served: bool = False  # another server answers for the model, and takes tokens


def build_spec(session: Session, user: User, order: JobRequest) -> JobSpec:
    """The spec of a request. While the dataset is still being parsed, its reference has no path yet (see `lifecycle.has_rows`)
    and the spec is built again when it is ready. Raises BadField, NotFound or Conflict with `param`."""
    return spec_on(context_of(session, user, order), order)


def context_of(session: Session, user: User, order: JobRequest) -> OrderContext:
    """The model and data of a request. Raises BadField, NotFound or Conflict with `param`."""
    from app.models import service as models

    resolved = _with_param("model", models.resolve, session, user, order.model)
    if resolved.model.status != "ready":
        raise BadField(
            gettext("The model %(model)s is not ready: it is %(status)s.", model=order.model, status=state_word(resolved.model.status)),
            hint=gettext("Wait until it has been fetched, or look at its page for what went wrong."),
            param="model",
        )
    if any(adapter.blend < 1 for adapter in resolved.ref.adapters):
        hint = gettext("Fine-tune the model itself, or its base, and blend the result.")
        raise BadField(
            gettext("%(model)s is a blend, which can be used and evaluated but not fine-tuned.", model=order.model),
            hint=hint,
            param="model",
        )
    dataset, param = _dataset(session, user, order.dataset_id, order.training_file, "training_file")
    if dataset is None:
        raise BadField(
            gettext("No data was named."),
            hint=gettext("Send training_file or dataset_id."),
            param="training_file",
            code="missing_required_parameter",
        )
    validation, validation_param = _dataset(session, user, order.validation_dataset_id, order.validation_file, "validation_file")
    task = _task(order, dataset)
    for named, where in ((dataset, param), (validation, validation_param)):
        if named is not None:
            check_dataset(named, task, where)
    feasibility.refuse_untunable(resolved.ref, task if _task_is_known(order, dataset) else "classification")
    feasibility.refuse_labels(task, dataset, validation, param, validation_param)
    reward = reinforcement_order.reward_of(session, user, order) if OBJECTIVES[task].rewards else None
    graded = saved_graders.named(session, user, order.graders or [])
    judges = _with_param("graders", asked_models.of_job, session, user, [*([reward] if reward else []), *graded])
    teachers_name = str((order.preference or {}).get("teacher") or "")
    teacher = asked_models.teacher(session, user, teachers_name, resolved.ref) if OBJECTIVES[task].teaches else None
    return OrderContext(
        resolved.ref,
        dataset,
        validation,
        task,
        trainable_graders(graded, task),
        graders.to_json(reward) if reward else None,
        judges,
        teacher,
        served_elsewhere(resolved.model, resolved.ref),
    )


def served_elsewhere(model: Model, ref: ModelRef) -> bool:
    """Whether a server that takes tokens answers for the model, which is a base."""
    return not ref.adapters and model.answered_elsewhere and (model.engine or {}).get("via") == "tokens"


def spec_on(found: OrderContext, order: JobRequest) -> JobSpec:
    """The spec of a request whose context is known. Raises BadField for the strategy and the settings."""
    from app.machines import heartbeats

    model, dataset, validation, task, graded, reward, judges, teacher, served = found
    strategy = read_strategy(order.strategy)
    feasibility.refuse_modules(strategy, model.shape, task)
    own = _objective_settings(order, task, dataset, reward)
    run = _run_settings(order, strategy, dataset, task, own)
    reason = why_not(strategy, model.shape, task if _task_is_known(order, dataset) else None, run.device, order.resources)
    if reason:
        hidden = run.device == "cpu" and has_gpu()
        without = gettext("Choose another method or model, or leave device out.")
        hint = without if hidden else gettext("Choose another method or model.")
        raise BadField(reason, hint=hint, param="strategy", code="strategy_unavailable")
    feasibility.refuse_no_room(strategy, run, model.shape)
    feasibility.refuse_unread(strategy, run)
    refuse_judges(judges, _processes(order.resources))
    check_graded(run, graded, validated_elsewhere=validation is not None, reward=reward is not None)
    if isinstance(own, DrawnSettings):
        refuse_drawn(strategy, run, own, model.shape)
    refuse_server(strategy, run, own, served=served, processes=_processes(order.resources))
    feasibility.refuse_without_prompt(model.shape, dataset.format)
    feasibility.refuse_turns(run, task, dataset.format)
    feasibility.refuse_rehearsal(run, task)
    feasibility.refuse_template(run, task, model.kind, dataset.format)
    feasibility.refuse_new_tokens(strategy, run, task, model.shape)
    if run.new_tokens:
        refuse_known_tokens(run.new_tokens, model)
    feasibility.refuse_without_gpu(strategy, run, task, heartbeats.training_machine(order.resources, run.device))
    return JobSpec(
        name=order.name or f"{dataset.name} with {strategy.title}",
        task=task,
        model=model,
        dataset=reference(dataset),
        validation=reference(validation) if validation is not None else None,
        split=split_of(order, dataset),
        run=run,
        strategy=strategy,
        preference=own,
        graders=graded,
        judges=judges,
        teacher=teacher,
    )


def _processes(asked: Resources | None) -> int:
    """How many processes train a job that asks for this."""
    wanted = asked or Resources()
    return (wanted.gpus or get_settings().gpus_per_job) * (wanted.machines or 1)


def refuse_judges(judges: Sequence[AskedModel], processes: int) -> None:
    """Raises BadField where several processes would train together, of which none may ask models."""
    if judges and processes > 1:
        raise BadField(
            gettext("A grader asks the model %(model)s, which a job of several processes cannot.", model=judges[0].name)
            if judges[0].name
            else gettext("A grader needs embeddings from a model, which a job of several processes cannot ask."),
            hint=gettext("Take a grader without a model, or ask for one GPU (resources.gpus, or LUTHIER_GPUS_PER_JOB for all jobs)."),
            param="graders",
        )


def trainable_graders(found: Sequence[Grader], task: Task) -> tuple[JSON, ...]:
    """Graders as a spec has them. Raises BadField for what a trainer cannot grade."""
    if found and not OBJECTIVES[task].graded:
        raise BadField(
            gettext("Graders score written answers; a job for %(task)s writes none.", task=task),
            hint=gettext("Remove graders."),
            param="graders",
        )
    return tuple(map(graders.to_json, found))


def check_graded(run: RunSettings, graded: tuple[JSON, ...], *, validated_elsewhere: bool, reward: bool = False) -> None:
    """Raises BadField for settings and graders that need each other. A `reward` is a grader too, and needs no validation rows."""
    if not reward and run.graded_rows != RunSettings.model_fields["graded_rows"].default and not graded:
        raise BadField(
            gettext("graded_rows means nothing without graders."), hint=gettext("Omit it, or send graders."), param="run.graded_rows"
        )
    if run.metric_for_best == "grader" and not graded and not reward:
        raise BadField(
            gettext("No grader was named to choose the best checkpoint by."), hint=gettext("Send graders."), param="run.metric_for_best"
        )
    if graded and not validated_elsewhere and run.validation_fraction == 0:
        raise BadField(
            gettext("Graders need validation rows, and none are held out."), hint=gettext("Set validation_fraction."), param="graders"
        )


def why_not(strategy: Strategy, shape: Shape, task: str | None, device: str = "auto", asked: Resources | None = None) -> str | None:
    """Why this strategy cannot fine-tune such a model here, on `device`, with what was asked for; None where it can. Without a task, as while rows are
    still being parsed, any task that it supports will do."""
    reasons = [strategy.unavailable(shape, task=one, cuda=has_gpu(device, asked)) for one in ((task,) if task else strategy.tasks)]
    return reasons[0] if all(reasons) else None


def reference(dataset: Dataset) -> DatasetRef:
    """The reference of the rows; without a path while they are still being parsed."""
    from app.datasets import service as datasets

    if dataset.status == "ready":
        return datasets.reference(dataset)
    return DatasetRef(id=dataset.id, name=dataset.name, path="", sha256="", format=dataset.format or "", rows=0)


def _with_param(param: str, call: Any, *arguments: Any) -> Any:
    """Call a service, adding to its errors the field of this request that named the object."""
    try:
        return call(*arguments)
    except StudioError as error:
        error.param = param
        raise


def _dataset(session: Session, user: User, dataset_id: uuid.UUID | None, file_id: str | None, param: str) -> tuple[Dataset | None, str]:
    from app.datasets import service as datasets

    if dataset_id is not None:
        param = "dataset_id" if param == "training_file" else "validation_dataset_id"
        return _with_param(param, datasets.get, session, user, dataset_id), param
    if file_id is not None:
        key = ids.parse(ids.FILE, file_id, param=param)
        return _with_param(param, datasets.for_file, session, user, key), param
    return None, param


def _task(order: JobRequest, dataset: Dataset) -> Task:
    from app.datasets import service as datasets

    if order.method and (named := _named_by_method(order)):
        if order.task not in (None, *named):
            raise BadField(
                gettext(
                    "The method %(method)s is for %(tasks)s, not %(task)s.",
                    method=order.method.type,
                    tasks=_all_of(named),
                    task=order.task,
                ),
                hint=gettext("Omit task."),
                param="task",
            )
        return order.task or named[0]
    own = objectives.get(datasets.usual_task(dataset)).method
    if order.method and order.task is None and dataset.status == "ready" and own != SUPERVISED:
        raise BadField(
            gettext(
                "The method supervised needs single answers, and the dataset %(dataset)s is for %(task)s.",
                dataset=dataset.name,
                task=datasets.usual_task(dataset),
            ),
            hint=gettext("Set the method to %(own)s, or choose a dataset with one answer to each prompt.", own=own),
            param="method.type",
        )
    return order.task or (datasets.usual_task(dataset) if dataset.status == "ready" else None) or objectives.DEFAULT


def _all_of(names: Sequence[str]) -> str:
    """`a and b and c`."""
    return functools.reduce(lambda one, other: gettext("%(one)s and %(other)s", one=one, other=other), names)


def _named_by_method(order: JobRequest) -> list[str]:
    """The objectives of the requested method; none where it leaves them open, as supervised does."""
    wanted = order.method.type if order.method else SUPERVISED
    return [] if wanted == SUPERVISED else [name for name, entry in OBJECTIVES.items() if entry.method == wanted]


def _task_is_known(order: JobRequest, dataset: Dataset) -> bool:
    return order.task is not None or dataset.status == "ready" or bool(_named_by_method(order))


MAX_STEP_TOKENS = 1_048_576
"""Maximum of `max_tokens_per_step`. A batch of more rows is limited to it: a row has at least one token."""


def _run_settings(order: JobRequest, strategy: Strategy, dataset: Dataset, task: Task, own: BaseModel | None) -> RunSettings:
    """Our run settings; `run` takes precedence over OpenAI's settings.

    `n_epochs` is our epochs. `learning_rate_multiplier` multiplies the strategy's own learning rate. `batch_size` counts rows
    where we count tokens, so it is multiplied by the mean length of a row of this dataset, in tokens.
    """
    asked, settings = order.asked(), dict(order.run)
    for name, value in (
        ("n_epochs", asked.n_epochs),
        ("batch_size", asked.batch_size),
        ("learning_rate_multiplier", asked.learning_rate_multiplier),
    ):
        if value != "auto" and value <= 0:
            raise BadField(
                gettext("%(name)s cannot be %(value)s.", name=name, value=value),
                hint=gettext('Give a number above 0, or "auto".'),
                param=f"hyperparameters.{name}",
            )
    if asked.n_epochs != "auto":
        settings.setdefault("epochs", asked.n_epochs)
    if asked.learning_rate_multiplier != "auto":
        usual = usual_learning_rate(strategy, task, str(settings.get("optimizer", "adamw")))
        settings.setdefault("learning_rate", usual * asked.learning_rate_multiplier)
    drawn = own if isinstance(own, DrawnSettings) else None
    if drawn:
        reinforcement_order.fill_run(settings, asked)
    elif asked.batch_size != "auto" and dataset.status == "ready" and settings.get("batch_size") is None:
        settings.setdefault(
            "max_tokens_per_step", max(16, min(round(min(asked.batch_size, MAX_STEP_TOKENS) * mean_tokens(dataset)), MAX_STEP_TOKENS))
        )
    elsewhere = bool(order.validation_file or order.validation_dataset_id)
    preset = order.preset or "balanced"
    settings |= usual_run(dataset, settings, validated_elsewhere=elsewhere, preset=preset, drawn=drawn, resources=order.resources)
    if settings.get("learning_rate") is None:
        settings["learning_rate"] = usual_learning_rate(strategy, task, str(settings.get("optimizer", "adamw")))
    if order.seed is not None:
        settings.setdefault("seed", order.seed)
    try:
        return RunSettings.model_validate(settings)
    except ValidationError as error:
        raise bad_field(error, "run") from None


def _objective_settings(order: JobRequest, task: Task, dataset: Dataset, reward: JSON | None) -> BaseModel | None:
    """The objective's own settings; `preference` takes precedence over OpenAI's `beta`."""
    wanted = OBJECTIVES[task].settings
    if wanted is None:
        # While the dataset is being parsed its task is unknown, so settings of another task are refused when it is ready.
        if order.preference is not None and dataset.status == "ready":
            raise BadField(
                gettext(
                    "The settings “preference” are for %(tasks)s; this job is for %(task)s.",
                    tasks=_all_of([n for n, o in OBJECTIVES.items() if o.settings]),
                    task=task,
                ),
                hint=gettext("Remove them, or choose another dataset."),
                param="preference",
            )
        return None
    settings, beta = dict(order.preference or {}), order.asked().beta
    if beta != "auto" and "beta" in wanted.model_fields:
        if not 0 < beta <= 10:
            raise BadField(
                gettext("beta cannot be %(beta)s.", beta=beta),
                hint=gettext('Give a number above 0 and up to 10, or "auto".'),
                param="hyperparameters.beta",
            )
        settings.setdefault("beta", beta)
    if reward is not None:
        settings = {**reinforcement_order.asked_settings(order), **settings, "grader": reward}
    return read_objective_settings(task, settings)


def has_gpu(device: str = "auto", asked: Resources | None = None) -> bool:
    """Whether a job on this device, which asks for this, has a GPU."""
    from app.machines import heartbeats

    return heartbeats.training_machine(asked, device).on(device).cuda


def figures_of(session: Session, spec: JobSpec, asked: Resources | None = None) -> JSON | None:
    """Memory, time and steps of a job on the weakest machine that has what it asks for and holds it, or on the strongest; None while its rows
    are not known."""
    from app.datasets import inspections
    from app.machines import heartbeats
    from app.planning import duration

    if not spec.dataset.path:
        return None
    stats = inspections.stats_for(session, session.get_one(Dataset, spec.dataset.id), spec.model)
    checked_on = inspections.stats_for(session, session.get_one(Dataset, spec.validation.id), spec.model) if spec.validation else None
    for machine in heartbeats.training_machines(asked, spec.run.device):
        found = duration.estimate(spec, stats, machine, checked_on)
        if found.fits:
            break
    return found.model_dump(mode="json")


def estimate_of(session: Session, spec: JobSpec, asked: Resources | None = None) -> JSON | None:
    """The job's estimate, with `warnings` about its data and the leakage of its split (`overlap`, see there); None while its rows
    are not known."""
    from app.datasets import service as datasets
    from app.jobs import split_leakage

    found = figures_of(session, spec, asked)
    if found is None:
        return None
    dataset = session.get_one(Dataset, spec.dataset.id)
    validation = session.get_one(Dataset, spec.validation.id) if spec.validation else None
    both_sides, warnings = split_leakage.leakage_summary(session, spec)
    later = datasets.failed_later(session, dataset)
    warnings = [
        *data_warnings.later_failed(dataset, later),
        *data_warnings.few_steps(spec, found["steps"]),
        *data_warnings.warnings(spec, dataset, validation),
        *_refused_rows(spec, dataset),
        *warnings,
    ]
    return found | {"warnings": warnings, "overlap": both_sides}


def _refused_rows(spec: JobSpec, dataset: Dataset) -> list[str]:
    """A warning that the job would stop at rows that the model's own chat template refuses, where its dataset was read with this model."""
    report = dataset.report or {}
    count = (report.get("findings") or {}).get("template_refuses", {}).get("count", 0)
    if not count or report.get("tokenizer") != spec.model.name or spec.run.chat_template != "model":
        return []
    return [
        gettext(
            "The chat template of %(model)s refuses %(count)s of %(rows)s rows, and the run would stop at the first of them. "
            "Choose another chat template under Advanced (hermes for rows with tool calls), or look at the rows under the dataset's issues.",
            model=spec.model.name,
            count=human_number(count),
            rows=human_number(dataset.rows),
        )
    ]
