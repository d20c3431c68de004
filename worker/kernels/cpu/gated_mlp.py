"""The gated activation of a feed-forward layer, act(gate) · up (Shazeer 2020, https://arxiv.org/abs/2002.05202), on a CPU in one
pass each way instead of two and five. Gate and up are kept for the backward pass, the activation is recomputed. Where gate and up
share one product (`worker/kernels/cpu/shared_projection.py`), their gradients are written into one tensor, so that nothing has to
be concatenated."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.activations import GELUTanh, SiLUActivation

from worker.kernels.cpu import jit
from worker.kernels.cpu.jit import KINDS, F, addresses, contiguous_rows, kernel, row_of, sigmoid, steps, to_bf16, to_f32

GATED = frozenset(
    f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite", "Gemma", "Gemma2", "Gemma3", "Olmo2")
)
"""Class names of layers whose forward is down_proj(act_fn(gate_proj(x)) · up_proj(x)) and nothing else."""


class Gate(NamedTuple):
    """Coefficients of an activation x · σ(linear · x + cubic · x³)."""

    linear: float
    cubic: float


SILU = Gate(1.0, 0.0)
GELU_TANH = Gate(2 * (2 / np.pi) ** 0.5, 2 * (2 / np.pi) ** 0.5 * 0.044715)
"""GELU, tanh approximation (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415): x/2 (1 + tanh z) equals x σ(2z)."""

ACTIVATIONS: dict[type, Gate] = {torch.nn.SiLU: SILU, SiLUActivation: SILU, GELUTanh: GELU_TANH}


def gate_of(layer: Any) -> Gate | None:
    """The activation of a gated layer; None where there is no kernel for it."""
    return ACTIVATIONS.get(type(layer.act_fn))


@kernel
def _forward(gate, up, y, kind, rows, width, gate_row, up_row, y_row, linear, cubic):
    c1, c3 = F(linear), F(cubic)
    for i in range(rows):
        G, U, Y = row_of(gate, i, gate_row, width, kind), row_of(up, i, up_row, width, kind), row_of(y, i, y_row, width, kind)
        for j in range(width):
            g = to_f32(G[j])
            Y[j] = to_bf16(g * sigmoid(g * (c1 + c3 * g * g)) * to_f32(U[j]), kind)


@kernel
def _backward(gate, up, dy, d_gate, d_up, y, kind, rows, width, gate_row, up_row, dy_row, d_row, y_row, linear, cubic):
    """Where `y` is not 0, the output of the forward pass is recomputed there."""
    c1, c3 = F(linear), F(cubic)
    for i in range(rows):
        G, U, D = row_of(gate, i, gate_row, width, kind), row_of(up, i, up_row, width, kind), row_of(dy, i, dy_row, width, kind)
        DG, DU = row_of(d_gate, i, d_row, width, kind), row_of(d_up, i, d_row, width, kind)
        for j in range(width):
            g, u, d = to_f32(G[j]), to_f32(U[j]), to_f32(D[j])
            square = c3 * g * g
            s = sigmoid(g * (c1 + square))
            DU[j] = to_bf16(d * g * s, kind)
            DG[j] = to_bf16(d * u * s * (F(1.0) + g * (F(1.0) - s) * (c1 + F(3.0) * square)), kind)
        if y != 0:
            Y = row_of(y, i, y_row, width, kind)
            for j in range(width):
                g = to_f32(G[j])
                Y[j] = to_bf16(g * sigmoid(g * (c1 + c3 * g * g)) * to_f32(U[j]), kind)


def gated(gate: torch.Tensor, up: torch.Tensor, act: Gate) -> torch.Tensor:
    """act(gate) · up for two tensors (…, I) of one dtype: (R, I) in that dtype. Raises ValueError when shapes or dtypes differ."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"a gate of {tuple(gate.shape)} in {gate.dtype} for {tuple(up.shape)} in {up.dtype}")
    gate, up = contiguous_rows(gate), contiguous_rows(up)
    y = torch.empty(gate.shape, dtype=gate.dtype)
    _forward(*addresses(gate, up, y), KINDS[gate.dtype], *gate.shape, *steps(gate, up, y), *act)
    return y


def gated_back(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, act: Gate, again: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of gate and up concatenated, (R, 2 I), from dy (R, I), the gradient of their product; with `again` also that
    product (R, I), recomputed, else None."""
    gate, up, dy = contiguous_rows(gate), contiguous_rows(up), contiguous_rows(dy)
    rows, width = gate.shape
    found = torch.empty(rows, 2 * width, dtype=gate.dtype)
    d_gate, d_up = found.chunk(2, 1)
    y = torch.empty(rows, width, dtype=gate.dtype) if again else None
    sizes = (rows, width, *steps(gate, up, dy, found, dy if y is None else y))
    _backward(*addresses(gate, up, dy, d_gate, d_up, y), KINDS[gate.dtype], *sizes, *act)
    return found, y


class _GatedActivation(torch.autograd.Function):
    """act(gate) · up, (R, I), of gate and up concatenated (R, 2 I), or of each (R, I)."""

    @staticmethod
    def forward(ctx: Any, act: Gate, *given: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*given)
        ctx.act = act
        return gated(*halves(given), act)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        given = ctx.saved_tensors
        both, _ = gated_back(*halves(given), dy, ctx.act)
        return (None, both) if len(given) == 1 else (None, *halves([both]))


def halves(given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(given) if len(given) == 2 else given[0].chunk(2, 1)


def gate_and_up(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Gate and up of x (…, K) as rows: one tensor (R, 2 I) where they share a product, else two (R, I)."""
    gate, up = layer.gate_proj, layer.up_proj
    group: Any = getattr(gate, "group", None)
    shared = group is not None and group is getattr(up, "group", None) and gate.shares(x)
    found = [group.product(x)] if shared else [gate(x), up(x)]
    return [one.view(-1, one.shape[-1]) for one in found]


def _feed_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    act = gate_of(self)
    given = gate_and_up(self, x)
    if act is None or not jit.supports(*given) or len({one.dtype for one in given}) > 1:
        gate, up = halves(given)
        inner = self.act_fn(gate) * up
    else:
        inner = _GatedActivation.apply(act, *given)
    return self.down_proj(inner.view(*x.shape[:-1], inner.shape[-1]))


@functools.cache
def _in_one_pass(kind: type) -> type:
    return type(kind.__name__, (kind,), {"forward": _feed_forward, "plain": kind})


def patch_gated_mlp(model: torch.nn.Module) -> int:
    """Have a model's gated feed-forward layers use the kernel. Returns the number of layers changed."""
    found = [m for m in model.modules() if type(m).__name__ in GATED and not hasattr(type(m), "plain") and gate_of(m)]
    for module in found:
        module.__class__ = _in_one_pass(type(module))  # type: ignore[arg-type]  # a class is hashable
    return len(found)
