"""The benchmark of the estimates runs real jobs, each in a process of its own, and says what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from app.settings import PROJECT
from benchmarks.estimates import error, order_key, parser, plans, table
from tests.worker.training.test_classification import put_encoder


def run(*arguments, folder):
    command = [sys.executable, "-m", "benchmarks.estimates", *arguments, "--work", str(folder), "--json", str(folder / "out.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LUTHIER_DATA_DIR": str(folder / "studio")}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def tiny_encoder(data_dir, tiny_model):
    ref = put_encoder(tiny_model)
    return data_dir / ref.path


@pytest.mark.long
def test_two_strategies_predicted_and_measured_and_not_measured_again(tmp_path, tiny_model):
    command = ["--model", str(tiny_model), "--only", "generation,lora,bitfit", "--steps", "3", "--no-calibration"]
    command += ["--set", "precision=fp32", "--set", "forgetting=false"]
    done = run(*command, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert "error" not in result, result
    assert "bitfit: left out. This model has no biases" in done.stdout
    assert result["parameters"]["predicted"] == result["parameters"]["counted"] > 0
    assert result["steps"] == {"predicted": 3, "measured": 3}
    assert abs(error(result["memory"])) < 0.2 and result["memory"]["measured"] > 3e8
    assert result["loss"]["after"] < result["loss"]["before"] and result["saved_and_loaded"] < 1e-5
    assert result["seconds"]["measured"] > 0 and "1 counts as predicted" in done.stdout
    assert "1 with a lower loss than before, 1 equal after saving and loading" in done.stdout

    again = run(*command, folder=tmp_path)
    assert again.returncode == 0 and json.loads((tmp_path / "out.json").read_text())["results"] == [result]


@pytest.mark.long
def test_classes_are_told_by_their_accuracy(tmp_path, tiny_encoder):
    done = run("--encoder", str(tiny_encoder), "--only", "feature_extraction", "--steps", "3", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert "error" not in result, result
    assert result["part"] == "encoder" and 0 <= result["accuracy"]["before"] <= 1 and f"{result['accuracy']['after']:.0%}" in done.stdout
    assert result["saved_and_loaded"] < 1e-5 and not list(tmp_path.glob("runs/*"))


def test_without_models_it_says_how_to_bring_them(tmp_path):
    done = run(folder=tmp_path)
    assert done.returncode == 1
    for name in ("smollm2-135m-instruct", "all-minilm-l6-v2"):
        assert f"luthier models add {name} --files-only" in done.stdout


def test_another_model_is_another_job(tmp_path, tiny_model, tiny_encoder):
    """A --work folder kept from another model must not lend it its vectors or its results."""

    def key(*arguments):
        return {order_key(plan) for plan in plans(parser().parse_args(["--only", "classification,encoder,lora", *arguments]), tmp_path)}

    assert key("--model", str(tiny_model)).isdisjoint(key("--encoder", str(tiny_encoder)))
    with pytest.raises(SystemExit, match="no part or strategy lara"):
        key("--only", "lara")


def test_a_job_that_failed_says_so():
    failed = {"part": "generation", "task": "generation", "strategy": "lora", "error": "line\nno memory"}
    assert "failed: no memory" in table({"device": "d", "results": [failed]})
