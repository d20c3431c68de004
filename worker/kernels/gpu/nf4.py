"""Products with a frozen weight that bitsandbytes keeps in 4 bits, as operators of their own.

A compiler that sees the dequantization joins the one of the forward pass and the one of the backward pass into one, and keeps the dense
matrix between them: 416 MiB for each layer of an 8 B model. Inside an operator it sees neither, so each pass makes the matrix for its own
product and drops it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

NESTED = 5
"""Tensors of a state whose scales are quantized too (Dettmers et al. 2023, QLoRA, section 3); `absmax` and `code` alone where they are not."""


def tables(state: Any) -> list[torch.Tensor]:
    """What stands beside a packed weight in a bitsandbytes QuantState: scales, the 16 values, and where the scales are quantized their
    offset, scales and values."""
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]


def sizes(state: Any) -> list[int]:
    """Of a QuantState: rows and columns of its weight, and numbers that share a scale in the weight and in the scales."""
    return [*state.shape, state.blocksize, state.state2.blocksize if state.nested else 0]


def dense(weight: torch.Tensor, beside: Sequence[torch.Tensor], size: Sequence[int], kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) in `dtype`; `beside` and `size` are the above."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    rows, columns, block, outer = size
    absmax, code, *nested = beside
    scales = QuantState(absmax=nested[1], code=nested[2], blocksize=outer, dtype=torch.float32) if nested else None
    state = QuantState(
        absmax=absmax, shape=torch.Size((rows, columns)), code=code, blocksize=block, quant_type=kind, dtype=dtype,
        offset=nested[0] if nested else None, state2=scales,
    )  # fmt: skip
    return dequantize_4bit(weight, state)


@torch.library.custom_op("luthier::add_nf4_product", mutates_args=("y",))
def add_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, beside: list[torch.Tensor], size: list[int], kind: str) -> None:
    """y (T, N) += x (T, K) Wᵀ, summed in float32."""
    y.addmm_(x, dense(weight, beside, size, kind, x.dtype).t())


@torch.library.custom_op("luthier::add_nf4_product_back", mutates_args=("dx",))
def add_product_back(
    dx: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, beside: list[torch.Tensor], size: list[int], kind: str
) -> None:
    """dx (T, K) += dy (T, N) W, summed in float32."""
    dx.addmm_(dy, dense(weight, beside, size, kind, dy.dtype))


for _operator in (add_product, add_product_back):
    _operator.register_fake(lambda *given: None)
