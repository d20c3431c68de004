"""The peak of a step of real size on a card that computes nothing, byte by byte, against what was estimated before it."""

from __future__ import annotations

from typing import Any

import pytest

from app.machines.hardware import Machine
from app.planning.memory import FLOOR_CUDA_BYTES, memory_of, pack_tokens
from app.spec import JobSpec
from benchmarks.shapes import LLAMA
from tests.gpu.conftest import FakeGpu

GIB = 2**30
WITHIN = 0.10


def shape_of(name: str) -> dict[str, Any]:
    given = dict(LLAMA[name])
    renamed = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    tied, head_dim = given.pop("tied", True), given["hidden_size"] // given["heads"]
    widths = {renamed.get(key, key): value for key, value in given.items()}
    return {**widths, "tie_word_embeddings": tied, "head_dim": head_dim, "max_position_embeddings": 8192}


T4 = {"name": "Tesla T4", "bf16": False, "capability": [7, 5]}

CASES: dict[str, tuple[str, str, int, int]] = {
    "1 B, LoRA, 16,384 tokens, 80 GB": ("1b", "lora", 16_384, 80),
    "8 B, LoRA, 8,192 tokens, 80 GB": ("8b", "lora", 8192, 80),
    "8 B, QLoRA, 2,048 tokens, 24 GB": ("8b", "qlora", 2048, 24),
    "8 B, QLoRA, 4,096 tokens, 24 GB": ("8b", "qlora", 4096, 24),
    "8 B, QLoRA, 8,192 tokens, 24 GB": ("8b", "qlora", 8192, 24),
    "1 B, LoRA in fp16, 4,096 tokens, 15 GB": ("1b", "lora", 4096, 15),
    "1 B, LoRA in fp16, 16,384 tokens, 15 GB": ("1b", "lora", 16_384, 15),
    "1 B, full in fp16, 2,048 tokens, 32 GB": ("1b", "full", 2048, 32),
    "1 B, LoRA in float32, 4,096 tokens, 24 GB": ("1b", "lora", 4096, 24),
}


TWO_STEPS = {"1 B, LoRA, 16,384 tokens, 80 GB", "1 B, full in fp16, 2,048 tokens, 32 GB"}
"""Where the second step, which holds the moments of the first, is looked at too: in full tuning they are most of the memory, and of an
adapter's, which are small, one case is enough."""
A_FEW = {
    "8 B, LoRA, 8,192 tokens, 80 GB",
    "8 B, QLoRA, 4,096 tokens, 24 GB",
    "1 B, full in fp16, 2,048 tokens, 32 GB",
    "1 B, LoRA in float32, 4,096 tokens, 24 GB",
}
"""What is run by `make test-all`; all others by `make test-faults`."""


def case_of(name: str) -> dict[str, Any]:
    shape, strategy, tokens, memory = CASES[name]
    return {
        "strategy": strategy,
        "precision": "fp32" if "float32" in name else "auto",
        "shape": shape_of(shape),
        "rows": tokens // 100,
        "words": 400,
        "run": {"max_tokens_per_step": tokens, "max_length": 1024},
        "card": {"memory": memory * GIB, **(T4 if "fp16" in name else {})},
        "steps": 2 if name in TWO_STEPS else 1,
    }


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in A_FEW else pytest.mark.fault) for name in CASES])
def test_the_peak_is_what_was_estimated(gpu: FakeGpu, name: str) -> None:
    """Within a tenth, and below the card's memory. The context, which no tensor holds, is left out of both."""
    _, _, tokens, memory = CASES[name]
    found = gpu.run(**case_of(name))
    assert found["started"]["precision"] == ("fp32" if "float32" in name else "fp16" if "fp16" in name else "bf16")
    spec = JobSpec.model_validate(found["spec"])
    machine = Machine(
        cores=2,
        memory_bytes=64 * GIB,
        gpu_name="A fake GPU",
        gpu_memory_bytes=memory * GIB,
        gpu_capability=7.5 if "fp16" in name else 9.0,
        bf16_pays=True,
    )
    assert pack_tokens(spec.run, found["longest"]) == tokens
    # Packs that are not filled up to one shape hold somewhat fewer tokens than they may.
    ran = (
        spec.run if found["frames"] else spec.run.model_copy(update={"max_tokens_per_step": max(step["tokens"] for step in found["steps"])})
    )
    parts = memory_of(spec.model.shape, spec.strategy, ran, found["longest"], machine, found["started"]["recomputed_layers"])
    estimated = sum(parts.model_dump().values()) - FLOOR_CUDA_BYTES
    peak = max(step["peak"] for step in found["steps"])
    print(f"{name}: {peak / GIB:.2f} GiB, estimated {estimated / GIB:.2f}, {found['started']['recomputed_layers']} layers recomputed")
    assert peak == pytest.approx(estimated, rel=WITHIN)
    assert peak + FLOOR_CUDA_BYTES < memory * GIB


@pytest.mark.long
def test_a_large_card_plays_a_small_one(gpu: FakeGpu) -> None:
    """The planner recomputes what it would on a card of 24 GB, and the allocator gives no more."""
    shape, run = shape_of("8b"), {"max_tokens_per_step": 4096, "max_length": 1024}
    job: dict[str, Any] = {"strategy": "qlora", "precision": "auto", "shape": shape, "rows": 40, "words": 400, "run": run, "steps": 0}
    large, small, plays = (
        gpu.run(**job, card={"memory": size * GIB}, **more) for size, more in ((80, {}), (24, {}), (80, {"gpu_memory": 24 * GIB}))
    )
    layers = [found["started"]["recomputed_layers"] for found in (large, small, plays)]
    assert layers[0] == 0 < layers[1] == layers[2]
    assert large["share"] is None and plays["share"] * 80 * GIB == pytest.approx(24 * GIB - FLOOR_CUDA_BYTES)
