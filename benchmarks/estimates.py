"""Is what a job was said to cost what it cost? Every strategy on this machine, predicted and measured side by side.

    python -m benchmarks.estimates --model FOLDER [--encoder FOLDER] [--task generation] [--strategies lora,full]
        [--steps 12] [--tokens 512] [--set accumulation=4 --set gradient_checkpointing=all] [--json FILE]

Each strategy learns twice, each time in a process of its own, as a job runs: a short job that calibrates the machine's speed,
then a longer one that is predicted first. Generation learns `samples/support-replies.jsonl`, classification
`samples/shop-questions.csv`, with the encoder where one is given. Printed for each: parameters predicted and counted, peak
memory and seconds predicted and measured, loss on held-out rows before and after, what was forgotten, and whether the saved
result answers as the trained model did.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SAMPLES = Path(__file__).parents[1] / "samples"
SHORT_STEPS = 10
"""Steps of the job that calibrates: the fewest that count."""
MEMORY_GOAL, SECONDS_GOAL = 0.10, 0.25
ASKED = "How long does it take until the varnish of my violin is dry?"


def main() -> None:
    options = parser().parse_args()
    if options.child:
        print("RESULT " + json.dumps(child(json.loads(Path(options.child).read_text()))), flush=True)
        return
    with tempfile.TemporaryDirectory() as home:
        results = [measure(plan, Path(options.work or home)) for plan in plans(options, Path(options.work or home))]
    from app.machine import this_machine

    machine = this_machine()
    report = {"device": machine.gpu_name or f"{machine.cores} cores of {machine.processor}", "results": results}
    print(table(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


def plans(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """One plan for each task and strategy that this machine and model can run."""
    from app.machine import this_machine
    from app.shapes import shape_of
    from app.strategies import STRATEGIES

    cuda = this_machine().cuda
    found = []
    for task in options.task.split(","):
        model = Path(options.encoder if task == "classification" and options.encoder else options.model).resolve()
        target = work / "models" / model.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(model, target, copy_function=os.link if model.stat().st_dev == work.stat().st_dev else shutil.copy2)
        shape = shape_of(json.loads((target / "config.json").read_text()))
        for name in options.strategies.split(",") if options.strategies else STRATEGIES:
            why_not = STRATEGIES[name]().unavailable(shape, task=task, cuda=cuda)
            if why_not:
                print(f"  {task} {name}: left out. {why_not}", flush=True)
                continue
            settings = {"max_tokens_per_step": options.tokens, "max_length": options.length, **dict(_pair(s) for s in options.set or ())}
            found.append(
                {
                    "task": task,
                    "strategy": name,
                    "model": model.name,
                    "run": settings,
                    "steps": options.steps,
                    "limit": options.limit,
                    "calibrate": options.calibrate,
                }
            )
    return found


def _pair(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def measure(plan: dict[str, Any], work: Path) -> dict[str, Any]:
    """A short job, then the one that counts."""
    for steps in (SHORT_STEPS, plan["steps"]) if plan["calibrate"] else (plan["steps"],):
        found = in_child({**plan, "run": {**plan["run"], "max_steps": steps}}, work)
        if "error" in found:
            break
    print("  " + line(found), flush=True)
    return found


def in_child(plan: dict[str, Any], work: Path) -> dict[str, Any]:
    """A job in a process of its own, with the environment that a supervisor gives it."""
    from worker.exits import ALLOCATOR, THREADS

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
    about = {key: plan[key] for key in ("task", "strategy", "model", "run")}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=plan["limit"])
    except subprocess.TimeoutExpired:
        return {**about, "error": f"took more than {plan['limit']} s"}
    lines = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if not lines:
        return {**about, "error": (done.stderr.strip() or done.stdout.strip())[-1500:]}
    return {**about, **json.loads(lines[-1].removeprefix("RESULT "))}


# Inside a job's process -----------------------------------------------------------------------------------------------


def child(plan: dict[str, Any]) -> dict[str, Any]:
    """Predict a job, run it, and lay its result on the base again."""
    from app import events
    from app.estimate import estimate
    from app.machine import this_machine
    from app.settings import get_settings
    from worker import frozen, train
    from worker.run import _calibrate

    spec, stats = order_of(plan)
    predicted = estimate(spec, stats, this_machine())
    learns = spec.strategy.learns(spec.model.shape, task=spec.task, labels=stats.labels)
    said: dict[str, Any] = {}

    def exporting(attempt: Path, spec: Any, model: Any, *rest: Any) -> Any:
        said["trained"] = answers(spec, model)
        return exported(attempt, spec, model, *rest)

    exported = train.export
    train.export = frozen.export = exporting
    attempt = get_settings().folder("runs") / uuid.uuid4().hex / "a1"
    for event in train.train(spec, attempt):
        if isinstance(event, events.Started):
            said["started"] = event
        if isinstance(event, events.Finished):
            said["finished"] = event
    finished, started = said["finished"], said["started"]
    _calibrate(spec, finished)
    loaded = answers(spec, load(spec, finished))
    shutil.rmtree(attempt.parent)
    measured, evaluation = finished.measured, finished.evaluation or {}
    lost = finished.forgetting or {}
    return {
        "precision": started.precision,
        "parameters": {"predicted": learns, "counted": started.trainable_parameters},
        "memory": {"predicted": predicted.memory_bytes, "measured": measured.peak_memory_bytes, "parts": predicted.memory.model_dump()},
        "seconds": {"predicted": predicted.seconds, "measured": measured.seconds},
        "tokens_per_second": {"predicted": predicted.tokens_per_second, "measured": measured.tokens_per_second},
        "steps": {"predicted": predicted.steps, "measured": measured.steps},
        "tokens": {"predicted": predicted.tokens, "measured": measured.tokens},
        "recomputed_layers": predicted.recomputed_layers,
        "loss": {side: (evaluation.get(name) or {}).get("loss") for side, name in (("before", "base"), ("after", "tuned"))},
        "forgotten": {key: lost.get(key) for key in ("change", "interval", "verdict")} if lost else None,
        "saved_and_loaded": float((said["trained"] - loaded).abs().max() / said["trained"].abs().max()),
    }


def order_of(plan: dict[str, Any]) -> tuple[Any, Any]:
    """The order, and what the studio knows of its data."""
    from app.settings import get_settings
    from app.shapes import shape_of
    from app.spec import DatasetRef, JobSpec, ModelRef, RunSettings
    from app.strategies import STRATEGIES
    from app.token_counts import TokenCounter

    folder = get_settings().data_dir / "models" / plan["model"]
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    classes = plan["task"] == "classification"
    rows = list(csv.DictReader((SAMPLES / "shop-questions.csv").open())) if classes else _json_lines("support-replies.jsonl")
    path = _stored(rows, plan["task"])
    counter = TokenCounter(folder)
    for row in rows:
        counter.add(row)
    known = {key: value for key, value in counter.result().items() if key != "token_lengths"}
    stats = SimpleNamespace(rows=len(rows), characters=len(json.dumps(rows)), labels=len({row.get("label") for row in rows}), **known)
    kind = "encoder" if shape.architecture == "encoder" else "dialogue"
    model = ModelRef(id=uuid.UUID(int=1), name=plan["model"], kind=kind, path=f"models/{plan['model']}", revision="0" * 64, shape=shape)
    format_ = "classification" if classes else "chat"
    data = DatasetRef(id=uuid.UUID(int=2), name="rows", path=path, sha256="0" * 64, format=format_, rows=len(rows))
    run = RunSettings(**{"epochs": 1000, "samples": 0, "evaluations_per_epoch": 0, "early_stopping_patience": 0, **plan["run"]})
    strategy = STRATEGIES[plan["strategy"]]()
    return JobSpec(name="estimates", task=plan["task"], model=model, dataset=data, run=run, strategy=strategy), stats


def _json_lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (SAMPLES / name).read_text().splitlines()]


def _stored(rows: list[dict[str, Any]], name: str) -> str:
    """The rows as the studio stores them."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from app.settings import get_settings

    folder = get_settings().folder("rows", name)
    parquet.write_table(pa.table({"line": list(range(1, len(rows) + 1)), "row": [json.dumps(r) for r in rows]}), folder / "rows.parquet")
    return (folder / "rows.parquet").relative_to(get_settings().data_dir).as_posix()


def load(spec: Any, finished: Any) -> Any:
    """The result as the playground loads it, in the numbers that it was trained in."""
    from app.spec import Adapter
    from worker import attention, kernels
    from worker.classifier import load_classifier
    from worker.device import choose
    from worker.load import load_model

    if type(spec.strategy).adapter:
        laid = Adapter(strategy=spec.strategy.name, path=finished.path, sha256=finished.adapter_sha256 or "")
        ref = spec.model.model_copy(update={"adapters": (laid,)})
    else:
        ref = spec.model.model_copy(update={"path": finished.path})
    engine = choose(spec.run, spec.strategy)
    if spec.task == "classification":
        ref = ref.model_copy(update={"labels": tuple(finished.labels)})
        return load_classifier(ref, engine.frozen, str(engine.device), attention.NAME)[0]
    model = load_model(ref, engine.frozen, attention.NAME, str(engine.device))
    kernels.use_fused_norms(model)  # as in training, whose rounding the fused layers share
    kernels.speed_up(model, engine, 0.0)
    return model


def answers(spec: Any, model: Any) -> Any:
    """Logits of a fixed text, float32: of every token, or of every class."""
    import torch

    from worker.device import choose
    from worker.evaluate import evaluating
    from worker.load import load_tokenizer

    tokenizer, engine = load_tokenizer(spec.model), choose(spec.run, spec.strategy)
    ids = [*([tokenizer.pad_token_id or 0] * spec.strategy.virtual_tokens()), *tokenizer(ASKED)["input_ids"]]
    given = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
    given = {name: tensor.to(engine.device) for name, tensor in given.items()}
    with evaluating(model), engine.autocast():
        out = model(**given, lengths=[len(ids)]) if spec.task == "classification" else model(**given, use_cache=False).logits
    return out.float().cpu()


# Afterwards -----------------------------------------------------------------------------------------------------------


def line(r: dict[str, Any]) -> str:
    """One strategy in one line."""
    name = f"{r['task'][:10]:10} {r['strategy']:19}"
    if "error" in r:
        return f"{name} failed: {r['error'].strip().splitlines()[-1][:150]}"
    parameters, memory, seconds, loss = r["parameters"], r["memory"], r["seconds"], r["loss"]
    same = "=" if parameters["predicted"] == parameters["counted"] else f"≠ {parameters['predicted']}"
    losses = f"{loss['before']:7.3f}{loss['after']:8.3f}" if loss["after"] is not None and loss["before"] is not None else f"{'':15}"
    lost = f"{r['forgotten']['change']:+9.1%}" if r.get("forgotten") else f"{'':9}"
    return (
        f"{name} {r['precision']} {parameters['counted']:>11,} {same:2}{memory['predicted'] / 1e6:8.0f}{memory['measured'] / 1e6:7.0f}"
        f"{error(memory):+7.1%}{seconds['predicted']:8.1f}{seconds['measured']:7.1f}{error(seconds):+7.1%}{losses}{lost}{r['saved_and_loaded']:10.1e}"
    )


def error(pair: dict[str, float]) -> float:
    """How far the prediction lies above what was measured, as a share of that."""
    return pair["predicted"] / pair["measured"] - 1


def table(report: dict[str, Any]) -> str:
    good = [r for r in report["results"] if "error" not in r]
    head = f"{'task':10} {'strategy':19} {'':4} {'parameters':>11} {'':2}{'MB said':>8}{'was':>7}{'error':>7}{'s said':>8}{'was':>7}{'error':>7}"
    lines = [report["device"], head + f"{'loss':>7}{'then':>8}{'forgot':>9}{'reloaded':>10}", *map(line, report["results"])]
    if good:
        kept = sum(r["parameters"]["predicted"] == r["parameters"]["counted"] for r in good)
        near = [sum(abs(error(r[what])) <= goal for r in good) for what, goal in (("memory", MEMORY_GOAL), ("seconds", SECONDS_GOAL))]
        lines.append(
            f"Of {len(good)}: {kept} counts as predicted, {near[0]} peaks within {MEMORY_GOAL:.0%}, {near[1]} times within {SECONDS_GOAL:.0%}."
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.estimates", description=__doc__.splitlines()[0])
    made.add_argument("--model", help="folder of a decoder saved by save_pretrained()")
    made.add_argument("--encoder", help="folder of an encoder, for classification")
    made.add_argument("--task", default="generation,classification")
    made.add_argument("--strategies", help="names, separated by commas; all by default")
    made.add_argument("--no-calibration", dest="calibrate", action="store_false", help="leave out the short job before")
    made.add_argument("--steps", type=int, default=16, help="steps of the predicted job")
    made.add_argument("--tokens", type=int, default=512, help="tokens of a step")
    made.add_argument("--length", type=int, default=256, help="longest row")
    made.add_argument("--set", action="append", metavar="NAME=VALUE", help="another run setting")
    made.add_argument("--work", help="keep the data folder, and with it the calibration, here")
    made.add_argument("--limit", type=float, default=900, help="seconds that one job may take")
    made.add_argument("--json")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    main()
