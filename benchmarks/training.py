"""How fast Luthier trains, beside Hugging Face's Trainer and TRL, in one run and in turn.

    python -m benchmarks.training --shape 14m --strategy lora --json FILE
        [--engines luthier,hf_trainer,trl,trl_packed] [--rounds 3] [--steps 12] [--tokens 1024] [--same-allocator] [--device cuda]

All engines get the same weights from one folder, the same samples, strategy, optimizer, learning rate, clipping and number
format, and about the same real tokens per optimizer step. Each runs in a process of its own; padding is never counted.
Luthier's own path is `worker.train.train`, with the samples handed in where it would read a dataset. Engines:

    luthier          as a job runs
    luthier_eager    without compiling        luthier_peft   with peft's own layers
    luthier_compiled compiled, however short  hf_trainer     transformers.Trainer, bf16, padded batches
    trl, trl_packed  SFTTrainer as it comes, and with packing
    trl_tuned        packed, nothing recomputed, weights in bf16; on a GPU with torch's attention over packs, and Liger's layers where installed
    unsloth          packed, nothing recomputed; where it is installed (it needs a GPU), by --python in an environment of its own

NAME@TOKENS gives an engine another number of tokens a step.

Peers run with the system's allocator as it comes unless --same-allocator gives them the settings that Luthier's trainer has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.engines import run, strategy_of, warm
from benchmarks.shapes import LLAMA, draw_samples, write_samples

PEAKS = {
    "MI300X": 1307e12, "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10": 125e12, "A10G": 70e12, "RTX 6000 Ada": 364e12, "RTX A6000": 155e12, "5090": 209e12, "4090": 165e12, "3090": 71e12,
    "T4": 65e12,
}  # fmt: skip
"""Dense bf16 operations per second that the makers state (fp16 where a card has no bf16), by a part of the card's name; the first that
occurs in it, as whole words, counts."""
SIZES = {"unsloth": (8192, 16_384, 32_768)}
"""Tokens a step at which a peer is measured, whatever the others take: the best counts."""
LEARNING_RATE = {"full": 1e-4}
AGREE = 0.005
"""Share by which the loss of any step may differ between engines that were given the same rows: their rounding differs."""


def main() -> None:
    options = parser().parse_args()
    if options.child:
        print("RESULT " + json.dumps(run(json.loads(Path(options.child).read_text()))), flush=True)
        return
    with tempfile.TemporaryDirectory() as home:
        report = benchmark(options, Path(options.work or home))
    print(table(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


def benchmark(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every engine in turn, round after round; weights, samples and attempts lie in the folder `work`."""
    plan = prepare(options, work)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in plan["engines"]}
    for round_, name in turns(plan["engines"], options.rounds):
        found = measure({**of_engine(plan, name), "round": round_}, work, options)
        said = found["error"].strip().splitlines()[-1:] if "error" in found else f"{found['tokens_per_second']:.0f} tokens/s"
        print(f"  round {round_ + 1} {name}: {said}", flush=True)
        runs[name].append(found)
    return summarise(plan, runs, curves(plan, work, options))


def turns(engines: list[str], rounds: int) -> list[tuple[int, str]]:
    """(round, engine) in the order of the runs: each engine once a round, A B A B, so that heat and neighbors meet all alike."""
    return [(round_, name) for round_ in range(rounds) for name in engines]


def in_sizes(engine: str) -> list[str]:
    """An engine by the names of its `SIZES`, or by its own where it has none."""
    return [f"{engine}@{tokens}" for tokens in SIZES.get(engine, ())] or [engine]


def of_engine(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """The plan of one engine, `NAME` or `NAME@TOKENS`."""
    engine, _, tokens = name.partition("@")
    if not tokens:
        return {**plan, "engine": engine}
    return {**plan, "engine": engine, "tokens": int(tokens), "batch": max(1, round(plan["batch"] * int(tokens) / plan["tokens"]))}


def prepare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The weights and the samples on disk, and the plan that every engine reads."""
    from app.shapes import shape_of
    from worker.data.packing import plan as plan_packs

    cuda = options.device == "cuda"
    model = Path(options.model) if options.model else work / "models" / options.shape
    if not options.model:
        code = f"from benchmarks.shapes import write_model; from pathlib import Path; write_model({options.shape!r}, Path({str(model)!r}), {options.device!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
    if not cuda:  # as a worker does when it starts
        subprocess.run(
            [sys.executable, "-m", "worker.kernels.cpu.warmup"], env={**os.environ, "NUMBA_CACHE_DIR": str(work / "numba")}, check=True
        )
    tokens = options.tokens or (16_384 if cuda else 1024)
    lengths = (1500.0, 0.6, 64, 4096) if options.long else (180.0, 0.8, 16, 1024) if cuda else (75.0, 0.5, 30, 200)
    mean = lengths[0] * 2.718281828 ** (lengths[1] ** 2 / 2)
    config = json.loads((model / "config.json").read_text())
    engines = options.engines.split(",") if options.engines else ["luthier", "hf_trainer"] + ([] if cuda else ["trl", "trl_packed"])
    most = max([tokens, *(int(name.partition("@")[2] or 0) for name in engines)])
    steps = options.steps + warm(cuda)
    samples = draw_samples(config["vocab_size"], int((steps + 3) * most / mean * 1.15) + 16, *lengths)
    write_samples(work / "samples.json", samples)
    groups = plan_packs([len(s) for s in samples], tokens, seed=42, epoch=0, most=max(1, int(tokens / mean)) + 8)
    real = sum(map(len, samples)) / len(samples)
    shape = shape_of(config)
    return {
        "device": options.device, "shape": options.shape, "strategy": options.strategy, "model": str(model), "engines": engines,
        "samples": str(work / "samples.json"), "tokens": tokens, "batch": max(1, round(tokens / real)), "longest": int(max(map(len, samples))),
        "steps": options.steps, "precision": options.precision, "rate": LEARNING_RATE.get(options.strategy, 5e-4), "rank": options.rank,
        "parameters": shape.parameters(), "same_allocator": options.same_allocator, "checkpointing": options.checkpointing,
        "frozen_weights": options.frozen_weights, "prompt_share": options.prompt_share,
        "same_rows": groups[:steps],
    }  # fmt: skip


def curves(plan: dict[str, Any], work: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Each engine's losses on the same rows, step by step: {engine: losses}. One run each, not timed, and none at another size."""
    found: dict[str, list[float]] = {}
    for name in dict.fromkeys(name.partition("@")[0] for name in plan["engines"]) if options.curves else ():
        done = measure({**plan, "engine": name, "round": "same-rows", "groups": plan["same_rows"]}, work, options)
        found[name] = done.get("losses", [])
        print(f"  same rows {name}: " + (" ".join(f"{loss:.3f}" for loss in found[name]) or done["error"].strip()[-200:]), flush=True)
    return found


def measure(plan: dict[str, Any], work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One engine's run in a process of its own."""
    try:
        from worker.supervision.exit_codes import ALLOCATOR, CUDA_ALLOCATOR, THREADS
    except ImportError:  # a machine with the trainer's packages alone
        ALLOCATOR, THREADS, CUDA_ALLOCATOR = {}, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}

    path = work / f"plan-{plan['engine']}.json"
    path.write_text(json.dumps(plan))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LUTHIER_DATA_DIR": str(work)}
    environment |= {**CUDA_ALLOCATOR, "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "NUMBA_CACHE_DIR": str(work / "numba")}
    if plan["engine"].startswith("luthier") or plan["same_allocator"]:
        environment |= ALLOCATOR
    if plan["engine"].startswith("luthier"):
        environment |= THREADS
    if options.gpu_memory_bytes:  # a large card plays a small one
        environment["LUTHIER_GPU_MEMORY_BYTES"] = str(options.gpu_memory_bytes)
    pythons = dict(pair.split("=", 1) for pair in options.python)
    command = [pythons.get(plan["engine"], sys.executable), "-m", "benchmarks.training", "--child", str(path)]
    try:
        with clocks(plan["device"] == "cuda") as seen:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {options.limit} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"error": (done.stderr.strip() or done.stdout.strip())[-options.error_length :]}
    return json.loads(lines[-1].removeprefix("RESULT ")) | seen


@contextlib.contextmanager
def clocks(cuda: bool) -> Iterator[dict[str, float]]:
    """The median clock and power of the GPU while it computes inside, as nvidia-smi tells them every second; nothing without it."""
    seen: dict[str, float] = {}
    if not cuda or shutil.which("nvidia-smi") is None:
        yield seen
        return
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,utilization.gpu", "--format=csv,noheader,nounits", "--loop=1"]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield seen
    finally:
        watcher.terminate()
        said, _ = watcher.communicate(timeout=10)
        rows = [found for line in said.splitlines() if len(found := re.findall(r"[\d.]+", line)) == 3]
        busy = [(float(clock), float(power)) for clock, power, load in rows if float(load) > 50]
        for place, name in enumerate(("clock_mhz", "power_watts") if busy else ()):
            seen[name] = statistics.median(one[place] for one in busy)


# Afterwards -----------------------------------------------------------------------------------------------------------


def summarise(plan: dict[str, Any], runs: dict[str, list[dict[str, Any]]], losses: dict[str, list[float]]) -> dict[str, Any]:
    """Medians over the rounds, ratios, the share of the device's peak, and how far the curves on the same rows lie apart."""
    from app.planning.duration import operations_per_token
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
    apart = farthest(losses)
    kept = ("shape", "strategy", "tokens", "steps", "precision", "rank", "same_allocator", "prompt_share")
    return {
        "device": name,
        **{k: plan[k] for k in kept},
        "peak_operations": speed,
        "operations_per_token": work,
        "losses_agree": None if apart is None else apart <= AGREE,
        "losses_apart": apart,
        "same_rows_losses": losses,
        "results": results,
    }


MIN_ROUNDS = 3
"""Rounds of each engine without which no interval is given: the median of two says nothing about how far apart they may lie."""


def ratio_interval(ours: list[float], theirs: list[float], draws: int = 2000) -> tuple[float, float] | None:
    """95 % bootstrap interval of the ratio of two engines' median speeds, drawn from their rounds, which were run in turn; None with fewer
    than `MIN_ROUNDS` (Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13: percentile intervals)."""
    if min(len(ours), len(theirs)) < MIN_ROUNDS:
        return None
    random = Random(1)
    ratios = sorted(
        statistics.median(random.choices(ours, k=len(ours))) / statistics.median(random.choices(theirs, k=len(theirs)))
        for _ in range(draws)
    )
    return ratios[int(0.025 * draws)], ratios[int(0.975 * draws) - 1]


def farthest(losses: dict[str, list[float]]) -> float | None:
    """The largest share by which two engines' losses of one step differ; None when fewer than two engines told theirs."""
    told = [curve for curve in losses.values() if curve]
    if len(told) < 2:
        return None
    return max((max(step) - min(step)) / max(step) for step in zip(*told, strict=False))


def device(kind: str) -> tuple[str, float]:
    """Its name and its bf16 peak: as stated by its maker, or as the best of some large products here."""
    import torch

    if kind == "cuda":
        name = torch.cuda.get_device_name()
        return name, peak_of(name) or _products("cuda")
    from app.machines.hardware import this_machine

    machine = this_machine()
    return f"{machine.cores} cores of {machine.processor}", _products("cpu")


def peak_of(name: str) -> float | None:
    """What the maker states of the card with this name; None of one that is not known."""
    return next((peak for key, peak in PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


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
    if report["losses_agree"] is None:
        lines.append("The loss curves were not compared.")
    else:
        apart = f"On the same rows no step's losses lie more than {report['losses_apart']:.2%} apart"
        lines.append(f"{apart}." if report["losses_agree"] else f"THE LOSS CURVES DIFFER, by {report['losses_apart']:.2%}.")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    made.add_argument("--shape", default="14m", choices=sorted(LLAMA))
    made.add_argument("--model", help="a folder with a model, instead of random weights of the shape")
    made.add_argument("--strategy", default="lora")
    made.add_argument("--engines", help="names, separated by commas")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--steps", type=int, default=12, help="timed steps; three more come before them, on a GPU ten")
    made.add_argument("--tokens", type=int, help="real tokens per optimizer step (1,024 on a CPU, 16,384 on a GPU)")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "auto"])
    made.add_argument("--checkpointing", default="auto", choices=["auto", "none", "all"], help="Luthier's recomputing of activations")
    made.add_argument("--frozen-weights", default="auto", choices=["auto", "fp8"], help="Luthier's format of the layers that do not learn")
    made.add_argument(
        "--prompt-share", type=float, default=0.0, help="share of each sample that is not learnt, as a prompt is; 0.35 is usual"
    )
    made.add_argument("--long", action="store_true", help="long samples: median 1,500 tokens")
    made.add_argument("--same-allocator", action="store_true")
    made.add_argument("--no-curves", dest="curves", action="store_false", help="leave out the run on the same rows that compares losses")
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="an engine's own interpreter, such as unsloth's")
    made.add_argument("--gpu-memory-bytes", type=int, help="what Luthier may use of the GPU, as if it had no more")
    made.add_argument("--work", help="keep weights and samples in this folder")
    made.add_argument("--limit", type=float, default=600, help="seconds that one engine's run may take")
    made.add_argument("--error-length", type=int, default=1500)
    made.add_argument("--json")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    main()
