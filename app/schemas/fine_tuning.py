"""Fine-tuning jobs: requests, jobs, events, checkpoints and estimates."""

from __future__ import annotations

import functools
import operator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, RootModel, create_model
from pydantic.json_schema import SkipJsonSchema

from app import events
from app.evaluation.forgetting import Forgetting, WithoutMeasuring
from app.evaluation.verdict import Verdict
from app.events import Measured
from app.jobs.fair_share import Priority
from app.jobs.request import JobRequest
from app.objectives import SETTINGS, Task
from app.planning.duration import Estimate
from app.run_settings import RunSettings
from app.schemas.base import UNBUILT, WAY_OUT, Problem, Schema
from app.strategies import AnyStrategy
from app.trackers import TRACKERS

JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]


class CreateJob(JobRequest):
    """The model, the data and the settings. The data is given by `dataset_id` or by the `training_file` that it was parsed from.
    Unknown keys are ignored, as OpenAI's clients need."""

    model_config = UNBUILT

    run: RunSettings = Field(default_factory=RunSettings)  # type: ignore[assignment]  # as documents show it
    strategy: AnyStrategy = Field(default_factory=dict)  # type: ignore[assignment]  # as documents show it
    preference: SETTINGS | None = None  # as documents show it
    comparison_id: SkipJsonSchema[None] = None


class JobResources(Schema):
    """What the job needs of the machine that trains it: what was asked for, and the memory of its estimate with every layer recomputed that
    may be."""

    gpus: int | None = Field(description="GPUs that train it together; null where it takes as many as its worker's jobs usually do.")
    machines: int | None = Field(description="Machines that train it together, each with as many GPUs; null for one.")
    gpu: str | None = Field(description="Part of the name of the GPU.")
    gpu_memory_bytes: int | None = Field(description="Memory of each GPU; 0 where it is not known, null where it trains on the CPU alone.")
    memory_bytes: int | None = Field(
        description="Memory of each process without a GPU; 0 where it is not known, null where it needs a GPU."
    )
    labels: list[str]


class SplitOverlap(Schema):
    """Validation rows that are in the training set too, once they are counted, and the page that lists them."""

    status: Literal["none", "waiting", "ready", "error"]
    rows: int | None
    page: str | None = None
    held_out: int | None = None


class JobEstimate(Estimate):
    """The memory, time and steps of a job on this machine, and warnings about its data."""

    model_config = UNBUILT

    warnings: list[str]
    overlap: SplitOverlap


class JobHyperparameters(Schema):
    """OpenAI's own settings. "auto" leaves the choice to the studio."""

    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]
    beta: float | Literal["auto"] = "auto"


class MethodSettings(Schema):
    """The settings of one method."""

    hyperparameters: JobHyperparameters


class JobReinforcementHyperparameters(JobHyperparameters):
    """OpenAI's hyperparameters of reinforcement; `batch_size` counts prompts."""

    compute_multiplier: float | Literal["auto"] = Field(
        description="Multiplier of the answers that are drawn for each prompt, which are 8."
    )
    eval_interval: int | Literal["auto"] = Field(description="Steps between two evaluations.")
    eval_samples: int | Literal["auto"] = Field(description="Validation prompts that are answered and graded at each evaluation.")
    reasoning_effort: Literal["default"]


class ReinforcementMethodSettings(Schema):
    """The reward and the settings of reinforcement."""

    grader: dict[str, Any]
    hyperparameters: JobReinforcementHyperparameters


class JobMethod(Schema):
    """The training objective: supervised answers, preference pairs, rated answers, a reward model, a reward, or a teacher."""

    type: Literal["supervised", "dpo", "kto", "reward", "reinforcement", "distillation"]
    supervised: MethodSettings | None = None
    dpo: MethodSettings | None = None
    kto: MethodSettings | None = None
    reward: MethodSettings | None = None
    reinforcement: ReinforcementMethodSettings | None = None
    distillation: MethodSettings | None = None


class JobProgress(Schema):
    """The progress of a job."""

    step: int
    total_steps: int | None
    fraction: float
    seconds_left: float | None
    attempt: int
    asked: Literal["cancelling", "pausing"] | None = Field(description="What was requested and has not happened yet.")


class ListedRow(Schema):
    """A validation row with a remarkable result, with the losses of base and fine-tuned model and their answers."""

    line: int | None = None
    prompt: str
    reference: str | None = None
    base_loss: float | None = None
    tuned_loss: float | None = None
    base_answer: str | None = None
    tuned_answer: str | None = None
    probability: float | None = None


class HeldOutQuestion(Schema):
    """The prompt of a validation row; of a conversation the first."""

    line: int
    system: str = Field(description="Its system prompt; empty without one.")
    prompt: str
    reference: str = Field(description="The row's own answer.")


class SolvedExample(Schema):
    prompt: Any = Field(description="Messages, or a text.")
    reference: str


class Tryout(Schema):
    system: str = Field(description="The commonest system prompt of the training rows.")
    questions: list[HeldOutQuestion]
    examples: list[SolvedExample] = Field(description="The training rows that the base was shown for the verdict's few-shot score.")


class JobEvaluation(Schema):
    """Base and fine-tuned model on the same validation rows, by name of the score. Empty without validation rows."""

    rows: int | None = None
    answers: int | None = None
    unanswered: int | None = None
    difference: Any = None
    base: dict[str, Any] | None = None
    tuned: dict[str, Any] | None = None
    worst: list[ListedRow] | None = None
    best: list[ListedRow] | None = None
    contest: dict[str, Any] | None = Field(
        None, description="Base, few-shot and fine-tuned on the same validation rows; the verdict reads it."
    )
    tryout: Tryout | None = Field(None, description="What the model can be asked for a fair first look; absent for classifiers.")
    steps: int | None = None
    curve: list[tuple[int, float]] | None = Field(None, description="Validation loss by step.")


class JobCost(Schema):
    """What a job has used in all its attempts."""

    gpu_hours: float = Field(description="A train worker without a GPU counts as one.")
    kwh: float | None = Field(description="Null where the GPUs count no energy.")
    amount: float | None = Field(description="By the prices of the studio; null where none is set.")
    currency: str


class FineTuningJob(Schema):
    """A `fine_tuning.job` as the OpenAI API has it; the fields after `user_provided_suffix` are additions."""

    object: Literal["fine_tuning.job"]
    id: str
    created_at: int = Field(description="Seconds since 1970.")
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: JobStatus
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: JobHyperparameters
    method: JobMethod
    integrations: list[dict[str, Any]]
    metadata: dict[str, str] | None
    error: Problem | None
    user_provided_suffix: str | None
    name: str
    tags: list[str]
    priority: Priority
    resources: JobResources
    position: int | None = Field(description="Place in the queue, from 1, while it is queued and its dataset is read.")
    expected_start: int | None = Field(description="By the estimates of what runs and what is before it; null where no worker is online.")
    waits_for: str | None = Field(
        description="What keeps it waiting: a limit of running jobs, a machine that keeps GPUs for it, or that no worker has what it needs."
    )
    task: Task
    strategy: AnyStrategy
    run: RunSettings
    preference: SETTINGS | None
    dataset: str
    cost: JobCost | None = Field(description="Null where neither a price nor the energy is known.")
    estimate: JobEstimate | None
    measured: Measured | None
    evaluation: JobEvaluation | None
    forgetting: Forgetting | WithoutMeasuring | None
    verdict: Verdict | None
    progress: JobProgress


class _JobTracker(Schema):
    """A tracker that a job is sent to. Under the name of its type are the settings it is sent with."""

    object: Literal["fine_tuning.job.tracker"]
    type: Literal[*TRACKERS]  # type: ignore[valid-type]
    status: Literal["following", "retrying", "failed"] = Field(
        description="retrying after an error, failed after three deaths of its workers."
    )
    url: str | None = Field(description="Where the tracker shows the run, once it was sent.")
    folder: str | None = Field(description="Where its files are, of a tracker that has files.")
    error: str | None = Field(description="Why the last try failed.")
    sent_at: int | None
    created_at: int


_settings: dict[str, Any] = {kind: (cls | None, None) for kind, cls in TRACKERS.items()}
JobTracker = create_model("JobTracker", __base__=_JobTracker, __module__=__name__, __doc__=_JobTracker.__doc__, **_settings)


class FineTuningJobEvent(Schema):
    """A `fine_tuning.job.event`: the message, and the complete event as `data`."""

    object: Literal["fine_tuning.job.event"]
    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any]


def _streamed(kind: type[BaseModel]) -> type[BaseModel]:
    """An event as a stream sends it: its own fields, with its number, attempt and time."""
    old: dict[str, Any] = {"way_out": (str | None, WAY_OUT)} if kind is events.Failed else {}
    return create_model(
        f"{kind.__name__}Event",
        __base__=(kind, Schema),
        __doc__=kind.__doc__,
        id=(int, Field(description="For Last-Event-ID, when the stream is opened again.")),
        attempt=(int, ...),
        at=(float, Field(description="Seconds since 1970.")),
        **old,
    )


_EVENTS = map(_streamed, get_args(get_args(events.JobEvent)[0]))


class StreamedJobEvent(RootModel[Annotated[functools.reduce(operator.or_, _EVENTS), Field(discriminator="type")]]):  # type: ignore[misc]
    """The data of one server-sent event of a job."""

    model_config = UNBUILT


class CheckpointMetrics(Schema):
    """Metrics under the names of OpenAI's client. Null where a metric was not measured."""

    step: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class FineTuningCheckpoint(Schema):
    """A `fine_tuning.job.checkpoint`. All metrics are under `scores`."""

    object: Literal["fine_tuning.job.checkpoint"]
    id: str
    created_at: int
    fine_tuned_model_checkpoint: str = Field(description="The name to send requests to.")
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics
    scores: dict[str, Any]
    best: bool
    bytes: int


class CreateCheckpointPermissions(Schema):
    """The projects that may use a checkpoint."""

    project_ids: list[str] = Field(min_length=1)


class CheckpointPermission(Schema):
    """A `checkpoint.permission`."""

    object: Literal["checkpoint.permission"]
    id: str
    created_at: int
    project_id: str
