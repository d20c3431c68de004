"""Axolotl: https://docs.axolotl.ai/docs/config-reference.html"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.config_formats._base import (
    NO_COUNTERPART,
    OPTIMIZERS,
    SCHEDULES,
    TEMPLATE,
    TEMPLATES,
    ConfigFormat,
    Note,
    Translation,
    forget_rank,
    if_positive,
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

METHODS = {
    None: "generation", "dpo": "preference", "ipo": "preference", "orpo": "preference", "simpo": "preference", "kto": "kto",
}  # fmt: skip


def recognizes(body: Mapping[str, Any]) -> bool:
    return "base_model" in body and bool({"datasets", "sequence_len", "micro_batch_size", "adapter"} & body.keys())


def _datasets(found: Translation, key: str, value: Any) -> None:
    sets = value if isinstance(value, list) else [value]
    if len(sets) != 1 or not isinstance(sets[0], dict):
        found.note(key, "several datasets: join them first (Datasets, Join), then write the dataset_id")
        return
    one = sets[0]
    files = one.get("data_files")
    training_data(found, key, files if isinstance(files, str) else files[0] if files else one.get("path", ""))
    for name in one.keys() - {"path", "type", "data_files", "ds_type", "split", "name"}:
        found.notes.append(Note(f"datasets.{name}", one[name], "columns are chosen when the dataset is added (Datasets, Columns)"))


def _validation(found: Translation, key: str, value: Any) -> None:
    if 0 <= float(value) < 1:
        found.put("run.validation_fraction", float(value))
    else:
        found.note(key, "a number of rows: write a share of them as run.validation_fraction")


def _template(found: Translation, key: str, value: Any) -> None:
    if value in TEMPLATES:
        found.put("run.chat_template", TEMPLATES[value])
    else:
        found.note(key, TEMPLATE)


def finish(found: Translation) -> None:
    body = found.body
    if body.get("rl") not in METHODS:
        raise BadData(f"rl: {body['rl']} of Axolotl is not trained here.", hint="Known are dpo, ipo, orpo, simpo, kto, and none.")
    found.put("task", METHODS[body.get("rl")])
    if body.get("rl") == "kto":
        preferences(found, desirable_weight=1.0, undesirable_weight=1.0)
    else:
        preferences(found, body.get("rl"), **({"beta": 0.1, "gamma": 0.5} if body.get("rl") == "simpo" else {}))
    adapter = body.get("adapter")
    if adapter in ("lora", "qlora"):
        if adapter == "lora" and body.get("load_in_8bit"):
            found.note("load_in_8bit", "bases are kept in 4 bits (QLoRA) or in 16")
        four = adapter == "qlora" or bool(body.get("load_in_4bit"))
        low_rank(found, four_bit=four, dora=bool(body.get("peft_use_dora")), rslora=bool(body.get("peft_use_rslora")))
    elif not adapter:
        found.put("strategy.name", "full")
        forget_rank(found)
    else:
        raise BadData(f"adapter: {adapter} of Axolotl is not trained here.", hint="Known are lora, qlora, and none.")
    rows, length = int(body.get("micro_batch_size") or 1), int(body.get("sequence_len") or 2048)
    if body.get("sample_packing"):
        found.put("run.max_tokens_per_step", rows * length)  # its batches are full sequences
    else:
        found.put("run.batch_size", rows)


FORMAT = ConfigFormat(
    name="axolotl",
    title="Axolotl",
    recognizes=recognizes,
    finish=finish,
    rules={
        "base_model": to("model", str), "base_model_config": nothing, "model_type": nothing, "tokenizer_type": nothing, "tokenizer_config": nothing,
        "is_llama_derived_model": nothing, "is_mistral_derived_model": nothing, "trust_remote_code": left("no code of a model is ever run here"),
        "load_in_8bit": read_elsewhere, "load_in_4bit": read_elsewhere, "strict": nothing, "datasets": _datasets, "dataset_prepared_path": nothing,
        "val_set_size": _validation, "test_datasets": left("add it and write its validation_dataset_id"), "output_dir": nothing, "adapter": read_elsewhere,
        "lora_model_dir": left("add that model first and name it as the model"), "sequence_len": to("run.max_length", int), "sample_packing": read_elsewhere,
        "eval_sample_packing": nothing, "pad_to_sequence_len": nothing, "excess_length_strategy": left("longer rows are truncated, and the report lists them"),
        "lora_r": to("strategy.rank", int), "lora_alpha": to("strategy.alpha", float), "lora_dropout": to("strategy.dropout", float),
        "lora_target_linear": lambda f, k, v: f.put("strategy.layers", "all-linear") if v else None, "lora_target_modules": targets,
        "lora_modules_to_save": lambda f, k, v: f.put("strategy.modules_to_save", ", ".join(v)), "lora_fan_in_fan_out": nothing,
        "peft_use_dora": read_elsewhere, "peft_use_rslora": read_elsewhere, "loraplus_lr_ratio": to("strategy.loraplus_lr_ratio", float),
        "lora_on_cpu": nothing, "gradient_accumulation_steps": to("run.gradient_accumulation_steps", int), "micro_batch_size": read_elsewhere,
        "eval_batch_size": nothing, "num_epochs": to("run.epochs", float), "max_steps": to("run.max_steps", int), "optimizer": one_of("run.optimizer", OPTIMIZERS),
        "lr_scheduler": one_of("run.schedule", SCHEDULES), "learning_rate": to("run.learning_rate", float), "cosine_min_lr_ratio": to("run.min_lr_fraction", float),
        "warmup_steps": if_positive("run.warmup_steps"), "warmup_ratio": to("run.warmup_fraction", float),
        "weight_decay": to("run.weight_decay", float), "max_grad_norm": to("run.max_grad_norm", float), "adam_beta1": to("run.adam_beta1", float),
        "adam_beta2": to("run.adam_beta2", float), "adam_epsilon": to("run.adam_epsilon", float), "neftune_noise_alpha": to("run.neftune_noise_alpha", float),
        "train_on_inputs": lambda f, k, v: f.put("run.train_on", "all_turns") if v else None, "group_by_length": nothing,
        "early_stopping_patience": to("run.early_stopping_patience", int), "seed": to("run.seed", int), "data_seed": nothing, "chat_template": _template,
        "chat_template_jinja": to("run.chat_template_jinja", str), "rl": read_elsewhere, "rl_beta": to("preference.beta", float),
        "dpo_beta": to("preference.beta", float), "dpo_label_smoothing": to("preference.label_smoothing", float),
        "orpo_alpha": to("preference.beta", float), "simpo_gamma": to("preference.gamma", float),
        "kto_desirable_weight": to("preference.desirable_weight", float), "kto_undesirable_weight": to("preference.undesirable_weight", float),
        "evals_per_epoch": to("run.evaluations_per_epoch", float), "eval_steps": to("run.eval_steps", int),
        "saves_per_epoch": nothing, "save_steps": to("run.save_steps", int), "save_total_limit": to("run.save_total_limit", int),
        "logging_steps": nothing, "bf16": nothing, "fp16": nothing, "tf32": nothing, "gradient_checkpointing": nothing, "gradient_checkpointing_kwargs": nothing,
        "flash_attention": nothing, "sdp_attention": nothing, "xformers_attention": nothing, "deepspeed": left("several GPUs are used by the studio itself"),
        "fsdp": left("several GPUs are used by the studio itself"), "fsdp_config": nothing, "special_tokens": left("the tokenizer keeps its special tokens"),
        "resume_from_checkpoint": left("a job is resumed on its own page"), "hub_model_id": left("push the result from its page (Export)"), "debug": nothing,
        "local_rank": nothing, "wandb_project": left("metrics are kept in the studio"), "plugins": left(NO_COUNTERPART),
    },
)  # fmt: skip
