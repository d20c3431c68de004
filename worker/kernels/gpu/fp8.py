"""Frozen linear layers with fp8 weights and fp8 products: half the memory of bf16, and up to twice the throughput.

Each row of a weight is quantized to e4m3 (4 exponent bits, 3 mantissa bits, at most 448) with a float32 scale of its own
(Micikevicius et al. 2022, FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433). Activations are quantized on the fly,
with a scale per token:

    forward    y  = (x̂ Ŵᵀ) · s_x · s_W
    backward   dx = (ĝ Ŵ) · s_g,  g = dy · s_W:  the weight's scales run along the summed axis, so dy takes them first

Both products are `torch._scaled_mm`; it also runs on a CPU, slowly, which the tests use. The relative rounding error of a product
is about 4 %, most of it from the activations. Trainable weights next to such a layer are not quantized. Whether a model of
billions of weights trains as well this way, and how much faster, has not been measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KIND = torch.float8_e4m3fn
MOST = torch.finfo(KIND).max
MULTIPLE = 16
"""Both dimensions of a weight must be multiples of this for the GPU's product."""
MIN_CAPABILITY = (8, 9)


def why_not(device: torch.device) -> str | None:
    """Why a device has no fp8 products; None where it has."""
    if device.type != "cuda":
        return "Products in fp8 need an NVIDIA GPU."
    if torch.version.hip:
        return "Products in fp8 need an NVIDIA GPU: AMD's cards have other kinds of fp8."
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        return f"Products in fp8 need a GPU of capability 8.9 or later (Ada, Hopper, Blackwell); this one has {found[0]}.{found[1]}."
    return None


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x (R, C) row by row: e4m3 values (R, C) and scales (R, 1) in float32."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / MOST
    return (x.float() / scale).to(KIND), scale


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (T, K) times the transpose of a quantized weight (N, K) with scales (N, 1): (T, N) in bf16."""
    rows, own = quantize(x)
    return torch._scaled_mm(rows, weight.t(), scale_a=own, scale_b=scale.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=True)


def product_back(dy: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """dy (T, N) times a quantized weight (N, K) with scales (N, 1): (T, K) in bf16. The GPU's product needs a column-major right
    operand, so the weight is transposed for it: two bytes moved per weight, little compared with the product."""
    rows, own = quantize(dy.float() * scale.view(1, -1))
    ones = torch.ones(1, weight.shape[1], device=dy.device)
    turned = weight.t().contiguous().t()
    return torch._scaled_mm(rows, turned, scale_a=own, scale_b=ones, out_dtype=torch.bfloat16, use_fast_accum=True)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return product(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return (product_back(dy, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None), None, None


class Fp8Linear(nn.Linear):
    """A frozen linear layer with an e4m3 weight (N, K) and `scale` (N, 1) in float32; its outputs are bf16."""

    scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _Product.apply(x.reshape(-1, x.shape[-1]).to(torch.bfloat16), self.weight, self.scale)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


def patch_fp8(blocks: list[nn.Module]) -> int:
    """Quantize the frozen linear layers of a decoder's blocks to fp8, in place. Call it after the strategy is attached, because
    adapters take the dtype of the weight they find. Returns the number of layers quantized."""
    count = 0
    for block in blocks:
        for layer in block.modules():
            if type(layer) is nn.Linear and not layer.weight.requires_grad and not any(n % MULTIPLE for n in layer.weight.shape):
                weight, scale = quantize(layer.weight.detach())
                layer.weight = nn.Parameter(weight, requires_grad=False)
                layer.register_buffer("scale", scale, persistent=False)
                layer.__class__ = Fp8Linear
                count += 1
    return count
