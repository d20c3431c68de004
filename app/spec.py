"""JobSpec: the frozen order. Stored with the job, handed to the trainer, shown on the page, copied as YAML."""

from __future__ import annotations

import uuid
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.shapes import Shape
from app.strategies import AnyStrategy

Task = Literal["generation", "classification", "preference"]
Kind = Literal["generic", "instruction", "dialogue", "classifier", "encoder"]


MOST_CLASSES = 5000
"""Labels that a classifier learns at most: a column that names every row is no label."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSettings(_Frozen):
    """How training runs, whatever the method. The descriptions are the help under each field of the form, and `group` is its heading."""

    epochs: float = Field(
        3,
        gt=0,
        le=1000,
        description="Passes over the data. Training stops early when validation stops improving.",
        json_schema_extra={"basic": True, "group": "Optimization"},
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Peak learning rate. Leave empty for the method's default.",
        json_schema_extra={"basic": True, "group": "Optimization"},
    )
    max_tokens_per_step: int = Field(
        2048,
        ge=16,
        le=1_048_576,
        title="Tokens per batch",
        description="Tokens behind each optimizer step; padding is not counted.",
        json_schema_extra={"basic": True, "group": "Optimization"},
    )
    max_length: int = Field(
        1024,
        ge=8,
        le=131_072,
        description="In tokens. Longer examples are truncated; the report says which.",
        json_schema_extra={"group": "Data"},
    )
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimizer steps, whatever the epochs.", json_schema_extra={"group": "Optimization"}
    )
    accumulation: int = Field(
        1,
        ge=1,
        le=1024,
        title="Micro-batches",
        description="Passes that each batch is split into: less memory, the same result, a little slower. It does not enlarge the batch.",
        json_schema_extra={"group": "Hardware"},
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", title="LR scheduler", description="How the learning rate falls after warmup.", json_schema_extra={"group": "Optimization"}
    )
    warmup_fraction: float = Field(
        0.05,
        ge=0,
        le=0.5,
        description="Fraction of the steps during which the learning rate rises from zero.",
        json_schema_extra={"group": "Optimization"},
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="L2 decay.", json_schema_extra={"group": "Optimization"})
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping. 0 turns it off.", json_schema_extra={"group": "Optimization"})
    validation_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Fraction of the rows in the validation set, drawn by the seed, when no validation data is chosen.",
        json_schema_extra={"group": "Data"},
    )
    data_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        title="Use fraction of data",
        description="Fraction of the training rows to use, drawn by the seed; the validation set stays the same. A learning curve is made of such jobs.",
        json_schema_extra={"group": "Data"},
    )
    evaluations_per_epoch: float = Field(
        2,
        ge=0,
        le=100,
        description="How often validation loss is measured and a checkpoint saved. 0 evaluates only at the end.",
        json_schema_extra={"group": "Evaluation"},
    )
    early_stopping_patience: int = Field(
        3,
        ge=0,
        description="Stop after this many evaluations without a better validation loss. 0 never stops early.",
        json_schema_extra={"group": "Evaluation"},
    )
    samples: int = Field(
        3,
        ge=0,
        le=16,
        title="Sample generations",
        description="Answers to validation prompts that are written at each evaluation.",
        json_schema_extra={"group": "Evaluation"},
    )
    sample_tokens: int = Field(
        64,
        ge=1,
        le=1024,
        title="Max new tokens",
        description="Longest sample generation, in tokens.",
        json_schema_extra={"group": "Evaluation"},
    )
    forgetting: bool = Field(
        True,
        title="General-ability check",
        description="Score the model on general text before and after training. Takes some seconds.",
        json_schema_extra={"group": "Evaluation"},
    )
    row_losses: bool = Field(
        True,
        title="Per-example loss",
        description="Record each row's loss before and after training, which finds bad rows. Costs two passes over the data.",
        json_schema_extra={"group": "Evaluation"},
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Precision of the arithmetic. auto takes bf16 where this machine gains by it.",
        json_schema_extra={"group": "Hardware"},
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit keeps the optimizer state in 8 bits; it needs a GPU.", json_schema_extra={"group": "Optimization"}
    )
    frozen_weights: Literal["auto", "fp8"] = Field(
        "auto",
        title="Base weight dtype",
        description="fp8 keeps the frozen layers in 8 bits and multiplies in them: less memory and faster, a little less "
        "exact. For LoRA on NVIDIA GPUs of capability 8.9 or later (Ada, Hopper).",
        exclude_if=lambda kind: kind == "auto",
        json_schema_extra={"group": "Hardware"},
    )
    gradient_checkpointing: Literal["auto", "none", "all"] = Field(
        "auto",
        description="Recompute activations instead of keeping them: less memory, slower. auto does it for as many layers as the memory needs.",
        json_schema_extra={"group": "Hardware"},
    )
    seed: int = Field(
        42,
        ge=0,
        le=2**31 - 1,
        title="Random seed",
        description="Seeds the order of the data, the split and every random draw.",
        json_schema_extra={"group": "Data"},
    )


class PreferenceSettings(_Frozen):
    """How two answers are compared, for jobs that learn preferences. The descriptions are the help of the form."""

    beta: float = Field(
        0.1,
        gt=0,
        le=10,
        description="KL penalty β: higher stays closer to the base model, lower follows the preferences further.",
        json_schema_extra={"basic": True},
    )
    loss: Literal["dpo", "ipo"] = Field("dpo", description="DPO has no margin target; IPO has one, which beta sets.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Fraction of the pairs expected to be labeled the wrong way round; DPO only."
    )
    length_normalised: bool = Field(
        False,
        title="Length normalized",
        description="Compare likelihood per token, so that long answers weigh no more than short ones. IPO always does.",
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
