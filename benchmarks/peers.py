"""The trainers that Luthier is compared with: transformers' Trainer, TRL's SFTTrainer and Unsloth, each set up as it comes or, where its
name says so, as somebody who knows it would. Optimizer, learning rate, clipping and seed are stated for all of them.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from benchmarks.engines import Clock, lead_of, strategy_of, warm


def trainer(plan: dict[str, Any], samples: list[list[int]]) -> dict[str, Any]:
    """transformers' Trainer, or TRL's SFTTrainer on top of it."""
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    cuda, engine = plan["device"] == "cuda", plan["engine"]
    tokenizer = AutoTokenizer.from_pretrained(plan["model"])
    half = plan["precision"] != "fp32"
    clock = Clock(cuda)
    model = attached(plan, half)
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": plan["steps"] + warm(cuda), "per_device_train_batch_size": plan["batch"],
        "learning_rate": plan["rate"], "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "bf16": half, "use_cpu": not cuda, "logging_steps": logged(plan), "report_to": [], "save_strategy": "no", "seed": 42,
        "dataloader_num_workers": 0, "disable_tqdm": True, "optim": "adamw_torch_fused",
    }  # fmt: skip
    lead = lead_of(plan)
    rows = [{"input_ids": [*lead, *ids], "labels": [-100] * len(lead) + labels(ids, plan["prompt_share"])} for ids in samples]
    longest = plan["longest"] + len(lead)
    if engine == "hf_trainer":
        if cuda and not plan.get("groups"):  # all rows of a step padded at once are logits of 85 GB
            settings |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": max(1, round(plan["batch"] / 8))}
        arguments = TrainingArguments(**settings, remove_unused_columns=False)
        made = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=padded, callbacks=[times(clock)])
    else:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        own: dict[str, Any] = {"max_length": longest}
        if engine in ("trl_packed", "trl_tuned"):
            own = {"packing": True, "max_length": max(plan["tokens"], longest), "per_device_train_batch_size": 1}
        if engine == "trl_tuned":
            own |= {"gradient_checkpointing": False, "use_liger_kernel": cuda and find_spec("liger_kernel") is not None}
        arguments = SFTConfig(**{**settings, **own})
        made = SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[times(clock)]
        )
    return clock.result(counted(plan, made, rows, len(lead))) | {"details": about(made)}


def attached(plan: dict[str, Any], half: bool) -> Any:
    """The plan's model with its strategy, for a peer: trained weights in float32; frozen ones in bf16 on a GPU, where nobody
    keeps them otherwise."""
    import torch
    from transformers import AutoModelForCausalLM

    cuda, strategy = plan["device"] == "cuda", strategy_of(plan)
    narrow = half and (cuda or plan["engine"] == "trl_tuned") and strategy.adapter
    more: dict[str, Any] = {}
    if strategy.base_bits == 4:
        from transformers import BitsAndBytesConfig

        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    if cuda and plan["engine"] == "trl_tuned":
        more["attn_implementation"] = register_varlen()
    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.bfloat16 if narrow else torch.float32, **more)
    if cuda:
        model = model.cuda()
    model.config.use_cache = False
    torch.manual_seed(42)  # Luthier's own seed, so that a strategy that begins at random begins alike
    model = strategy.attach(model).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def unsloth(plan: dict[str, Any], samples: list[list[int]]) -> dict[str, Any]:
    """Unsloth's loader and layers under TRL, packed and without recomputing."""
    from unsloth import FastLanguageModel  # isort: skip  it changes trl, so it comes first
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    clock = Clock(True)
    longest = max(plan["tokens"], plan["longest"])
    model, tokenizer = FastLanguageModel.from_pretrained(plan["model"], max_seq_length=longest, load_in_4bit=plan["strategy"] == "qlora")
    model = FastLanguageModel.get_peft_model(model, r=plan["rank"], lora_alpha=2 * plan["rank"], use_gradient_checkpointing=False)
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=plan["steps"] + warm(True), per_device_train_batch_size=1, learning_rate=plan["rate"], packing=True,
        lr_scheduler_type="constant", warmup_steps=0, bf16=True, logging_steps=logged(plan), report_to=[], seed=42,
        optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0, save_strategy="no", max_length=longest,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": labels(ids, plan["prompt_share"])} for ids in samples]
    made = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[times(clock)]
    )
    return clock.result(counted(plan, made, rows, 0)) | {"details": about(made)}


def labels(ids: list[int], prompt_share: float) -> list[int]:
    """What is learnt of a sample; -100 in its prompt."""
    count = int(prompt_share * len(ids))
    return [-100] * count + ids[count:]


def register_varlen() -> str:
    """Give transformers torch's attention over packs under a name, which is returned. TRL's collator says where sequences begin."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **more: Any) -> tuple[Any, None]:
        q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
        if k.shape[1] != q.shape[1] and not GROUPED:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        ends = more["cu_seq_lens_q"], more["cu_seq_lens_k"], more["max_length_q"], more["max_length_k"]
        out: Any = varlen_attn(q, k, v, *ends, scale=scaling, window_size=(-1, 0), **GROUPED)
        return out.unsqueeze(0), None

    GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    AttentionInterface.register("torch_varlen", attention)
    return "torch_varlen"


PACKAGES = ("torch", "transformers", "trl", "peft", "liger_kernel", "unsloth", "unsloth_zoo", "xformers", "flash_attn", "triton")


def about(made: Any) -> dict[str, Any]:
    """What a peer computed with: the versions of what is installed in its interpreter, its attention, its optimizer's settings."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    inner, group = getattr(made.model, "module", made.model), made.optimizer.param_groups[0]
    optimizer = {key: value for key, value in group.items() if isinstance(value, int | float | bool | tuple)}
    chosen = {"optimizer": type(getattr(made.optimizer, "optimizer", made.optimizer)).__name__, **optimizer}
    return {
        "versions": versions,
        "attention": getattr(inner.config, "_attn_implementation", None),
        "rope": getattr(inner.config, "rope_parameters", None) or getattr(inner.config, "rope_scaling", None),
        "liger": bool(getattr(made.args, "use_liger_kernel", False)),
        "trained_dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in inner.parameters() if p.requires_grad}),
        **chosen,
    }


def logged(plan: dict[str, Any]) -> int:
    """Every how many steps a peer tells its loss: where a GPU is timed only at the end, because it waits for the GPU to tell it."""
    return 1 if plan["device"] == "cpu" or plan.get("groups") else 10**6


def times(clock: Clock) -> Any:
    """A callback that tells the clock of steps and losses."""
    from transformers import TrainerCallback

    class Times(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                clock.losses.append(float(logs["loss"]))
            elif logs and "train_loss" in logs and not clock.losses:  # the mean, at the end
                clock.losses.append(float(logs["train_loss"]))

    return Times()


def counted(plan: dict[str, Any], made: Any, rows: list[dict[str, Any]], lead: int) -> list[int]:
    """Let a Trainer train, on the plan's groups of rows where it has them; the real tokens of each batch, each sample without its `lead`
    placeholders."""
    counting = Counting(made.data_collator, lead)
    made.data_collator = counting
    if plan.get("groups"):
        from torch.utils.data import DataLoader

        made.get_train_dataloader = lambda: DataLoader(rows, batch_sampler=plan["groups"], collate_fn=counting)
    made.train()
    each = made.args.gradient_accumulation_steps
    return [sum(counting.tokens[start : start + each]) for start in range(0, len(counting.tokens), each)]


class Counting:
    """A collator that notes how many real tokens each batch holds, without the `lead` placeholders of each sample."""

    def __init__(self, inner: Any, lead: int = 0) -> None:
        self.inner, self.lead = inner, lead
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.tokens.append(sum(len(row["input_ids"]) for row in rows) - self.lead * sequences(rows))
        return self.inner(rows)


def sequences(rows: list[dict[str, Any]]) -> int:
    """How many samples a batch holds; a packed row says how long each of its own is."""
    return sum(len(row.get("seq_lengths") or [0]) for row in rows)


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
