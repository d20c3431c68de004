"""Memory of fine-tuning before there is a model: parameters × precision × method, by the formulas of the estimate. Pure."""

from __future__ import annotations

from typing import NamedTuple

from app.languages import mark
from app.machines.hardware import Machine
from app.planning import memory as memory_estimate
from app.run_settings import RunSettings
from app.shapes import Shape
from app.strategies import STRATEGIES, Strategy

BITS = (32, 16, 8, 4)
LEAST, MOST = 0.01, 2000
"""Range of parameters, in billions."""
ASPECT, VOCABULARY = 128, 50_000
"""Width over depth of the decoder assumed for a number of parameters, and its vocabulary: 175 B is then 12,288 wide with 96 layers."""
GPU = Machine(cores=8, memory_bytes=2**50, gpu_memory_bytes=2**50, gpu_capability=9.0, bf16_pays=True)
"""A GPU that everything fits into, so that nothing is recomputed to save memory."""


class MemoryRow(NamedTuple):
    """Bytes for each of `BITS`; None where the method does not support a base of that precision."""

    title: str
    strategy: str | None
    trainable: int
    bytes: tuple[int | None, ...]


def shape_for(billions: float) -> Shape:
    """A typical decoder of about this many parameters: an MLP of four times the width, heads of 64 or 128."""
    wanted = billions * 1e9
    hidden = max(128, round((wanted * ASPECT / 12) ** (1 / 3) / 128) * 128)
    layers = max(1, round((wanted - VOCABULARY * hidden) / (12 * hidden**2)))
    head = 128 if hidden >= 2048 else 64
    return Shape(
        model_type="llama", architecture="decoder", layers=layers, hidden=hidden, intermediate=4 * hidden, heads=hidden // head,
        kv_heads=hidden // head, head_dim=head, vocabulary=VOCABULARY, positions=8192, tied=True, gated=False,
    )  # fmt: skip


def table(shape: Shape, tokens: int) -> list[MemoryRow]:
    """The weights alone, then the first method of each family that a decoder supports, the cheapest last."""
    weights = MemoryRow(mark("Weights only (inference)"), None, 0, tuple(shape.parameters() * bits // 8 for bits in BITS))
    first: dict[str, Strategy] = {}
    for cls in STRATEGIES.values():
        if cls().unavailable(shape, task=cls.tasks[0], cuda=True) is None:
            first.setdefault(cls.family, cls())
    rows = [_row(strategy, shape, tokens) for strategy in first.values()]
    return [weights, *sorted(rows, key=lambda row: -(row.bytes[1] or 0))]


def _row(strategy: Strategy, shape: Shape, tokens: int) -> MemoryRow:
    found = tuple(_bytes(strategy, shape, tokens, bits) for bits in BITS)
    return MemoryRow(strategy.title, strategy.name, strategy.trainable(shape), found)


def _bytes(strategy: Strategy, shape: Shape, tokens: int, bits: int) -> int | None:
    """Peak bytes at a step of `tokens`. Trained weights always have 32 bits; 8 and 4 are for frozen ones."""
    run = RunSettings(precision="fp32" if bits == 32 else "bf16", max_tokens_per_step=tokens, max_length=tokens)
    task = strategy.tasks[0]
    if bits == 8:
        if not strategy.takes_fp8:
            return None
        run = run.model_copy(update={"frozen_weights": "fp8"})
    if bits == 4:
        squeezed = next((cls for cls in STRATEGIES.values() if cls.base_bits == 4 and cls.family == strategy.family), None)
        if squeezed is None:
            return None
        strategy = squeezed()
    if type(strategy).recipe == "features":
        parts = memory_estimate.features_memory(shape, strategy, run, tokens, 1000, tokens, GPU)
    else:
        parts = memory_estimate.memory_of(shape, strategy, run, tokens, GPU, 0, task)
    return parts.total
