"""Attention over packed sequences on a CPU with AMX: all heads of all sequences in one call each way.

With S = scale · Q Kᵀ, P = softmax(S), O = P V, and the log-sum-exp l of each row of S, which is kept instead of P:

    P = exp(S − l),   dV = Pᵀ dO,   dP = dO Vᵀ,   dS = P ∘ (dP − Σ dO ∘ O),   dQ = scale · dS K,   dK = scale · dSᵀ Q

(Dao 2023, FlashAttention-2, https://arxiv.org/abs/2307.08691, sections 2.1 and 2.3.) Products are bf16 with float32 accumulation;
scores, their gradients and l stay float32; P and dS are rounded to bf16 for the products that read them. Queries are processed in
blocks of 32, against the keys they may attend to. The backward pass computes the scores transposed, keys by queries, so that no
block of them has to be transposed again: two products read Pᵀ and dSᵀ as they are, and the third reads dSᵀ in pairs of rows.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from worker import kernels
from worker.kernels.cpu import jit
from worker.kernels.cpu.amx import (
    SIDE,
    configure,
    exponentials,
    gradients,
    mask,
    maximum,
    release,
    rounded,
    row_maximum,
    shapes,
    square,
    transpose,
)
from worker.kernels.cpu.jit import F, addresses, inlined, kernel, row_of, to_f32

log = logging.getLogger(__name__)

HALF, WORD = np.uint16(0), np.uint32(0)


# Layouts --------------------------------------------------------------------------------------------------------------


@kernel
def _copy_rows(x, step, count, padded, dim, y):
    """Copy `count` rows of x (bf16) to y (padded, dim), zero-filled below."""
    for i in range(count):
        X, Y = row_of(x, i, step, dim, HALF), row_of(y, i, 2 * dim, dim, HALF)
        for d in range(dim):
            Y[d] = X[d]
    Y = row_of(y + 2 * count * dim, 0, 0, (padded - count) * dim, HALF)
    for d in range((padded - count) * dim):
        Y[d] = HALF


@kernel
def _transpose_words(x, rows, words, y):
    """Transpose x (rows, words) of 32-bit words to (words, rows), both multiples of 16: turns columns of bf16 into pairs of rows."""
    for i in range(0, rows, 16):
        for j in range(0, words, 16):
            transpose(x + 4 * (i * words + j), 4 * words, y + 4 * (j * rows + i), 4 * rows)


@kernel
def _unpair(x, rows, columns, y):
    """Split pairs of rows (rows / 2, columns, 2) into rows (rows, columns)."""
    for i in range(rows // 2):
        X = row_of(x, i, 4 * columns, columns, WORD)
        A, B = row_of(y, 2 * i, 2 * columns, columns, HALF), row_of(y, 2 * i + 1, 2 * columns, columns, HALF)
        for j in range(columns):
            A[j] = np.uint16(X[j] & np.uint32(0xFFFF))
            B[j] = np.uint16(X[j] >> np.uint32(16))


@kernel
def _pair(x, rows, columns, y):
    """Interleave x (rows, columns) of 16-bit values into pairs of rows (rows / 2, columns, 2)."""
    for i in range(rows // 2):
        A, B = row_of(x, 2 * i, 2 * columns, columns, HALF), row_of(x, 2 * i + 1, 2 * columns, columns, HALF)
        Y = row_of(y, i, 4 * columns, columns, WORD)
        for j in range(columns):
            Y[j] = np.uint32(A[j]) | (np.uint32(B[j]) << np.uint32(16))


@inlined
def _key_blocks(block, padded, causal, window):
    """The range of key blocks in which a block of queries attends to at least one key."""
    last = block + 1 if causal else padded // SIDE
    if not window:
        return 0, last
    first = max(0, (block * SIDE - window + 1) // SIDE)
    return first, last if causal else min(last, (block * SIDE + SIDE + window - 2) // SIDE + 1)


# Passes ---------------------------------------------------------------------------------------------------------------


@kernel
def _forward(
    q, k, v, out, sums, ends, count, heads, groups, dim,
    q_head, q_step, k_head, k_step, v_head, v_step, scratch, config, max_length, scale, causal, window,
):  # fmt: skip
    """Write out (T, heads, dim) in bf16 and the log-sum-exp of each row (heads, T) in float32. `scratch` is scratch memory;
    `max_length` is the longest sequence rounded up to a multiple of 32."""
    E, c, wide_row = row_of(ends, 0, 0, count + 1, np.int64(0)), F(scale), 4 * max_length
    tokens = E[count]
    # Scratch memory: `rows` (longest, dim) bf16; `pairs`, V in pairs of rows; `keys`, Kᵀ in pairs of rows; `own`, a
    # block of queries; `scores` (32, longest) float32; `p`, the same in bf16; `o` (32, dim) float32; `sides`, one row
    # of 32 float32.
    rows, pairs, keys = scratch, scratch + 2 * max_length * dim, scratch + 4 * max_length * dim
    own, scores = keys + 2 * max_length * dim, keys + 2 * max_length * dim + 2 * SIDE * dim
    p = scores + SIDE * wide_row
    o = p + SIDE * 2 * max_length
    sides = o + 4 * SIDE * dim
    A = row_of(sides, 0, 0, SIDE, F(0))
    configure(config)
    for s in range(count):
        first, length = E[s], E[s + 1] - E[s]
        padded = (length + SIDE - 1) // SIDE * SIDE
        for g in range(groups):
            # Packed once for all query heads that share these keys and values (grouped-query attention).
            _copy_rows(v + g * v_head + first * v_step, v_step, length, padded, dim, rows)
            _pair(rows, padded, dim, pairs)
            _copy_rows(k + g * k_head + first * k_step, k_step, length, padded, dim, rows)
            _transpose_words(rows, padded, dim // 2, keys)
            for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
                for block in range(padded // SIDE):
                    start = block * SIDE
                    mine = min(SIDE, length - start)
                    _copy_rows(q + h * q_head + (first + start) * q_step, q_step, mine, SIDE, dim, own)
                    low, high = _key_blocks(block, padded, causal, window)
                    # S = Q Kᵀ, 32 keys at a time.
                    for b in range(low, high):
                        square(scores + 128 * b, wide_row, own, 2 * dim, 64, keys + 128 * b, 4 * padded, 64 * padded, dim // 32, True)
                    R = row_of(sums + 4 * (h * tokens + first + start), 0, 0, mine, F(0))
                    # Softmax of each row. The maximum is subtracted, so that no exponential overflows.
                    for r in range(mine):
                        place = start + r
                        begin = max(0, place - window + 1) if window else 0
                        end = min(length, place + 1 if causal else place + window if window else length)
                        for j in range(SIDE):
                            A[j] = F(-1e30)
                        for b in range(low, high):
                            at = scores + r * wide_row + 128 * b
                            if b * SIDE < begin or (b + 1) * SIDE > end:
                                mask(at, begin - b * SIDE, end - b * SIDE)
                            maximum(at, sides)
                        top = row_maximum(sides)
                        if not top > F(-1e30):
                            top = row_of(scores + 4 * begin, r, wide_row, 1, F(0))[0]  # every score is below −1e30, or NaN
                        for j in range(SIDE):
                            A[j] = F(0.0)
                        for b in range(low, high):
                            exponentials(scores + r * wide_row + 128 * b, top, c, sides, p + r * 2 * max_length + 64 * b)
                        mass = F(0.0)
                        for j in range(SIDE):
                            mass += A[j]
                        R[r] = top * c + np.log(mass)
                        # 1 / Σ exp is kept in place of the row's first score, which is not needed any more.
                        shares = row_of(scores, r, wide_row, 1, F(0))
                        shares[0] = F(1.0) / mass
                    # O = P V, normalized by 1 / Σ exp when it is rounded.
                    for d in range(dim // SIDE):
                        at, from_ = o + 128 * d, pairs + 128 * d + low * 64 * dim
                        square(at, 4 * dim, p + 64 * low, 2 * max_length, 64, from_, 4 * dim, 64 * dim, high - low, True)
                    for r in range(mine):
                        share = row_of(scores, r, wide_row, 1, F(0))[0]
                        for d in range(dim // SIDE):
                            rounded(o + 4 * r * dim + 128 * d, share, out + 2 * dim * ((first + start + r) * heads + h) + 64 * d)
    release()


@kernel
def _backward(
    q, k, v, out, given, sums, ends, d_q, d_k, d_v, count, heads, groups, dim,
    q_head, q_step, k_head, k_step, v_head, v_step, g_head, g_step, scratch, config, max_length, scale, causal, window,
):  # fmt: skip
    """Write the gradients of q (T, heads, dim), k and v (T, groups, dim), in bf16. `scratch` is scratch memory."""
    E, c = row_of(ends, 0, 0, count + 1, np.int64(0)), F(scale)
    tokens = E[count]
    size = 2 * max_length * dim
    # Scratch memory of a sequence: rows of K and V, Kᵀ, and the float32 sums of dK and dV. Of a block of queries: Q and
    # dO as rows, in pairs of rows and transposed, dQᵀ in float32, and for 32 keys scores, dP, P and dS.
    k_rows, v_rows, k_t, sum_k, sum_v = scratch, scratch + size, scratch + 2 * size, scratch + 3 * size, scratch + 5 * size
    block_bytes = 2 * SIDE * dim
    q_rows = scratch + 7 * size
    g_rows, q_pairs, g_pairs = q_rows + block_bytes, q_rows + 2 * block_bytes, q_rows + 3 * block_bytes
    q_words, g_words, sum_q = q_rows + 4 * block_bytes, q_rows + 5 * block_bytes, q_rows + 6 * block_bytes
    scores = q_rows + 8 * block_bytes
    d_p = scores + 4096
    p, d_s, d_s_pairs = d_p + 4096, d_p + 6144, d_p + 8192
    logs, deltas = d_p + 10240, d_p + 10368
    q_t = d_p + 10496
    L, D = row_of(logs, 0, 0, SIDE, F(0)), row_of(deltas, 0, 0, SIDE, F(0))
    configure(config)
    for s in range(count):
        first, length = E[s], E[s + 1] - E[s]
        padded = (length + SIDE - 1) // SIDE * SIDE
        for g in range(groups):
            _copy_rows(k + g * k_head + first * k_step, k_step, length, padded, dim, k_rows)
            _copy_rows(v + g * v_head + first * v_step, v_step, length, padded, dim, v_rows)
            # `sum_k` holds an intermediate layout before it is zeroed.
            _transpose_words(k_rows, padded, dim // 2, sum_k)
            _unpair(sum_k, dim, padded, k_t)
            K, V = row_of(sum_k, 0, 0, padded * dim, F(0)), row_of(sum_v, 0, 0, padded * dim, F(0))
            for j in range(padded * dim):
                K[j] = V[j] = F(0.0)
            for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
                for block in range(padded // SIDE):
                    start = block * SIDE
                    mine = min(SIDE, length - start)
                    _copy_rows(q + h * q_head + (first + start) * q_step, q_step, mine, SIDE, dim, q_rows)
                    _copy_rows(given + h * g_head + (first + start) * g_step, g_step, mine, SIDE, dim, g_rows)
                    _pair(q_rows, SIDE, dim, q_pairs)
                    _pair(g_rows, SIDE, dim, g_pairs)
                    _transpose_words(q_rows, SIDE, dim // 2, q_words)
                    _transpose_words(g_rows, SIDE, dim // 2, g_words)
                    R = row_of(sums + 4 * (h * tokens + first + start), 0, 0, mine, F(0))
                    # Rows beyond the sequence get a negligible P.
                    for i in range(mine, SIDE):
                        L[i], D[i] = F(1e30), F(0.0)
                    for i in range(mine):
                        Y, G = row_of(out, (first + start + i) * heads + h, 2 * dim, dim, HALF), row_of(g_rows, i, 2 * dim, dim, HALF)
                        # Σ dO ∘ O, the term of this row in dS.
                        delta = F(0.0)
                        for d in range(dim):
                            delta += to_f32(Y[d]) * to_f32(G[d])
                        L[i], D[i] = R[i], delta
                    low, high = _key_blocks(block, padded, causal, window)
                    for b in range(low, high):
                        # Sᵀ = K Qᵀ and dPᵀ = V dOᵀ, so that P and dS come out transposed.
                        square(scores, 128, k_rows + b * block_bytes, 2 * dim, 64, q_words, 128, 2048, dim // 32, True)
                        square(d_p, 128, v_rows + b * block_bytes, 2 * dim, 64, g_words, 128, 2048, dim // 32, True)
                        for j in range(SIDE):
                            key = b * SIDE + j
                            # The range of queries, counted from the block's first, that attend to this key.
                            since = max(0, key - start) if causal else max(0, key - window + 1 - start) if window else 0
                            until = min(SIDE, key + window - start) if window else SIDE
                            until = until if key < length else 0
                            gradients(scores + 128 * j, d_p + 128 * j, logs, deltas, c, since, until, p + 64 * j, d_s + 64 * j)
                        _pair(d_s, SIDE, SIDE, d_s_pairs)
                        # dV += Pᵀ dO, dK += dSᵀ Q, and dQᵀ += Kᵀ dSᵀ, which the first block of keys starts.
                        for d in range(dim // SIDE):
                            square(sum_v + 4 * b * SIDE * dim + 128 * d, 4 * dim, p, 64, 0, g_pairs + 128 * d, 4 * dim, 0, 1, False)
                            square(sum_k + 4 * b * SIDE * dim + 128 * d, 4 * dim, d_s, 64, 0, q_pairs + 128 * d, 4 * dim, 0, 1, False)
                            square(sum_q + 4096 * d, 128, k_t + 64 * b + 64 * padded * d, 2 * padded, 0, d_s_pairs, 128, 0, 1, b == low)
                    _transpose_words(sum_q, dim, SIDE, q_t)
                    for i in range(mine):
                        for d in range(dim // SIDE):
                            rounded(q_t + 4 * i * dim + 128 * d, F(1.0), d_q + 2 * dim * ((first + start + i) * heads + h) + 64 * d)
            for i in range(length):
                for d in range(dim // SIDE):
                    at, to = 4 * i * dim + 128 * d, 2 * dim * ((first + i) * groups + g) + 64 * d
                    rounded(sum_k + at, F(1.0), d_k + to)
                    rounded(sum_v + at, F(1.0), d_v + to)
    release()


# On tensors -----------------------------------------------------------------------------------------------------------


class Rules(NamedTuple):
    """How the tokens of a sequence attend to each other."""

    scale: float
    causal: bool
    window: int  # a token attends to others less than this many positions away; 0: to all


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Byte strides from one head and from one token to the next, for each tensor (1, heads, T, D)."""
    return tuple(x.stride(axis) * x.itemsize for x in tensors for axis in (1, 2))


def _padded_length(lengths: Sequence[int]) -> int:
    return -(-max(lengths) // SIDE) * SIDE


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], rules: Rules) -> torch.Tensor:
        _, heads, tokens, dim = q.shape
        ends = torch.tensor([0, *lengths]).cumsum(0)
        out, sums, max_length = torch.empty(1, tokens, heads, dim, dtype=q.dtype), torch.empty(heads, tokens), _padded_length(lengths)
        scratch = torch.empty(6 * max_length * dim + 192 * (max_length + dim) + 128, dtype=torch.uint8)
        sizes = (len(lengths), heads, k.shape[1], dim, *_strides(q, k, v))
        _forward(*addresses(q, k, v, out, sums, ends), *sizes, *addresses(scratch, shapes()), max_length, *rules)
        ctx.save_for_backward(q, k, v, out, sums, ends)
        ctx.rules, ctx.max_length = rules, max_length
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        q, k, v, out, sums, ends = ctx.saved_tensors
        _, heads, tokens, dim = q.shape
        given = d_out.transpose(1, 2)
        given = given if given.stride(3) == 1 else given.contiguous()
        found = [torch.empty(1, tokens, x.shape[1], dim, dtype=q.dtype) for x in (q, k, v)]
        scratch = torch.empty(14 * ctx.max_length * dim + 20 * SIDE * dim + 14592, dtype=torch.uint8)
        sizes = (len(ends) - 1, heads, k.shape[1], dim, *_strides(q, k, v, given))
        at = addresses(q, k, v, out, given, sums, ends, *found)
        _backward(*at, *sizes, *addresses(scratch, shapes()), ctx.max_length, *ctx.rules)
        return *(x.transpose(1, 2) for x in found), None, None


@functools.cache
def is_available() -> bool:
    """Whether this CPU has AMX and the kernel computes correctly with it; tried once."""
    if not (
        hasattr(torch.cpu, "_is_amx_tile_supported") and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() and jit.is_available()
    ):
        return False
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            q, k, v = (x.view(1, 2, 40, 32) for x in torch.linspace(-2, 2, 3 * 2560).sin().bfloat16().split(2560))
            found = _Attention.apply(q, k, v, (40,), Rules(0.2, True, 0)).transpose(1, 2)
            wanted = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, scale=0.2)
            return bool(torch.allclose(found.float(), wanted, atol=0.02))
    except Exception as error:
        log.warning("AMX cannot be used for attention: %s: %s", type(error).__name__, error)
        return False


def supports(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether `attention` may be used and takes such queries and keys: whole tiles of them, and a CPU that has AMX."""
    return kernels.allowed() and q.shape[0] == 1 and q.shape[3] % SIDE == 0 and q.shape[1] % k.shape[1] == 0 and is_available()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], rules: Rules) -> torch.Tensor:
    """Self-attention within each sequence of a pack, differentiable.

    q is (1, heads, T, D), k and v are (1, groups, T, D), all bf16, D a multiple of 32; `lengths` are the numbers of tokens of the
    sequences, in order. Returns (1, T, heads, D) in bf16.

    Raises ValueError when the lengths do not add up to T, shapes or dtypes do not match, or the scale is not positive.
    """
    if rules.scale <= 0:
        raise ValueError(f"a scale of {rules.scale} turns the order of the scores round")
    if sum(lengths) != q.shape[2]:
        raise ValueError(f"sequences of {sum(lengths)} tokens in a pack of {q.shape[2]}")
    if any(x.dtype != torch.bfloat16 for x in (q, k, v)):
        raise ValueError("queries, keys and values have to be bf16")
    if k.shape != v.shape or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"queries, keys and values of {[tuple(x.shape) for x in (q, k, v)]} do not fit together")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return _Attention.apply(q, k, v, tuple(lengths), rules)
