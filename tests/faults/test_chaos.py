"""F3: everything is killed, wiped and stopped, one after the other and at moments drawn from a seed, while jobs are ordered and trained.
It is `benchmarks.chaos`: servers, relay, web process, workers and trainers of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from app.settings import PROJECT
from benchmarks import chaos

SOUND = {
    "jobs": 2, "rows": 2, "states": {"succeeded": 2}, "lost": 0, "errors": [], "double": 0, "double_orders": 0, "succeeded_without_a_model": 0,
    "stale_writes": 0, "adapters_per_recipe": [1, 1], "orphans": 0,
}  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("seed", "jobs", "seconds", "pause", "workers"),
    [(4, 2, 6, 2, 1), *(pytest.param(seed, 20, 120, 8, 2, marks=pytest.mark.fault) for seed in (1, 2, 3))],
)
def test_nothing_is_lost_double_or_different_when_everything_is_killed(tmp_path, seed, jobs, seconds, pause, workers):
    told = tmp_path / "told.json"
    options = {"jobs": jobs, "seconds": seconds, "pause": pause, "workers": workers, "seed": seed, "json": told}
    command = [sys.executable, "-m", "benchmarks.chaos", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(told.read_text())
    assert not chaos.faults(result) and sum(result["kills"].values()) >= 2, result
    assert result["states"]["succeeded"] >= 0.9 * jobs and result["drain_seconds"] < 300, result


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, []),
        ({"lost": 1}, ["lost"]),
        ({"double_orders": 1, "orphans": 2}, ["double_orders", "orphans"]),
        ({"adapters_per_recipe": [1, 2]}, ["adapters_per_recipe"]),
        ({"states": {"succeeded": 1, "failed": 1}, "errors": ["Its worker was lost. The trainer crashed 3 times without progress."]}, []),
        ({"states": {"succeeded": 1, "failed": 1}, "errors": ["No module named x."]}, ["states"]),
        ({"states": {"succeeded": 1, "paused": 1}}, ["states"]),
    ],
)
def test_what_must_not_be_is_named(change, named):
    assert chaos.faults(SOUND | change) == named
