"""Frozen features on real labels: a whole `feature_extraction` job beside plain scikit-learn on the same vectors, in one run.

    python -m benchmarks.features --train train.csv --test test.csv [--model FOLDER] [--rows N] [--strategies feature_extraction,…] [--json FILE]

The files have the columns text and label (or category); BANKING77 (Casanueva et al. 2020, arXiv:2003.04807) is such a pair.
The model is the studio's starter encoder unless a folder is named. The job reads rows as the studio stores them, chooses C by
cross-validation, and is scored on the test file. The plain script takes the very vectors the job kept, and fits a
LogisticRegression for each C that the job may choose. Further strategies run as whole jobs on the same rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

NEAR = 0.005
"""How far from plain scikit-learn a job's accuracy may lie: half a point."""


def rows_of(path: Path, most: int | None) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{"text": r["text"], "label": r.get("label") or r["category"]} for r in csv.DictReader(file)]
    return rows[: most or None]


def put(rows: list[dict[str, str]], name: str) -> Any:
    from app.datasets.row_store import write_rows
    from app.settings import get_settings
    from app.spec import DatasetRef

    path = get_settings().folder("rows", name) / "rows.parquet"
    sha256 = write_rows(path, rows)
    return DatasetRef(id=uuid.uuid4(), name=name, path=f"rows/{name}/rows.parquet", sha256=sha256, format="classification", rows=len(rows))


def job(model: Any, train_ref: Any, test_ref: Any, strategy: str, settings: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    from app import events
    from app.settings import get_settings
    from app.spec import JobSpec, RunSettings
    from app.strategies import STRATEGIES
    from worker.train import train

    spec = JobSpec(
        name="benchmark", task="classification", model=model, dataset=train_ref, validation=test_ref,
        run=RunSettings(forgetting=False, row_losses=False, samples=0, **run), strategy=STRATEGIES[strategy](**settings),
    )  # fmt: skip
    began, said = time.perf_counter(), []
    for event in train(spec, get_settings().data_dir / "runs" / uuid.uuid4().hex / "a1"):
        said.append(event)
        if isinstance(event, events.Log):
            print(f"  {event.message}", flush=True)
            if chosen := re.search(r"C=(\S+) is taken", event.message):
                settings = {**settings, "C": float(chosen[1])}
    scores = said[-1].evaluation["tuned"]
    started = next(e for e in said if isinstance(e, events.Started))
    return {
        "strategy": strategy, **settings, "accuracy": scores["accuracy"], "macro_f1": scores["macro_f1"], "log_loss": scores["log_loss"],
        "calibration_error": scores["calibration_error"], "trainable": started.trainable_parameters,
        "seconds": time.perf_counter() - began, "peak_gb": said[-1].measured.peak_memory_bytes / 1e9,
    }  # fmt: skip


def plain(vectors: np.ndarray, train: list[dict[str, str]], test: list[dict[str, str]]) -> list[dict[str, Any]]:
    """scikit-learn alone on the vectors, for every C that a job may choose."""
    from worker.training.feature_cache import STRENGTHS

    inside, outside = vectors[: len(train)], vectors[len(train) :]
    found = []
    for strength in STRENGTHS:
        began = time.perf_counter()
        model = LogisticRegression(C=strength, max_iter=2000).fit(inside, [row["label"] for row in train])
        score = float(model.score(outside, [row["label"] for row in test]))
        found.append({"plain C": strength, "accuracy": score, "seconds": time.perf_counter() - began})
    return found


def _starter() -> Path:
    from app.models import starters
    from app.settings import get_settings

    name = "all-minilm-l6-v2"
    if starters.present(name) is None:
        raise SystemExit(
            f"The encoder {name} is not here: `luthier models add {name} --files-only` brings it, or name a folder with --model."
        )
    found = starters.folder(name)
    get_settings.cache_clear()  # the jobs have a data folder of their own
    return found


def verdict(results: list[dict[str, Any]]) -> str:
    """The job's logistic regression beside scikit-learn at the same C and at the best one."""
    ours = next(row for row in results if "C" in row)
    alone = {row["plain C"]: row["accuracy"] for row in results if "plain C" in row}
    best = max(alone, key=lambda c: alone[c])
    gap = ours["accuracy"] - alone[best]
    near = "within" if abs(gap) <= NEAR else "NOT within"
    return (
        f"feature_extraction {ours['accuracy']:.2%} at C={ours['C']:g}, chosen by cross-validation; scikit-learn {alone[ours['C']]:.2%} "
        f"there and {alone[best]:.2%} at its best, C={best:g}: {100 * gap:+.2f} points, {near} {100 * NEAR:.1f} points."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a model; the studio's starter encoder when left out")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="this many training rows at most")
    parser.add_argument("--strategies", default="feature_extraction")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model_folder = (options.model or _starter()).resolve()
    with tempfile.TemporaryDirectory(prefix="luthier-features-") as folder:
        os.environ.update(LUTHIER_DATA_DIR=folder, HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE")
        (Path(folder) / "models").mkdir()
        (Path(folder) / "models" / "model").symlink_to(model_folder)
        from app.shapes import shape_of
        from app.spec import ModelRef
        from worker.training import feature_cache

        shape = shape_of(json.loads((model_folder / "config.json").read_text()))
        kind = "encoder" if shape.architecture == "encoder" else "generic"
        model = ModelRef(id=uuid.uuid4(), name=model_folder.name, kind=kind, path="models/model", revision="0" * 64, shape=shape)
        train_rows, test_rows = rows_of(options.train, options.rows), rows_of(options.test, None)
        train_ref, test_ref = put(train_rows, "train"), put(test_rows, "test")
        results: list[dict[str, Any]] = []
        for name in options.strategies.split(","):
            print(f"{name} on {model.name}: {len(train_rows):,} training and {len(test_rows):,} test rows", flush=True)
            settings = [{}, {"classifier": "dense"}] if name == "feature_extraction" else [{}]
            run = {} if name == "feature_extraction" else {"epochs": 3, "max_length": 128}
            results += [job(model, train_ref, test_ref, name, chosen, run) for chosen in settings]
            if name == "feature_extraction":
                kept = next((Path(folder) / "features").glob("*.safetensors"))
                texts = [row["text"] for row in (*train_rows, *test_rows)]
                vectors = feature_cache.kept(kept.stem.rpartition("-")[0], texts)
                results += plain(np.stack([vectors[text] for text in texts]), train_rows, test_rows)
        for row in results:
            print("  ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
        if any("C" in row for row in results):
            print(verdict(results))
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
