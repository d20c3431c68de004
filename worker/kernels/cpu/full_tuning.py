"""Full fine-tuning on a CPU: layers whose own weights are trained, with bf16 copies and gradient buffers shared by all parts of a
pack.

For a weight W (N, K), kept in float32, and its copy w rounded to the dtype of the products:

    forward    y  = x wᵀ + b
    backward   dx = dy w,   W.grad += dyᵀ x

Autocast would round W again for every pass, and autograd would convert each pass's gradient to float32 before adding it. Here w
is made once per step, and a product is added to the gradient as it comes. Layers that read the same x (q, k and v; gate and up)
share one product. Of the embedding only the rows that were read have a gradient: their gradients are collected and added when all
parts are done, instead of a dense matrix of the embedding's size per part. A gated feed-forward layer, down(act(gate) · up),
keeps only gate and up and recomputes the input of its last product (Chen et al. 2016, Training Deep Nets with Sublinear Memory
Cost, https://arxiv.org/abs/1604.06174).

Each part has gradient buffers of its own (`worker/kernels/cpu/gradient_buffers.py`), or the parts' gradients are added in the
order of the parts (`worker/runtime/thread_parallel.py`), so a step is bitwise reproducible. (Float32 master weights with rounded
copies: Micikevicius et al. 2018, Mixed Precision Training, https://arxiv.org/abs/1710.03740, section 3.1.)
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F

from worker.kernels.cpu import jit
from worker.kernels.cpu.gated_mlp import GATED, Gate, gate_and_up, gate_of, gated, gated_back, halves
from worker.kernels.cpu.gradient_buffers import GradientBuffers, MasterWeight, leave
from worker.kernels.cpu.shared_projection import SharedProjection, siblings
from worker.runtime.device import Compute
from worker.runtime.thread_parallel import ThreadParallel


def release_memory(wholes: Sequence[MasterWeight]) -> None:
    """Release the gradients and their buffers, when no step follows."""
    for whole in wholes:
        whole.weight.grad = whole.memory = None
        whole.buffers.tensors = []
    leave(wholes)


def add_parts(wholes: Sequence[MasterWeight]) -> None:
    """Add the gradients that the parts kept, when all parts of a pack are done."""
    for whole in wholes:
        whole.add_parts()


def move(wholes: Sequence[MasterWeight], abreast: ThreadParallel) -> None:
    """Refresh the rounded copies of the weights that the optimizer updated from `weight.grad`, on all threads."""
    used = [whole for whole in wholes if whole.copy is not None and whole.weight.grad is not None]
    for whole in used:
        whole.moved()
    abreast.map(lambda own: [whole.rounded() for whole in own], [used[i :: abreast.threads] for i in range(abreast.threads)])


class _Product(torch.autograd.Function):
    """x (T, K) times the concatenated weights `joined` (ΣN, K) of n layers, plus their biases: (T, ΣN)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, joined: torch.Tensor, buffers: GradientBuffers, bias: torch.Tensor | None, *weights: Any) -> Any:
        ctx.save_for_backward(x)
        ctx.joined, ctx.buffers, ctx.count = joined, buffers, len(weights)
        return F.linear(x, joined, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        dx = dy @ ctx.joined if ctx.needs_input_grad[0] else None
        ctx.buffers.take(dy, x)
        return (dx, None, None, dy.sum(0) if ctx.needs_input_grad[3] else None, *[None] * ctx.count)


class _Group(SharedProjection):
    """Layers that read the same input; their rounded weights are one matrix."""

    def __init__(self, layers: list[FullLinear]) -> None:
        super().__init__(layers, layers[0].weight.device)
        self.wholes = [_whole(layer) for layer in layers]
        self.joined = torch.empty(sum(self.widths), layers[0].in_features, dtype=self.wholes[0].kind)
        for whole, part in zip(self.wholes, self.joined.split(self.widths), strict=True):
            whole.copy = part
        GradientBuffers(self.wholes)  # registers itself with each of them

    def product(self, x: torch.Tensor) -> torch.Tensor:
        for whole in self.wholes:
            whole.rounded()
        return product(x, self.layers, self.joined)


def product(x: torch.Tensor, layers: Sequence[FullLinear], joined: torch.Tensor) -> torch.Tensor:
    """The outputs of `layers` for x (…, K), concatenated: (…, ΣN)."""
    flat = x.reshape(-1, x.shape[-1]).to(joined.dtype)
    biases = [layer.bias.to(joined.dtype) for layer in layers if layer.bias is not None]
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
    # The weights themselves are arguments so that autograd calls backward even where x needs no gradient.
    y = _Product.apply(flat, joined, _whole(layers[0]).buffers, bias, *(layer.weight for layer in layers))
    return y.view(*x.shape[:-1], y.shape[-1])


class FullLinear(torch.nn.Linear):
    """A linear layer whose weight is a `MasterWeight`. An existing nn.Linear is converted by changing its class."""

    group: _Group | None = None
    place = 0  # in the group

    @property
    def keeper(self) -> MasterWeight:
        """Who keeps the weight and takes its gradient, for a loss that multiplies by it outside of this layer."""
        return _whole(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.group is not None and self.shares(x):
            return self.group.take(self.place, x)
        if _kind(x) != _whole(self).kind:
            return super().forward(x)
        return product(x, [self], _whole(self).rounded())

    def shares(self, x: torch.Tensor) -> bool:
        """Whether x is multiplied by the whole group in one product."""
        return self.group is not None and _kind(x) == _whole(self).kind


def _whole(layer: FullLinear | FullEmbedding) -> MasterWeight:
    return layer.weight.whole  # type: ignore[attr-defined]  # `MasterWeight` sets it


def _kind(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _Gated(torch.autograd.Function):
    """(act(gate) · up) wᵀ + b for gate and up (T, I), or both concatenated (T, 2 I). `act` is an elementwise function, or a
    `Gate` where there is a kernel. The weight is an argument for the reason given in `product`."""

    @staticmethod
    def forward(ctx: Any, act: Any, whole: MasterWeight, bias: torch.Tensor | None, _: Any, *given: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*given)
        ctx.act, ctx.whole, ctx.copy = act, whole, whole.rounded()
        gate, up = halves(given)
        return F.linear(gated(gate, up, act) if isinstance(act, Gate) else act(gate).mul_(up), ctx.copy, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        given = ctx.saved_tensors
        gate, up = halves(given)
        d_bias = dy.sum(0) if ctx.needs_input_grad[2] else None
        if isinstance(ctx.act, Gate):
            both, inner = gated_back(gate, up, dy @ ctx.copy, ctx.act, again=True)
            assert inner is not None
            ctx.whole.buffers.take(dy, inner)
            return (None, None, d_bias, None, *((both,) if len(given) == 1 else halves([both])))
        with torch.enable_grad():
            source = gate.detach().requires_grad_()
            active = ctx.act(source)
        lit = active.detach()
        ctx.whole.buffers.take(dy, lit * up)
        d_inner = dy @ ctx.copy
        (d_gate,) = torch.autograd.grad(active, source, d_inner * up)
        d_up = d_inner.mul_(lit)
        return (None, None, d_bias, None, *((torch.cat([d_gate, d_up], 1),) if len(given) == 1 else (d_gate, d_up)))


@functools.cache
def _lean(kind: type[torch.nn.Module]) -> type:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        down = self.down_proj
        if _kind(x) != down.weight.whole.kind:
            return kind.forward(self, x)
        given, kernel = gate_and_up(self, x), gate_of(self)
        bias = None if down.bias is None else down.bias.to(given[0].dtype)
        act = kernel if kernel is not None and jit.supports(*given) else self.act_fn
        return _Gated.apply(act, down.weight.whole, bias, down.weight, *given).view(*x.shape[:-1], down.out_features)

    return type(kind.__name__, (kind,), {"forward": forward})


class _Rows(torch.autograd.Function):
    """Rows (…) of an embedding (V, H): (…, H). The backward pass collects the gradients of the rows that were read."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.nn.Parameter, whole: MasterWeight, unmoved: int | None) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.whole, ctx.unmoved = whole, unmoved
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, gradients = ctx.saved_tensors[0].reshape(-1), gradient.reshape(-1, gradient.shape[-1])
        if ctx.unmoved is not None:
            moved = rows != ctx.unmoved
            rows, gradients = rows[moved], gradients[moved]
        ctx.whole.read.append((ctx.whole.abreast.place(), rows, gradients))
        return None, None, None, None


class FullEmbedding(torch.nn.Embedding):
    """An embedding whose weight is a `MasterWeight`."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return _Rows.apply(rows, self.weight, _whole(self), self.padding_idx)


def _plain_table(module: torch.nn.Module) -> TypeGuard[torch.nn.Embedding]:
    return type(module) is torch.nn.Embedding and not (module.max_norm or module.scale_grad_by_freq or module.sparse)


def patch_full_tuning(model: torch.nn.Module, engine: Compute) -> list[MasterWeight]:
    """Convert a model's plain trainable linear layers, its head and its embedding to the classes above. Returns their master
    weights, whose kept gradients have to be added after each `map` of parts. The head is left as it is where its weight is shared
    with another kind of module."""
    plain = [m for m in model.modules() if type(m) is torch.nn.Linear or _plain_table(m)]
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    known = Counter(id(module.weight) for module in plain)
    ours = [m for m in plain if m.weight.requires_grad and users[id(m.weight)] == known[id(m.weight)]]
    wholes: dict[int, MasterWeight] = {}
    for module in ours:
        if id(module.weight) not in wholes:
            wholes[id(module.weight)] = MasterWeight(cast("torch.nn.Parameter", module.weight), engine.compute, engine.abreast)
        wholes[id(module.weight)].multiplies |= isinstance(module, torch.nn.Linear)
        module.__class__ = FullEmbedding if isinstance(module, torch.nn.Embedding) else FullLinear
    if engine.compute != torch.float32:
        for layers in siblings(model, FullLinear):
            if all(users[id(layer.weight)] == 1 for layer in layers):  # a rounded copy can be a part of one matrix only
                _Group(layers)
    for block in list(model.modules()):
        if type(block).__name__ in GATED and type(block.down_proj) is FullLinear and not block.down_proj._forward_hooks:
            block.__class__ = _lean(type(block))  # type: ignore[arg-type]  # a class is hashable
    return list(wholes.values())
