"""Soup (soup-cli): the sections of `soup.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.config_formats._base import (
    OPTIMIZERS,
    SCHEDULES,
    ConfigFormat,
    Translation,
    left,
    low_rank,
    nothing,
    one_of,
    preferences,
    read_elsewhere,
    targets,
    to,
    training_data,
)
from app.errors import BadData

TASKS = {"sft": "generation", "pretrain": "generation", "dpo": "preference", "ipo": "preference"}


def recognizes(body: Mapping[str, Any]) -> bool:
    return "base" in body and isinstance(body.get("data"), Mapping) and "train" in body["data"]


def _number(path: str) -> Any:
    """Soup may leave a number to itself as `auto`; the studio then takes its own."""
    return lambda found, key, value: found.put(path, int(value)) if value != "auto" else None


def finish(found: Translation) -> None:
    body = found.body
    task = body.get("task", "sft")
    if task not in TASKS:
        raise BadData(f"The task {task!r} of Soup is not trained here.", hint=f"Known are {', '.join(TASKS)}.")
    found.put("task", TASKS[task])
    preferences(found, task if task in ("dpo", "ipo") else None)
    bits = str(body.get("training.quantization") or "none")
    if bits not in ("none", "4bit"):
        found.note("training.quantization", "bases are kept in 4 bits (QLoRA) or in 16")
    low_rank(
        found, four_bit=bits == "4bit", dora=bool(body.get("training.lora.use_dora")), rslora=bool(body.get("training.lora.use_rslora"))
    )


FORMAT = ConfigFormat(
    name="soup",
    title="Soup",
    recognizes=recognizes,
    finish=finish,
    rules={
        "base": to("model", str), "task": read_elsewhere, "backend": nothing, "data.train": training_data, "data.format": nothing,
        "data.val": left("add it and write its validation_dataset_id"), "data.val_split": to("run.validation_fraction", float),
        "data.max_length": to("run.max_length", int), "training.epochs": to("run.epochs", float), "training.lr": to("run.learning_rate", float),
        "training.batch_size": _number("run.batch_size"), "training.gradient_accumulation_steps": to("run.gradient_accumulation_steps", int),
        "training.lora.r": to("strategy.rank", int), "training.lora.alpha": to("strategy.alpha", float), "training.lora.dropout": to("strategy.dropout", float),
        "training.lora.target_modules": targets, "training.lora.use_dora": read_elsewhere, "training.lora.use_rslora": read_elsewhere,
        "training.quantization": read_elsewhere, "training.warmup_ratio": to("run.warmup_fraction", float), "training.weight_decay": to("run.weight_decay", float),
        "training.max_grad_norm": to("run.max_grad_norm", float), "training.optimizer": one_of("run.optimizer", OPTIMIZERS),
        "training.scheduler": one_of("run.schedule", SCHEDULES), "training.neftune_alpha": to("run.neftune_noise_alpha", float),
        "training.dpo_beta": to("preference.beta", float), "training.ipo_tau": to("preference.beta", float), "training.seed": to("run.seed", int),
        "training.logging_steps": nothing, "training.save_steps": to("run.save_steps", int), "training.gradient_checkpointing": nothing, "output": nothing,
        "experiment_name": to("name", str),
    },
)  # fmt: skip
