"""The benchmark of the estimates runs real jobs, each in a process of its own, and says what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from app.settings import PROJECT
from benchmarks.estimates import error, table


def test_two_strategies_predicted_and_measured(tmp_path, tiny_model):
    command = [
        sys.executable,
        "-m",
        "benchmarks.estimates",
        "--model",
        str(tiny_model),
        "--task",
        "generation",
        "--strategies",
        "lora,bitfit",
    ]
    command += ["--steps", "3", "--tokens", "256", "--no-calibration", "--set", "precision=fp32", "--set", "forgetting=false"]
    command += ["--work", str(tmp_path), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert "error" not in result, result
    assert "bitfit: left out. This model has no biases" in done.stdout
    assert result["parameters"]["predicted"] == result["parameters"]["counted"] > 0
    assert result["steps"] == {"predicted": 3, "measured": 3}
    assert abs(error(result["memory"])) < 0.2 and result["memory"]["measured"] > 3e8
    assert result["loss"]["after"] < result["loss"]["before"] and result["saved_and_loaded"] < 1e-5
    assert result["seconds"]["measured"] > 0 and "1 counts as predicted" in done.stdout


def test_a_job_that_failed_says_so():
    assert "failed: no memory" in table(
        {"device": "d", "results": [{"task": "generation", "strategy": "lora", "error": "line\nno memory"}]}
    )
