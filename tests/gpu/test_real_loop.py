"""Two steps of the real loop on a CUDA device that computes nothing: every strategy in both precisions, every family, every objective.

The host never waits for the device, everything lies on it, every layer reaches the attention over packs, and no more kernels are
launched than `launches.json` says. After a change that saves some, `WRITE_LAUNCHES=1 pytest tests/gpu` writes that table anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from app.objectives import OBJECTIVES
from app.strategies import STRATEGIES
from tests.gpu.conftest import HERE, FakeGpu

TABLE = HERE / "launches.json"
SLACK = 0.9
"""A table that allows more than a tenth too many would not notice what comes back."""

GRADIENT = [name for name, kind in STRATEGIES.items() if kind.recipe == "gradient"]
WRITING = [name for name in GRADIENT if "generation" in STRATEGIES[name].tasks]
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
ENCODERS = ("bert", "roberta", "xlm-roberta")

CASES: dict[str, dict[str, Any]] = {
    **{
        f"{name} {precision}": {"strategy": name, "precision": precision, **({"family": "qwen2"} if name == "bitfit" else {})}
        for name in WRITING
        for precision in ("bf16", "fp32")
    },
    **{f"{family} lora": {"family": family} for family in DECODERS},
    **{f"{family} lora classification": {"family": family, "task": "classification"} for family in ("llama", *ENCODERS)},
    **{f"{name} classification": {"strategy": name, "task": "classification"} for name in GRADIENT if name not in WRITING},
    "lora preference": {"task": "preference"},
    "lora kto": {"task": "kto"},
    "lora recomputed": {"run": {"gradient_checkpointing": "all"}},
    "lora 3 passes": {"run": {"micro_batches": 3}},
    "lora rows": {"run": {"max_tokens_per_step": None, "batch_size": 4}},
    "lora padded": {"run": {"packing": False}},
}
WAITS = {"adalora"}
"""AdaLoRA's allocator asks for a threshold at each step in which it prunes, which these two are not."""


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, int]]:
    kept: dict[str, int] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    yield kept
    if os.environ.get("WRITE_LAUNCHES"):
        TABLE.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


def case_of(name: str) -> dict[str, Any]:
    return CASES[name]


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.fault if name.endswith("fp32") and name not in ("lora fp32", "full fp32") else ())
        for name in CASES
    ],
)
def test_a_step_keeps_the_device_busy(gpu: FakeGpu, table: dict[str, int], name: str) -> None:
    case = case_of(name)
    found = gpu.run(**case)
    *_, last = found["steps"]
    half = case.get("precision", "bf16") == "bf16"
    assert found["started"]["precision"] == ("bf16" if half else "fp32")
    for one in found["steps"]:
        assert not one["waits"], "the host waits for a copy"
        assert not one["on_host"], "computed on the host"
        assert one["devices"] == ["cuda"]
    again = 2 if case.get("run", {}).get("gradient_checkpointing") == "all" else 1
    again += OBJECTIVES[case.get("task", "generation")].beside
    assert last["attention"] == (found["layers"] * last["passes"] * again if half else 0)
    assert not half or last["types"] == ["bfloat16"]
    if os.environ.get("WRITE_LAUNCHES"):
        table[name] = last["launches"]
    assert SLACK * table[name] <= last["launches"] <= table[name], f"{last['launches']} launches: {last['operations']}"


def test_the_table_knows_no_case_that_is_gone(table: dict[str, int]) -> None:
    assert set(table) == set(CASES)
