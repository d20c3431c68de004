"""What `benchmarks/training.py` runs in a process of its own for each engine: Luthier, transformers' Trainer, TRL and Unsloth.

With `groups` in the plan every engine gets the same rows in the same steps, so that their losses can be laid side by side;
without, each makes its own batches, as it comes.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

WARM = 3


class Clock:
    """Times of the ends of steps, and what was read until then. `ahead` is how many further steps were launched when one is told of: their
    work is done before a time that is taken then, so it is not counted after it."""

    def __init__(self, cuda: bool, ahead: int = 0) -> None:
        self.cuda, self.ahead = cuda, ahead
        self.began = time.perf_counter()
        self.marks: list[tuple[float, float]] = []  # (wall, processor) at the end of each step
        self.losses: list[float] = []

    def step(self) -> None:
        if self.cuda and len(self.marks) == WARM - 1:
            import torch

            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))

    def result(self, tokens: list[int]) -> dict[str, Any]:
        """`tokens` are the real ones of each step."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            self.marks[-1] = (time.perf_counter(), time.process_time())
        (wall, cpu), (end, cpu_end) = self.marks[WARM - 1], self.marks[-1]
        timed = tokens[WARM + self.ahead : len(self.marks)]
        real = sum(timed)
        tail = self.losses[-max(1, len(self.losses) // 3) :]
        return {
            "tokens_per_second": real / (end - wall),
            "tokens_per_cpu_second": real / max(cpu_end - cpu, 1e-9),
            "tokens_per_step": real / len(timed),
            "peak_memory_bytes": peak(self.cuda),
            "loss": sum(tail) / len(tail),
            "first_loss": self.losses[0],
            "losses": self.losses,
            "seconds_to_first_step": self.marks[0][0] - self.began,
        }


def peak(cuda: bool) -> int:
    import torch

    from worker.runtime import devices

    device = torch.device("cuda" if cuda else "cpu")
    return devices.of(device).peak_memory(device)


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """One engine's run of `plan`: speeds, memory and losses."""
    engine = plan["engine"]
    samples = json.loads(Path(plan["samples"]).read_text())
    if engine.startswith("luthier"):
        return luthier(plan, samples)
    if engine == "unsloth":
        return unsloth(plan, samples)
    return trainer(plan, samples)


def lead_of(plan: dict[str, Any]) -> list[int]:
    """The placeholders before each sample whose places the strategy fills itself. They are neither learnt nor counted."""
    return [0] * strategy_of(plan).virtual_tokens()


def strategy_of(plan: dict[str, Any]) -> Any:
    from app.strategies import STRATEGIES

    kind = STRATEGIES[plan["strategy"]]
    ranked = {"rank": plan["rank"], "alpha": 2.0 * plan["rank"]} if "rank" in kind.model_fields and "alpha" in kind.model_fields else {}
    return kind(**ranked)


# Luthier --------------------------------------------------------------------------------------------------------------


def luthier(plan: dict[str, Any], samples: list[list[int]]) -> dict[str, Any]:
    """`worker.train.train` from its first line to the last timed step."""
    import torch

    from app import events
    from worker import train
    from worker.modeling import fused_layers
    from worker.runtime.transfer import depth
    from worker.training import schedule as train_schedule

    spec = order_of(plan, len(samples))
    total = spec.run.max_steps
    train.objective_of = lambda spec, tokenizer: given(spec, tokenizer, samples)
    packs, lead, rows_of = train_schedule.stream, len(lead_of(plan)), []

    def stream(*order: Any, **more: Any) -> Any:
        groups = ((0, place, rows) for place, rows in enumerate(plan["groups"])) if plan.get("groups") else packs(*order, **more)
        for epoch, place, rows in groups:
            rows_of.append(len(rows))
            yield epoch, place, rows

    train_schedule.stream = stream
    fused_layers.MIN_SECONDS_TO_COMPILE = {"luthier_compiled": 0.0, "luthier_eager": 1e12, "luthier_peft": 1e12}.get(
        plan["engine"], fused_layers.MIN_SECONDS_TO_COMPILE
    )
    if plan["engine"] == "luthier_peft":
        from worker.modeling import fused_lora

        fused_lora.fuse = lambda model, grouped=True: 0
    device = torch.device(plan["device"])
    clock, counts, told = Clock(device.type == "cuda", depth(device)), [], 0
    attempt = Path(os.environ["LUTHIER_DATA_DIR"]) / "runs" / f"{plan['engine']}-{plan['round']}" / "a1"
    details: dict[str, Any] = {}
    for event in train.train(spec, attempt):
        if isinstance(event, events.Started):
            details = {"precision": event.precision, **event.details}
        if isinstance(event, events.Step):
            clock.losses.append(event.loss)
            counts.append(event.tokens - told - lead * rows_of[len(counts)])
            told = event.tokens
            clock.step()
            if len(counts) == total:
                break
    return {**clock.result(counts), "details": details}


def order_of(plan: dict[str, Any], rows: int) -> Any:
    """The plan as Luthier's order: no validation, no sample answers, no forgetting, a constant learning rate."""
    import uuid

    from app.shapes import shape_of
    from app.spec import DatasetRef, JobSpec, ModelRef, RunSettings

    folder = Path(plan["model"])
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    model = ModelRef(id=uuid.UUID(int=1), name="model", kind="generic", path=str(folder), revision="0" * 64, shape=shape)
    data = DatasetRef(id=uuid.UUID(int=2), name="rows", path="rows", sha256="0" * 64, format="plain_text", rows=rows)
    settings = RunSettings(
        max_tokens_per_step=plan["tokens"], learning_rate=plan["rate"], schedule="constant", warmup_fraction=0, samples=0,
        max_steps=plan["steps"] + WARM, validation_fraction=0, precision=plan["precision"], early_stopping_patience=0,
        gradient_checkpointing=plan["checkpointing"], frozen_weights=plan.get("frozen_weights", "auto"), forgetting=False, row_losses=False,
        evaluations_per_epoch=0,  # a checkpoint in the middle would be timed too
    )  # fmt: skip
    return JobSpec(name="benchmark", task="generation", model=model, dataset=data, run=settings, strategy=strategy_of(plan))


def given(spec: Any, tokenizer: Any, samples: list[list[int]]) -> Any:
    """The lesson of a job that writes, with the samples where it would read a dataset."""
    from worker.training.objectives._base import Objective
    from worker.training.objectives.causal_lm import CausalLM

    class Given(CausalLM):
        def __init__(self) -> None:
            Objective.__init__(self, spec, tokenizer)
            self.train, self.held_out = tokenised(samples, self.lead)
            self.questions, self.plain_template = [], False

    return Given()


def tokenised(samples: list[list[int]], lead: list[int]) -> tuple[Any, Any]:
    """(the samples, no samples) as the trainer holds rows: all but the first token of each is learnt."""
    import numpy as np

    from worker.data.batching import Tokenised

    rows = [[*lead, *ids] for ids in samples]
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    trained = np.ones(starts[-1], bool)
    for place in range(len(lead) + 1):
        trained[starts[:-1] + place] = False
    done = Tokenised(np.concatenate([np.asarray(r, np.int32) for r in rows]), trained, starts, list(range(len(rows))), 0, [])
    return done, Tokenised(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), [], 0, [])


# Peers ----------------------------------------------------------------------------------------------------------------


def trainer(plan: dict[str, Any], samples: list[list[int]]) -> dict[str, Any]:
    """transformers' Trainer, or TRL's SFTTrainer on top of it."""
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    cuda, engine = plan["device"] == "cuda", plan["engine"]
    tokenizer = AutoTokenizer.from_pretrained(plan["model"])
    half = plan["precision"] != "fp32"
    clock = Clock(cuda)
    model = attached(plan, half)
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": plan["steps"] + WARM, "per_device_train_batch_size": plan["batch"],
        "learning_rate": plan["rate"], "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "bf16": half, "use_cpu": not cuda, "logging_steps": logged(plan), "report_to": [], "save_strategy": "no", "seed": 42,
        "dataloader_num_workers": 0, "disable_tqdm": True, "optim": "adamw_torch_fused",
    }  # fmt: skip
    lead = lead_of(plan)
    rows = [{"input_ids": [*lead, *ids], "labels": [-100] * len(lead) + ids} for ids in samples]
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
            own["gradient_checkpointing"] = False
        arguments = SFTConfig(**{**settings, **own})
        made = SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[times(clock)]
        )
    return clock.result(counted(plan, made, rows))


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
        output_dir=tempfile.mkdtemp(), max_steps=plan["steps"] + WARM, per_device_train_batch_size=1, learning_rate=plan["rate"], packing=True,
        lr_scheduler_type="constant", warmup_steps=0, bf16=True, logging_steps=logged(plan), report_to=[], seed=42,
        optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0, save_strategy="no", max_length=longest,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in samples]
    made = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[times(clock)]
    )
    return clock.result(counted(plan, made, rows))


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


def counted(plan: dict[str, Any], made: Any, rows: list[dict[str, Any]]) -> list[int]:
    """Let a Trainer train, on the plan's groups of rows where it has them; the real tokens of each batch."""
    counting = Counting(made.data_collator, len(lead_of(plan)))
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
