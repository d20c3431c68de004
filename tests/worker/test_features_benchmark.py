"""The benchmark of frozen features runs whole, small, and holds the job against plain scikit-learn at the C it chose."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest

from app.settings import PROJECT
from benchmarks.features import verdict
from tests.worker.training.test_classification import put_encoder, texts
from worker.training.feature_cache import STRENGTHS


@pytest.mark.long
def test_a_job_beside_plain_scikit_learn(tmp_path, data_dir, tiny_model):
    encoder = put_encoder(tiny_model)
    for name, count in (("train", 90), ("test", 30)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(texts(count))
    command = [sys.executable, "-m", "benchmarks.features", "--model", str(data_dir / encoder.path), "--json", str(tmp_path / "out.json")]
    command += ["--train", str(tmp_path / "train.csv"), "--test", str(tmp_path / "test.csv")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert [row["plain C"] for row in results if "plain C" in row] == list(STRENGTHS)
    said = done.stdout.strip().splitlines()[-1]
    assert said == verdict(results) and "within 0.5 points" in said and "NOT" not in said


def test_a_job_further_away_is_told():
    rows = [{"C": 10.0, "accuracy": 0.90}, {"plain C": 1.0, "accuracy": 0.91}, {"plain C": 10.0, "accuracy": 0.90}]
    assert "90.00% there and 91.00% at its best, C=1: -1.00 points, NOT within 0.5 points" in verdict(rows)
