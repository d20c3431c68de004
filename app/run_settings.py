"""RunSettings: how a job trains, whatever its strategy. A field is a setting of the API, a control of the form and a part of the stored
spec at once; `group` in its `json_schema_extra` says where the form shows it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from app.chat_templates import MAX_CHARACTERS, SAMPLES, TemplateName, fault
from app.new_tokens import NewTokens
from app.optimizers import Optimizer, with_setting

TrainOn = Literal["assistant", "all_turns", "last_turn"]
TRAIN_ON = {"assistant": "assistant turns", "all_turns": "all turns", "last_turn": "last assistant turn"}
"""Which turns of a conversation have a loss, and their labels in the form."""
Schedule = Literal["cosine", "linear", "constant", "cosine_with_restarts", "wsd"]


def unset(value: Any) -> bool:
    """For settings newer than the first jobs: omitted from a spec that does not set them, so that it stays the spec it was."""
    return value is None


INSTEAD_OF: dict[str, tuple[str, Any]] = {
    "batch_size": ("max_tokens_per_step", None),
    "warmup_steps": ("warmup_fraction", 0.0),
    "eval_steps": ("evaluations_per_epoch", 0.0),
}
"""Settings that replace another: its name, and the value by which it is off."""
ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "num_cycles": ("schedule", ("cosine_with_restarts",)),
    "decay_fraction": ("schedule", ("wsd",)),
    "adam_beta1": ("optimizer", with_setting("betas")),
    "adam_beta2": ("optimizer", with_setting("betas")),
    "adam_epsilon": ("optimizer", with_setting("eps")),
    "min_lr_fraction": ("schedule", ("cosine", "linear", "cosine_with_restarts", "wsd")),
}
"""Settings that have an effect only with some values of another one; they are refused otherwise."""


def displaced(run: dict[str, Any]) -> list[str]:
    """The settings that others of `run` replace."""
    return [other for name, (other, _) in INSTEAD_OF.items() if run.get(name) is not None]


class RunSettings(BaseModel):
    """How training runs, whatever the strategy. The descriptions are the help under each field of the form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: float = Field(
        3,
        gt=0,
        le=1000,
        description="Passes over the data. Training stops early when validation stops improving.",
        json_schema_extra={"group": "Optimization", "basic": True},
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Learning rate after warmup. Leave empty for the method's default.",
        json_schema_extra={"group": "Optimization", "basic": True},
    )
    max_tokens_per_step: int | None = Field(
        2048,
        ge=16,
        le=1_048_576,
        title="Tokens per batch",
        description="Tokens of data in a batch, padding not counted. Batch size sets it in rows.",
        json_schema_extra={"group": "Optimization", "basic": True, "unit": "tokens"},
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Rows in a batch, instead of tokens: as many behind every optimizer step, however long they are. The memory must hold "
        "that many of the longest.",
        json_schema_extra={"group": "Optimization", "unit": "rows"},
        exclude_if=unset,
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        le=1024,
        description="Batches whose gradients are added up before the optimizer takes a step: the effective batch is as many times larger.",
        json_schema_extra={"group": "Optimization"},
        exclude_if=lambda batches: batches == 1,
    )
    max_length: int = Field(
        1024,
        ge=8,
        le=131_072,
        description="Longer examples are truncated to this many tokens; the report lists them.",
        json_schema_extra={"group": "Data", "unit": "tokens"},
    )
    train_on: TrainOn = Field(
        "assistant",
        description="Which turns of a conversation carry a loss: the assistant's, all of the text with its system and user turns, or the "
        "last of the assistant's. A turn of weight 0 never does.",
        json_schema_extra={"group": "Data", "words": {**TRAIN_ON}},
        exclude_if=lambda turns: turns == "assistant",
    )
    chat_template: TemplateName = Field(
        "model",
        title="Chat template",
        description="How conversations are written as text. The result keeps the one it was trained with.",
        json_schema_extra={"group": "Data", "words": {**SAMPLES}},
        exclude_if=lambda name: name == "model",
    )
    chat_template_jinja: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_CHARACTERS,
        title="Chat template (Jinja)",
        description="For the chat template jinja: the text of one. It is given messages, add_generation_prompt, bos_token and eos_token, and "
        "should end an answer with {{ eos_token }}.",
        json_schema_extra={"group": "Data", "rows": 4},
        exclude_if=unset,
        validate_default=True,
    )
    packing: bool = Field(
        True,
        description="Rows of a batch are laid end to end without padding, and never see each other. Off pads each to the longest of its pass: "
        "the same loss, fewer rows in as many tokens, slower.",
        json_schema_extra={"group": "Data"},
        exclude_if=lambda packed: packed is True,
    )
    rehearsal_fraction: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Share of each step's tokens that are general text, against forgetting: the base's own answers to general prompts, which "
        "it writes once before the first step. 0.05 to 0.25 is usual; 0 plays in none. The steps become more by as much.",
        json_schema_extra={"group": "Data"},
        exclude_if=lambda share: share == 0,
    )
    new_tokens: NewTokens | None = Field(
        None,
        description="Strings, one a line, that become one token each, trained by any method. The dataset's report suggests some.",
        json_schema_extra={"group": "Data", "rows": 3},
        exclude_if=unset,
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Stop after this many optimizer steps, whatever the epochs are.",
        json_schema_extra={"group": "Optimization", "unit": "steps"},
    )
    micro_batches: int = Field(
        1,
        ge=1,
        le=1024,
        title="Micro-batches",
        description="Passes that a batch is split over: less memory, the same result, a little slower. It does not enlarge the batch; "
        "gradient accumulation does.",
        json_schema_extra={"group": "Hardware"},
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
        description="Share of the steps during which the learning rate rises from zero. Warmup steps set the same as a number.",
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
    weight_decay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Decoupled L2 decay of trained matrices; biases and norms have none.",
        json_schema_extra={"group": "Optimization"},
    )
    max_grad_norm: float = Field(
        1.0,
        ge=0,
        description="Gradient clipping: longer gradients are scaled down to this norm. 0 turns it off.",
        json_schema_extra={"group": "Optimization"},
    )
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
        0.1,
        ge=0,
        lt=1,
        description="Share of the rows held out, drawn by the seed, when no validation file is given. Empty holds out a tenth, and of fewer than "
        "100 rows enough for ten, but a quarter at most.",
        json_schema_extra={"group": "Data"},
    )
    data_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the training rows to train on, drawn by the seed; the validation rows stay the same. A learning curve is made "
        "of such jobs.",
        json_schema_extra={"group": "Data"},
    )
    evaluations_per_epoch: float = Field(
        2,
        ge=0,
        le=100,
        description="How often validation loss is measured and a checkpoint saved. 0 measures only at the end.",
        json_schema_extra={"group": "Evaluation"},
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Measure validation loss every so many optimizer steps, instead of so often per epoch.",
        json_schema_extra={"group": "Evaluation", "unit": "steps"},
        exclude_if=unset,
    )
    save_steps: int | None = Field(
        None,
        ge=1,
        description="Save a checkpoint every so many optimizer steps, at the end, and where an evaluation is the best so far. Empty saves at "
        "every evaluation.",
        json_schema_extra={"group": "Evaluation", "unit": "steps"},
        exclude_if=unset,
    )
    save_total_limit: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Checkpoints that are kept besides the best one, newest first. Empty keeps as many as the studio is set to (2).",
        json_schema_extra={"group": "Evaluation"},
        exclude_if=unset,
    )
    metric_for_best: Literal["loss", "accuracy", "grader"] = Field(
        "loss",
        title="Metric for best",
        description="What the best checkpoint and early stopping go by: validation loss, the share of held-out tokens, texts or pairs "
        "that the model gets right, or the first of the job's graders: then a checkpoint is better only where the 95% interval of its "
        "difference over the same rows is above zero.",
        json_schema_extra={"group": "Evaluation"},
        exclude_if=lambda metric: metric == "loss",
    )
    graded_rows: int = Field(
        32,
        ge=5,
        le=2000,
        description="Validation rows that are answered and graded at each evaluation, where the job has graders.",
        json_schema_extra={"group": "Evaluation", "unit": "rows"},
        exclude_if=lambda rows: rows == 32,
    )
    load_best: bool = Field(
        True,
        description="The result is the best checkpoint on the validation rows. Off keeps the last weights.",
        json_schema_extra={"group": "Evaluation"},
        exclude_if=lambda best: best is True,
    )
    early_stopping_patience: int = Field(
        3,
        ge=0,
        description="Stop after this many evaluations without a better score. 0 never stops early.",
        json_schema_extra={"group": "Evaluation"},
    )
    samples: int = Field(
        3,
        ge=0,
        le=16,
        title="Sample generations",
        description="Answers written to held-out prompts at each evaluation, to read how it goes.",
        json_schema_extra={"group": "Evaluation"},
    )
    sample_tokens: int = Field(
        64,
        ge=1,
        le=1024,
        title="Max new tokens",
        description="Longest sample generation.",
        json_schema_extra={"group": "Evaluation", "unit": "tokens"},
    )
    forgetting: bool = Field(
        True,
        title="General-ability check",
        description="Score the model on general texts before and at the end, to see whether it lost general ability. Takes some seconds.",
        json_schema_extra={"group": "Evaluation"},
    )
    row_losses: bool = Field(
        True,
        title="Per-example loss",
        description="Write down each row's loss before and at the end, which shows rows that are wrong. Costs two passes over the rows "
        "without training.",
        json_schema_extra={"group": "Evaluation"},
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="What the run computes on. auto takes the GPU where there is one, cpu leaves it to others, and cuda is refused without one.",
        json_schema_extra={"group": "Hardware"},
        exclude_if=lambda device: device == "auto",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Precision of the arithmetic. auto takes bf16 where this machine gains by it.",
        json_schema_extra={"group": "Hardware"},
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
        title="Base weight dtype",
        description="fp8 keeps the frozen layers in 8 bits and multiplies in them: less memory and faster, a little less exact. For LoRA on "
        "NVIDIA GPUs of capability 8.9 or later (Ada, Hopper).",
        json_schema_extra={"group": "Hardware"},
        exclude_if=lambda kind: kind == "auto",
    )
    gradient_checkpointing: Literal["auto", "none", "all"] = Field(
        "auto",
        description="Recompute activations instead of keeping them: less memory, slower. auto does it for as many layers as the memory needs.",
        json_schema_extra={"group": "Hardware"},
    )
    seed: int = Field(
        42, ge=0, le=2**31 - 1, description="Seed of the data order, the split and every draw.", json_schema_extra={"group": "Optimization"}
    )

    @model_validator(mode="before")
    @classmethod
    def _one_of_two(cls, given: Any) -> Any:
        """A setting that means the same as another in other units replaces it."""
        if not isinstance(given, dict):
            return given
        if given.get("batch_size") is None and given.get("max_tokens_per_step", 0) is None:
            given = {name: value for name, value in given.items() if name != "max_tokens_per_step"}
        others = {other: off for name, (other, off) in INSTEAD_OF.items() if given.get(name) is not None and other not in given}
        return {**given, **others}

    @field_validator(*INSTEAD_OF)
    @classmethod
    def _not_both(cls, value: Any, info: ValidationInfo) -> Any:
        other, off = INSTEAD_OF[info.field_name or ""]
        if value is not None and info.data.get(other, off) != off:
            raise ValueError(f"It means the same as {other}, which was given too: omit one of the two")
        return value

    @field_validator("chat_template_jinja")
    @classmethod
    def _is_a_template(cls, value: str | None, info: ValidationInfo) -> str | None:
        chosen = info.data.get("chat_template")
        if value is None and chosen == "jinja":
            raise ValueError("It is missing: write the template, or choose one by its name")
        if value is not None and chosen != "jinja":
            raise ValueError(f"It is for chat_template jinja, and chat_template is {chosen}: omit it, or change that")
        if value is not None and (wrong := fault(value)):
            raise ValueError(f"{wrong}: fix the template, or choose one by its name")
        return value

    @field_validator("micro_batches")
    @classmethod
    def _rows_for_each(cls, value: int, info: ValidationInfo) -> int:
        rows = info.data.get("batch_size")
        if rows and rows % value:
            raise ValueError(f"A batch of {rows} rows cannot be split over {value} passes evenly: take a number that divides it")
        return value

    @property
    def passes(self) -> int:
        """Forward and backward passes per optimizer step."""
        return self.micro_batches * self.gradient_accumulation_steps

    def step_tokens(self, mean: float) -> float:
        """Tokens of the dataset per optimizer step, with rows of `mean` tokens."""
        tokens = self.max_tokens_per_step and self.max_tokens_per_step * (1 - self.rehearsal_fraction)
        return (tokens or (self.batch_size or 1) * mean) * self.gradient_accumulation_steps

    @field_validator(*ONLY_WITH)
    @classmethod
    def _has_its_use(cls, value: Any, info: ValidationInfo) -> Any:
        other, needed = ONLY_WITH[info.field_name or ""]
        if value != cls.model_fields[info.field_name or ""].default and info.data.get(other) not in needed:
            raise ValueError(f"It is for {other} {' or '.join(needed)}, and {other} is {info.data.get(other)}: omit it, or change that")
        return value
