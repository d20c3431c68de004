"""Numba toolkit of the CPU kernels: bf16 conversion, exp, row addressing, and compilation for the host CPU.

torch runs one kernel per operation: a norm or a gated activation reads and writes its rows five to nine times, and on a CPU with
AMX that takes half as long as all matrix products. A kernel here evaluates a whole formula in one pass, in float32, and rounds
once. They are in `rms_norm.py`, `gated_mlp.py`, `rotary.py`, `cross_entropy.py`, `attention.py`, `lora_products.py`,
`lora_step.py` and `adamw.py` of this package.

A kernel takes addresses, sizes, row strides in bytes, and for each dtype a sample value of it (`KINDS`), by which Numba
specializes it. It runs without the GIL. It is compiled on first use, which takes half a second, and cached on disk
(`NUMBA_CACHE_DIR`, else `cache/numba` in the data folder; see `worker/kernels/cpu/warmup.py`).
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
"""Whether the CPU has an instruction that rounds to bf16. CPUs that have it lose nothing by 512-bit vectors, which LLVM avoids by
default because older CPUs lower their clock for them: a chunk of the head's loss took 16.9 instead of 22.2 ms."""
if ROUNDS:
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = binding.get_host_cpu_name(), FEATURES + ",-prefer-256-bit"


class _Bf16(ir.Type):
    """LLVM's bf16 type, which llvmlite does not define."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bf16)

    def __hash__(self) -> int:
        return hash(_Bf16)


FLOAT, INT, SHORT, BF16 = ir.FloatType(), ir.IntType(32), ir.IntType(16), _Bf16()


# Formulas of float32, of one number or of a vector of them -------------------------------------------------------------


def constant(kind: Any, value: float) -> Any:
    """A constant of an LLVM type, broadcast to all lanes of a vector type."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _integers(kind: Any, bits: int) -> Any:
    return ir.VectorType(ir.IntType(bits), kind.count) if isinstance(kind, ir.VectorType) else ir.IntType(bits)


def _call(b: Any, name: str, *given: Any) -> Any:
    """Call an LLVM intrinsic whose arguments and result have one float32 (vector) type."""
    kind = given[0].type
    name = f"llvm.{name}." + (f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32")
    known = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(kind, [kind] * len(given)), name)
    return b.call(known, given)


def build_to_bf16(b: Any, x: Any) -> Any:
    """The bits of float32 x rounded to bf16, to nearest even. NaN stays NaN."""
    ints, shorts = _integers(x.type, 32), _integers(x.type, 16)
    if ROUNDS:
        return b.bitcast(b.fptrunc(x, ir.VectorType(BF16, x.type.count) if isinstance(x.type, ir.VectorType) else BF16), shorts)
    # Without the instruction: add half a unit of the last bit kept, a little less where that is even, and truncate.
    bits, half = b.bitcast(x, ints), constant(ints, 16)
    odd = b.and_(b.lshr(bits, half), constant(ints, 1))
    rounded = b.trunc(b.lshr(b.add(b.add(bits, constant(ints, 0x7FFF)), odd), half), shorts)
    return b.select(b.fcmp_unordered("uno", x, x), constant(shorts, 0x7FC0), rounded)


def build_exp(b: Any, x: Any) -> Any:
    """e^x in float32: 2^n times a polynomial of degree 5 in the remainder (Cephes, S. L. Moshier, expf). x is clamped to ±87; NaN
    propagates."""
    kind, ints = x.type, _integers(x.type, 32)

    def number(value: float) -> Any:
        return constant(kind, value)

    for bound, beyond in ((-87.0, "<"), (87.0, ">")):
        x = b.select(b.fcmp_ordered(beyond, x, number(bound)), number(bound), x)
    # ln 2 is subtracted in two parts (Cody and Waite), so that the remainder r keeps its precision.
    n = _call(b, "rint", b.fmul(x, number(1.44269504)))
    r = _call(b, "fma", n, number(2.12194440e-4), _call(b, "fma", n, number(-0.693359375), x))
    p = number(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = _call(b, "fma", p, r, number(factor))
    p = b.fadd(_call(b, "fma", b.fmul(p, r), r, r), number(1.0))
    # For NaN, fptosi gives an arbitrary n, but p is NaN already and the product stays NaN.
    power = b.shl(b.add(b.fptosi(n, ints), constant(ints, 127)), constant(ints, 23))
    return b.fmul(p, b.bitcast(power, kind))


# What Numba's Python has no word for -----------------------------------------------------------------------------------


@intrinsic
def at(context: Any, address: Any, like: Any) -> Any:
    """A pointer to values at an address, of the type of `like`; uint16 stands for bf16."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        return b.inttoptr(a[0], c.get_value_type(like).as_pointer())

    return types.CPointer(like)(types.int64, like), build


@intrinsic
def to_f32(context: Any, number: Any) -> Any:
    """bf16 to float32; float32 is returned unchanged."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        return b.bitcast(b.shl(b.zext(a[0], INT), INT(16)), FLOAT) if number == types.uint16 else a[0]

    return types.float32(number), build


@intrinsic
def to_bf16(context: Any, number: Any, like: Any) -> Any:
    """float32 rounded to bf16, to nearest even, where `like` is bf16; unchanged where it is float32. NaN stays NaN."""

    def build(c: Any, b: Any, s: Any, a: Any) -> Any:
        return a[0] if like == types.float32 else build_to_bf16(b, a[0])

    return like(types.float32, like), build


@intrinsic
def rank(context: Any, number: Any) -> Any:
    """An int32 with the order of the float32 values, inverted by `ranked`. NaN sorts first or last, by its sign."""

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
def maximum(context: Any, one: Any, other: Any) -> Any:
    """The maximum of two ranks."""
    return types.int32(types.int32, types.int32), lambda c, b, s, a: b.select(b.icmp_signed(">", a[0], a[1]), a[0], a[1])


F = np.float32
inlined = numba.njit(inline="always")
kernel: Callable[[Callable], Callable] = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
"""Compiles a kernel. Sums may be reordered (the same way in every run); NaN is not optimized away, because a diverged job must be
noticed."""


@intrinsic
def exp(context: Any, number: Any) -> Any:
    """e^x in float32, clamped to ±87, with a relative error below 2e-7."""
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
    """Whether kernels can be compiled and run here; tried once. Without them torch's own, slower operations are used."""
    try:
        x = torch.full((40,), 3.0, dtype=torch.bfloat16)
        _powers(*addresses(x, x), KINDS[x.dtype], len(x))
    except Exception as error:
        log.warning("CPU kernels cannot be compiled, so torch's own operations are used: %s: %s", type(error).__name__, error)
        return False
    return bool((x == 20.125).all())


KINDS = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0)}
"""The sample value by which a kernel is specialized for a dtype."""


def supports(*tensors: torch.Tensor) -> bool:
    """Whether kernels may be used and take these tensors: bf16 or float32, on a CPU, real ones and not a compiler's."""
    for x in tensors:  # a loop, since this is asked for each piece of each layer
        if x.dtype not in KINDS or not x.is_cpu:
            return False
    return not torch.compiler.is_compiling() and kernels.allowed() and is_available()


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """x (…, N) as rows (R, N) whose elements are contiguous; a copy where they are not."""
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x (…, N), or contiguous rows of it where it has gaps; the number of rows R; the row stride in bytes."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x, x.numel() // width, width * x.itemsize
    rows = contiguous_rows(x)
    return rows, rows.shape[0], rows.stride(0) * x.itemsize


def steps(*tensors: torch.Tensor) -> list[int]:
    """Row strides in bytes."""
    return [x.stride(0) * x.itemsize for x in tensors]


def addresses(*tensors: torch.Tensor | None) -> list[int]:
    """Data addresses of tensors; 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]
