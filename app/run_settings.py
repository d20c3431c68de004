"""RunSettings: how a job trains, whatever its strategy. A field is a setting of the API, a control of the form and a part of the stored
spec at once; `group` in its `json_schema_extra` says where the form shows it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from app.chat_templates import MAX_CHARACTERS, SAMPLES, TemplateName, fault
from app.languages import mark
from app.new_tokens import NewTokens
from app.optimizers import Optimizer, with_setting

TrainOn = Literal["assistant", "all_turns", "last_turn"]
TRAIN_ON = {"assistant": mark("assistant turns"), "all_turns": mark("all turns"), "last_turn": mark("last assistant turn")}
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
        3, gt=0, le=1000, json_schema_extra={"group": "Optimization", "basic": True},
        description=mark("Passes over the data. Training stops early when validation stops improving."),
    )  # fmt: skip
    learning_rate: float | None = Field(
        None, gt=0, le=10, json_schema_extra={"group": "Optimization", "basic": True},
        description=mark("Learning rate after warmup. Leave empty for the method's default."),
    )  # fmt: skip
    max_tokens_per_step: int | None = Field(
        2048, ge=16, le=1_048_576, title=mark("Tokens per batch"),
        json_schema_extra={"group": "Optimization", "basic": True, "unit": "tokens"},
        description=mark("Tokens of data in a batch, padding not counted. Batch size sets it in rows."),
    )  # fmt: skip
    batch_size: int | None = Field(
        None, ge=1, le=65_536, exclude_if=unset, json_schema_extra={"group": "Optimization", "unit": "rows"},
        description=mark(
            "Rows in a batch, instead of tokens: as many behind every optimizer step, however long they are. The memory must hold that "
            "many of the longest."
        ),
    )  # fmt: skip
    gradient_accumulation_steps: int = Field(
        1, ge=1, le=1024, exclude_if=lambda batches: batches == 1, json_schema_extra={"group": "Optimization"},
        description=mark(
            "Batches whose gradients are added up before the optimizer takes a step: the effective batch is as many times larger."
        ),
    )  # fmt: skip
    max_length: int = Field(
        1024, ge=8, le=131_072, json_schema_extra={"group": "Data", "unit": "tokens"},
        description=mark("Longer examples are truncated to this many tokens; the report lists them."),
    )  # fmt: skip
    train_on: TrainOn = Field(
        "assistant", exclude_if=lambda turns: turns == "assistant", json_schema_extra={"group": "Data", "words": {**TRAIN_ON}},
        description=mark(
            "Which turns of a conversation carry a loss: the assistant's, all of the text with its system and user turns, or the last of "
            "the assistant's. A turn of weight 0 never does."
        ),
    )  # fmt: skip
    chat_template: TemplateName = Field(
        "model", title=mark("Chat template"), exclude_if=lambda name: name == "model",
        json_schema_extra={"group": "Data", "words": {**SAMPLES}},
        description=mark("How conversations are written as text. The result keeps the one it was trained with."),
    )  # fmt: skip
    chat_template_jinja: str | None = Field(
        None, min_length=1, max_length=MAX_CHARACTERS, title=mark("Chat template (Jinja)"), exclude_if=unset, validate_default=True,
        json_schema_extra={"group": "Data", "rows": 4},
        description=mark(
            "For the chat template jinja: the text of one. It is given messages, add_generation_prompt, bos_token and eos_token, and "
            "should end an answer with {{ eos_token }}."
        ),
    )  # fmt: skip
    packing: bool = Field(
        True, exclude_if=lambda packed: packed is True, json_schema_extra={"group": "Data"},
        description=mark(
            "Rows of a batch are laid end to end without padding, and never see each other. Off pads each to the longest of its pass: the "
            "same loss, fewer rows in as many tokens, slower."
        ),
    )  # fmt: skip
    rehearsal_fraction: float = Field(
        0.0, ge=0, le=0.5, exclude_if=lambda share: share == 0, json_schema_extra={"group": "Data"},
        description=mark(
            "Share of each step's tokens that are general text, against forgetting: the base's own answers to general prompts, which it "
            "writes once before the first step. 0.05 to 0.25 is usual; 0 plays in none. The steps become more by as much."
        ),
    )  # fmt: skip
    new_tokens: NewTokens | None = Field(
        None, exclude_if=unset, json_schema_extra={"group": "Data", "rows": 3},
        description=mark("Strings, one a line, that become one token each, trained by any method. The dataset's report suggests some."),
    )  # fmt: skip
    max_steps: int | None = Field(
        None, ge=1, json_schema_extra={"group": "Optimization", "unit": "steps"},
        description=mark("Stop after this many optimizer steps, whatever the epochs are."),
    )  # fmt: skip
    micro_batches: int = Field(
        1, ge=1, le=1024, title=mark("Micro-batches"), json_schema_extra={"group": "Hardware"},
        description=mark(
            "Passes that a batch is split over: less memory, the same result, a little slower. It does not enlarge the batch; gradient "
            "accumulation does."
        ),
    )  # fmt: skip
    schedule: Schedule = Field(
        "cosine", title=mark("LR scheduler"), json_schema_extra={"group": "Optimization"},
        description=mark("How the learning rate falls after warmup. wsd (warmup, stable, decay) keeps it until the last steps."),
    )  # fmt: skip
    warmup_fraction: float = Field(
        0.05, ge=0, le=0.5, json_schema_extra={"group": "Optimization"},
        description=mark("Share of the steps during which the learning rate rises from zero. Warmup steps set the same as a number."),
    )  # fmt: skip
    warmup_steps: int | None = Field(
        None, ge=0, exclude_if=unset, json_schema_extra={"group": "Optimization", "unit": "steps"},
        description=mark("Optimizer steps during which the learning rate rises from zero, instead of a share."),
    )  # fmt: skip
    num_cycles: int | None = Field(
        None, ge=1, le=100, title=mark("Number of cycles"), exclude_if=unset, json_schema_extra={"group": "Optimization"},
        description=mark("How often cosine_with_restarts falls from the full learning rate. Empty takes 2."),
    )  # fmt: skip
    decay_fraction: float | None = Field(
        None, gt=0, le=1, exclude_if=unset, json_schema_extra={"group": "Optimization"},
        description=mark("Share of the steps, the last ones, during which wsd falls linearly. Empty takes 0.1."),
    )  # fmt: skip
    min_lr_fraction: float = Field(
        0.0, ge=0, lt=1, title=mark("Minimum LR fraction"), exclude_if=lambda share: share == 0,
        json_schema_extra={"group": "Optimization"},
        description=mark("Share of the learning rate that the schedule ends at instead of zero. constant never falls, so it takes none."),
    )  # fmt: skip
    weight_decay: float = Field(
        0.0, ge=0, le=1, json_schema_extra={"group": "Optimization"},
        description=mark("Decoupled L2 decay of trained matrices; biases and norms have none."),
    )  # fmt: skip
    max_grad_norm: float = Field(
        1.0, ge=0, json_schema_extra={"group": "Optimization"},
        description=mark("Gradient clipping: longer gradients are scaled down to this norm. 0 turns it off."),
    )  # fmt: skip
    neftune_noise_alpha: float | None = Field(
        None, gt=0, le=100, title=mark("NEFTune noise alpha"), exclude_if=unset, json_schema_extra={"group": "Optimization"},
        description=mark("NEFTune: random noise on the embeddings while training, never in evaluation; 5 is usual. Empty adds none."),
    )  # fmt: skip
    validation_fraction: float = Field(
        0.1, ge=0, lt=1, json_schema_extra={"group": "Data"},
        description=mark(
            "Share of the rows held out, drawn by the seed, when no validation file is given. Empty holds out a tenth, and of fewer than "
            "100 rows enough for ten, but a quarter at most."
        ),
    )  # fmt: skip
    data_fraction: float = Field(
        1.0, gt=0, le=1, json_schema_extra={"group": "Data"},
        description=mark(
            "Share of the training rows to train on, drawn by the seed; the validation rows stay the same. A learning curve is made of "
            "such jobs."
        ),
    )  # fmt: skip
    evaluations_per_epoch: float = Field(
        2, ge=0, le=100, json_schema_extra={"group": "Evaluation"},
        description=mark("How often validation loss is measured and a checkpoint saved. 0 measures only at the end."),
    )  # fmt: skip
    eval_steps: int | None = Field(
        None, ge=1, exclude_if=unset, json_schema_extra={"group": "Evaluation", "unit": "steps"},
        description=mark("Measure validation loss every so many optimizer steps, instead of so often per epoch."),
    )  # fmt: skip
    save_steps: int | None = Field(
        None, ge=1, exclude_if=unset, json_schema_extra={"group": "Evaluation", "unit": "steps"},
        description=mark(
            "Save a checkpoint every so many optimizer steps, at the end, and where an evaluation is the best so far. Empty saves at "
            "every evaluation."
        ),
    )  # fmt: skip
    save_total_limit: int | None = Field(
        None, ge=1, le=1000, exclude_if=unset, json_schema_extra={"group": "Evaluation"},
        description=mark("Checkpoints that are kept besides the best one, newest first. Empty keeps as many as the studio is set to (2)."),
    )  # fmt: skip
    metric_for_best: Literal["loss", "accuracy", "grader"] = Field(
        "loss", title=mark("Metric for best"), exclude_if=lambda metric: metric == "loss", json_schema_extra={"group": "Evaluation"},
        description=mark(
            "What the best checkpoint and early stopping go by: validation loss, the share of held-out tokens, texts or pairs that the "
            "model gets right, or the first of the job's graders: then a checkpoint is better only where the 95% interval of its "
            "difference over the same rows is above zero."
        ),
    )  # fmt: skip
    graded_rows: int = Field(
        32, ge=5, le=2000, exclude_if=lambda rows: rows == 32, json_schema_extra={"group": "Evaluation", "unit": "rows"},
        description=mark("Validation rows that are answered and graded at each evaluation, where the job has graders."),
    )  # fmt: skip
    load_best: bool = Field(
        True, exclude_if=lambda best: best is True, json_schema_extra={"group": "Evaluation"},
        description=mark("The result is the best checkpoint on the validation rows. Off keeps the last weights."),
    )  # fmt: skip
    early_stopping_patience: int = Field(
        3, ge=0, json_schema_extra={"group": "Evaluation"},
        description=mark("Stop after this many evaluations without a better score. 0 never stops early."),
    )  # fmt: skip
    samples: int = Field(
        3, ge=0, le=16, title=mark("Sample generations"), json_schema_extra={"group": "Evaluation"},
        description=mark("Answers written to held-out prompts at each evaluation, to read how it goes."),
    )  # fmt: skip
    sample_tokens: int = Field(
        64, ge=1, le=1024, title=mark("Max new tokens"), json_schema_extra={"group": "Evaluation", "unit": "tokens"},
        description=mark("Longest sample generation."),
    )  # fmt: skip
    forgetting: bool = Field(
        True, title=mark("General-ability check"), json_schema_extra={"group": "Evaluation"},
        description=mark(
            "Score the model on general texts before and at the end, to see whether it lost general ability. Takes some seconds."
        ),
    )  # fmt: skip
    row_losses: bool = Field(
        True, title=mark("Per-example loss"), json_schema_extra={"group": "Evaluation"},
        description=mark(
            "Write down each row's loss before and at the end, which shows rows that are wrong. Costs two passes over the rows without "
            "training."
        ),
    )  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", exclude_if=lambda device: device == "auto", json_schema_extra={"group": "Hardware"},
        description=mark(
            "What the run computes on. auto takes the GPU where there is one, cpu leaves it to others, and cuda is refused without one."
        ),
    )  # fmt: skip
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", json_schema_extra={"group": "Hardware"},
        description=mark("Precision of the arithmetic. auto takes bf16 where this machine gains by it."),
    )  # fmt: skip
    optimizer: Optimizer = Field(
        "adamw", json_schema_extra={"group": "Optimization"},
        description=mark(
            "adamw fits most. adamw_8bit and paged_adamw_8bit keep its moments in 8 bits, on a GPU. lion and muon keep one moment (muon "
            "of matrices; the rest is adamw's), adafactor hardly any."
        ),
    )  # fmt: skip
    adam_beta1: float | None = Field(
        None, ge=0, lt=1, title=mark("Adam beta1"), exclude_if=unset, json_schema_extra={"group": "Optimization"},
        description=mark("Decay of the mean of the gradients. Empty takes the optimizer's own: 0.9."),
    )  # fmt: skip
    adam_beta2: float | None = Field(
        None, ge=0, lt=1, title=mark("Adam beta2"), exclude_if=unset, json_schema_extra={"group": "Optimization"},
        description=mark("Decay of the mean of their squares; lion's second decay. Empty takes the optimizer's own: 0.999, lion 0.99."),
    )  # fmt: skip
    adam_epsilon: float | None = Field(
        None, gt=0, le=1, title=mark("Adam epsilon"), exclude_if=unset, json_schema_extra={"group": "Optimization"},
        description=mark("Added to the root that a step is divided by. Empty takes 1e-8."),
    )  # fmt: skip
    frozen_weights: Literal["auto", "fp8"] = Field(
        "auto", title=mark("Base weight dtype"), exclude_if=lambda kind: kind == "auto", json_schema_extra={"group": "Hardware"},
        description=mark(
            "fp8 keeps the frozen layers in 8 bits and multiplies in them: less memory and faster, a little less exact. For LoRA on "
            "NVIDIA GPUs of capability 8.9 or later (Ada, Hopper)."
        ),
    )  # fmt: skip
    gradient_checkpointing: Literal["auto", "none", "all"] = Field(
        "auto", json_schema_extra={"group": "Hardware"},
        description=mark(
            "Recompute activations instead of keeping them: less memory, slower. auto does it for as many layers as the memory needs."
        ),
    )  # fmt: skip
    seed: int = Field(
        42, ge=0, le=2**31 - 1, json_schema_extra={"group": "Optimization"},
        description=mark("Seed of the data order, the split and every draw."),
    )  # fmt: skip

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


_SHOWN = (
    mark("Epochs"), mark("Learning rate"), mark("Batch size"), mark("Gradient accumulation steps"), mark("Max length"), mark("Train on"),
    mark("Packing"), mark("Rehearsal fraction"), mark("New tokens"), mark("Max steps"), mark("Warmup fraction"), mark("Warmup steps"),
    mark("Decay fraction"), mark("Weight decay"), mark("Max grad norm"), mark("Validation fraction"), mark("Data fraction"),
    mark("Evaluations per epoch"), mark("Eval steps"), mark("Save steps"), mark("Save total limit"), mark("Graded rows"), mark("Load best"),
    mark("Early stopping patience"), mark("Device"), mark("Precision"), mark("Optimizer"), mark("Gradient checkpointing"), mark("Seed"),
    mark("Optimization"), mark("Data"), mark("Evaluation"), mark("Hardware"), mark("tokens"), mark("rows"), mark("steps"),
)  # fmt: skip
"""What forms show of it besides: labels that are made of the names of fields, groups and units."""
