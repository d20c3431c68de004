"""Answers on a CUDA device that computes nothing: what is launched for a token, and what the host waits for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.conftest import FakeGpu
from tests.gpu.test_memory import shape_of

ALONE, CAPTURED, SAMPLED, TOLD = 702, 12, 22, 39
"""Kernels of a 1 B model for a token: of its layers in a step as it is, and of all of a captured one, whose likeliest token is taken, or
drawn, or drawn and told with its log-probability."""

HOT: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}


@pytest.mark.long
@pytest.mark.parametrize(
    ("answers", "sampling", "most"),
    [
        (1, {"temperature": 0}, CAPTURED),
        (1, HOT, SAMPLED),
        (8, HOT, SAMPLED),
        (8, {"top_p": 1.0, "logprobs": True, "top_logprobs": 5}, TOLD),
    ],
)
def test_a_token_is_a_captured_graph_and_one_copy(gpu: FakeGpu, answers: int, sampling: dict[str, Any], most: int) -> None:
    found = gpu.run(answers=answers, sampling=sampling, shape=shape_of("1b"))
    _reading, alone, *replayed = found["steps"]
    assert found["written"] == [len(found["steps"])] * answers and found["captured"] == 1
    assert not any(step["waits"] for step in found["steps"]), "the host waits for a copy"
    print(f"{answers} answers, {sampling}: {alone['launches']} launches, replayed {[step['launches'] for step in replayed]}")
    assert replayed and alone["launches"] <= ALONE + most
    for step in replayed:
        assert step["operations"]["a captured graph"] == 1 and step["launches"] <= most, step["operations"]
