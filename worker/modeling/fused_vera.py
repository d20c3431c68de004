"""Fused VeRA layers, replacing peft's forward. Same parameters, names and saved layout.

For a frozen weight W (N, K), the random matrices A (r, K) and B (N, r), sliced from matrices that all layers share, and the
trainable vectors d (r,) and b (N,) of a layer (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454, equation 2):

    forward    low = x Aᵀ,   y = x Wᵀ + (low · d) (b · B)ᵀ
    backward   g = dy (b · B),   dx = dy W + (g · d) A,   dd = Σ g · low,   db = Σ over r of B · (dyᵀ (low · d))

As in `worker/modeling/fused_lora.py` the correction is computed first and the large product is added to it, so that bf16 rounds
their sum. Only `low` is kept, and layers that read the same x share it, since A is the same for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.vera.layer import Linear as PeftVera

from worker.kernels.cpu.shared_projection import SharedProjection, SharedProjectionPart, siblings
from worker.modeling.fused_lora import ADAPTER, compute_type, joined_weight, plain_linear


class _Product(torch.autograd.Function):
    """x (T, K) and A (r, K), then for each of n layers W (N, K), bias (N,) or None, d (r,), b (N,), B (N, r); the result is (T, ΣN)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, across: torch.Tensor, joined: torch.Tensor | None, *tensors: Any) -> torch.Tensor:
        weights, biases, narrow, wide, ups = (tensors[i::5] for i in range(5))
        low = x @ across.to(x.dtype).t()
        parts = [
            _part(low * d.to(x.dtype), (b.unsqueeze(1) * up).to(x.dtype), bias)
            for d, b, up, bias in zip(narrow, wide, ups, biases, strict=True)
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if joined is not None:
            y.addmm_(x, joined.t())
        else:
            for part, weight in zip(y.split([w.shape[0] for w in weights], 1), weights, strict=True):
                part.addmm_(x, weight.to(x.dtype).t())
        ctx.joined, ctx.count = joined, len(weights)
        ctx.save_for_backward(low, across, *weights, *narrow, *wide, *ups)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        low, across, *rest = ctx.saved_tensors
        weights, narrow, wide, ups = (rest[i * ctx.count : (i + 1) * ctx.count] for i in range(4))
        parts = dy.split([w.shape[0] for w in weights], 1)
        d_low, found = torch.zeros_like(low), []
        for part, d, b, up in zip(parts, narrow, wide, ups, strict=True):
            back = part @ (b.unsqueeze(1) * up).to(dy.dtype)
            scaled = low * d.to(low.dtype)
            d_low.addcmul_(back, d.to(low.dtype))
            d_wide = ((part.t() @ scaled) * up).sum(1, dtype=torch.float32)
            found += [None, None, (back * low).sum(0, dtype=torch.float32).to(d.dtype), d_wide.to(b.dtype), None]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = d_low @ across.to(dy.dtype)
            if ctx.joined is not None:
                dx.addmm_(dy, ctx.joined)
            else:
                for part, weight in zip(parts, weights, strict=True):
                    dx.addmm_(part, weight.to(dy.dtype))
        return dx, None, None, *found


def _part(low: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return low @ up.t() if bias is None else torch.addmm(bias.to(low.dtype), low, up.t())


def product(x: torch.Tensor, layers: Sequence[Any], joined: torch.Tensor | None = None) -> torch.Tensor:
    """The outputs of `layers` for x (…, K), concatenated: (…, ΣN)."""
    compute = compute_type(x)
    across = layers[0].vera_A[ADAPTER][:, : x.shape[-1]]
    tensors: list[Any] = []
    for layer in layers:
        base = layer.base_layer
        rows = layer.vera_B[ADAPTER][: layer.out_features]
        tensors += [base.weight, base.bias, layer.vera_lambda_d[ADAPTER], layer.vera_lambda_b[ADAPTER], rows]
    if joined is not None and joined.dtype != compute:
        joined = None
    y = _Product.apply(x.reshape(-1, x.shape[-1]).to(compute), across, joined, *tensors)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Group(SharedProjection):
    """Layers that read the same input, their frozen weights views of one matrix."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers, layers[0].base_layer.weight.device)
        self.joined = joined_weight([layer.base_layer.weight for layer in layers])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.layers, self.joined)


class FusedVera(SharedProjectionPart, PeftVera):
    """Replaces the forward of peft's layer and nothing else."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        return self.group.take(self.place, x) if self.shares(x) else product(x, [self])


def fuse(model: torch.nn.Module, grouped: bool = True) -> int:
    """Give every plain VeRA layer of a peft model the fused forward. Returns the number of layers changed."""
    found = [m for m in model.modules() if type(m) is PeftVera and _plain(m)]
    for layer in found:
        layer.__class__ = FusedVera
    for layers in siblings(model, FusedVera) if grouped else ():
        _Group(layers)
    return len(found)


def _plain(layer: Any) -> bool:
    """One adapter, no dropout, on a frozen ordinary linear layer."""
    alone = list(layer.vera_lambda_b) == [ADAPTER] == layer.active_adapters
    return alone and isinstance(layer.vera_dropout[ADAPTER], torch.nn.Identity) and plain_linear(layer)
