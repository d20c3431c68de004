"""How fast Luthier trains, beside Hugging Face's Trainer and TRL, in one run and in turn.

    python -m benchmarks.training --shape 14m --strategy lora --json FILE
        [--engines luthier,hf_trainer,trl,trl_packed] [--rounds 3] [--steps 12] [--tokens 1024] [--same-allocator] [--device cuda]

All engines get the same weights from one folder, the same samples, strategy, optimizer, learning rate, clipping and number
format, and about the same real tokens per optimizer step. Each runs in a process of its own; padding is never counted.
Luthier's own path is `worker.train.train`, with the samples handed in where it would read a dataset. Engines:

    luthier          as a job runs
    luthier_eager    without compiling        luthier_peft   with peft's own layers
    luthier_compiled compiled, however short  hf_trainer     transformers.Trainer, bf16, padded batches
    trl, trl_packed  SFTTrainer as it comes, and with packing    trl_tuned   packed, without recomputing, weights in bf16
    unsloth          where it is installed (it needs a GPU)

Peers run with the system's allocator as it comes unless --same-allocator gives them the settings that Luthier's trainer has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.shapes import LLAMA, draw_samples, write_samples

WARM = 3
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}
"""Dense bf16 operations per second that the makers state."""
LEARNING_RATE = {"full": 1e-4}
AGREE = 0.05
"""Share by which the mean loss of the last third of the steps may differ between engines: their batches are not the same."""


def main() -> None:
    options = parser().parse_args()
    if options.child:
        print("RESULT " + json.dumps(child(json.loads(Path(options.child).read_text()))), flush=True)
        return
    with tempfile.TemporaryDirectory() as home:
        work = Path(options.work or home)
        plan = prepare(options, work)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in plan["engines"]}
        for round_ in range(options.rounds):
            for name in plan["engines"]:
                found = measure({**plan, "engine": name, "round": round_}, work, options)
                said = found["error"].strip().splitlines()[-1:] if "error" in found else f"{found['tokens_per_second']:.0f} tokens/s"
                print(f"  round {round_ + 1} {name}: {said}", flush=True)
                runs[name].append(found)
        report = summarise(plan, runs)
    print(table(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


def prepare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The weights and the samples on disk, and the plan that every engine reads."""
    from app.shapes import shape_of

    cuda = options.device == "cuda"
    model = Path(options.model) if options.model else work / "models" / options.shape
    if not options.model:
        code = f"from benchmarks.shapes import write_model; from pathlib import Path; write_model({options.shape!r}, Path({str(model)!r}), {options.device!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
    tokens = options.tokens or (16_384 if cuda else 1024)
    lengths = (1500.0, 0.6, 64, 4096) if options.long else (180.0, 0.8, 16, 1024) if cuda else (75.0, 0.5, 30, 200)
    mean = lengths[0] * 2.718281828 ** (lengths[1] ** 2 / 2)
    config = json.loads((model / "config.json").read_text())
    samples = draw_samples(config["vocab_size"], int((options.steps + WARM + 3) * tokens / mean * 1.15) + 16, *lengths)
    write_samples(work / "samples.json", samples)
    real = sum(map(len, samples)) / len(samples)
    engines = options.engines.split(",") if options.engines else ["luthier", "hf_trainer"] + ([] if cuda else ["trl", "trl_packed"])
    shape = shape_of(config)
    return {
        "device": options.device, "shape": options.shape, "strategy": options.strategy, "model": str(model), "engines": engines,
        "samples": str(work / "samples.json"), "tokens": tokens, "batch": max(1, round(tokens / real)), "longest": int(max(map(len, samples))),
        "steps": options.steps, "precision": options.precision, "rate": LEARNING_RATE.get(options.strategy, 5e-4), "rank": options.rank,
        "parameters": shape.parameters(), "same_allocator": options.same_allocator, "checkpointing": options.checkpointing,
    }  # fmt: skip


def measure(plan: dict[str, Any], work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One engine's run in a process of its own."""
    try:
        from worker.exits import ALLOCATOR, THREADS
    except ImportError:  # a machine with the trainer's packages alone
        ALLOCATOR, THREADS = {}, {}

    path = work / f"plan-{plan['engine']}.json"
    path.write_text(json.dumps(plan))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LUTHIER_DATA_DIR": str(work)}
    environment |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    if plan["engine"].startswith("luthier") or plan["same_allocator"]:
        environment |= ALLOCATOR
    if plan["engine"].startswith("luthier"):
        environment |= THREADS
    command = [sys.executable, "-m", "benchmarks.training", "--child", str(path)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {options.limit} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"error": (done.stderr.strip() or done.stdout.strip())[-options.error_length :]}
    return json.loads(lines[-1].removeprefix("RESULT "))


# Inside an engine's process -------------------------------------------------------------------------------------------


class Clock:
    """Times of the ends of steps, and what was read until then."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
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
        real = sum(tokens[WARM : len(self.marks)])
        tail = self.losses[-max(1, len(self.losses) // 3) :]
        return {
            "tokens_per_second": real / (end - wall),
            "tokens_per_cpu_second": real / max(cpu_end - cpu, 1e-9),
            "tokens_per_step": real / (len(self.marks) - WARM),
            "peak_memory_bytes": peak(self.cuda),
            "loss": sum(tail) / len(tail),
            "first_loss": self.losses[0],
            "seconds_to_first_step": self.marks[0][0] - self.began,
        }


def peak(cuda: bool) -> int:
    import torch

    from worker.device import peak_memory

    return peak_memory(torch.device("cuda" if cuda else "cpu"))


def child(plan: dict[str, Any]) -> dict[str, Any]:
    engine = plan["engine"]
    samples = json.loads(Path(plan["samples"]).read_text())
    if engine.startswith("luthier"):
        return luthier(plan, samples)
    if engine == "unsloth":
        return unsloth(plan, samples)
    return trainer(plan, samples)


def strategy_of(plan: dict[str, Any]) -> Any:
    from app.strategies import STRATEGIES

    kind = STRATEGIES[plan["strategy"]]
    ranked = {"rank": plan["rank"], "alpha": 2.0 * plan["rank"]} if "rank" in kind.model_fields and "alpha" in kind.model_fields else {}
    return kind(**ranked)


def luthier(plan: dict[str, Any], samples: list[list[int]]) -> dict[str, Any]:
    """`worker.train.train` from its first line to the last timed step."""
    import uuid

    import numpy as np

    from app import events
    from app.shapes import shape_of
    from app.spec import DatasetRef, JobSpec, ModelRef, RunSettings
    from worker import attention, kernels, train
    from worker.batches import Tokenised
    from worker.pack import plan as plan_packs

    folder = Path(plan["model"])
    model = ModelRef(
        id=uuid.UUID(int=1), name="model", kind="generic", path=str(folder), revision="0" * 64, shape=shape_of(json.loads((folder / "config.json").read_text()))
    )  # fmt: skip
    data = DatasetRef(id=uuid.UUID(int=2), name="rows", path="rows", sha256="0" * 64, format="plain_text", rows=len(samples))
    run = RunSettings(
        max_tokens_per_step=plan["tokens"], learning_rate=plan["rate"], schedule="constant", warmup_fraction=0, samples=0, max_steps=plan["steps"] + WARM,
        validation_fraction=0, precision=plan["precision"], early_stopping_patience=0, gradient_checkpointing=plan["checkpointing"],
    )  # fmt: skip
    spec = JobSpec(name="benchmark", task="generation", model=model, dataset=data, run=run, strategy=strategy_of(plan))
    lead = spec.strategy.virtual_tokens()

    def given(spec: Any, tokenizer: Any, lead_ids: list[int], engine: Any, *_: Any) -> Any:
        rows = [[*lead_ids, *ids] for ids in samples]
        starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
        trained = np.ones(starts[-1], bool)
        for place in range(lead + 1):
            trained[starts[:-1] + place] = False
        done = Tokenised(np.concatenate([np.asarray(r, np.int32) for r in rows]), trained, starts, list(range(len(rows))), 0, [])
        nothing = Tokenised(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), [], 0, [])
        frame = attention.frame_of(done.lengths, plan["tokens"]) if engine.framed else None
        packs = plan_packs(done.lengths, plan["tokens"], seed=run.seed, epoch=0, most=frame and frame.most())
        total = plan["steps"] + WARM
        return train.Data(done, nothing, [], plan["tokens"], len(packs), total, total, frame=frame)

    train.read_data = given
    kernels.LEAST_SECONDS_TO_COMPILE = {"luthier_compiled": 0.0, "luthier_eager": 1e12, "luthier_peft": 1e12}.get(
        plan["engine"], kernels.LEAST_SECONDS_TO_COMPILE
    )
    if plan["engine"] == "luthier_peft":
        import worker.lora

        worker.lora.fuse = lambda model, grouped=True: 0
    clock, counts, told = Clock(plan["device"] == "cuda"), [], 0
    attempt = Path(os.environ["LUTHIER_DATA_DIR"]) / "runs" / f"{plan['engine']}-{plan['round']}" / "a1"
    details: dict[str, Any] = {}
    for event in train.train(spec, attempt):
        if isinstance(event, events.Started):
            details = {"precision": event.precision, **event.details}
        if isinstance(event, events.Step):
            clock.losses.append(event.loss)
            counts.append(event.tokens - told - lead * 0)
            told = event.tokens
            clock.step()
            if len(counts) == plan["steps"] + WARM:
                break
    return {**clock.result(counts), "details": details}


def trainer(plan: dict[str, Any], samples: list[list[int]]) -> dict[str, Any]:
    """transformers' Trainer, or TRL's SFTTrainer on top of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    cuda = plan["device"] == "cuda"
    engine, strategy = plan["engine"], strategy_of(plan)
    tokenizer = AutoTokenizer.from_pretrained(plan["model"])
    half = plan["precision"] != "fp32"
    # Trained weights are float32; frozen ones bf16 on a GPU, where nobody keeps them otherwise.
    narrow = half and (cuda or engine == "trl_tuned") and strategy.adapter
    more: dict[str, Any] = {}
    if strategy.base_bits == 4:
        from transformers import BitsAndBytesConfig

        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    clock = Clock(cuda)
    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.bfloat16 if narrow else torch.float32, **more)
    if cuda:
        model = model.cuda()
    model.config.use_cache = False
    model = strategy.attach(model).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": plan["steps"] + WARM, "per_device_train_batch_size": plan["batch"],
        "learning_rate": plan["rate"], "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "bf16": half, "use_cpu": not cuda, "logging_steps": 1, "report_to": [], "save_strategy": "no", "seed": 42,
        "dataloader_num_workers": 0, "disable_tqdm": True, "optim": "adamw_torch_fused",
    }  # fmt: skip

    class Times(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    if engine == "hf_trainer":
        arguments = TrainingArguments(**settings, remove_unused_columns=False)
        made = Trainer(
            model=model, args=arguments, train_dataset=[{"input_ids": ids} for ids in samples], data_collator=padded, callbacks=[Times()]
        )
    else:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        own: dict[str, Any] = {"max_length": plan["longest"]}
        if engine in ("trl_packed", "trl_tuned"):
            own = {"packing": True, "max_length": max(plan["tokens"], plan["longest"]), "per_device_train_batch_size": 1}
        if engine == "trl_tuned":
            own["gradient_checkpointing"] = False
        rows = Dataset.from_list([{"input_ids": ids} for ids in samples])
        made = SFTTrainer(
            model=model, args=SFTConfig(**{**settings, **own}), train_dataset=rows, processing_class=tokenizer, callbacks=[Times()]
        )
    counting = Counting(made.data_collator)
    made.data_collator = counting
    made.train()
    return clock.result(counting.tokens)


def unsloth(plan: dict[str, Any], samples: list[list[int]]) -> dict[str, Any]:
    """Unsloth's loader and layers under TRL, packed and without recomputing."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    clock = Clock(True)

    class Times(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    model, tokenizer = FastLanguageModel.from_pretrained(
        plan["model"], max_seq_length=max(plan["tokens"], plan["longest"]), load_in_4bit=plan["strategy"] == "qlora"
    )
    model = FastLanguageModel.get_peft_model(model, r=plan["rank"], lora_alpha=2 * plan["rank"], use_gradient_checkpointing=False)
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=plan["steps"] + WARM, per_device_train_batch_size=1, learning_rate=plan["rate"], packing=True,
        lr_scheduler_type="constant", warmup_steps=0, bf16=True, logging_steps=1, report_to=[], save_strategy="no",
        max_length=max(plan["tokens"], plan["longest"]),
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": ids} for ids in samples])
    made = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=[Times()])
    counting = Counting(made.data_collator)
    made.data_collator = counting
    made.train()
    return clock.result(counting.tokens)


class Counting:
    """A collator that notes how many real tokens each batch holds."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self.inner(rows)


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# Afterwards -----------------------------------------------------------------------------------------------------------


def summarise(plan: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, ratios, and the share of the device's peak."""
    from app.estimate import operations_per_token
    from app.shapes import shape_of

    shape = shape_of(json.loads((Path(plan["model"]) / "config.json").read_text()))
    work = operations_per_token(shape, strategy_of(plan), 1.0)
    name, speed = device(plan["device"])
    results = []
    for engine, found in runs.items():
        good = [one for one in found if "error" not in one]
        if not good:
            results.append({"engine": engine, "error": found[-1].get("error", "no run") if found else "no run"})
            continue
        middle = {k: statistics.median(one[k] for one in good) for k in good[0] if isinstance(good[0][k], int | float)}
        middle["fraction_of_peak"] = middle["tokens_per_second"] * work / speed
        results.append(
            {"engine": engine, **middle, "rounds": [one["tokens_per_second"] for one in good], "details": good[-1].get("details", {})}
        )
    losses = [r["loss"] for r in results if "loss" in r]
    agree = not losses or max(losses) - min(losses) <= AGREE * max(losses)
    kept = ("shape", "strategy", "tokens", "steps", "precision", "rank", "same_allocator")
    return {
        "device": name,
        **{k: plan[k] for k in kept},
        "peak_operations": speed,
        "operations_per_token": work,
        "losses_agree": agree,
        "results": results,
    }


def device(kind: str) -> tuple[str, float]:
    """Its name and its bf16 peak: as stated by its maker, or as the best of some large products here."""
    import torch

    if kind == "cuda":
        name = torch.cuda.get_device_name()
        return name, next((peak for key, peak in PEAKS.items() if key in name), _products("cuda"))
    from app.machine import this_machine

    machine = this_machine()
    return f"{machine.cores} cores of {machine.processor}", _products("cpu")


def _products(kind: str) -> float:
    import torch

    size = 8192 if kind == "cuda" else 1024
    x = torch.randn(size, size, device=kind, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(6):
        began = time.perf_counter()
        x @ x
        if kind == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['device']}; shape {report['shape']}, {report['strategy']}, {report['tokens']} tokens a step, {report['precision']}"
        + (", same allocator for all" if report["same_allocator"] else ""),
        f"{'engine':18}{'tokens/s':>10}{'tokens/cpu-s':>14}{'luthier is':>12}{'of peak':>9}{'peak MB':>9}{'loss':>8}{'first step s':>14}",
    ]
    first = next((r["tokens_per_second"] for r in report["results"] if r["engine"].startswith("luthier") and "error" not in r), None)
    for r in report["results"]:
        if "error" in r:
            lines.append(f"{r['engine']:18}failed: {r['error'].splitlines()[-1][:100] if r['error'] else ''}")
            continue
        ratio = f"{first / r['tokens_per_second']:.2f} x" if first else ""
        lines.append(
            f"{r['engine']:18}{r['tokens_per_second']:10.0f}{r['tokens_per_cpu_second']:14.0f}{ratio:>12}{r['fraction_of_peak']:9.1%}"
            f"{r['peak_memory_bytes'] / 1e6:9.0f}{r['loss']:8.3f}{r['seconds_to_first_step']:14.1f}"
        )
    lines.append(
        "The loss curves agree." if report["losses_agree"] else "THE LOSS CURVES DIFFER: the figures do not compare the same work."
    )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    made.add_argument("--shape", default="14m", choices=sorted(LLAMA))
    made.add_argument("--model", help="a folder with a model, instead of random weights of the shape")
    made.add_argument("--strategy", default="lora")
    made.add_argument("--engines", help="names, separated by commas")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--steps", type=int, default=12, help="timed steps; three more come before them")
    made.add_argument("--tokens", type=int, help="real tokens per optimizer step (1,024 on a CPU, 16,384 on a GPU)")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "auto"])
    made.add_argument("--checkpointing", default="auto", choices=["auto", "none", "all"], help="Luthier's recomputing of activations")
    made.add_argument("--long", action="store_true", help="long samples: median 1,500 tokens")
    made.add_argument("--same-allocator", action="store_true")
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--work", help="keep weights and samples in this folder")
    made.add_argument("--limit", type=float, default=600, help="seconds that one engine's run may take")
    made.add_argument("--error-length", type=int, default=1500)
    made.add_argument("--json")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    main()
