"""Fused layers for LoRA and its variants, replacing peft's forward. Same parameters, names and saved layout.

For a frozen weight W (N, K) and the correction s · B · A, with A (r, K) and B (N, r) kept in float32:

    forward    y  = x Wᵀ + s (x Aᵀ) Bᵀ
    backward   dx = dy W + s (dy B) A,   dA = s (dy B)ᵀ x,   dB = s dyᵀ (x Aᵀ)

All products run in the dtype of x. The low-rank product is computed first and the large one is added to it within the matrix
product, which accumulates in float32: a correction far below the last bit of a bf16 result still influences its rounding. peft
adds it to a rounded value, so most of a small correction is lost (as it is here next to fp8 weights, whose product comes
rounded). Only x and x Aᵀ are kept for the backward pass; layers that read the same x (q, k and v; gate and up) share one product,
and where x needs no gradient none is computed. (Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685, section 4.1; the joint
products follow the idea of Unsloth's and NeMo's kernels.)

In PiSSA and AdaLoRA, A and B are computed from more than one trainable tensor (`_correction`); DoRA rescales the rows of the
output (`worker/modeling/fused_dora.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch.optim.optimizer import register_optimizer_step_post_hook

from app.strategies.pissa import whole_correction
from worker import kernels
from worker.kernels.cpu import lora_products
from worker.kernels.cpu.lora_step import LoraLayerState, LoraOptimizer
from worker.kernels.cpu.lora_step import Product as FactorProduct
from worker.kernels.cpu.shared_projection import SharedProjection, SharedProjectionPart, siblings
from worker.kernels.gpu import fp8, nf4
from worker.kernels.gpu.sum_of_products import sum_of_products
from worker.modeling import fused_dora
from worker.runtime.device import Compute

ADAPTER = "default"


class Fp8Weight(NamedTuple):
    """A frozen weight of one layer or of several concatenated, (ΣN, K) in e4m3, and its row scales (ΣN, 1); see
    `worker/kernels/gpu/fp8.py`."""

    weight: torch.Tensor
    scale: torch.Tensor


class _Rounded(NamedTuple):
    """The trainable factors in the dtype of the products: A of all layers of a product, (Σr, K), and s B of each, (N, r)."""

    down: torch.Tensor
    ups: tuple[torch.Tensor, ...]
    lifts: torch.Tensor | None  # all s Bᵀ as diagonal blocks, (Σr, ΣN); None in the backward pass


class _Product(torch.autograd.Function):
    """x (T, K), then for each of n layers W (N, K), bias (N,) or None, A (r, K), B (N, r); the result is one (T, ΣN)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        joined: torch.Tensor | Fp8Weight | None,
        scales: tuple,
        states: tuple,
        rounded: _Rounded | None,
        *tensors: Any,
    ) -> torch.Tensor:
        weights, biases, downs, ups = (tensors[i::4] for i in range(4))
        ctx.rounded, rounded = rounded, rounded or _round(downs, ups, scales, x.dtype)
        low = lora_products.project(x, rounded.down) if lora_products.supports(x, rounded.down) else x @ rounded.down.t()  # (T, Σr)
        assert rounded.lifts is not None  # always set in the forward pass
        # The low-rank product first: the large one is then added inside a product that accumulates in float32.
        bias = None if biases[0] is None else _joined_bias(biases, x.dtype)
        dense = _dense(joined, weights, states, x.dtype)
        if dense is not None:
            y = _sum(low, rounded.lifts, x, dense.t(), bias)
        else:
            y = _first(low, rounded.lifts, bias)
            if isinstance(joined, Fp8Weight):
                y += fp8.product(x, *joined)
            else:
                own = [y] if len(weights) == 1 else y.split([up.shape[0] for up in ups], 1)
                for part, weight, state in zip(own, weights, states, strict=True):
                    if state is not None:
                        nf4.add_product(part, x, weight, nf4.tables(state), nf4.sizes(state), state.quant_type)
                    else:
                        part.addmm_(x, weight.to(x.dtype).t())
        ctx.scales, ctx.states, ctx.joined = scales, states, joined
        ctx.save_for_backward(x, low, *weights, *downs, *ups)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, low, *rest = ctx.saved_tensors
        count = len(ctx.scales)
        weights, downs, ups = rest[:count], rest[count : 2 * count], rest[2 * count :]
        # Where the rounded factors are not cached they are rounded again, which costs less memory than keeping them.
        rounded = ctx.rounded or _round(downs, ups, ctx.scales, dy.dtype, back=True)
        parts, lows = dy.split([up.shape[0] for up in ups], 1), low.split([up.shape[1] for up in ups], 1)
        in_tiles = lora_products.supports(x, *parts)
        if in_tiles:  # (T, Σr): dy B of each layer, and the gradients of B
            joined = torch.empty(dy.shape[0], low.shape[1], dtype=dy.dtype)
            backs = joined.split([up.shape[1] for up in ups], 1)
            d_ups = [lora_products.both(*given) for given in zip(parts, rounded.ups, lows, backs, ctx.scales, strict=True)]
        else:
            back = [part @ up for part, up in zip(parts, rounded.ups, strict=True)]
            joined = back[0] if count == 1 else torch.cat(back, 1)
            turned = [own.t() @ part for own, part in zip(lows, parts, strict=True)]
            d_ups = [
                d_up.t().to(up.dtype, memory_format=torch.contiguous_format).mul_(scale)
                for d_up, up, scale in zip(turned, ups, ctx.scales, strict=True)
            ]
        dx = None
        if ctx.needs_input_grad[0]:
            dense = _dense(ctx.joined, weights, ctx.states, dy.dtype)
            if dense is not None:
                dx = _sum(joined, rounded.down, dy, dense)
            else:
                dx = joined @ rounded.down
                if isinstance(ctx.joined, Fp8Weight):
                    dx += fp8.product_back(dy, *ctx.joined)
                else:
                    for part, weight, state in zip(parts, weights, ctx.states, strict=True):
                        if state is not None:
                            nf4.add_product_back(dx, part, weight, nf4.tables(state), nf4.sizes(state), state.quant_type)
                        else:
                            dx.addmm_(part, weight.to(dy.dtype))
        d_down_all = lora_products.gather(x, joined) if in_tiles else joined.t() @ x
        found: list[Any] = []
        d_downs = d_down_all.split([down.shape[0] for down in downs])
        for up, down, d_up, d_down in zip(ups, downs, d_ups, d_downs, strict=True):
            found += [None, None, _as(d_down, down.dtype), _as(d_up, up.dtype)]
        return dx, None, None, None, None, *found


def _dense(
    joined: torch.Tensor | Fp8Weight | None, weights: Sequence[torch.Tensor], states: Sequence[Any], dtype: torch.dtype
) -> torch.Tensor | None:
    """The frozen weight (ΣN, K) of a product, where it is one matrix of floats."""
    if isinstance(joined, torch.Tensor):
        return joined
    return weights[0].to(dtype) if joined is None and len(weights) == 1 and states[0] is None else None


def _first(low: torch.Tensor, lifts: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return low @ lifts if bias is None else torch.addmm(bias, low, lifts)


def _sum(low: torch.Tensor, lifts: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """low (T, R) lifts (R, N) + x (T, K) weight (K, N) + bias (N,)."""
    if torch.compiler.is_compiling():
        return sum_of_products(low, lifts, x, weight, bias)
    return _first(low, lifts, bias).addmm_(x, weight)


def _as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in a dtype. Checked here rather than by `x.to`, because each torch call hands the GIL to another part's thread."""
    return x if x.dtype == dtype else x.to(dtype)


def _joined_bias(biases: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    return biases[0].to(dtype) if len(biases) == 1 else torch.cat([bias.to(dtype) for bias in biases])


def _round(
    downs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], scales: Sequence[float], dtype: torch.dtype, back: bool = False
) -> _Rounded:
    down = downs[0].to(dtype) if len(downs) == 1 else torch.cat([a.to(dtype) for a in downs])
    found = tuple((up * scale).to(dtype).contiguous() for up, scale in zip(ups, scales, strict=True))
    if back:
        return _Rounded(down.contiguous(), found, None)
    turned = [up.t() for up in found]
    return _Rounded(down.contiguous(), found, turned[0] if len(turned) == 1 else torch.block_diag(*turned))


_steps = 0


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


# A fused optimizer does not bump a tensor's version.
register_optimizer_step_post_hook(_count)


@torch.no_grad()
def _kept(layer: Any, downs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], scales: Sequence[float], dtype: torch.dtype) -> _Rounded:
    """The result of `_round`, computed once per step for all parts of a pack and both passes, and cached on the first layer of a
    product."""
    # Changes with every optimizer step and every in-place change of a factor.
    stands_at = (_steps, dtype, *scales, *((x.data_ptr(), x._version) for x in (*downs, *ups)))
    kept = layer.kept
    if kept is None or kept[0] != stands_at:
        kept = layer.kept = stands_at, _round(downs, ups, scales, dtype)
    return kept[1]


class _Group(SharedProjection):
    """Layers that read the same input. Their frozen weights become views of one matrix, so that the shared product takes no extra
    memory."""

    def __init__(self, layers: list[Any]) -> None:
        weights = [layer.base_layer.weight for layer in layers]
        super().__init__(layers, weights[0].device)
        self.own: LoraLayerState | None = None
        self.joined: torch.Tensor | Fp8Weight | None = joined_weight(weights)
        if self.joined is not None and weights[0].dtype == fp8.KIND:
            self.joined = Fp8Weight(self.joined, torch.cat([layer.base_layer.scale for layer in layers]))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.layers, self.joined, self.own)


def joined_weight(weights: list[torch.Tensor]) -> torch.Tensor | None:
    """Make frozen weights (N, K) views of one matrix (ΣN, K), which is returned; None unless they are floats of one dtype."""
    if not all(w.dtype == weights[0].dtype and w.is_floating_point() for w in weights):
        return None
    joined = torch.cat([w.detach() for w in weights])
    for weight, part in zip(weights, joined.split([w.shape[0] for w in weights]), strict=True):
        weight.data = part
    return joined


def product(
    x: torch.Tensor, layers: Sequence[Any], joined: torch.Tensor | Fp8Weight | None = None, own: LoraLayerState | None = None
) -> torch.Tensor:
    """The outputs of `layers` for x (…, K), concatenated: (…, ΣN). Several fp8 layers come with their weights `joined`; `own` is
    their kernel state, where there is one (`keep`)."""
    compute = compute_type(x)
    x = _as(x, compute)
    y = FactorProduct.apply(x, own, own.downs[0]) if own is not None and own.supports(x) else _product(x, layers, joined)
    if hasattr(layers[0], "squares"):  # DoRA: the magnitude does not scale the bias
        rows = [layer.row_norms(*_correction(layer, compute)) for layer in layers]
        y = fused_dora.apply_magnitude(
            y.view(-1, y.shape[-1]), [layer.lora_magnitude_vector[ADAPTER].weight for layer in layers], rows
        ).view(y.shape)
        if layers[0].base_layer.bias is not None:
            y = y + _joined_bias(tuple(layer.base_layer.bias for layer in layers), compute)
    return y


def _product(x: torch.Tensor, layers: Sequence[Any], joined: torch.Tensor | Fp8Weight | None) -> torch.Tensor:
    compute, stretched = x.dtype, hasattr(layers[0], "squares")
    tensors: list[Any] = []
    scales: list[float] = []
    for layer in layers:
        down, up, scale = _correction(layer, compute)
        base = layer.base_layer
        tensors += [base.weight, None if stretched else base.bias, down, up]
        scales.append(scale)
    if layers[0].base_layer.weight.dtype == fp8.KIND:
        joined = joined or Fp8Weight(layers[0].base_layer.weight, layers[0].base_layer.scale)
    elif isinstance(joined, torch.Tensor) and joined.dtype != compute:
        joined = None
    states = tuple(getattr(layer.base_layer.weight, "quant_state", None) for layer in layers)
    kept = None
    if x.device.type == "cpu" and not _recomputes_factors(layers[0]) and not torch.compiler.is_compiling():
        kept = _kept(layers[0], tensors[2::4], tensors[3::4], scales, compute)
    y = _Product.apply(x.reshape(-1, x.shape[-1]), joined, tuple(scales), states, kept, *tensors)
    return y.view(*x.shape[:-1], y.shape[-1])


def _correction(layer: Any, compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (r, K), B (N, r) and s of a layer. PiSSA's have twice the rank and are recomputed in each pass, with s in B: they are
    kept for the backward pass in the products' dtype. So is AdaLoRA's A, which includes its singular values and s, so that no
    device is synchronized to read s."""
    scale = layer.scaling[ADAPTER]
    if isinstance(layer, SVDLinear):
        values = layer.lora_E[ADAPTER] * (scale / (layer.ranknum[ADAPTER] + 1e-5))
        up: torch.Tensor = layer.lora_B[ADAPTER]  # type: ignore[assignment]  # AdaLoRA's are parameters
        return (layer.lora_A[ADAPTER] * values).to(compute), up, 1.0
    if not _recomputes_factors(layer):
        return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, scale
    down, up = whole_correction(layer)
    return down.to(compute), (up * scale).to(compute), 1.0


def _recomputes_factors(layer: Any) -> bool:
    """Whether A and B are computed from other tensors in each pass."""
    return isinstance(layer, SVDLinear) or hasattr(layer, "first_down")


def compute_type(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class Fused(SharedProjectionPart):
    """Replaces the forward of peft's layer and nothing else. An existing layer is converted by changing its class."""

    kept: tuple[tuple, _Rounded] | None = None
    own: LoraLayerState | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or args or kwargs:  # type: ignore[attr-defined]  # of the layer of peft's beside it
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # of the layer of peft's beside it
        return self.group.take(self.place, x) if self.shares(x) else product(x, [self], None, self.own)


class FusedLora(Fused, PeftLinear):
    """LoRA on an unquantized base. With DoRA it has `squares`, the squared norms of the frozen rows."""

    kept_norms: tuple[tuple[int, int], torch.Tensor] | None = None
    squares: torch.Tensor

    def row_norms(self, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
        """DoRA's row norms. They are cached while nothing is trained: computing them costs more than generating one token."""
        if self.training:
            return fused_dora.row_norms(cast("torch.nn.Linear", self.base_layer).weight, self.squares, down, up, scale)
        of = down._version, up._version
        if self.kept_norms is None or self.kept_norms[0] != of:
            self.kept_norms = of, fused_dora.row_norms(cast("torch.nn.Linear", self.base_layer).weight, self.squares, down, up, scale)
        return self.kept_norms[1]

    def train(self, mode: bool = True) -> FusedLora:
        self.kept_norms = None  # a fused optimizer does not bump a tensor's version
        return super().train(mode)


class FusedAdaLora(Fused, SVDLinear):
    """AdaLoRA: singular values in addition to A and B."""


@functools.cache
def _fused_4bit(kind: type) -> type:
    """The class for a base in 4 bits; peft has its counterpart only where bitsandbytes is installed."""
    return type("FusedLora4bit", (Fused, kind), {})


def fuse(model: torch.nn.Module, grouped: bool = True) -> int:
    """Give every plain layer of LoRA or a variant the fused forward. Returns the number of layers changed; the others stay peft's."""
    found = _take([m for m in model.modules() if _plain(m)])
    if grouped:
        for layers in siblings(model, Fused):
            _Group(layers)
    return len(found)


def fuse_dora(model: torch.nn.Module) -> int:
    """The same for DoRA's layers alone, where answers are written: peft makes whole weights for every token of them. Frozen weights,
    which other models may share, stay where they are."""
    if not kernels.allowed():
        return 0
    return len(_take([m for m in model.modules() if ADAPTER in getattr(m, "lora_variant", ()) and _plain(m)]))


def _take(layers: list[Any]) -> list[Any]:
    for layer in layers:
        if hasattr(layer, "takes_first_off"):
            layer.takes_first_off.remove()
        if ADAPTER in getattr(layer, "lora_variant", ()):
            layer.register_buffer("squares", fused_dora.squares(layer.base_layer.weight), persistent=False)
        fused: dict[type, type] = {PeftLinear: FusedLora, SVDLinear: FusedAdaLora}
        layer.__class__ = fused.get(type(layer)) or _fused_4bit(type(layer))  # type: ignore[arg-type]  # a class is hashable
    return layers


def keep(model: torch.nn.Module, parts: int, engine: Compute, optimizer: torch.optim.Optimizer) -> LoraOptimizer | None:
    """Have the layers of a model that trains with packs in `parts` parts computed as `worker/kernels/cpu/lora_step.py` says, where they can be; None
    where none can. The optimizer is AdamW. Until `LoraOptimizer.release` nothing else may change their A and B."""
    layers = [m for m in model.modules() if type(m) is FusedLora and not _recomputes_factors(m)]
    places = {id(place): place for place in (layer.group or layer for layer in layers)}
    found = [place for place in places.values() if _keep(place, engine, parts)]
    return LoraOptimizer(found, optimizer, engine.abreast) if found else None


def _keep(place: _Group | FusedLora, engine: Compute, parts: int) -> bool:
    layers = place.layers if isinstance(place, _Group) else [place]
    weight = place.joined if isinstance(place, _Group) else place.base_layer.weight
    downs, ups, scales = zip(*(_correction(layer, engine.compute) for layer in layers), strict=True)
    learns = all(x.requires_grad and x.dtype == torch.float32 and x.is_contiguous() for x in (*downs, *ups))
    if not learns or not isinstance(weight, torch.Tensor) or weight.dtype != engine.compute:
        return False
    biases: tuple[Any, ...] = tuple(layer.base_layer.bias for layer in layers)
    bias = None if biases[0] is None or hasattr(layers[0], "squares") else _joined_bias(biases, engine.compute)
    if lora_products.supports_sizes(weight.shape[1], [up.shape[0] for up in ups]):
        place.own = LoraLayerState(downs, ups, scales, weight.detach(), bias, engine.abreast, parts)
    return place.own is not None


def _plain(layer: Any) -> bool:
    """One adapter, no dropout, no variant except DoRA, on a frozen ordinary linear layer."""
    quantised = type(layer).__name__ == "Linear4bit" and isinstance(layer, LoraLayer)
    if not (quantised or type(layer) in (PeftLinear, SVDLinear)) or list(layer.lora_A) != [ADAPTER] or layer.active_adapters != [ADAPTER]:
        return False
    variant = getattr(layer, "lora_variant", {}).get(ADAPTER)
    kinds = (torch.nn.Linear, fp8.Fp8Linear) if type(layer) is PeftLinear and variant is None else (torch.nn.Linear,)
    return (
        (variant is None or (isinstance(variant, DoraLinearVariant) and not quantised))
        and plain_linear(layer, None if quantised else kinds)
        and not (isinstance(layer, LoraLayer) and layer.lora_bias.get(ADAPTER))
        and isinstance(layer.lora_dropout[ADAPTER], torch.nn.Identity)
    )


def plain_linear(layer: Any, kinds: tuple[type, ...] | None = (torch.nn.Linear,)) -> bool:
    """Whether the base layer of an adapter's layer is of one of these classes (None: any) and frozen."""
    base = layer.base_layer
    return (
        (kinds is None or type(base) in kinds)
        and not base.weight.requires_grad
        and not (base.bias is not None and base.bias.requires_grad)
        and not getattr(layer, "fan_in_fan_out", False)
    )
