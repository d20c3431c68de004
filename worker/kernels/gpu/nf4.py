"""Products with a frozen 4-bit weight of bitsandbytes, as custom operators.

A compiler that sees the dequantization of the forward and of the backward pass computes it once and keeps the dense matrix in between:
416 MiB per layer of an 8 B model. It does not look into an operator, so each pass dequantizes for its own product and discards the matrix
(Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314, section 3: double dequantization).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def tables(state: Any) -> list[torch.Tensor]:
    """The tensors of a bitsandbytes QuantState: scales and the 16 values; with quantized scales also their offset, scales and values."""
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]


def sizes(state: Any) -> list[int]:
    """The integers of a QuantState: rows and columns of the weight, its block size, and that of the scales (0: not quantized)."""
    return [*state.shape, state.blocksize, state.state2.blocksize if state.nested else 0]


def dequantize(weight: torch.Tensor, beside: Sequence[torch.Tensor], size: Sequence[int], kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The packed `weight` as (N, K) in `dtype`; `beside` is from `tables`, `size` from `sizes`, `kind` is "nf4" or "fp4"."""
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
    """y (T, N) += x (T, K) Wᵀ in the dtype of x, accumulated in float32."""
    y.addmm_(x, dequantize(weight, beside, size, kind, x.dtype).t())


@torch.library.custom_op("luthier::add_nf4_product_back", mutates_args=("dx",))
def add_product_back(
    dx: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, beside: list[torch.Tensor], size: list[int], kind: str
) -> None:
    """dx (T, K) += dy (T, N) W in the dtype of dy, accumulated in float32."""
    dx.addmm_(dy, dequantize(weight, beside, size, kind, dy.dtype))


for _operator in (add_product, add_product_back):
    _operator.register_fake(lambda *given: None)
