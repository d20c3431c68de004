"""Passes of small models as CUDA graphs, on a CUDA device that computes nothing: what is launched beside them, and that nothing moves."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.conftest import FakeGpu
from tests.gpu.test_memory import GIB, shape_of
from worker.training.backends.graphed import COMPARED_AT

AROUND = 10
"""Launches that a replayed step has and a computed one has not: what differs is copied to where graphs read it."""
LAYERS = 2
"""Enough to tell them from what is launched once; each takes as many launches as the next."""


def job(name: str, **more: Any) -> dict[str, Any]:
    run = {"max_tokens_per_step": 4096, "max_length": 1024, "max_steps": 8, "evaluations_per_epoch": 0, **more.pop("run", {})}
    return {
        "shape": {**shape_of(name), "num_hidden_layers": LAYERS},
        "rows": 160,
        "words": 100,
        "hours": 1,
        "steps": COMPARED_AT + 2,
        "run": run,
        **more,
    }


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_pass_is_two_graphs(gpu: FakeGpu, strategy: str) -> None:
    found = gpu.run(**job("starter", strategy=strategy))
    assert found["started"]["backend"] == "graphed"
    first, computed, *_, before, last = found["steps"]
    ahead, back = found["captured"]
    around, rest = last["launches"] - 2, computed["launches"] - ahead["launches"] - back["launches"]
    print(f"{strategy}: {computed['launches']} launches, captured {ahead['launches']} and {back['launches']}, around them {around}")
    assert last["operations"]["a captured graph"] == 2 and 0 < around <= rest + AROUND
    assert (first["attention"], last["attention"]) == (LAYERS, 0), "a layer is not captured"
    for graph in found["captured"]:
        assert not graph["copied"], "a graph would copy from the host, or to it"
    assert not last["waits"] and last["addresses"] == before["addresses"], "what a graph reads or writes has moved"


@pytest.mark.long
def test_each_pass_of_a_step_replays_the_same_graphs(gpu: FakeGpu) -> None:
    found = gpu.run(**job("starter", run={"micro_batches": 4, "max_tokens_per_step": 4 * 2048}, steps=2))
    last = found["steps"][-1]
    assert len(found["captured"]) == 2 and last["passes"] == 4 and last["operations"]["a captured graph"] == 8


NOT: dict[str, dict[str, Any]] = {
    "small": {"shape": shape_of("1b")},
    "long": {"hours": 0},
    "without recomputed layers": {"run": {"gradient_checkpointing": "all"}},
    "roomy": {"card": {"memory": 2 * GIB}},
}


@pytest.mark.long
@pytest.mark.parametrize("name", NOT)
def test_what_is_none_of_these_is_computed_as_it_is(gpu: FakeGpu, name: str) -> None:
    assert gpu.run(**{**job("starter", **NOT[name]), "steps": 0})["started"]["backend"] == "plain"
