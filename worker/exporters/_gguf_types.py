"""Which type each tensor of a GGUF file gets, and its bytes.

A file's type names a recipe: most matrices get its base type, a few that matter more get a larger one, norms and biases stay F32. The
recipes are those of llama.cpp (`src/llama-quant.cpp`, `llama_tensor_get_type`), without its special cases for mixtures of experts
and for 70B models, so that a file is what its name promises elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

G = GGMLQuantizationType
PIECE = 4 * 2**20
"""Weights that are quantized at a time, so that only one tensor's result and a piece of it in float32 are in memory."""


class FileType(NamedTuple):
    base: GGMLQuantizationType
    more: GGMLQuantizationType
    """The type of the matrices that matter more: a third of the value and down projections."""
    number: LlamaFileType


FILE_TYPES = {
    "F32": FileType(G.F32, G.F32, LlamaFileType.ALL_F32),
    "F16": FileType(G.F16, G.F16, LlamaFileType.MOSTLY_F16),
    "BF16": FileType(G.BF16, G.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": FileType(G.Q8_0, G.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q6_K": FileType(G.Q6_K, G.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "Q5_K_M": FileType(G.Q5_K, G.Q6_K, LlamaFileType.MOSTLY_Q5_K_M),
    "Q4_K_M": FileType(G.Q4_K, G.Q6_K, LlamaFileType.MOSTLY_Q4_K_M),
    "Q4_0": FileType(G.Q4_0, G.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "IQ4_XS": FileType(G.IQ4_XS, G.Q5_K, LlamaFileType.MOSTLY_IQ4_XS),
}
SMALLER_BLOCKS = {G.IQ4_XS: G.IQ4_NL, G.Q4_K: G.Q5_0, G.Q5_K: G.Q5_1, G.Q6_K: G.Q8_0}
"""What llama.cpp takes for rows that are not a multiple of 256: a type in blocks of 32."""
PLAIN = (G.F32, G.F16, G.BF16)


class Recipe(NamedTuple):
    """The types of one file's tensors. `gqa` is how many query heads share a key and value head."""

    name: str
    layers: int
    gqa: int
    output: str
    """The tensor that the logits are computed with: output.weight, or token_embd.weight where they are one."""

    def wanted(self, tensor: str) -> GGMLQuantizationType:
        """The type by the recipe, whatever the width of its rows."""
        kind = FILE_TYPES[self.name]
        if kind.base in PLAIN:
            return kind.base
        if tensor == self.output:
            return G.Q8_0 if kind.base == G.Q8_0 else G.Q6_K
        match = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight", tensor)
        if match is None or kind.more == kind.base:
            return kind.base
        layer, part = int(match[1]), match[2]
        if self.name == "IQ4_XS":
            chosen = self.gqa >= 4 if part == "attn_v" else layer < self.layers // 8
        else:
            chosen = more_bits(layer, self.layers)
        return kind.more if chosen else kind.base

    def type_of(self, tensor: str, shape: tuple[int, ...]) -> tuple[GGMLQuantizationType, GGMLQuantizationType]:
        """(the type that is written, the type by the recipe) of a tensor, whose rows are `shape[-1]` wide."""
        if len(shape) == 1:
            return G.F32, G.F32  # norms and biases are added to float32 states
        wanted = self.wanted(tensor)
        for kind in (wanted, SMALLER_BLOCKS.get(wanted, wanted), G.F16):
            if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0:
                return kind, wanted
        raise AssertionError("rows of any width can be F16")


def more_bits(layer: int, layers: int) -> bool:
    """The first eighth, the last eighth and every third layer between (`use_more_bits`)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def nbytes(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def encode(
    rows: Iterator[np.ndarray], kind: GGMLQuantizationType, shape: tuple[int, ...], importance: np.ndarray | None = None
) -> np.ndarray:
    """The bytes of a tensor, (nbytes,) uint8, from pieces of its rows in float32. `importance` (shape[-1],) weighs its columns."""
    import gguf
    import libgguf

    out, at = np.empty(nbytes(kind, shape), np.uint8), 0
    for piece in rows:
        if kind in PLAIN:  # `gguf` rounds to the nearest even, and keeps what is too large for float16 as infinite
            done = gguf.quants.quantize(np.ascontiguousarray(piece, np.float32), kind)
        else:
            done = libgguf.quantize_rows(piece, int(kind), importance)
        flat = done.reshape(-1).view(np.uint8)
        out[at : at + flat.size] = flat
        at += flat.size
    assert at == out.size, "every row was written"
    return out


def pieces(rows: int, width: int) -> Iterator[slice]:
    """Slices of the rows of a matrix that hold about PIECE weights each."""
    step = max(1, PIECE // width)
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))


def fallback_notes(chosen: dict[str, tuple[GGMLQuantizationType, GGMLQuantizationType]], widths: dict[str, int]) -> tuple[str, ...]:
    """In words, how many tensors have another type than the recipe's, and why."""
    found: dict[tuple[str, str, int], int] = {}
    for tensor, (kind, wanted) in chosen.items():
        if kind != wanted:
            key = (wanted.name, kind.name, widths[tensor])
            found[key] = found.get(key, 0) + 1
    return tuple(
        f"{count} tensors are {kind} in place of {wanted}: their rows are {width} wide, which is no multiple of 256."
        for (wanted, kind, width), count in sorted(found.items())
    )
