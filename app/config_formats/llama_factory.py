"""LLaMA-Factory: https://llamafactory.readthedocs.io, arguments of `llamafactory-cli train`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.config_formats._base import (
    KEPT,
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

STAGES = {"sft": "generation", "pt": "generation", "dpo": "preference", "kto": "kto"}
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}


def recognizes(body: Mapping[str, Any]) -> bool:
    return "model_name_or_path" in body and bool({"finetuning_type", "stage", "template"} & body.keys())


def _template(found: Translation, key: str, value: Any) -> None:
    if value in TEMPLATES and value != "tokenizer_default":
        found.put("run.chat_template", TEMPLATES[value])
    elif value != "default":
        found.note(key, TEMPLATE)


def _dataset(found: Translation, key: str, value: Any) -> None:
    names = [name.strip() for name in str(value).split(",")]
    if len(names) > 1:
        found.note(key, "several datasets: join them first (Datasets, Join), then write the dataset_id")
    else:
        training_data(found, key, names[0])


def finish(found: Translation) -> None:
    body = found.body
    stage, kind = body.get("stage", "sft"), body.get("finetuning_type", "lora")
    if stage not in STAGES:
        raise BadData(f"The stage {stage!r} of LLaMA-Factory is not trained here.", hint=f"Known are {', '.join(STAGES)}.")
    found.put("task", STAGES[stage])
    bits = body.get("quantization_bit")
    if kind == "lora":
        if bits not in (None, 4, "4"):
            found.note("quantization_bit", "bases are kept in 4 bits (QLoRA) or in 16")
        low_rank(
            found, four_bit=bits in (4, "4"), dora=bool(body.get("use_dora")), rslora=bool(body.get("use_rslora")),
            pissa=bool(body.get("pissa_init")),
        )  # fmt: skip
        if "lora_rank" in body and "lora_alpha" not in body:
            found.put("strategy.alpha", 2 * body["lora_rank"])  # its default
    elif kind == "full":
        found.put("strategy.name", "full")
        forget_rank(found)
    elif kind == "freeze":
        found.order["strategy"] = {"name": "top_layers", "layers": int(body.get("freeze_trainable_layers", 2))}
    else:
        found.order["strategy"] = {"name": "oft"} if kind == "oft" else {"name": "lora"}
        if kind != "oft":
            found.note("finetuning_type", "is not known here: LoRA is taken")
    if stage == "dpo":
        loss = body.get("pref_loss", "sigmoid")
        preferences(found, LOSSES.get(loss, "dpo"), **({"beta": 0.1, "gamma": 0.5} if loss == "simpo" else {}))
        if loss not in LOSSES:
            found.note("pref_loss", "is not known here: DPO's loss is taken")
    else:
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0} if stage == "kto" else {}
        preferences(found, None, **weights)
    if body.get("packing") is False or "packing" not in body:
        found.notes.append(Note("packing", body.get("packing"), "rows are packed without seeing each other: the same loss, faster"))


FORMAT = ConfigFormat(
    name="llama_factory",
    title="LLaMA-Factory",
    recognizes=recognizes,
    finish=finish,
    rules={
        "model_name_or_path": to("model", str), "stage": read_elsewhere, "finetuning_type": read_elsewhere, "do_train": nothing, "do_eval": nothing,
        "trust_remote_code": left("no code of a model is ever run here"), "dataset": _dataset, "dataset_dir": nothing, "template": _template,
        "cutoff_len": to("run.max_length", int), "max_samples": left("all rows are taken: cut the dataset (Datasets, Rows), or set run.data_fraction"),
        "val_size": to("run.validation_fraction", float), "eval_dataset": left("add it and write its validation_dataset_id"),
        "per_device_train_batch_size": to("run.batch_size", int), "gradient_accumulation_steps": to("run.gradient_accumulation_steps", int),
        "per_device_eval_batch_size": nothing, "learning_rate": to("run.learning_rate", float), "num_train_epochs": to("run.epochs", float),
        "max_steps": if_positive("run.max_steps"), "lr_scheduler_type": one_of("run.schedule", SCHEDULES),
        "warmup_ratio": to("run.warmup_fraction", float), "warmup_steps": if_positive("run.warmup_steps"),
        "weight_decay": to("run.weight_decay", float), "max_grad_norm": to("run.max_grad_norm", float), "optim": one_of("run.optimizer", OPTIMIZERS),
        "adam_beta1": to("run.adam_beta1", float), "adam_beta2": to("run.adam_beta2", float), "adam_epsilon": to("run.adam_epsilon", float),
        "neftune_noise_alpha": to("run.neftune_noise_alpha", float), "seed": to("run.seed", int), "data_seed": nothing,
        "lora_rank": to("strategy.rank", int), "lora_alpha": to("strategy.alpha", float), "lora_dropout": to("strategy.dropout", float),
        "lora_target": targets, "loraplus_lr_ratio": to("strategy.loraplus_lr_ratio", float), "additional_target": to("strategy.modules_to_save", str),
        "use_dora": read_elsewhere, "use_rslora": read_elsewhere, "pissa_init": read_elsewhere, "quantization_bit": read_elsewhere,
        "quantization_method": nothing, "double_quantization": nothing, "freeze_trainable_layers": read_elsewhere,
        "train_on_prompt": lambda f, k, v: f.put("run.train_on", "all_turns") if v else None,
        "mask_history": lambda f, k, v: f.put("run.train_on", "last_turn") if v else None, "packing": read_elsewhere, "neat_packing": nothing,
        "pref_beta": to("preference.beta", float), "pref_loss": read_elsewhere, "simpo_gamma": to("preference.gamma", float),
        "dpo_label_smoothing": to("preference.label_smoothing", float), "kto_chosen_weight": to("preference.desirable_weight", float),
        "kto_rejected_weight": to("preference.undesirable_weight", float), "save_steps": to("run.save_steps", int),
        "save_total_limit": to("run.save_total_limit", int), "eval_steps": to("run.eval_steps", int), "output_dir": nothing,
        "logging_steps": nothing, "plot_loss": nothing, "overwrite_output_dir": nothing, "overwrite_cache": nothing, "save_only_model": nothing,
        "preprocessing_num_workers": nothing, "dataloader_num_workers": nothing, "ddp_timeout": nothing, "report_to": left("metrics are kept in the studio"),
        "bf16": nothing, "fp16": nothing, "pure_bf16": nothing, "flash_attn": nothing, "enable_liger_kernel": nothing, "use_unsloth": nothing,
        "gradient_checkpointing": nothing, "disable_gradient_checkpointing": nothing, "upcast_layernorm": nothing, "eval_strategy": nothing,
        "save_strategy": nothing, "include_num_input_tokens_seen": nothing, "run_name": to("name", str), "export_dir": left(KEPT),
        "resume_from_checkpoint": left("a job is resumed on its own page"), "adapter_name_or_path": left("add that model first and name it as the model"),
    },
)  # fmt: skip
