"""QLoRA and 8-bit AdamW on the CPU backend of bitsandbytes, and what compiled QLoRA keeps for its backward pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from app.settings import PROJECT

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.four_bits"], cwd=PROJECT, env={**os.environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_no_dense_weight_is_kept_for_the_backward_pass(found: dict[str, Any]) -> None:
    """Each is made twice, for one product each, and dropped; all 7 of a block were kept, 416 MiB a layer for 8 B."""
    assert found["saved"]["fused"] == 28 and found["saved"]["graphs"] in (1, 2)
    assert found["saved"]["weights"] == []


def test_qlora_learns_as_lora_does(found: dict[str, Any]) -> None:
    for layers in ("peft", "fused"):
        assert found["lora"][layers]["loss"] < 1e-2, layers
        assert found["lora"][layers]["cosine"] > 0.9, layers


def test_8_bit_adamw_follows_adamw_and_goes_on_after_a_pause(found: dict[str, Any]) -> None:
    assert 0 < found["adamw"]["apart"] < 1e-2
    assert found["adamw"]["same_after_a_pause"]
