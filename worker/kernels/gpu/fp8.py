"""Frozen weights kept in fp8 and multiplied in it: half the memory of bf16, and up to twice the products a second.

A matrix is squeezed row by row to e4m3 (4 bits of exponent, 3 of mantissa, up to 448), each row with a float32 scale of its own
(Micikevicius et al. 2022, FP8 Formats for Deep Learning). Activations are squeezed as they come, a scale for every token:

    forward    y  = (x̂ Ŵᵀ) · s_x · s_W
    backward   dx = (ĝ Ŵ) · s_g,  g = dy · s_W:  the weights' scales run along what is summed, so they go into dy first

Both products are `torch._scaled_mm`, on a processor too, where it is slow and for tests alone. Of a product's length about 4 %
is rounding, most of it of the activations. What learns beside such a layer stays as it is. Whether a model of billions of
weights learns as well with it, and how much faster, has not been measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KIND = torch.float8_e4m3fn
MOST = torch.finfo(KIND).max
MULTIPLE = 16
"""Both widths of a weight must be multiples of this for the GPU's product."""
MIN_CAPABILITY = (8, 9)


def why_not(device: torch.device) -> str | None:
    """Why a device cannot multiply in fp8; None where it can."""
    if device.type != "cuda":
        return "Products in fp8 need an NVIDIA GPU."
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        return f"Products in fp8 need a GPU of capability 8.9 or later (Ada, Hopper, Blackwell); this one has {found[0]}.{found[1]}."
    return None


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (R, C) in e4m3 and the scale of each row, (R, 1) in float32."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / MOST
    return (x.float() / scale).to(KIND), scale


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (T, K) times the transpose of a squeezed weight (N, K) with scales (N, 1): (T, N) in bf16."""
    rows, own = quantize(x)
    return torch._scaled_mm(rows, weight.t(), scale_a=own, scale_b=scale.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=True)


def product_back(dy: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """dy (T, N) times a squeezed weight (N, K) with scales (N, 1): (T, K) in bf16. The GPU wants the weight's columns to lie
    together, so it is turned for the one product: two bytes moved for each weight, little beside the product itself."""
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
    """A frozen linear layer whose weight is e4m3, (N, K), with `scale` (N, 1) in float32; its outputs are bf16."""

    scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _Product.apply(x.reshape(-1, x.shape[-1]).to(torch.bfloat16), self.weight, self.scale)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


def use_fp8(blocks: list[nn.Module]) -> int:
    """Keep the frozen linear layers of a decoder's blocks in fp8, one after the other. Their strategy is attached already, so
    that what it adds is not made in the type of the weights. Returns how many were squeezed."""
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
