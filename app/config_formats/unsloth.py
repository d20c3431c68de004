"""Unsloth and Unsloth Studio: the YAML of `unsloth train --config`, whose sections are data, training, lora and logging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.config_formats._base import (
    OPTIMIZERS,
    SCHEDULES,
    ConfigFormat,
    Translation,
    forget_rank,
    if_positive,
    left,
    low_rank,
    nothing,
    one_of,
    read_elsewhere,
    targets,
    to,
    training_data,
)
from app.errors import BadData


def recognizes(body: Mapping[str, Any]) -> bool:
    training = body.get("training")
    return "model" in body and isinstance(training, Mapping) and bool({"training_type", "load_in_4bit", "max_seq_length"} & training.keys())


def _local(found: Translation, key: str, value: Any) -> None:
    for name in value if isinstance(value, list) else [value]:
        training_data(found, key, name)


def finish(found: Translation) -> None:
    body = found.body
    kind = body.get("training.training_type", "lora")
    if kind not in ("lora", "full"):
        raise BadData(f"training_type: {kind} of Unsloth is not trained here.", hint="Known are lora and full.")
    if kind == "full":
        found.put("strategy.name", "full")
        forget_rank(found)
    else:
        low_rank(found, four_bit=bool(body.get("training.load_in_4bit", True)), rslora=bool(body.get("lora.use_rslora")))
    if not body.get("training.train_on_completions"):
        found.put("run.train_on", "all_turns")  # its default learns the prompt too
    if body.get("lora.use_loftq"):
        found.note("lora.use_loftq", "the correction begins at zero, as QLoRA's does")


FORMAT = ConfigFormat(
    name="unsloth",
    title="Unsloth",
    recognizes=recognizes,
    finish=finish,
    rules={
        "model": to("model", str), "data.dataset": training_data, "data.local_dataset": _local, "data.format_type": nothing,
        "data.custom_format_mapping": left("columns are chosen when the dataset is added (Datasets, Columns)"),
        "training.training_type": read_elsewhere, "training.max_seq_length": to("run.max_length", int), "training.load_in_4bit": read_elsewhere,
        "training.output_dir": nothing, "training.num_epochs": to("run.epochs", float), "training.learning_rate": to("run.learning_rate", float),
        "training.batch_size": to("run.batch_size", int), "training.gradient_accumulation_steps": to("run.gradient_accumulation_steps", int),
        "training.warmup_steps": if_positive("run.warmup_steps"), "training.warmup_ratio": to("run.warmup_fraction", float),
        "training.max_steps": if_positive("run.max_steps"), "training.save_steps": if_positive("run.save_steps"),
        "training.weight_decay": to("run.weight_decay", float), "training.random_seed": to("run.seed", int), "training.packing": nothing,
        "training.optim": one_of("run.optimizer", OPTIMIZERS), "training.lr_scheduler_type": one_of("run.schedule", SCHEDULES),
        "training.train_on_completions": read_elsewhere, "training.gradient_checkpointing": nothing, "lora.lora_r": to("strategy.rank", int),
        "lora.lora_alpha": to("strategy.alpha", float), "lora.lora_dropout": to("strategy.dropout", float), "lora.target_modules": targets,
        "lora.use_rslora": read_elsewhere, "lora.use_loftq": read_elsewhere, "lora.finetune_language_layers": nothing,
        "lora.finetune_attention_modules": nothing, "lora.finetune_mlp_modules": nothing, "lora.finetune_vision_layers": nothing,
        "lora.vision_all_linear": nothing, "logging.wandb_project": nothing, "logging.tensorboard_dir": nothing,
        "logging.enable_wandb": left("metrics are kept in the studio"), "logging.enable_tensorboard": left("metrics are kept in the studio"),
    },
)  # fmt: skip
