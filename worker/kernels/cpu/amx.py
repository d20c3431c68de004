"""AMX tile instructions, and operations on rows of 32 float32 values, as Numba intrinsics (`worker/kernels/cpu/jit.py`).

A tile is 16 rows of 64 bytes. `TDPBF16PS` multiplies a (16, 32) bf16 tile by a (32, 16) one whose rows are stored in pairs, and
accumulates in float32 (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2).
Addresses and strides are in bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from worker.kernels.cpu.jit import build_exp, build_to_bf16, constant, inlined

SIDE = 32
"""Rows and columns of a block: 2 × 2 float32 tiles."""


# Instructions ---------------------------------------------------------------------------------------------------------

_BYTE, _LONG, _NONE = ir.IntType(8), ir.IntType(64), ir.VoidType()
_POINTER = _BYTE.as_pointer()


def _instruction(builder: Any, name: str, *given: tuple[Any, Any]) -> None:
    kinds, values = zip(*given, strict=True) if given else ((), ())
    name = f"llvm.x86.{name}"
    known = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(_NONE, kinds), name)
    builder.call(known, values)


@functools.cache
def shapes() -> torch.Tensor:
    """The tile configuration: eight tiles of 16 rows of 64 bytes."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32].view(np.uint16)[:] = 64
    config[48:56] = 16
    return torch.from_numpy(config)


@intrinsic
def configure(context: Any, address: Any) -> Any:
    """Load a tile configuration of 64 bytes (LDTILECFG)."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        _instruction(b, "ldtilecfg", (_POINTER, b.inttoptr(a[0], _POINTER)))
        return c.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def release(context: Any) -> Any:
    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        _instruction(b, "tilerelease")
        return c.get_dummy_value()

    return types.void(), build


def _tile_number(tile: types.Literal) -> tuple[Any, Any]:
    return _BYTE, _BYTE(tile.literal_value)


@intrinsic(prefer_literal=True)
def zero(context: Any, tile: Any) -> Any:
    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        _instruction(b, "tilezero", _tile_number(tile))
        return c.get_dummy_value()

    return types.void(tile), build


def _transfer(name: str, tile: Any) -> Any:
    """Signature and code of an instruction that loads or stores a tile: 16 rows of 64 bytes at a row stride."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        _instruction(b, name, _tile_number(tile), (_POINTER, b.inttoptr(a[1], _POINTER)), (_LONG, a[2]))
        return c.get_dummy_value()

    return types.void(tile, types.int64, types.int64), build


@intrinsic(prefer_literal=True)
def load(context: Any, tile: Any, address: Any, step: Any) -> Any:
    return _transfer("tileloadd64", tile)


@intrinsic(prefer_literal=True)
def store(context: Any, tile: Any, address: Any, step: Any) -> Any:
    return _transfer("tilestored64", tile)


@intrinsic(prefer_literal=True)
def dot(context: Any, sums: Any, left: Any, right: Any) -> Any:
    """`sums` += `left` · `right` (TDPBF16PS)."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        _instruction(b, "tdpbf16ps", _tile_number(sums), _tile_number(left), _tile_number(right))
        return c.get_dummy_value()

    return types.void(sums, left, right), build


@inlined
def square(to, to_row, left, left_row, left_step, right, right_row, right_step, products, overwrite):
    """A block (32, 32) of float32 at `to` = (with `overwrite`) or += the sum of `products` products of left (32, 32) bf16 and right (16
    pairs of rows, 32) bf16. `left_step` and `right_step` are the bytes from one product's operands to the next."""
    if overwrite:
        zero(0)
        zero(1)
        zero(2)
        zero(3)
    else:
        load(0, to, to_row)
        load(1, to + 64, to_row)
        load(2, to + 16 * to_row, to_row)
        load(3, to + 16 * to_row + 64, to_row)
    for t in range(products):
        a, b = left + t * left_step, right + t * right_step
        load(4, a, left_row)
        load(5, a + 16 * left_row, left_row)
        load(6, b, right_row)
        load(7, b + 64, right_row)
        dot(0, 4, 6)
        dot(1, 4, 7)
        dot(2, 5, 6)
        dot(3, 5, 7)
    store(0, to, to_row)
    store(1, to + 64, to_row)
    store(2, to + 16 * to_row, to_row)
    store(3, to + 16 * to_row + 64, to_row)


# Rows of a block, 32 numbers ------------------------------------------------------------------------------------------

_VECTOR = ir.VectorType(ir.FloatType(), 16)
_INDICES = ir.VectorType(ir.IntType(64), 16)


def _load_half(b: Any, address: Any, half: int) -> Any:
    place = b.inttoptr(b.add(address, _LONG(64 * half)), _VECTOR.as_pointer())
    return b.load(place, align=4)


def _store_rounded(b: Any, halves: Sequence[Any], address: Any) -> None:
    """Store a row rounded to bf16 in one 64-byte store: a tile load is served from it sooner than from two stores."""
    whole = b.shuffle_vector(
        *(build_to_bf16(b, half) for half in halves), ir.Constant(ir.VectorType(ir.IntType(32), SIDE), list(range(SIDE)))
    )
    b.store(whole, b.inttoptr(address, whole.type.as_pointer()), align=2)


def _store_half(b: Any, vector: Any, address: Any, half: int) -> None:
    b.store(vector, b.inttoptr(b.add(address, _LONG(64 * half)), _VECTOR.as_pointer()), align=4)


def _broadcast(b: Any, value: Any, kind: Any) -> Any:
    """One value broadcast to all lanes of a vector."""
    return b.shuffle_vector(
        b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.IntType(32)(0)),
        ir.Constant(kind, ir.Undefined),
        ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count),
    )


@intrinsic
def maximum(context: Any, row: Any, highest: Any) -> Any:
    """highest = max(row, highest), elementwise over 32 float32 values, in place."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        for half in (0, 1):
            x, y = _load_half(b, a[0], half), _load_half(b, a[1], half)
            _store_half(b, b.select(b.fcmp_ordered(">", x, y), x, y), a[1], half)
        return c.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def rounded(context: Any, row: Any, factor: Any, to: Any) -> Any:
    """row · factor for 32 float32 values, rounded to bf16 at `to`."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        factor = _broadcast(b, a[1], _VECTOR)
        _store_rounded(b, [b.fmul(_load_half(b, a[0], half), factor) for half in (0, 1)], a[2])
        return c.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), build


_SHORTS = ir.VectorType(ir.IntType(16), SIDE)


def _shorts(b: Any, address: Any) -> Any:
    return b.inttoptr(address, _SHORTS.as_pointer())


@intrinsic
def pair_rows(context: Any, upper: Any, lower: Any, to: Any) -> Any:
    """Interleave two rows of 32 bf16 values into 32 pairs, the layout of a tile's right operand."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        rows = [b.load(_shorts(b, a[i]), align=2) for i in (0, 1)]
        for half in (0, 1):
            chosen = [16 * half + j // 2 + (SIDE if j % 2 else 0) for j in range(SIDE)]
            mixed = b.shuffle_vector(*rows, ir.Constant(ir.VectorType(ir.IntType(32), SIDE), chosen))
            b.store(mixed, _shorts(b, b.add(a[2], _LONG(64 * half))), align=2)
        return c.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def transpose(context: Any, square: Any, step: Any, to: Any, to_step: Any) -> Any:
    """Transpose a (16, 16) matrix of 32-bit words, by exchanging halves of ever smaller squares."""

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
def mask(context: Any, row: Any, since: Any, until: Any) -> Any:
    """Set the positions of a row outside [since, until) to −1e30, whose exponential is negligible."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        for half in (0, 1):
            _store_half(b, b.select(_between(b, half, a[1], a[2]), _load_half(b, a[0], half), constant(_VECTOR, -1e30)), a[0], half)
        return c.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


def _between(b: Any, half: int, since: Any, until: Any) -> Any:
    """Which lanes of one half of a row are in [since, until)."""
    places = ir.Constant(_INDICES, [16 * half + j for j in range(16)])
    first, end = (_broadcast(b, x, _INDICES) for x in (since, until))
    return b.and_(b.icmp_signed(">=", places, first), b.icmp_signed("<", places, end))


@intrinsic
def row_maximum(context: Any, row: Any) -> Any:
    """The maximum of a row of 32 float32 values."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        found = [_load_half(b, a[0], half) for half in (0, 1)]
        found = b.select(b.fcmp_ordered(">", *found), *found)
        for size in (8, 4, 2, 1):
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 16), [(j + size) % 16 for j in range(16)])
            other = b.shuffle_vector(found, found, lanes)
            found = b.select(b.fcmp_ordered(">", found, other), found, other)
        return b.extract_element(found, ir.IntType(32)(0))

    return types.float32(types.int64), build


@intrinsic
def exponentials(context: Any, scores: Any, top: Any, scale: Any, sums: Any, p: Any) -> Any:
    """exp(scale · (score − top)) of a row of 32, added to `sums` in float32 and rounded to bf16 at `p`."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        top, scale = (_broadcast(b, x, _VECTOR) for x in (a[1], a[2]))
        found = [build_exp(b, b.fmul(b.fsub(_load_half(b, a[0], half), top), scale)) for half in (0, 1)]
        for half, e in enumerate(found):
            _store_half(b, b.fadd(_load_half(b, a[3], half), e), a[3], half)
        _store_rounded(b, found, a[4])
        return c.get_dummy_value()

    return types.void(types.int64, types.float32, types.float32, types.int64, types.int64), build


@intrinsic
def gradients(context: Any, scores: Any, d_p: Any, logs: Any, pulls: Any, scale: Any, since: Any, until: Any, p: Any, d_s: Any) -> Any:
    """P = exp(scale · score − log) of a row of 32, and dS = scale · P · (dP − pull), both rounded to bf16; zeros outside [since, until)."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        scale, none = _broadcast(b, a[4], _VECTOR), constant(_VECTOR, 0.0)
        found, given = [], []
        for half in (0, 1):
            e = build_exp(b, b.fsub(b.fmul(_load_half(b, a[0], half), scale), _load_half(b, a[2], half)))
            found.append(b.select(_between(b, half, a[5], a[6]), e, none))
            given.append(b.fmul(b.fmul(found[half], b.fsub(_load_half(b, a[1], half), _load_half(b, a[3], half))), scale))
        _store_rounded(b, found, a[7])
        _store_rounded(b, given, a[8])
        return c.get_dummy_value()

    long, number = types.int64, types.float32
    return types.void(long, long, long, long, number, long, long, long, long), build
