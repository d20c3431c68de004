"""What `benchmarks/training.py` runs in a process of its own for each engine: Luthier here, its peers in `benchmarks/peers.py`.

With `groups` in the plan every engine gets the same rows in the same steps, so that their losses can be laid side by side;
without, each makes its own batches, as it comes. A peer may have an interpreter of its own, in which there is nothing of ours but this
folder: what it runs imports neither `app` nor `worker`.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

WARM, WARM_GPU = 3, 10
"""Steps before those that are timed. On a GPU peers still gained 9 % after 8 of them."""


def warm(cuda: bool) -> int:
    return WARM_GPU if cuda else WARM


class Clock:
    """Times of the ends of steps, and what was read until then. `ahead` is how many further steps were launched when one is told of: their
    work is done before a time that is taken then, so it is not counted after it."""

    def __init__(self, cuda: bool, ahead: int = 0) -> None:
        self.cuda, self.ahead, self.warm = cuda, ahead, warm(cuda)
        self.began = time.perf_counter()
        self.marks: list[tuple[float, float]] = []  # (wall, processor) at the end of each step
        self.losses: list[float] = []

    def step(self) -> None:
        if self.cuda and len(self.marks) == self.warm - 1:
            import torch

            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))

    def result(self, tokens: list[int]) -> dict[str, Any]:
        """`tokens` are the real ones of each step."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            self.marks[-1] = (time.perf_counter(), time.process_time())
        (wall, cpu), (end, cpu_end) = self.marks[self.warm - 1], self.marks[-1]
        timed = tokens[self.warm + self.ahead : len(self.marks)]
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

    if cuda:
        return torch.cuda.max_memory_allocated()
    from worker.runtime import devices

    return devices.CPU.peak_memory(torch.device("cpu"))


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """One engine's run of `plan`: speeds, memory and losses."""
    engine = plan["engine"]
    samples = json.loads(Path(plan["samples"]).read_text())
    if engine.startswith("luthier"):
        return luthier(plan, samples)
    from benchmarks import peers

    return peers.unsloth(plan, samples) if engine == "unsloth" else peers.trainer(plan, samples)


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
    train.objective_of = lambda spec, tokenizer: given(spec, tokenizer, samples, plan["prompt_share"])
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
        max_steps=plan["steps"] + warm(plan["device"] == "cuda"), validation_fraction=0, precision=plan["precision"], early_stopping_patience=0,
        gradient_checkpointing=plan["checkpointing"], frozen_weights=plan.get("frozen_weights", "auto"), forgetting=False, row_losses=False,
        evaluations_per_epoch=0,  # a checkpoint in the middle would be timed too
    )  # fmt: skip
    return JobSpec(name="benchmark", task="generation", model=model, dataset=data, run=settings, strategy=strategy_of(plan))


def given(spec: Any, tokenizer: Any, samples: list[list[int]], prompt_share: float) -> Any:
    """The lesson of a job that writes, with the samples where it would read a dataset."""
    from worker.training.objectives._base import TrainingObjective
    from worker.training.objectives.causal_lm import CausalLM

    class Given(CausalLM):
        def __init__(self) -> None:
            TrainingObjective.__init__(self, spec, tokenizer)
            self.train, self.held_out = tokenised(samples, self.lead, prompt_share)
            self.questions, self.plain_template = [], False

    return Given()


def prompt_length(ids: list[int], share: float) -> int:
    """How many tokens a sample begins with that are not learnt: its prompt, and the first in any case."""
    return max(1, int(share * len(ids)))


def tokenised(samples: list[list[int]], lead: list[int], prompt_share: float) -> tuple[Any, Any]:
    """(the samples, no samples) as the trainer holds rows: all but the prompt of each is learnt."""
    import numpy as np

    from worker.data.batching import Tokenised

    rows = [[*lead, *ids] for ids in samples]
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    trained = np.ones(starts[-1], bool)
    for start, ids in zip(starts, samples, strict=False):
        trained[start : start + len(lead) + prompt_length(ids, prompt_share)] = False
    done = Tokenised(np.concatenate([np.asarray(r, np.int32) for r in rows]), trained, starts, list(range(len(rows))), 0, [])
    return done, Tokenised(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), [], 0, [])
