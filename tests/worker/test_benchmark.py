"""The training benchmark runs, counts what it says it counts, and its engines learn the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from app.settings import PROJECT
from benchmarks.engines import WARM, Clock, Counting, padded
from benchmarks.shapes import draw_samples
from benchmarks.training import farthest, table


def test_two_engines_on_one_model(tmp_path):
    command = [sys.executable, "-m", "benchmarks.training", "--shape", "tiny", "--engines", "luthier,hf_trainer", "--rounds", "1"]
    command += ["--steps", "4", "--tokens", "512", "--json", str(tmp_path / "out.json"), "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["shape"] == "tiny" and report["strategy"] == "lora" and report["device"] and report["losses_agree"]
    told = report["same_rows_losses"]
    assert len(told["luthier"]) == len(told["hf_trainer"]) == 4 + WARM and report["losses_apart"] < 0.01
    assert [r["engine"] for r in report["results"]] == ["luthier", "hf_trainer"]
    for result in report["results"]:
        assert "error" not in result, result
        assert result["tokens_per_second"] > 0 and result["peak_memory_bytes"] > 10**8 and 5 < result["loss"] < 8
        assert 300 < result["tokens_per_step"] < 700  # near the budget: padding is not counted
    assert "tokens/s" in done.stdout and "hf_trainer" in done.stdout


@pytest.mark.parametrize("strategy", ["full", "prefix_tuning", "bottleneck_adapter"])
def test_the_other_strategies(tmp_path, strategy):
    """On the same rows with the same seed each learns the same in both engines, and counts the same tokens."""
    command = [sys.executable, "-m", "benchmarks.training", "--shape", "tiny", "--engines", "luthier,trl_packed", "--rounds", "1"]
    command += ["--steps", "2", "--tokens", "512", "--json", str(tmp_path / "out.json"), "--work", str(tmp_path), "--strategy", strategy]
    done = subprocess.run(command, cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert all("error" not in result for result in report["results"]), report["results"]
    assert report["losses_apart"] < 0.01
    assert all(300 < result["tokens_per_step"] < 600 for result in report["results"])


def test_padding_is_not_counted():
    counting = Counting(padded)
    batch = counting([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert counting.tokens == [4]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]


def test_placeholders_are_not_counted():
    counting = Counting(lambda rows: rows, lead=2)
    counting([{"input_ids": [0, 0, 5], "labels": [-100, -100, 5]}])
    counting([{"input_ids": [0, 0, 5, 0, 0, 6, 7], "labels": [-100, -100, 5, -100, -100, 6, 7], "seq_lengths": [3, 4]}])
    assert counting.tokens == [1, 3]


def test_the_first_steps_are_not_timed(monkeypatch):
    clock = Clock(False)
    clock.losses = [1.0] * 6
    clock.marks = [(10.0 * (i < WARM) + i, 2.0 * i) for i in range(6)]
    clock.marks[WARM - 1] = (100.0, 0.0)
    clock.marks[-1] = (103.0, 6.0)
    found = clock.result([10**6] * WARM + [30, 30, 30])
    assert found["tokens_per_second"] == 30.0 and found["tokens_per_cpu_second"] == 15.0


def test_samples_are_the_same_every_time_and_long_tailed():
    one, two = (draw_samples(512, 200, 75, 0.5, 30, 200) for _ in range(2))
    assert one == two
    lengths = sorted(map(len, one))
    assert 60 < lengths[100] < 95 and lengths[0] >= 30 and lengths[-1] <= 200 and lengths[-1] > 1.8 * lengths[100]


def test_the_table_says_when_losses_differ():
    report = {"device": "d", "shape": "tiny", "strategy": "lora", "tokens": 1, "precision": "bf16", "same_allocator": False, "results": []}
    told = {agree: table({**report, "losses_agree": agree, "losses_apart": 0.02}) for agree in (False, True, None)}
    assert "DIFFER, by 2.00%" in told[False] and "DIFFER" not in told[True] + told[None] and "not compared" in told[None]


def test_curves_are_compared_step_by_step():
    assert farthest({"a": [2.0, 1.0], "b": [2.0, 0.9], "c": []}) == pytest.approx(0.1)
    assert farthest({"a": [2.0], "b": []}) is None
