"""Attention within each sequence of a pack on a CPU with matrix units (AMX), all heads of all sequences in one call each way.

With S = scale · Q Kᵀ, P = softmax(S), O = P V, and the logarithms l of the softmax's sums, which are kept in the place of P:

    P = exp(S − l),   dV = Pᵀ dO,   dP = dO Vᵀ,   dS = P ∘ (dP − Σ dO ∘ O),   dQ = scale · dS K,   dK = scale · dSᵀ Q

(Dao 2023, FlashAttention-2, https://arxiv.org/abs/2307.08691, sections 2.1 and 2.3.) All products are of bf16 numbers with sums in float32;
scores, their gradients and l stay float32, P and dS are rounded to bf16 for the products that read them. 32 queries are taken at a time,
with the keys that they may see. Backwards the scores are made the other way round, keys by queries, for then no block of them has to be
turned: Pᵀ and dSᵀ are what two products read, and the third takes two of their rows at a time as they lie.

A tile is 16 rows of 64 bytes; a unit multiplies 16 × 32 by 32 × 16 numbers of bf16, of which the second lie as pairs of rows (Intel 64 and
IA-32 Architectures Software Developer's Manual, volume 1, chapter 18; `TDPBF16PS` in volume 2).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from worker import simd
from worker.simd import F, addresses, build_exp, constant, inlined, kernel, row_of, wide

log = logging.getLogger(__name__)

llvmlite.binding.initialize_native_asmparser()  # for the one instruction that llvmlite has no type for

SIDE = 32
"""Queries, and keys, of a block: two tiles."""

HALF, WORD = np.uint16(0), np.uint32(0)


# Instructions ---------------------------------------------------------------------------------------------------------

_BYTE, _LONG, _NONE = ir.IntType(8), ir.IntType(64), ir.VoidType()
_PLACE = _BYTE.as_pointer()


def _instruction(builder: Any, name: str, *given: tuple[Any, Any]) -> None:
    kinds, values = zip(*given, strict=True) if given else ((), ())
    name = f"llvm.x86.{name}"
    known = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(_NONE, kinds), name)
    builder.call(known, values)


@intrinsic
def _configure(context: Any, address: Any) -> Any:
    """Tell the unit the tiles' shapes, from 64 bytes."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        _instruction(b, "ldtilecfg", (_PLACE, b.inttoptr(a[0], _PLACE)))
        return c.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def _release(context: Any) -> Any:
    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        _instruction(b, "tilerelease")
        return c.get_dummy_value()

    return types.void(), build


def _number(tile: types.Literal) -> tuple[Any, Any]:
    return _BYTE, _BYTE(tile.literal_value)


@intrinsic(prefer_literal=True)
def _zero(context: Any, tile: Any) -> Any:
    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        _instruction(b, "tilezero", _number(tile))
        return c.get_dummy_value()

    return types.void(tile), build


@intrinsic(prefer_literal=True)
def _load(context: Any, tile: Any, address: Any, step: Any) -> Any:
    """16 rows of 64 bytes, `step` bytes from one to the next."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        _instruction(b, "tileloadd64", _number(tile), (_PLACE, b.inttoptr(a[1], _PLACE)), (_LONG, a[2]))
        return c.get_dummy_value()

    return types.void(tile, types.int64, types.int64), build


@intrinsic(prefer_literal=True)
def _store(context: Any, tile: Any, address: Any, step: Any) -> Any:
    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        _instruction(b, "tilestored64", _number(tile), (_PLACE, b.inttoptr(a[1], _PLACE)), (_LONG, a[2]))
        return c.get_dummy_value()

    return types.void(tile, types.int64, types.int64), build


@intrinsic(prefer_literal=True)
def _dot(context: Any, sums: Any, left: Any, right: Any) -> Any:
    """`sums` += left · right."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        _instruction(b, "tdpbf16ps", _number(sums), _number(left), _number(right))
        return c.get_dummy_value()

    return types.void(sums, left, right), build


@inlined
def _square(to, to_row, left, left_row, left_step, right, right_row, right_step, times, fresh):
    """A block of 32 × 32 float32 at `to` (+)= a sum over `times` of left (32 × 32, bf16) · right (16 pairs of rows × 32). From one of the
    `times` to the next both go on by so many bytes."""
    if fresh:
        _zero(0)
        _zero(1)
        _zero(2)
        _zero(3)
    else:
        _load(0, to, to_row)
        _load(1, to + 64, to_row)
        _load(2, to + 16 * to_row, to_row)
        _load(3, to + 16 * to_row + 64, to_row)
    for t in range(times):
        a, b = left + t * left_step, right + t * right_step
        _load(4, a, left_row)
        _load(5, a + 16 * left_row, left_row)
        _load(6, b, right_row)
        _load(7, b + 64, right_row)
        _dot(0, 4, 6)
        _dot(1, 4, 7)
        _dot(2, 5, 6)
        _dot(3, 5, 7)
    _store(0, to, to_row)
    _store(1, to + 64, to_row)
    _store(2, to + 16 * to_row, to_row)
    _store(3, to + 16 * to_row + 64, to_row)


# Rows of a block, 32 numbers ------------------------------------------------------------------------------------------

_VECTOR = ir.VectorType(ir.FloatType(), 16)
_PLACES = ir.VectorType(ir.IntType(64), 16)


def _get(b: Any, address: Any, half: int) -> Any:
    place = b.inttoptr(b.add(address, _LONG(64 * half)), _VECTOR.as_pointer())
    return b.load(place, align=4)


def _round(b: Any, vector: Any) -> Any:
    """A vector in bf16, to nearest even: an instruction that every processor with these units has."""
    shape = ir.FunctionType(ir.VectorType(ir.IntType(16), 16), [_VECTOR])
    return b.asm(shape, "vcvtneps2bf16 $1, $0", "=v,v", [vector], False)


def _put_rounded(b: Any, halves: Sequence[Any], address: Any) -> None:
    """A row rounded to bf16 and stored at once: a tile loads its 64 bytes sooner than those of two stores."""
    whole = b.shuffle_vector(*(_round(b, half) for half in halves), ir.Constant(ir.VectorType(ir.IntType(32), SIDE), list(range(SIDE))))
    b.store(whole, b.inttoptr(address, whole.type.as_pointer()), align=2)


def _put(b: Any, vector: Any, address: Any, half: int) -> None:
    b.store(vector, b.inttoptr(b.add(address, _LONG(64 * half)), _VECTOR.as_pointer()), align=4)


def _spread(b: Any, value: Any, kind: Any) -> Any:
    """One value in each place of a vector."""
    return b.shuffle_vector(
        b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.IntType(32)(0)),
        ir.Constant(kind, ir.Undefined),
        ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count),
    )


@intrinsic
def _raise(context: Any, row: Any, highest: Any) -> Any:
    """The higher of each of two rows' numbers, in the place of the second."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        for half in (0, 1):
            x, y = _get(b, a[0], half), _get(b, a[1], half)
            _put(b, b.select(b.fcmp_ordered(">", x, y), x, y), a[1], half)
        return c.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def _rounded(context: Any, row: Any, factor: Any, to: Any) -> Any:
    """A row times a factor, rounded to bf16."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        factor = _spread(b, a[1], _VECTOR)
        _put_rounded(b, [b.fmul(_get(b, a[0], half), factor) for half in (0, 1)], a[2])
        return c.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), build


@intrinsic
def _turn(context: Any, square: Any, step: Any, to: Any, to_step: Any) -> Any:
    """A square of 16 × 16 words, turned: halves of ever smaller squares change places."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        kind = ir.VectorType(ir.IntType(32), 16)

        def place(base: Any, step: Any, i: int) -> Any:
            return b.inttoptr(b.add(base, b.mul(step, _LONG(i))), kind.as_pointer())

        rows = [b.load(place(a[0], a[1], i), align=4) for i in range(16)]
        for size in (8, 4, 2, 1):
            upper = [j if not j & size else 16 + j - size for j in range(16)]
            lower = [j + size if not j & size else 16 + j for j in range(16)]
            for i in range(16):
                if not i & size:
                    pair = rows[i], rows[i + size]
                    rows[i], rows[i + size] = (b.shuffle_vector(*pair, ir.Constant(kind, chosen)) for chosen in (upper, lower))
        for i, row in enumerate(rows):
            b.store(row, place(a[2], a[3], i), align=4)
        return c.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), build


@intrinsic
def _hide(context: Any, row: Any, since: Any, until: Any) -> Any:
    """What is outside of the places [since, until) of a row is made so low that nothing is left of it."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        for half in (0, 1):
            _put(b, b.select(_between(b, half, a[1], a[2]), _get(b, a[0], half), constant(_VECTOR, -1e30)), a[0], half)
        return c.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


def _between(b: Any, half: int, since: Any, until: Any) -> Any:
    """Which places of a half of a row are in [since, until)."""
    places = ir.Constant(_PLACES, [16 * half + j for j in range(16)])
    first, end = (_spread(b, x, _PLACES) for x in (since, until))
    return b.and_(b.icmp_signed(">=", places, first), b.icmp_signed("<", places, end))


@intrinsic
def _top(context: Any, row: Any) -> Any:
    """The highest number of a row."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        found = [_get(b, a[0], half) for half in (0, 1)]
        found = b.select(b.fcmp_ordered(">", *found), *found)
        for size in (8, 4, 2, 1):
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 16), [(j + size) % 16 for j in range(16)])
            other = b.shuffle_vector(found, found, lanes)
            found = b.select(b.fcmp_ordered(">", found, other), found, other)
        return b.extract_element(found, ir.IntType(32)(0))

    return types.float32(types.int64), build


@intrinsic
def _exponentials(context: Any, scores: Any, top: Any, scale: Any, sums: Any, p: Any) -> Any:
    """exp(scale · (score - top)) of a row, added to `sums` and rounded to bf16 at `p`."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        top, scale = (_spread(b, x, _VECTOR) for x in (a[1], a[2]))
        found = [build_exp(b, b.fmul(b.fsub(_get(b, a[0], half), top), scale)) for half in (0, 1)]
        for half, e in enumerate(found):
            _put(b, b.fadd(_get(b, a[3], half), e), a[3], half)
        _put_rounded(b, found, a[4])
        return c.get_dummy_value()

    return types.void(types.int64, types.float32, types.float32, types.int64, types.int64), build


@intrinsic
def _gradients(context: Any, scores: Any, d_p: Any, logs: Any, pulls: Any, scale: Any, since: Any, until: Any, p: Any, d_s: Any) -> Any:
    """P = exp(scale · score - log) of a row and scale · P · (dP - pull), rounded to bf16; zeros outside of the places [since, until)."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        scale, none = _spread(b, a[4], _VECTOR), constant(_VECTOR, 0.0)
        found, given = [], []
        for half in (0, 1):
            e = build_exp(b, b.fsub(b.fmul(_get(b, a[0], half), scale), _get(b, a[2], half)))
            found.append(b.select(_between(b, half, a[5], a[6]), e, none))
            given.append(b.fmul(b.fmul(found[half], b.fsub(_get(b, a[1], half), _get(b, a[3], half))), scale))
        _put_rounded(b, found, a[7])
        _put_rounded(b, given, a[8])
        return c.get_dummy_value()

    long, number = types.int64, types.float32
    return types.void(long, long, long, long, number, long, long, long, long), build


# Layouts --------------------------------------------------------------------------------------------------------------


@kernel
def _rows(x, step, count, padded, dim, y):
    """`count` rows of x as (padded, dim), zeros below."""
    for i in range(count):
        X, Y = row_of(x, i, step, dim, HALF), row_of(y, i, 2 * dim, dim, HALF)
        for d in range(dim):
            Y[d] = X[d]
    Y = row_of(y + 2 * count * dim, 0, 0, (padded - count) * dim, HALF)
    for d in range((padded - count) * dim):
        Y[d] = HALF


@kernel
def _turned_words(x, rows, words, y):
    """x (rows, words) of 32 bits as (words, rows), both whole sixteens: columns of bf16 as pairs of rows."""
    for i in range(0, rows, 16):
        for j in range(0, words, 16):
            _turn(x + 4 * (i * words + j), 4 * words, y + 4 * (j * rows + i), 4 * rows)


@kernel
def _unpaired(x, rows, columns, y):
    """Pairs of rows (rows / 2, columns, 2) as they were, (rows, columns)."""
    for i in range(rows // 2):
        X = row_of(x, i, 4 * columns, columns, WORD)
        A, B = row_of(y, 2 * i, 2 * columns, columns, HALF), row_of(y, 2 * i + 1, 2 * columns, columns, HALF)
        for j in range(columns):
            A[j] = np.uint16(X[j] & np.uint32(0xFFFF))
            B[j] = np.uint16(X[j] >> np.uint32(16))


@kernel
def _paired(x, rows, columns, y):
    """x (rows, columns) of 16 bits as pairs of rows, (rows / 2, columns, 2)."""
    for i in range(rows // 2):
        A, B = row_of(x, 2 * i, 2 * columns, columns, HALF), row_of(x, 2 * i + 1, 2 * columns, columns, HALF)
        Y = row_of(y, i, 4 * columns, columns, WORD)
        for j in range(columns):
            Y[j] = np.uint32(A[j]) | (np.uint32(B[j]) << np.uint32(16))


@inlined
def _seen(block, padded, causal, window):
    """The blocks of keys that a block of queries sees some of: from, to."""
    last = block + 1 if causal else padded // SIDE
    if not window:
        return 0, last
    first = max(0, (block * SIDE - window + 1) // SIDE)
    return first, last if causal else min(last, (block * SIDE + SIDE + window - 2) // SIDE + 1)


# Passes ---------------------------------------------------------------------------------------------------------------


@kernel
def _forward(
    q, k, v, out, sums, ends, count, heads, groups, dim,
    q_head, q_step, k_head, k_step, v_head, v_step, room, config, longest, scale, causal, window,
):  # fmt: skip
    """out (T, heads, dim) and the logarithms of the sums (heads, T). `longest` is the longest sequence in whole blocks."""
    E, c, wide_row = row_of(ends, 0, 0, count + 1, np.int64(0)), F(scale), 4 * longest
    tokens = E[count]
    rows, pairs, keys = room, room + 2 * longest * dim, room + 4 * longest * dim
    own, scores = keys + 2 * longest * dim, keys + 2 * longest * dim + 2 * SIDE * dim
    p = scores + SIDE * wide_row
    o = p + SIDE * 2 * longest
    sides = o + 4 * SIDE * dim
    A = row_of(sides, 0, 0, SIDE, F(0))
    _configure(config)
    for s in range(count):
        first, length = E[s], E[s + 1] - E[s]
        padded = (length + SIDE - 1) // SIDE * SIDE
        for g in range(groups):
            _rows(v + g * v_head + first * v_step, v_step, length, padded, dim, rows)
            _paired(rows, padded, dim, pairs)
            _rows(k + g * k_head + first * k_step, k_step, length, padded, dim, rows)
            _turned_words(rows, padded, dim // 2, keys)
            for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
                for block in range(padded // SIDE):
                    start = block * SIDE
                    mine = min(SIDE, length - start)
                    _rows(q + h * q_head + (first + start) * q_step, q_step, mine, SIDE, dim, own)
                    low, high = _seen(block, padded, causal, window)
                    for b in range(low, high):
                        _square(scores + 128 * b, wide_row, own, 2 * dim, 64, keys + 128 * b, 4 * padded, 64 * padded, dim // 32, True)
                    R = row_of(sums + 4 * (h * tokens + first + start), 0, 0, mine, F(0))
                    for r in range(mine):
                        place = start + r
                        begin = max(0, place - window + 1) if window else 0
                        end = min(length, place + 1 if causal else place + window if window else length)
                        for j in range(SIDE):
                            A[j] = F(-1e30)
                        for b in range(low, high):
                            at = scores + r * wide_row + 128 * b
                            if b * SIDE < begin or (b + 1) * SIDE > end:
                                _hide(at, begin - b * SIDE, end - b * SIDE)
                            _raise(at, sides)
                        top = _top(sides)
                        if not top > F(-1e30):
                            top = row_of(scores + 4 * begin, r, wide_row, 1, F(0))[0]  # all is below that, or no number
                        for j in range(SIDE):
                            A[j] = F(0.0)
                        for b in range(low, high):
                            _exponentials(scores + r * wide_row + 128 * b, top, c, sides, p + r * 2 * longest + 64 * b)
                        mass = F(0.0)
                        for j in range(SIDE):
                            mass += A[j]
                        R[r] = top * c + np.log(mass)
                        shares = row_of(scores, r, wide_row, 1, F(0))
                        shares[0] = F(1.0) / mass
                    for d in range(dim // SIDE):
                        at, from_ = o + 128 * d, pairs + 128 * d + low * 64 * dim
                        _square(at, 4 * dim, p + 64 * low, 2 * longest, 64, from_, 4 * dim, 64 * dim, high - low, True)
                    for r in range(mine):
                        share = row_of(scores, r, wide_row, 1, F(0))[0]
                        for d in range(dim // SIDE):
                            _rounded(o + 4 * r * dim + 128 * d, share, out + 2 * dim * ((first + start + r) * heads + h) + 64 * d)
    _release()


@kernel
def _backward(
    q, k, v, out, given, sums, ends, d_q, d_k, d_v, count, heads, groups, dim,
    q_head, q_step, k_head, k_step, v_head, v_step, g_head, g_step, room, config, longest, scale, causal, window,
):  # fmt: skip
    """The gradients of q (T, heads, dim), k and v (T, groups, dim)."""
    E, c = row_of(ends, 0, 0, count + 1, np.int64(0)), F(scale)
    tokens = E[count]
    size = 2 * longest * dim
    k_rows, v_rows, k_turned, sum_k, sum_v = room, room + size, room + 2 * size, room + 3 * size, room + 5 * size
    block_bytes = 2 * SIDE * dim
    q_rows = room + 7 * size
    g_rows, q_pairs, g_pairs = q_rows + block_bytes, q_rows + 2 * block_bytes, q_rows + 3 * block_bytes
    q_words, g_words, sum_q = q_rows + 4 * block_bytes, q_rows + 5 * block_bytes, q_rows + 6 * block_bytes
    scores = q_rows + 8 * block_bytes
    d_p = scores + 4096
    p, d_s, d_s_pairs = d_p + 4096, d_p + 6144, d_p + 8192
    logs, pulls = d_p + 10240, d_p + 10368
    q_turned = d_p + 10496
    L, D = row_of(logs, 0, 0, SIDE, F(0)), row_of(pulls, 0, 0, SIDE, F(0))
    _configure(config)
    for s in range(count):
        first, length = E[s], E[s + 1] - E[s]
        padded = (length + SIDE - 1) // SIDE * SIDE
        for g in range(groups):
            _rows(k + g * k_head + first * k_step, k_step, length, padded, dim, k_rows)
            _rows(v + g * v_head + first * v_step, v_step, length, padded, dim, v_rows)
            _turned_words(k_rows, padded, dim // 2, sum_k)
            _unpaired(sum_k, dim, padded, k_turned)
            K, V = row_of(sum_k, 0, 0, padded * dim, F(0)), row_of(sum_v, 0, 0, padded * dim, F(0))
            for j in range(padded * dim):
                K[j] = V[j] = F(0.0)
            for h in range(g * (heads // groups), (g + 1) * (heads // groups)):
                for block in range(padded // SIDE):
                    start = block * SIDE
                    mine = min(SIDE, length - start)
                    _rows(q + h * q_head + (first + start) * q_step, q_step, mine, SIDE, dim, q_rows)
                    _rows(given + h * g_head + (first + start) * g_step, g_step, mine, SIDE, dim, g_rows)
                    _paired(q_rows, SIDE, dim, q_pairs)
                    _paired(g_rows, SIDE, dim, g_pairs)
                    _turned_words(q_rows, SIDE, dim // 2, q_words)
                    _turned_words(g_rows, SIDE, dim // 2, g_words)
                    R = row_of(sums + 4 * (h * tokens + first + start), 0, 0, mine, F(0))
                    for i in range(mine, SIDE):
                        L[i], D[i] = F(1e30), F(0.0)
                    for i in range(mine):
                        Y, G = row_of(out, (first + start + i) * heads + h, 2 * dim, dim, HALF), row_of(g_rows, i, 2 * dim, dim, HALF)
                        pull = F(0.0)
                        for d in range(dim):
                            pull += wide(Y[d]) * wide(G[d])
                        L[i], D[i] = R[i], pull
                    low, high = _seen(block, padded, causal, window)
                    for b in range(low, high):
                        _square(scores, 128, k_rows + b * block_bytes, 2 * dim, 64, q_words, 128, 2048, dim // 32, True)
                        _square(d_p, 128, v_rows + b * block_bytes, 2 * dim, 64, g_words, 128, 2048, dim // 32, True)
                        for j in range(SIDE):
                            key = b * SIDE + j
                            # The queries, counted from the block's first, that see this key: from, to.
                            since = max(0, key - start) if causal else max(0, key - window + 1 - start) if window else 0
                            until = min(SIDE, key + window - start) if window else SIDE
                            until = until if key < length else 0
                            _gradients(scores + 128 * j, d_p + 128 * j, logs, pulls, c, since, until, p + 64 * j, d_s + 64 * j)
                        _paired(d_s, SIDE, SIDE, d_s_pairs)
                        for d in range(dim // SIDE):
                            _square(sum_v + 4 * b * SIDE * dim + 128 * d, 4 * dim, p, 64, 0, g_pairs + 128 * d, 4 * dim, 0, 1, False)
                            _square(sum_k + 4 * b * SIDE * dim + 128 * d, 4 * dim, d_s, 64, 0, q_pairs + 128 * d, 4 * dim, 0, 1, False)
                            _square(
                                sum_q + 4096 * d, 128, k_turned + 64 * b + 64 * padded * d, 2 * padded, 0, d_s_pairs, 128, 0, 1, b == low
                            )
                    _turned_words(sum_q, dim, SIDE, q_turned)
                    for i in range(mine):
                        for d in range(dim // SIDE):
                            _rounded(q_turned + 4 * i * dim + 128 * d, F(1.0), d_q + 2 * dim * ((first + start + i) * heads + h) + 64 * d)
            for i in range(length):
                for d in range(dim // SIDE):
                    at, to = 4 * i * dim + 128 * d, 2 * dim * ((first + i) * groups + g) + 64 * d
                    _rounded(sum_k + at, F(1.0), d_k + to)
                    _rounded(sum_v + at, F(1.0), d_v + to)
    _release()


# On tensors -----------------------------------------------------------------------------------------------------------


class Rules(NamedTuple):
    """How a sequence looks at itself."""

    scale: float
    causal: bool
    window: int  # a token sees others less than so many places away; 0: all of them


@functools.cache
def _shapes() -> torch.Tensor:
    """The configuration of eight tiles of 16 rows of 64 bytes."""
    told = np.zeros(64, np.uint8)
    told[0] = 1
    told[16:32].view(np.uint16)[:] = 64
    told[48:56] = 16
    return torch.from_numpy(told)


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Bytes from a head to the next, and from a token to the next, of each (1, heads, T, D)."""
    return tuple(x.stride(axis) * x.itemsize for x in tensors for axis in (1, 2))


def _whole(lengths: Sequence[int]) -> int:
    return -(-max(lengths) // SIDE) * SIDE


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], rules: Rules) -> torch.Tensor:
        _, heads, tokens, dim = q.shape
        ends = torch.tensor([0, *lengths]).cumsum(0)
        out, sums, longest = torch.empty(1, tokens, heads, dim, dtype=q.dtype), torch.empty(heads, tokens), _whole(lengths)
        room = torch.empty(6 * longest * dim + 192 * (longest + dim) + 128, dtype=torch.uint8)
        sizes = (len(lengths), heads, k.shape[1], dim, *_strides(q, k, v))
        _forward(*addresses(q, k, v, out, sums, ends), *sizes, *addresses(room, _shapes()), longest, *rules)
        ctx.save_for_backward(q, k, v, out, sums, ends)
        ctx.rules, ctx.longest = rules, longest
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        q, k, v, out, sums, ends = ctx.saved_tensors
        _, heads, tokens, dim = q.shape
        given = d_out.transpose(1, 2)
        given = given if given.stride(3) == 1 else given.contiguous()
        found = [torch.empty(1, tokens, x.shape[1], dim, dtype=q.dtype) for x in (q, k, v)]
        room = torch.empty(14 * ctx.longest * dim + 20 * SIDE * dim + 14592, dtype=torch.uint8)
        sizes = (len(ends) - 1, heads, k.shape[1], dim, *_strides(q, k, v, given))
        at = addresses(q, k, v, out, given, sums, ends, *found)
        _backward(*at, *sizes, *addresses(room, _shapes()), ctx.longest, *ctx.rules)
        return *(x.transpose(1, 2) for x in found), None, None


@functools.cache
def works() -> bool:
    """Whether this processor has the units and a kernel gives with them what it should, tried once."""
    if not (hasattr(torch.cpu, "_is_amx_tile_supported") and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() and simd.works()):
        return False
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            q, k, v = (x.view(1, 2, 40, 32) for x in torch.linspace(-2, 2, 3 * 2560).sin().bfloat16().split(2560))
            found = _Attention.apply(q, k, v, (40,), Rules(0.2, True, 0)).transpose(1, 2)
            wanted = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, scale=0.2)
            return bool(torch.allclose(found.float(), wanted, atol=0.02))
    except Exception as error:
        log.warning("The matrix units cannot be used for attention: %s: %s", type(error).__name__, error)
        return False


def takes(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether `attention` takes such queries and keys here: whole tiles of them, and a processor that has the units."""
    return q.shape[0] == 1 and q.shape[3] % SIDE == 0 and q.shape[1] % k.shape[1] == 0 and works()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], rules: Rules) -> torch.Tensor:
    """Attention of each of the sequences of q (1, heads, T, D), k and v (1, groups, T, D) to itself, all in bf16: (1, T, heads, D). D is a
    multiple of 32, `lengths` are the sequences' tokens in order.

    Raises ValueError when the lengths do not add up to T, a tensor is of another type, or the scale is not above zero.
    """
    if rules.scale <= 0:
        raise ValueError(f"a scale of {rules.scale} turns the order of the scores round")
    if sum(lengths) != q.shape[2]:
        raise ValueError(f"sequences of {sum(lengths)} tokens in a pack of {q.shape[2]}")
    if any(x.dtype != torch.bfloat16 for x in (q, k, v)):
        raise ValueError("queries, keys and values have to be bf16")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return _Attention.apply(q, k, v, tuple(lengths), rules)
