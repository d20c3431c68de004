"""Float32 linear layers for generation on a CPU, where a step has one row for each answer being generated.

Between one row and some dozens MKL, which torch uses for float32 products, loses half of its speed (all products of a step of a
model of 135 M, milliseconds on two cores with AMX, at 1, 3, 4, 8, 11, 16 and 32 rows: 30, 35, 49, 59, 68, 56, 66); oneDNN takes
36, 44, 44, 48, 52, 52, 63 with the same weights. So a layer uses one or the other by its number of rows, where a measurement
shows that it pays on this machine. Layers that read the same input share one product, because the threads synchronize at every
product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from worker import kernels
from worker.kernels.cpu.shared_projection import SharedProjection, siblings

FEW = range(4, 49)
"""Numbers of rows for which oneDNN is used."""
WORTHWHILE = 1.05


class _Group(SharedProjection):
    """Layers that read the same input; their weights become views of one matrix, so that the shared product takes no extra memory."""

    def __init__(self, layers: list[SmallBatchLinear]) -> None:
        super().__init__(layers, layers[0].weight.device)
        self.joined = torch.cat([layer.weight.detach() for layer in layers])
        for layer, part in zip(layers, self.joined.split(self.widths), strict=True):
            layer.weight.data = part
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = torch.cat([bias.detach() for bias in biases]) if biases else None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.joined, self.bias)


class SmallBatchLinear(torch.nn.Linear):
    """An existing nn.Linear is converted by changing its class."""

    group: _Group | None = None
    place = 0  # in the group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias) if self.group is None else self.group.take(self.place, x)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (…, K) Wᵀ + b: (…, N)."""
    rows = x.numel() // x.shape[-1]
    if rows not in FEW or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _onednn(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], -1)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def patch_small_batch(model: torch.nn.Module, join: bool) -> int:
    """Have a model's plain float32 linear layers on a CPU use oneDNN for few rows, where it pays; with `join`, which moves
    weights, also share products. Returns the number of layers changed. For inference only: with gradients enabled F.linear is
    used."""
    found = [m for m in model.modules() if type(m) is torch.nn.Linear and m.weight.dtype == torch.float32 and m.weight.device.type == "cpu"]
    if not found or not kernels.allowed() or not pays_here():
        return 0
    for layer in found:
        layer.__class__ = SmallBatchLinear
    for layers in siblings(model, SmallBatchLinear) if join else ():
        _Group(layers)
    return len(found)


@cache
@torch.inference_mode()
def pays_here() -> bool:
    """Whether oneDNN is faster at eight rows on this machine: the best of twelve alternating runs of each. False where torch has
    no oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.ones(8, 576), torch.ones(3072, 576)
    ways: list[Callable[..., torch.Tensor]] = [F.linear, _onednn]
    best = [float("inf")] * 2
    for _ in range(12):
        for place, way in enumerate(ways):
            began = time.perf_counter()
            way(x, weight, None)
            best[place] = min(best[place], time.perf_counter() - began)
    return best[0] >= WORTHWHILE * best[1]
