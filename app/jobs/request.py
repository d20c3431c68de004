"""The request for a job: its body, as the API and the form send it, validated field by field. `spec_builder.py` makes a spec of it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, create_model

from app import trackers
from app.errors import BadField, field_path, plain
from app.jobs.fair_share import Priority
from app.kit import ids
from app.languages import gettext, mark
from app.machines.placement import Resources
from app.objectives import METHODS, OBJECTIVES, Task
from app.older_settings import RENAMED
from app.planning.schedule import PresetName
from app.spec import Split
from app.strategies import STRATEGIES, UNNAMED, AnyStrategy, Strategy

Number = float | Literal["auto"]
Count = int | Literal["auto"]


class Hyperparameters(BaseModel):
    """OpenAI's own settings. "auto" leaves the choice to us."""

    n_epochs: Annotated[Count, Field(description="Epochs, 1 to 1000.")] = "auto"
    batch_size: Annotated[Count, Field(description="Rows behind each step.")] = "auto"
    learning_rate_multiplier: Annotated[Number, Field(description="Multiplier of the method's default learning rate.")] = "auto"
    beta: Annotated[Number, Field(description="KL penalty β of preference training.")] = "auto"


class MethodOrder(BaseModel):
    hyperparameters: Hyperparameters | None = None


class ReinforcementHyperparameters(Hyperparameters):
    batch_size: Annotated[Count, Field(description="Prompts of a step.")] = "auto"
    compute_multiplier: Annotated[Number, Field(description="Multiplier of the answers that are drawn for each prompt, which are 8.")] = (
        "auto"
    )
    eval_interval: Annotated[Count, Field(description="Steps between two evaluations.")] = "auto"
    eval_samples: Annotated[Count, Field(description="Validation prompts that are answered and graded at each evaluation.")] = "auto"
    reasoning_effort: Literal["default"] = "default"


class ReinforcementOrder(MethodOrder):
    grader: dict[str, Any] | str | None = Field(None, description="The reward: a grader, or the id of a saved one.")
    hyperparameters: ReinforcementHyperparameters | None = None


class _Method(BaseModel):
    type: Literal[METHODS]  # type: ignore[valid-type]

    def named(self) -> MethodOrder | None:
        """What is under the type's name."""
        found: MethodOrder | None = getattr(self, self.type, None)
        return found

    def hyperparameters(self) -> Hyperparameters | None:
        named = self.named()
        return named.hyperparameters if named else None


if TYPE_CHECKING:
    Method = _Method
else:
    _ORDERS = {"reinforcement": ReinforcementOrder}
    Method = create_model(
        "Method", __base__=_Method, __module__=__name__, **{m: (_ORDERS.get(m, MethodOrder) | None, None) for m in METHODS}
    )
"""OpenAI's `method`: its type, and under the type's name the settings."""


MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


def _dataset_key(value: Any) -> Any:
    """The UUID in a dataset's public id; any other value unchanged."""
    return value.removeprefix(f"{ids.DATASET}-") if isinstance(value, str) else value


DatasetId = Annotated[uuid.UUID, BeforeValidator(_dataset_key, json_schema_input_type=str)]
"""A dataset as `ds-…`, which responses use, or as its plain UUID."""


class JobRequest(BaseModel):
    """One job request. The dataset is named by `dataset_id` or by the `training_file` it was made from; `run`, `strategy` and
    `preference` are settings as people write them, validated here. Other unknown keys are ignored, as OpenAI's clients need."""

    model_config = ConfigDict(extra="ignore")

    model: str
    dataset_id: DatasetId | None = None
    training_file: str | None = None
    validation_dataset_id: DatasetId | None = None
    validation_file: str | None = None
    split: Split | None = None
    task: Task | None = None
    preset: PresetName | None = Field(
        None,
        description="How long to train: quick (about 25 steps), balanced (at least 60 steps or 3 epochs; the default) or best (at least 150 "
        "steps or 5 epochs). It decides tokens per batch, epochs, evaluations, max steps and patience where `run` omits them.",
    )
    run: dict[str, Any] = Field(default_factory=dict)
    strategy: dict[str, Any] = Field(default_factory=lambda: {"name": UNNAMED})
    preference: dict[str, Any] | None = None
    graders: list[str | dict[str, Any]] | None = Field(
        None, description="Graders of validation answers at each evaluation: ids of saved graders, or graders as they are."
    )
    name: Annotated[str, StringConstraints(max_length=200)] | None = None
    suffix: Annotated[str, StringConstraints(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    priority: Priority | None = Field(
        None,
        description="low, normal or high: worth a day of use more or less in the queue. high is for admins, unless a setting says else.",
    )
    resources: Resources | None = Field(None, description="What it asks of the machine that trains it, beyond what the estimate says.")
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: list[dict[str, Any]] | None = Field(None, max_length=5, description="Trackers that the job is sent to.")
    comparison_id: uuid.UUID | None = None

    def asked(self) -> Hyperparameters:
        """OpenAI's settings, from `method` or from their deprecated place next to it."""
        return (self.method and self.method.hyperparameters()) or self.hyperparameters or Hyperparameters()


def read_order(body: Mapping[str, Any]) -> JobRequest:
    """The request in a JSON body. Null means absent. Raises BadField naming the first wrong field.

    The comparison that a job belongs to cannot be set by a request: `app.evaluation.comparisons` sets it.
    """
    try:
        order = JobRequest.model_validate({name: value for name, value in body.items() if value is not None and name != "comparison_id"})
    except ValidationError as error:
        raise bad_field(error) from None
    trackers.read(order.integrations or [])
    return order


def bad_field(error: ValidationError, prefix: str = "", tag: str = "") -> BadField:
    """The first of pydantic's errors as ours. `param` is the path of the field, as `strategy.rank`."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(filter(None, (prefix, field_path(first["loc"], tag))))
    if first["type"] == "extra_forbidden":
        usual = (
            mark("Omit it, or look up the settings under /v1/strategies.")
            if prefix
            else mark("Omit it, or look up what this request takes in /v1/openapi.json.")
        )
        _, now = RENAMED.get(param.rpartition(".")[2], ("", usual))
        return BadField(gettext("There is no setting %(param)s.", param=repr(param)), hint=gettext(now), param=param)
    if first["type"] == "missing":
        return BadField(
            gettext("%(param)s is missing.", param=param),
            hint=gettext("Send %(param)s with the request.", param=param),
            param=param,
            code="missing_required_parameter",
        )
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    return BadField(gettext("%(param)s cannot be %(shown)s.", param=param, shown=shown), hint=plain(first["msg"]), param=param)


_strategies: TypeAdapter[Strategy] = TypeAdapter(AnyStrategy)


def read_strategy(asked: Mapping[str, Any]) -> Strategy:
    """The strategy with its settings. Raises BadField."""
    name = asked.get("name", UNNAMED)
    if not isinstance(name, str) or name not in STRATEGIES:
        raise BadField(
            gettext("There is no strategy %(name)s.", name=repr(str(name)[:60])),
            hint=gettext("Use one of %(names)s.", names=", ".join(STRATEGIES)),
            param="strategy.name",
        )
    try:
        return _strategies.validate_python({**asked, "name": name})
    except ValidationError as error:
        raise bad_field(error, "strategy", tag=name) from None


def read_objective_settings(task: str, asked: Mapping[str, Any]) -> BaseModel | None:
    """The settings of an objective, the field `preference`; None where it has none. Raises BadField, also for a setting that would
    have no effect."""
    kind = OBJECTIVES[task].settings
    if kind is None:
        return None
    try:
        found = kind.model_validate(dict(asked))
    except ValidationError as error:
        raise bad_field(error, "preference") from None
    for name in found.unused():
        if getattr(found, name) != kind.model_fields[name].default:
            loss = getattr(found, "loss", task)
            takes = ", ".join(one for one in kind.model_fields if one not in found.unused())
            raise BadField(
                gettext("%(name)s means nothing with the loss %(loss)s.", name=name, loss=loss),
                hint=gettext("Omit it, or choose a loss that takes it: %(loss)s takes %(takes)s.", loss=loss, takes=takes),
                param=f"preference.{name}",
                code="setting_without_use",
            )
    return found
