"""One job of `benchmarks/estimates.py`, in a process of its own: predict it, run it, and lay its result on the base again."""

from __future__ import annotations

import csv
import json
import shutil
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SAMPLES = Path(__file__).parents[1] / "samples"
ASKED = "How long does it take until the varnish of my violin is dry?"


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Predict a job, run it, and lay its result on the base again."""
    from app import events
    from app.machines.hardware import this_machine
    from app.planning.duration import estimate
    from app.settings import get_settings
    from worker import train
    from worker.run import calibrate
    from worker.training import train_on_features

    spec, stats = order_of(plan)
    predicted = estimate(spec, stats, this_machine())
    said: dict[str, Any] = {}

    def exporting(attempt: Path, spec: Any, model: Any, *rest: Any) -> Any:
        said["trained"] = answers(spec, model)
        return exported(attempt, spec, model, *rest)

    exported = train.export
    train.export = train_on_features.export = exporting
    attempt = get_settings().folder("runs") / uuid.uuid4().hex / "a1"
    for event in train.train(spec, attempt):
        if isinstance(event, events.Started):
            said["started"] = event
        if isinstance(event, events.Finished):
            said["finished"] = event
    finished, started = said["finished"], said["started"]
    calibrate(spec, started, finished)
    loaded = answers(spec, load(spec, finished))
    shutil.rmtree(attempt.parent)
    measured, evaluation = finished.measured, finished.evaluation or {}
    lost = finished.forgetting or {}
    return {
        "precision": started.precision,
        "parameters": {"predicted": predicted.trainable_parameters, "counted": started.trainable_parameters},
        "memory": {"predicted": predicted.memory_bytes, "measured": measured.peak_memory_bytes, "parts": predicted.memory.model_dump()},
        "seconds": {"predicted": predicted.seconds, "measured": measured.seconds, "before_the_first_step": started.seconds_to_load},
        "tokens_per_second": {"predicted": predicted.tokens_per_second, "measured": measured.tokens_per_second},
        "steps": {"predicted": predicted.steps, "measured": measured.steps},
        "tokens": {"predicted": predicted.tokens, "measured": measured.tokens},
        "recomputed_layers": predicted.recomputed_layers,
        **{score: _sides(evaluation, score) for score in ("loss", "accuracy")},
        "forgotten": {key: lost.get(key) for key in ("change", "interval", "verdict")} if lost else None,
        "saved_and_loaded": float((said["trained"] - loaded).abs().max() / said["trained"].abs().max()),
    }


def _sides(evaluation: dict[str, Any], score: str) -> dict[str, float | None]:
    """A score on the held-out rows, before tuning and after; None where the job has none."""
    return {side: (evaluation.get(name) or {}).get(score) for side, name in (("before", "base"), ("after", "tuned"))}


def order_of(plan: dict[str, Any]) -> tuple[Any, Any]:
    """The order, and what the studio knows of its data."""
    from app.settings import get_settings
    from app.shapes import shape_of
    from app.spec import DatasetRef, JobSpec, ModelRef, RunSettings
    from app.strategies import STRATEGIES
    from worker.data.inspection import TokenCounter, open_tokenizer

    folder = get_settings().data_dir / "models" / plan["model"]
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    classes = plan["task"] == "classification"
    rows = list(csv.DictReader((SAMPLES / "shop-questions.csv").open())) if classes else _json_lines("support-replies.jsonl")
    path, sha256 = _stored(rows, plan["task"])
    kind = "encoder" if shape.architecture == "encoder" else "dialogue"
    counter = TokenCounter(open_tokenizer(folder, plan["task"]), {"kind": kind}, plan["task"], lambda line, finding: None)
    for line, row in enumerate(rows, start=1):
        counter.add(row, line)
    counted = counter.result()["report"]
    known = {name: counted[name] for name in ("tokens", "trained_tokens", "longest")}
    stats = SimpleNamespace(rows=len(rows), characters=len(json.dumps(rows)), labels=len({row.get("label") for row in rows}), **known)
    model = ModelRef(
        id=uuid.UUID(int=1), name=plan["model"], kind=kind, path=f"models/{plan['model']}", revision=plan["revision"], shape=shape
    )
    format_ = "classification" if classes else "chat"
    data = DatasetRef(id=uuid.UUID(int=2), name="rows", path=path, sha256=sha256, format=format_, rows=len(rows))
    usual = {"epochs": 1000, "samples": 0, "evaluations_per_epoch": 0, "early_stopping_patience": 0, "row_losses": False}
    run = RunSettings(**{**usual, "validation_fraction": 0.3 if classes else 0.1, **plan["run"]})
    strategy = STRATEGIES[plan["strategy"]]()
    return JobSpec(name="estimates", task=plan["task"], model=model, dataset=data, run=run, strategy=strategy), stats


def _json_lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (SAMPLES / name).read_text().splitlines()]


def _stored(rows: list[dict[str, Any]], name: str) -> tuple[str, str]:
    """The rows as the studio stores them: their place in the data folder, and their hash."""
    from app.datasets.row_store import write_rows
    from app.settings import get_settings

    path = get_settings().folder("rows", name) / "rows.parquet"
    sha256 = write_rows(path, rows)
    return path.relative_to(get_settings().data_dir).as_posix(), sha256


def load(spec: Any, finished: Any) -> Any:
    """The result as the playground loads it, in the numbers that it was trained in."""
    import torch

    from app.spec import Adapter
    from app.strategies._selected import Selected
    from worker.modeling import fused_layers, packed_attention
    from worker.modeling.classifier import load_classifier
    from worker.modeling.loading import load_model
    from worker.runtime.device import choose
    from worker.training.objectives._base import body_of

    if type(spec.strategy).adapter:
        laid = Adapter(strategy=spec.strategy.name, path=finished.path, sha256=finished.adapter_sha256 or "")
        ref = spec.model.model_copy(update={"adapters": (laid,)})
    else:
        ref = spec.model.model_copy(update={"path": finished.path})
    engine = choose(spec.run, spec.strategy)
    wide = torch.float32 if isinstance(spec.strategy, Selected) else engine.frozen
    if spec.task == "classification":
        ref = ref.model_copy(update={"labels": tuple(finished.labels)})
        model = load_classifier(ref, wide, str(engine.device), packed_attention.NAME)[0]
    else:
        model = load_model(ref, wide, packed_attention.NAME, str(engine.device))
    if isinstance(spec.strategy, Selected):
        _narrow(model, spec.strategy, engine.frozen)
    fused_layers.patch_layers(model)  # as in training, whose rounding the fused layers share
    fused_layers.speed_up(body_of(model), engine, 0.0)
    return model


def _narrow(model: Any, strategy: Any, dtype: Any) -> None:
    """Round the weights that did not learn to `dtype`: the others are kept in float32 while they learn."""
    from app.strategies._selected import match_norms

    learnt = set(strategy.chosen(getattr(model, "backbone", model)))
    for name, parameter in getattr(model, "backbone", model).named_parameters():
        if name not in learnt:
            parameter.data = parameter.data.to(dtype)
    match_norms(model)


def answers(spec: Any, model: Any) -> Any:
    """Logits of a fixed text, float32: of every token, or of every class."""
    import torch

    from worker.modeling.loading import load_tokenizer
    from worker.runtime.device import choose
    from worker.scoring.held_out import evaluating

    tokenizer, engine = load_tokenizer(spec.model), choose(spec.run, spec.strategy)
    ids = [*([tokenizer.pad_token_id or 0] * spec.strategy.virtual_tokens()), *tokenizer(ASKED)["input_ids"]]
    given = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
    given = {name: tensor.to(engine.device) for name, tensor in given.items()}
    with evaluating(model), engine.autocast():
        out = model(**given, lengths=[len(ids)]) if spec.task == "classification" else model(**given, use_cache=False).logits
    return out.float().cpu()
