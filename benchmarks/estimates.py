"""Is what a job was said to cost what it cost? Every strategy on this machine, predicted and measured side by side.

    python -m benchmarks.estimates [--only lora,encoder] [--steps 6] [--tokens 256] [--json FILE]
        [--model FOLDER] [--encoder FOLDER] [--set micro_batches=4 --set gradient_checkpointing=all]

Three parts: `generation` on a decoder learns `samples/support-replies.jsonl`; `classification` on the decoder and on an
`encoder` learns `samples/shop-questions.csv`, three tenths of it held out. The models are the studio's starters unless folders
are named. Each strategy learns twice, each time in a process of its own, as a job runs: a short job that calibrates the
machine's speed, then the one that is predicted first. Nothing is carried from one strategy to the next: neither speeds, nor
vectors, nor the scores of the model before tuning.

Printed for each: parameters predicted and counted, peak memory and seconds predicted and measured, loss (accuracy, where it
learns classes) on held-out rows before and after, the change on general texts, and whether the saved result answers as the
trained model did. `--json` is written after every job; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHORT_STEPS = 4
"""Steps of the job that calibrates: with 256 tokens each, some more than count (`worker/run.py`)."""
MEMORY_GOAL, SECONDS_GOAL = 0.10, 0.25
EQUAL = 1e-4
"""Largest difference of two answers, as a share of the largest number in them, that rounding explains."""
STARTERS = {"decoder": "smollm2-135m-instruct", "encoder": "all-minilm-l6-v2"}
PARTS = {"generation": ("decoder", "generation"), "classification": ("decoder", "classification"), "encoder": ("encoder", "classification")}
"""Parts of the table: the model that learns, and the task."""


def main() -> None:
    options = parser().parse_args()
    if options.child:
        from benchmarks import one_job

        print("RESULT " + json.dumps(one_job.run(json.loads(Path(options.child).read_text()))), flush=True)
        return
    from app.machines.hardware import this_machine

    machine, began = this_machine(), time.monotonic()
    report: dict[str, Any] = {"device": machine.gpu_name or f"{machine.cores} cores of {machine.processor}", "results": []}
    kept = {r["order"]: r for r in _read(options.json) if "error" not in r}
    with tempfile.TemporaryDirectory() as home:
        work = Path(options.work or home)
        for plan in plans(options, work):
            report["results"].append(kept.get(order_key(plan)) or {"order": order_key(plan), **measure(plan, work)})
            print("  " + line(report["results"][-1]), flush=True)
            if options.json:
                Path(options.json).write_text(json.dumps(report, indent=1))
    print(f"\n{table(report)}\n{(time.monotonic() - began) / 60:.0f} minutes.")
    if not report["results"]:
        raise SystemExit(1)


def _read(path: str | None) -> list[dict[str, Any]]:
    return json.loads(Path(path).read_text())["results"] if path and Path(path).is_file() else []


def order_key(plan: dict[str, Any]) -> str:
    """What makes two jobs the same, in words."""
    return json.dumps([plan["part"], plan["strategy"], plan["revision"][:16], plan["steps"], plan["calibrate"], plan["run"]])


# What is run ----------------------------------------------------------------------------------------------------------


def plans(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """One plan for each part and strategy that was asked for and that this machine and model can run."""
    from app.machines.hardware import this_machine
    from app.shapes import shape_of
    from app.strategies import STRATEGIES

    names = [name for name in (options.only or "").split(",") if name]
    if unknown := [name for name in names if name not in (*PARTS, *STRATEGIES)]:
        raise SystemExit(f"There is no part or strategy {', '.join(unknown)}; there are {', '.join((*PARTS, *STRATEGIES))}.")
    cuda, found = this_machine().cuda, []
    for part in [name for name in names if name in PARTS] or PARTS:
        role, task = PARTS[part]
        folder = folder_of(role, options)
        if folder is None:
            continue
        model, revision = laid_in(folder, work)
        shape = shape_of(json.loads((folder / "config.json").read_text()))
        for name in [name for name in names if name in STRATEGIES] or STRATEGIES:
            if why_not := STRATEGIES[name]().unavailable(shape, task=task, cuda=cuda):
                print(f"  {part} {name}: left out. {why_not}", flush=True)
                continue
            run = {"max_tokens_per_step": options.tokens, "max_length": options.length, **dict(_pair(s) for s in options.set or ())}
            plan = {"part": part, "task": task, "strategy": name, "model": model, "title": folder.name, "revision": revision, "run": run}
            found.append(plan | {"steps": options.steps, "limit": options.limit, "calibrate": options.calibrate})
    return found


@functools.cache
def _starter(role: str) -> Path | None:
    from app.models import starters

    if starters.present(STARTERS[role]):
        return starters.folder(STARTERS[role])
    print(f"  The {role} {STARTERS[role]} is not here: `luthier models add {STARTERS[role]} --files-only` brings it.", flush=True)
    return None


def folder_of(role: str, options: argparse.Namespace) -> Path | None:
    """The model that plays a role. Where one folder was named, the other role's starter was not asked for."""
    named = {"decoder": options.model, "encoder": options.encoder}
    if named[role]:
        return Path(named[role]).resolve()
    return None if any(named.values()) else _starter(role)


def laid_in(folder: Path, work: Path) -> tuple[str, str]:
    """Put a model's files into the data folder of the jobs. Returns its name there and the SHA-256 over its files."""
    from app.kit import manifest

    revision = manifest.revision_of(manifest.files_of(folder))
    target = work / "models" / revision[:16]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, target, copy_function=os.link if folder.stat().st_dev == work.stat().st_dev else shutil.copy2)
    return target.name, revision


def _pair(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def measure(plan: dict[str, Any], work: Path) -> dict[str, Any]:
    """A short job, then the one that counts. Neither finds anything that an earlier one measured but the machine's arithmetic."""
    from app.machines.hardware import CALIBRATION

    (work / CALIBRATION).unlink(missing_ok=True)
    if plan["calibrate"]:
        found = in_child({**plan, "run": {**plan["run"], "max_steps": SHORT_STEPS}}, work)
        if "error" in found:
            return found
    return in_child({**plan, "run": {**plan["run"], "max_steps": plan["steps"]}}, work)


def in_child(plan: dict[str, Any], work: Path) -> dict[str, Any]:
    """A job in a process of its own, with the environment that a supervisor gives it."""
    from worker.supervision.exit_codes import ALLOCATOR, THREADS

    shutil.rmtree(work / "features", ignore_errors=True)  # vectors and scores that the job before kept
    path = work / "plan.json"
    path.write_text(json.dumps(plan))
    environment = {
        **ALLOCATOR,
        **THREADS,
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LUTHIER_DATA_DIR": str(work),
    }
    command = [sys.executable, "-m", "benchmarks.estimates", "--child", str(path)]
    about = {key: plan[key] for key in ("part", "task", "strategy", "title", "run")}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=plan["limit"])
    except subprocess.TimeoutExpired:
        return {**about, "error": f"took more than {plan['limit']} s"}
    lines = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if not lines:
        return {**about, "error": (done.stderr.strip() or done.stdout.strip())[-1500:]}
    return {**about, **json.loads(lines[-1].removeprefix("RESULT "))}


# What came of it ------------------------------------------------------------------------------------------------------

HEAD = (
    f"{'strategy':34} {'':4} {'parameters':>11} {'':2}{'MB said':>8}{'was':>7}{'error':>7}{'s said':>8}{'was':>7}{'error':>7}"
    f"{'before':>9}{'after':>8}{'forgot':>9}{'reloaded':>10}"
)


def line(r: dict[str, Any]) -> str:
    """One strategy in one line."""
    name = f"{r['part']:14} {r['strategy']:19}"
    if "error" in r:
        return f"{name} failed: {r['error'].strip().splitlines()[-1][:150]}"
    parameters, memory, seconds = r["parameters"], r["memory"], r["seconds"]
    same = "=" if parameters["predicted"] == parameters["counted"] else f"≠ {parameters['predicted']}"
    change = (r.get("forgotten") or {}).get("change")  # none for a model that writes no text
    lost = "–" if change is None else f"{change:+.1%}"
    return (
        f"{name} {r['precision']} {parameters['counted']:>11,} {same:2}{memory['predicted'] / 1e6:8.0f}{memory['measured'] / 1e6:7.0f}"
        f"{error(memory):+7.0%}{seconds['predicted']:8.1f}{seconds['measured']:7.1f}{error(seconds):+7.0%}"
        f"{score(r, 'before'):>9}{score(r, 'after'):>8}{lost:>9}{r['saved_and_loaded']:10.0e}"
    )


def score(r: dict[str, Any], side: str) -> str:
    """Accuracy where classes were learnt, else the loss, in nats a token."""
    found, shown = (r["accuracy"][side], "{:.0%}") if r["task"] == "classification" else (r["loss"][side], "{:.3f}")
    return "–" if found is None else shown.format(found)


def error(pair: dict[str, float]) -> float:
    """How far the prediction lies above what was measured, as a share of that."""
    return pair["predicted"] / pair["measured"] - 1


def better(r: dict[str, Any]) -> bool:
    """Whether the loss on held-out rows fell."""
    return r["loss"]["after"] is not None and r["loss"]["after"] < (r["loss"]["before"] or 0)


def table(report: dict[str, Any]) -> str:
    lines = [report["device"], HEAD]
    for part in dict.fromkeys(r["part"] for r in report["results"]):
        lines += ["", *(line(r) for r in report["results"] if r["part"] == part)]
    good = [r for r in report["results"] if "error" not in r]
    if good:
        kept = sum(r["parameters"]["predicted"] == r["parameters"]["counted"] for r in good)
        near = [sum(abs(error(r[what])) <= goal for r in good) for what, goal in (("memory", MEMORY_GOAL), ("seconds", SECONDS_GOAL))]
        equal = sum(r["saved_and_loaded"] <= EQUAL for r in good)
        lines += [
            "",
            f"Of {len(good)}: {kept} counts as predicted, {near[0]} peaks within {MEMORY_GOAL:.0%}, {near[1]} times within "
            f"{SECONDS_GOAL:.0%}, {sum(map(better, good))} with a lower loss than before, {equal} equal after saving and loading.",
        ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.estimates", description=__doc__.splitlines()[0])
    made.add_argument("--only", help=f"strategies, and parts of the table ({', '.join(PARTS)}), separated by commas; all by default")
    made.add_argument("--model", help=f"folder of a decoder saved by save_pretrained(), in place of {STARTERS['decoder']}")
    made.add_argument("--encoder", help=f"folder of an encoder, in place of {STARTERS['encoder']}")
    made.add_argument("--no-calibration", dest="calibrate", action="store_false", help="leave out the short job before")
    made.add_argument("--steps", type=int, default=6, help="steps of the predicted job")
    made.add_argument("--tokens", type=int, default=256, help="tokens of a step")
    made.add_argument("--length", type=int, default=256, help="longest row, in tokens")
    made.add_argument("--set", action="append", metavar="NAME=VALUE", help="another run setting")
    made.add_argument("--work", help="keep the jobs' data folder here")
    made.add_argument("--limit", type=float, default=900, help="seconds that one job may take")
    made.add_argument("--json", help="written after every job; what it holds of the same jobs is not run again")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    main()
