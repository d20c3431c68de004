"""What passes over rows of numbers on a CPU are written with, compiled for the processor they run on (Numba).

torch has one kernel for each single operation: a norm or a gated activation reads and writes its rows five to nine times, and on a CPU
with matrix units that takes half as long as all matrix products. A kernel here does a whole formula in one pass, in float32, and rounds
once. The kernels stand where they are used: `rms_norm.py`, `gated_mlp.py`, `rotary.py`, `cross_entropy.py`, `attention.py`, `lora_products.py`,
`lora_step.py` and `adamw.py`, all in `worker/kernels/cpu/`.

A kernel takes addresses, sizes, bytes from one row to the next, and for each type of numbers one that is `like` them (`KINDS`). It
holds no lock of Python's while it runs, is compiled on first use, which takes half a second, and is kept on disk (`NUMBA_CACHE_DIR`, else
`cache/numba` in the data folder; see `worker/kernels/cpu/warmup.py`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from worker import kernels
from worker.runtime import kernel_cache

log = logging.getLogger(__name__)

numba.config.CACHE_DIR = str(kernel_cache.folder())

FEATURES = binding.get_host_cpu_features().flatten()
ROUNDS = "+avx512bf16" in FEATURES.split(",")
"""Whether the processor has an instruction that rounds to bf16. Those that have it lose nothing by vectors of 512 bits, which LLVM
avoids on some for the sake of older ones: a chunk of the head's loss took 16.9 instead of 22.2 ms."""
if ROUNDS:
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = binding.get_host_cpu_name(), FEATURES + ",-prefer-256-bit"


class _Bf16(ir.Type):
    """LLVM's type of bf16, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bf16)

    def __hash__(self) -> int:
        return hash(_Bf16)


FLOAT, INT, SHORT, BF16 = ir.FloatType(), ir.IntType(32), ir.IntType(16), _Bf16()


# Formulas of float32, of one number or of a vector of them -------------------------------------------------------------


def constant(kind: Any, value: float) -> Any:
    """A value of an LLVM type, in each place of a vector."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _integers(kind: Any, bits: int) -> Any:
    return ir.VectorType(ir.IntType(bits), kind.count) if isinstance(kind, ir.VectorType) else ir.IntType(bits)


def _call(b: Any, name: str, *given: Any) -> Any:
    """One of LLVM's functions that take and give one type."""
    kind = given[0].type
    name = f"llvm.{name}." + (f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32")
    known = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(kind, [kind] * len(given)), name)
    return b.call(known, given)


def build_narrow(b: Any, x: Any) -> Any:
    """The bits of x rounded to bf16, to nearest even."""
    ints, shorts = _integers(x.type, 32), _integers(x.type, 16)
    if ROUNDS:
        return b.bitcast(b.fptrunc(x, ir.VectorType(BF16, x.type.count) if isinstance(x.type, ir.VectorType) else BF16), shorts)
    bits, half = b.bitcast(x, ints), constant(ints, 16)
    odd = b.and_(b.lshr(bits, half), constant(ints, 1))
    rounded = b.trunc(b.lshr(b.add(b.add(bits, constant(ints, 0x7FFF)), odd), half), shorts)
    return b.select(b.fcmp_unordered("uno", x, x), constant(shorts, 0x7FC0), rounded)


def build_exp(b: Any, x: Any) -> Any:
    """e to the power of x: 2 to the power of a whole number times a polynomial of degree 5 (Cephes, S. L. Moshier, expf). What is no
    number stays none."""
    kind, ints = x.type, _integers(x.type, 32)

    def number(value: float) -> Any:
        return constant(kind, value)

    for bound, beyond in ((-87.0, "<"), (87.0, ">")):
        x = b.select(b.fcmp_ordered(beyond, x, number(bound)), number(bound), x)
    n = _call(b, "rint", b.fmul(x, number(1.44269504)))
    r = _call(b, "fma", n, number(2.12194440e-4), _call(b, "fma", n, number(-0.693359375), x))
    p = number(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = _call(b, "fma", p, r, number(factor))
    p = b.fadd(_call(b, "fma", b.fmul(p, r), r, r), number(1.0))
    # What is no number has no whole number beside it either, and keeps p from being one.
    power = b.shl(b.add(b.fptosi(n, ints), constant(ints, 127)), constant(ints, 23))
    return b.fmul(p, b.bitcast(power, kind))


# What Numba's Python has no word for -----------------------------------------------------------------------------------


@intrinsic
def at(context: Any, address: Any, like: Any) -> Any:
    """The numbers at an address, of the type of `like`: uint16 stands for bf16."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        return b.inttoptr(a[0], c.get_value_type(like).as_pointer())

    return types.CPointer(like)(types.int64, like), build


@intrinsic
def to_f32(context: Any, number: Any) -> Any:
    """bf16 as float32; float32 as it is."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        return b.bitcast(b.shl(b.zext(a[0], INT), INT(16)), FLOAT) if number == types.uint16 else a[0]

    return types.float32(number), build


@intrinsic
def to_bf16(context: Any, number: Any, like: Any) -> Any:
    """float32 rounded to bf16, to nearest even, where `like` is that; what is no number stays none."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        return a[0] if like == types.float32 else build_narrow(b, a[0])

    return like(types.float32, like), build


@intrinsic
def rank(context: Any, number: Any) -> Any:
    """An integer that orders float32 numbers as they are ordered, turned back by `ranked`. What is no number comes first or last."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        bits = b.bitcast(a[0], INT)
        return b.xor(bits, b.and_(b.ashr(bits, INT(31)), INT(0x7FFFFFFF)))

    return types.int32(types.float32), build


@intrinsic
def ranked(context: Any, rank: Any) -> Any:
    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        return b.bitcast(b.xor(a[0], b.and_(b.ashr(a[0], INT(31)), INT(0x7FFFFFFF))), FLOAT)

    return types.float32(types.int32), build


@intrinsic
def later(context: Any, one: Any, other: Any) -> Any:
    """The higher of two ranks."""
    return types.int32(types.int32, types.int32), lambda c, b, s, a: b.select(b.icmp_signed(">", a[0], a[1]), a[0], a[1])


F = np.float32
inlined = numba.njit(inline="always")
kernel: Callable[[Callable], Callable] = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
"""Sums may be taken in any order, the same in every run; what is no number stays none, for a job that diverges must be seen to."""


@intrinsic
def exp(context: Any, number: Any) -> Any:
    """e to the power of a float32, held to ±87, within 2e-7 of its value."""
    return types.float32(types.float32), lambda c, b, s, a: build_exp(b, a[0])


@inlined
def sigmoid(x):
    return F(1.0) / (F(1.0) + exp(-x))


@inlined
def row_of(address, i, stride, width, like):
    return numba.carray(at(address + i * stride, like), (width,))


# On tensors -----------------------------------------------------------------------------------------------------------


@kernel
def _powers(x, y, kind, count):
    X, Y = row_of(x, 0, 0, count, kind), row_of(y, 0, 0, count, kind)
    for j in range(count):
        Y[j] = to_bf16(exp(to_f32(X[j])), kind)


@functools.cache
def is_available() -> bool:
    """Whether kernels can be compiled and run here, tried once. Without them torch's own operations are taken, which are slower."""
    try:
        x = torch.full((40,), 3.0, dtype=torch.bfloat16)
        _powers(*addresses(x, x), KINDS[x.dtype], len(x))
    except Exception as error:
        log.warning(
            "Kernels for this processor cannot be compiled, so torch's own operations are taken: %s: %s", type(error).__name__, error
        )
        return False
    return bool((x == 20.125).all())


KINDS = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0)}
"""What the kernels tell types of numbers by."""


def supports(*tensors: torch.Tensor) -> bool:
    """Whether kernels may be used and take these tensors: bf16 or float32, on a CPU, real ones and not a compiler's."""
    for x in tensors:  # a loop, since this is asked for each piece of each layer
        if x.dtype not in KINDS or not x.is_cpu:
            return False
    return not torch.compiler.is_compiling() and kernels.allowed() and is_available()


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """x (…, N) as rows (R, N) whose numbers lie side by side; copied where they do not."""
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x (…, N) as it is, where its rows lie one after the other, or as `contiguous_rows` gives it; how many rows; bytes from one to the next."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x, x.numel() // width, width * x.itemsize
    rows = contiguous_rows(x)
    return rows, rows.shape[0], rows.stride(0) * x.itemsize


def steps(*tensors: torch.Tensor) -> list[int]:
    """Bytes from a row to the next."""
    return [x.stride(0) * x.itemsize for x in tensors]


def addresses(*tensors: torch.Tensor | None) -> list[int]:
    """Where tensors lie; 0 for one that is not there."""
    return [0 if x is None else x.data_ptr() for x in tensors]
