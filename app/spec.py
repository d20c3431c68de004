"""JobSpec: the frozen order. Stored with the job, handed to the trainer, shown on the page, copied as YAML."""

from __future__ import annotations

import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from app.optimizers import OPTIMIZERS, Optimizer, with_setting
from app.shapes import Shape
from app.strategies import AnyStrategy, Strategy

Task = Literal["generation", "classification", "preference"]
Kind = Literal["generic", "instruction", "dialogue", "classifier", "encoder"]
Schedule = Literal["cosine", "linear", "constant", "cosine_with_restarts", "wsd"]


MOST_CLASSES = 5000
"""Labels that a classifier learns at most: a column that names every row is no label."""


def unset(value: Any) -> bool:
    """For settings that came later than the first jobs: left out of a spec where nobody gave them, it is the spec it was before."""
    return value is None


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


INSTEAD_OF: dict[str, tuple[str, Any]] = {"warmup_steps": ("warmup_fraction", 0.0)}
"""Settings that take the place of another: its name, and the value by which it says nothing."""
ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "num_cycles": ("schedule", ("cosine_with_restarts",)),
    "decay_fraction": ("schedule", ("wsd",)),
    "adam_beta1": ("optimizer", with_setting("betas")),
    "adam_beta2": ("optimizer", with_setting("betas")),
    "adam_epsilon": ("optimizer", with_setting("eps")),
    "min_lr_fraction": ("schedule", ("cosine", "linear", "cosine_with_restarts", "wsd")),
}
"""Settings that mean something beside some values of another one alone; they are refused elsewhere."""
GRADIENT_ONLY = ("neftune_noise_alpha",)
"""Settings that mean nothing where frozen features are computed once and a classifier is fitted to them."""
STEPS_ONLY = ("optimizer", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps", "num_cycles", "decay_fraction", "min_lr_fraction")
"""Settings that mean nothing either where that classifier is logistic regression, which takes no optimizer steps."""


class RunSettings(_Frozen):
    """How training runs, whatever the strategy. The descriptions are the help under each field of the form."""

    epochs: float = Field(
        3,
        gt=0,
        le=1000,
        description="How often the data is seen. Training stops early when validation stops improving.",
        json_schema_extra={"basic": True},
    )
    learning_rate: float | None = Field(
        None, gt=0, le=10, description="Size of each step. Empty takes the strategy's own advice.", json_schema_extra={"basic": True}
    )
    max_tokens_per_step: int = Field(
        2048,
        ge=16,
        le=1_048_576,
        description="Tokens of data behind each optimizer step; padding is not counted.",
        json_schema_extra={"basic": True, "unit": "tokens"},
    )
    max_length: int = Field(
        1024,
        ge=8,
        le=131_072,
        description="Longer rows are cut to this many tokens; the report says which.",
        json_schema_extra={"unit": "tokens"},
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps, whatever the epochs say.")
    accumulation: int = Field(
        1, ge=1, le=1024, description="Split each step's tokens over this many passes: less memory, the same result, a little slower."
    )
    schedule: Schedule = Field(
        "cosine",
        title="LR scheduler",
        description="How the learning rate falls after warmup. wsd (warmup, stable, decay) keeps it until the last steps.",
        json_schema_extra={"group": "Optimization"},
    )
    warmup_fraction: float = Field(
        0.05,
        ge=0,
        le=0.5,
        description="Share of the steps during which the learning rate rises from zero. Warmup steps say the same as a number.",
        json_schema_extra={"group": "Optimization"},
    )
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="Optimizer steps during which the learning rate rises from zero, instead of a share.",
        json_schema_extra={"group": "Optimization", "unit": "steps"},
        exclude_if=unset,
    )
    num_cycles: int | None = Field(
        None,
        ge=1,
        le=100,
        title="Number of cycles",
        description="How often cosine_with_restarts falls from the full learning rate. Empty takes 2.",
        json_schema_extra={"group": "Optimization"},
        exclude_if=unset,
    )
    decay_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the steps, the last ones, during which wsd falls linearly. Empty takes 0.1.",
        json_schema_extra={"group": "Optimization"},
        exclude_if=unset,
    )
    min_lr_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        title="Minimum LR fraction",
        description="Share of the learning rate that the schedule ends at instead of zero. constant never falls, so it takes none.",
        json_schema_extra={"group": "Optimization"},
        exclude_if=lambda share: share == 0,
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="Pulls trained weights towards zero at each step.")
    max_grad_norm: float = Field(1.0, ge=0, description="Longer gradients are shortened to this. 0 turns it off.")
    neftune_noise_alpha: float | None = Field(
        None,
        gt=0,
        le=100,
        title="NEFTune noise alpha",
        description="NEFTune: random noise on the embeddings while training, never in evaluation; 5 is usual. Empty adds none.",
        json_schema_extra={"group": "Optimization"},
        exclude_if=unset,
    )
    validation_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share of the rows held out, drawn by the seed, when no validation file is given."
    )
    data_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the training rows to learn from, drawn by the seed; the held-out rows stay the same. A learning curve is made of such jobs.",
    )
    evaluations_per_epoch: float = Field(
        2, ge=0, le=100, description="How often validation loss is measured and a checkpoint saved. 0 measures only at the end."
    )
    early_stopping_patience: int = Field(
        3, ge=0, description="Stop after this many evaluations without a better validation loss. 0 never stops early."
    )
    samples: int = Field(3, ge=0, le=16, description="Answers written to held-out prompts at each evaluation, to read how it goes.")
    sample_tokens: int = Field(64, ge=1, le=1024, description="Longest sample answer.", json_schema_extra={"unit": "tokens"})
    forgetting: bool = Field(
        True, description="Score the model on general texts before and at the end, to see what it forgot. Takes some seconds."
    )
    row_losses: bool = Field(
        True,
        description="Write down each row's loss before and at the end, which shows rows that are wrong. Costs two passes over the rows without learning.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Number format of the arithmetic. auto takes bf16 where this machine gains by it."
    )
    optimizer: Optimizer = Field(
        "adamw",
        description="adamw fits most. adamw_8bit and paged_adamw_8bit keep its moments in 8 bits, on a GPU. lion and muon keep one moment "
        "(muon of matrices; the rest is adamw's), adafactor hardly any.",
        json_schema_extra={"group": "Optimization"},
    )
    adam_beta1: float | None = Field(
        None,
        ge=0,
        lt=1,
        title="Adam beta1",
        description="Decay of the mean of the gradients. Empty takes the optimizer's own: 0.9.",
        json_schema_extra={"group": "Optimization"},
        exclude_if=unset,
    )
    adam_beta2: float | None = Field(
        None,
        ge=0,
        lt=1,
        title="Adam beta2",
        description="Decay of the mean of their squares; lion's second decay. Empty takes the optimizer's own: 0.999, lion 0.99.",
        json_schema_extra={"group": "Optimization"},
        exclude_if=unset,
    )
    adam_epsilon: float | None = Field(
        None,
        gt=0,
        le=1,
        title="Adam epsilon",
        description="Added to the root that a step is divided by. Empty takes 1e-8.",
        json_schema_extra={"group": "Optimization"},
        exclude_if=unset,
    )
    frozen_weights: Literal["auto", "fp8"] = Field(
        "auto",
        description="fp8 keeps the layers that do not learn in 8 bits and multiplies in them: less memory and faster, a little less "
        "exact. For LoRA on NVIDIA GPUs of capability 8.9 or later (Ada, Hopper).",
        exclude_if=lambda kind: kind == "auto",
    )
    gradient_checkpointing: Literal["auto", "none", "all"] = Field(
        "auto",
        description="Recompute activations instead of keeping them: less memory, slower. auto does it for as many layers as the memory needs.",
    )
    seed: int = Field(42, ge=0, le=2**31 - 1, description="Decides the order of the data, the split and every random draw.")

    @model_validator(mode="before")
    @classmethod
    def _one_of_two(cls, given: Any) -> Any:
        """A setting that says the same as another in other units takes its place."""
        if not isinstance(given, dict):
            return given
        others = {other: off for name, (other, off) in INSTEAD_OF.items() if given.get(name) is not None and other not in given}
        return {**given, **others}

    @field_validator(*INSTEAD_OF)
    @classmethod
    def _not_both(cls, value: Any, info: ValidationInfo) -> Any:
        other, off = INSTEAD_OF[info.field_name or ""]
        if value is not None and info.data.get(other, off) != off:
            raise ValueError(f"It says the same as {other}, which was given too: leave out one of the two")
        return value

    @field_validator(*ONLY_WITH)
    @classmethod
    def _has_its_use(cls, value: Any, info: ValidationInfo) -> Any:
        other, needed = ONLY_WITH[info.field_name or ""]
        if value and info.data.get(other) not in needed:
            raise ValueError(
                f"It is for {other} {' or '.join(needed)}, and {other} is {info.data.get(other)}: leave it out, or change that"
            )
        return value


class PreferenceSettings(_Frozen):
    """How two answers are compared, for jobs that learn preferences. The descriptions are the help of the form."""

    beta: float = Field(
        0.1,
        gt=0,
        le=10,
        description="Pull back to the model before tuning: higher changes less, lower follows the preferences further.",
        json_schema_extra={"basic": True},
    )
    loss: Literal["dpo", "ipo"] = Field("dpo", description="dpo widens the margin without end; ipo stops at a margin that beta sets.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of the pairs expected to be labelled the wrong way round; dpo only."
    )
    length_normalised: bool = Field(
        False, description="Compare likelihood per token, so that long answers weigh no more than short ones. ipo always does."
    )

    @property
    def means(self) -> bool:
        """Whether an answer's log-probability is the mean over its tokens rather than the sum."""
        return self.length_normalised or self.loss == "ipo"


class Adapter(_Frozen):
    """One adapter on the way from a base to a tuned model. `path` is relative to the data folder. `blend` is how much of its
    change is played; below 1 a whole model may stand here too, to be mixed with the base it lies on."""

    strategy: str
    path: str
    sha256: str
    blend: float = Field(1.0, ge=0, le=1, exclude_if=lambda share: share == 1)

    @property
    def key(self) -> str:
        """What tells it from every other adapter, and from itself at another blend."""
        return self.sha256 if self.blend == 1 else f"{self.sha256 or self.path}@{self.blend:g}"


class ModelRef(_Frozen):
    """Which weights. `path` is the folder of the base's weights and tokenizer, relative to the data folder;
    `adapters` are laid on it in order (none for a whole model). `revision` is the SHA-256 over the files of `path`."""

    id: uuid.UUID
    name: str
    kind: Kind
    path: str
    revision: str
    adapters: tuple[Adapter, ...] = ()
    shape: Shape
    labels: tuple[str, ...] | None = None


class DatasetRef(_Frozen):
    """Which rows: a Parquet file with the columns `line` and `row`, relative to the data folder."""

    id: uuid.UUID
    name: str
    path: str
    sha256: str
    format: str
    rows: int


class Split(_Frozen):
    """How rows are held out when there is no validation file; how many, and the seed, stand in the run settings."""

    method: Literal["random", "stratified", "grouped"] = Field(
        "random", description="At random; every label in its share; or whole groups of a column at a time."
    )
    column: str | None = Field(None, max_length=200, description="The column whose values are the groups, or the labels.")


class JobSpec(_Frozen):
    """All that a trainer needs to know; two equal specs on one machine give equal weights."""

    version: Literal[1] = 1
    name: str
    task: Task
    model: ModelRef
    dataset: DatasetRef
    validation: DatasetRef | None = None
    split: Split | None = Field(None, exclude_if=lambda split: split is None)
    run: RunSettings
    strategy: AnyStrategy
    preference: PreferenceSettings | None = Field(None, exclude_if=lambda settings: settings is None)

    @property
    def learning_rate(self) -> float:
        """The highest rate of the job: as ordered, or the strategy's own as it suits the task and the optimizer."""
        return self.run.learning_rate or usual_learning_rate(self.strategy, self.task, self.run.optimizer)


def usual_learning_rate(strategy: Strategy | type[Strategy], task: str, optimizer: str = "adamw") -> float:
    """The learning rate where nobody says one."""
    return strategy.learning_rate_for(task) * OPTIMIZERS[optimizer].rate
