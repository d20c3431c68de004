"""The closed list of job events.

The trainer writes its events as JSON lines on a pipe; its supervisor records them in Postgres, and the job page is a fold over
them (`app/jobs/progress.py`). Losses are nats per trained token; memory is bytes; times are seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

FailureKind = Literal[
    "out_of_memory",  # the machine's memory: killed by the kernel, or MemoryError
    "cuda_out_of_memory",
    "gpu_fault",  # the card or its driver failed; every later call of that process fails too
    "diverged",  # loss or gradients were not finite
    "bad_data",
    "bad_model",  # the model's folder cannot be loaded, or cannot do what the strategy needs
    "disk_full",
    "model_away",  # a model that a grader asks could not be asked
    "worker_lost",
    "no_progress",  # no step for a long time
    "crashed",  # anything else
]

TRANSIENT: frozenset[str] = frozenset({"worker_lost", "no_progress", "gpu_fault"})
"""Failures that a new attempt may survive with the same settings."""
PAUSING: frozenset[str] = frozenset({"disk_full", "model_away"})
"""Failures that pause a job: once their cause is gone it goes on from its checkpoint."""


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True, ser_json_inf_nan="strings")


# Said by the trainer -------------------------------------------------------------------------------------------------


class Started(_Event):
    """The model is loaded and the first batch is next. `resumed_from` is the step of the checkpoint it goes on from."""

    type: Literal["started"] = "started"
    device: str
    precision: Literal["fp32", "bf16", "fp16"]
    total_steps: int
    train_rows: int
    validation_rows: int
    train_tokens: int = Field(description="tokens of one epoch, padding not counted")
    trainable_parameters: int
    parameters: int
    resumed_from: int | None = None
    exact: bool = Field(True, description="false when resuming cannot be bit-exact (other packages, device or world size)")
    seconds_to_load: float = 0.0
    details: dict[str, Any] = Field(default_factory=dict, description="package versions, threads, attention, engine choices")


class Step(_Event):
    """One optimizer step. `loss` is the mean over the trained tokens of all its passes."""

    type: Literal["step"] = "step"
    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int = Field(description="tokens seen since the job began, padding not counted")
    trained_tokens: int = Field(description="tokens with a loss since the job began")
    tokens_per_second: float
    memory_bytes: int = Field(description="peak so far")
    seconds: float = Field(description="training time so far, over all attempts")
    metrics: dict[str, float] = Field(default_factory=dict, description="reward margin, accuracy, …")


class Evaluated(_Event):
    type: Literal["evaluated"] = "evaluated"
    step: int
    loss: float
    metrics: dict[str, float] = Field(default_factory=dict, description="token_accuracy, perplexity, accuracy, …")
    best: bool = False
    seconds: float = 0.0


class Sample(_Event):
    prompt: str
    reference: str
    base: str | None = None
    answer: str
    score: float | None = Field(None, exclude_if=lambda score: score is None)  # of the answer by the reward, 0 to 1


class Sampled(_Event):
    type: Literal["sampled"] = "sampled"
    step: int
    samples: list[Sample]


class Saved(_Event):
    """A checkpoint whose manifest was written and verified. `path` is relative to the data folder."""

    type: Literal["saved"] = "saved"
    step: int
    path: str
    bytes: int
    manifest_sha256: str
    metrics: dict[str, float] = Field(default_factory=dict)
    best: bool = False


class Measured(_Event):
    peak_memory_bytes: int
    seconds: float
    tokens_per_second: float
    tokens: int
    trained_tokens: int
    steps: int
    device: str


class Finished(_Event):
    """The job's result is at `path` (relative to the data folder) with a verified manifest."""

    type: Literal["finished"] = "finished"
    reason: Literal["completed", "early_stopped"]
    why: str = Field("", description="why it stopped by itself, where that was not for a validation loss that no longer fell")
    step: int
    path: str
    bytes: int
    revision: str
    adapter_sha256: str | None
    kind: str = Field(description="kind of the fine-tuned model")
    best_step: int | None = None
    labels: list[str] | None = None
    measured: Measured
    evaluation: dict[str, Any] = Field(default_factory=dict, description="base and fine-tuned model scored on the same rows")
    forgetting: dict[str, Any] | None = None


class Failed(_Event):
    type: Literal["failed"] = "failed"
    kind: FailureKind
    message: str
    hint: str = ""
    step: int | None = None
    line: int | None = Field(None, description="line of the dataset, when one row is at fault")
    suggestion: dict[str, Any] | None = Field(None, description="changed run settings, offered as one click")


class TaskProgress(_Event):
    """Long work that is no step, as scoring the validation rows or comparing base and result, and how far it is."""

    type: Literal["progress"] = "progress"
    what: str = Field(description="`Comparing base and result`")
    share: float = Field(description="of this work, 0 to 1")


class Log(_Event):
    type: Literal["log"] = "log"
    level: Literal["info", "warn", "error"] = "info"
    message: str


# Said by the studio -------------------------------------------------------------------------------------------------


class Queued(_Event):
    type: Literal["queued"] = "queued"
    reason: Literal["submitted", "resumed", "worker_left", "worker_lost", "retry"] = "submitted"


class Claimed(_Event):
    type: Literal["claimed"] = "claimed"
    attempt: int
    worker: str


class Lost(_Event):
    """The lease passed, or the trainer died; another attempt follows unless a `failed` event does."""

    type: Literal["lost"] = "lost"
    attempt: int
    message: str


class Stopped(_Event):
    """Paused or cancelled, at a step boundary when a trainer was running."""

    type: Literal["stopped"] = "stopped"
    status: Literal["paused", "cancelled"]
    step: int | None = None
    reason: str = ""


TrainerEvent = Annotated[Started | Step | Evaluated | Sampled | Saved | Finished | Failed | TaskProgress | Log, Field(discriminator="type")]
JobEvent = Annotated[
    Started | Step | Evaluated | Sampled | Saved | Finished | Failed | TaskProgress | Log | Queued | Claimed | Lost | Stopped,
    Field(discriminator="type"),
]

_trainer: TypeAdapter[TrainerEvent] = TypeAdapter(TrainerEvent)
_any: TypeAdapter[JobEvent] = TypeAdapter(JobEvent)


def read_line(line: str | bytes) -> TrainerEvent:
    """Parse one line from the trainer's pipe. Raises pydantic.ValidationError for anything outside the list."""
    return _trainer.validate_json(line)


def from_row(type_: str, data: dict[str, Any]) -> JobEvent:
    """The event of a row of the table `events`."""
    return _any.validate_python({**data, "type": type_})
