"""LoRA's low-rank products on a CPU with AMX. They are bound by reading x and dy, so each is read once.

    project    x (T, K) · A ᵀ              with A (r, K):      (T, r)
    both       dy (T, N) · B               with B (N, r):      (T, r)
               (lowᵀ · dy)ᵀ                with low (T, r):    (N, r), float32
    gather     lowᵀ · x                    with low (T, r):    (r, K), float32

T, K and N are multiples of 32, r is any. As separate products these took a seventh of a step: at rank 16 oneDNN reads the wide
matrix at a quarter of the memory bandwidth, and two of the products read dy twice. A `GradientBuffer` takes the backward pass of
all layers of one shared product in one call. (Tile layouts: `worker/kernels/cpu/amx.py`.)
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence

import numpy as np
import torch

from worker import kernels
from worker.kernels.cpu import attention as amx_attention
from worker.kernels.cpu.amx import SIDE, configure, dot, load, pair_rows, release, shapes, store, transpose, zero
from worker.kernels.cpu.jit import F, addresses, inlined, kernel, row_of, to_bf16

log = logging.getLogger(__name__)

HALF, WORD, LONG = np.uint16(0), np.uint32(0), np.int64(0)
LANE = 16
"""Ranks computed at once: the columns of a tile."""
TILE = 1024
"""Bytes of a tile."""


@kernel
def _pack_rows(x, step, rows, columns, y):
    """Pack x (rows, columns) into right-operand tiles of 32 rows by 16 columns, rows in pairs, one column block after another;
    zero-filled beyond `columns`."""
    lanes = (columns + LANE - 1) // LANE
    for lane in range(lanes):
        width = min(LANE, columns - lane * LANE)
        for i in range(rows // 2):
            A, B = row_of(x + 2 * LANE * lane, 2 * i, step, width, HALF), row_of(x + 2 * LANE * lane, 2 * i + 1, step, width, HALF)
            Y = row_of(y + lane * (rows // SIDE) * TILE, i, 64, LANE, WORD)
            for j in range(width):
                Y[j] = np.uint32(A[j]) | (np.uint32(B[j]) << np.uint32(16))
            for j in range(width, LANE):
                Y[j] = WORD


@kernel
def _pack_transposed(x, step, columns, rows, scratch, y):
    """The same for a transposed x (columns, rows)."""
    lanes = (columns + LANE - 1) // LANE
    for lane in range(lanes):
        height = min(LANE, columns - lane * LANE)
        for s in range(rows // SIDE):
            source, line = x + lane * LANE * step + 64 * s, step
            if height < LANE:
                for j in range(LANE):
                    Y = row_of(scratch, j, 64, LANE, WORD)
                    for i in range(LANE):
                        Y[i] = WORD
                    if j < height:
                        X = row_of(source, j, step, LANE, WORD)
                        for i in range(LANE):
                            Y[i] = X[i]
                source, line = scratch, 64
            transpose(source, line, y + (lane * (rows // SIDE) + s) * TILE, 64)


@inlined
def _store_rounded(tile_at, out, out_row, lane, rank, rows):
    """Round the rows of a float32 tile to bf16 into their columns of `out`."""
    width = min(LANE, rank - lane * LANE)
    for i in range(rows):
        S, Y = row_of(tile_at, i, 64, LANE, F(0)), row_of(out + 2 * LANE * lane, i, out_row, width, HALF)
        for j in range(width):
            Y[j] = to_bf16(S[j], HALF)


@kernel
def _project(x, step, rows, width, down, down_row, rank, out, out_row, scratch, config):
    steps, lanes, right = width // SIDE, (rank + LANE - 1) // LANE, scratch + 2 * TILE
    # Aᵀ as right-operand tiles, packed once for all rows.
    _pack_transposed(down, down_row, rank, width, scratch, right)
    configure(config)
    for first in range(0, rows, SIDE):
        for lane in range(lanes):
            zero(0)
            zero(1)
            for s in range(steps):
                at = x + first * step + 64 * s
                load(6, right + (lane * steps + s) * TILE, 64)
                load(4, at, step)
                dot(0, 4, 6)
                load(5, at + LANE * step, step)
                dot(1, 5, 6)
            store(0, scratch, 64)
            store(1, scratch + TILE, 64)
            _store_rounded(scratch, out + first * out_row, out_row, lane, rank, SIDE)
    release()


@kernel
def _accumulate(x, step, rows, width, low, low_row, rank, right, back, back_row, sums, scratch, config):
    """`sums` (16 ⌈rank / 16⌉, width) = lowᵀ x, and where `right` is not 0 `back` (rows, rank) = x · right. 64 rows at a time, so
    that the sums are loaded and stored half as often."""
    steps, lanes, sums_row = width // SIDE, (rank + LANE - 1) // LANE, 4 * width
    transposed, pairs = scratch, scratch + 2 * TILE
    found = pairs + 2 * TILE
    configure(config)
    for lane in range(lanes):
        for first in range(0, rows, 2 * SIDE):
            halves = min(2, (rows - first) // SIDE)
            # lowᵀ of these rows, the left operand of the sums.
            for h in range(halves):
                _pack_rows(low + (first + SIDE * h) * low_row + 2 * LANE * lane, low_row, SIDE, min(LANE, rank - lane * LANE), pairs)
                transpose(pairs, 64, transposed + h * TILE, 64)
            # Tiles 0 to 3 accumulate `back`, 4 and 5 `sums`; 6 and 7 are operands.
            zero(0)
            zero(1)
            zero(2)
            zero(3)
            for s in range(steps):
                at, to = x + first * step + 64 * s, sums + lane * LANE * sums_row + 128 * s
                if right:
                    load(6, right + (lane * steps + s) * TILE, 64)
                    load(7, at, step)
                    dot(0, 7, 6)
                    load(7, at + LANE * step, step)
                    dot(1, 7, 6)
                    if halves == 2:
                        load(7, at + SIDE * step, step)
                        dot(2, 7, 6)
                        load(7, at + (SIDE + LANE) * step, step)
                        dot(3, 7, 6)
                if first:
                    load(4, to, sums_row)
                    load(5, to + 64, sums_row)
                else:
                    zero(4)
                    zero(5)
                # x in pairs of rows is the right operand.
                for h in range(halves):
                    for i in range(LANE):
                        pair = at + (SIDE * h + 2 * i) * step
                        pair_rows(pair, pair + step, pairs + 128 * i)
                    load(6, transposed + h * TILE, 64)
                    load(7, pairs, 128)
                    dot(4, 6, 7)
                    load(7, pairs + 64, 128)
                    dot(5, 6, 7)
                store(4, to, sums_row)
                store(5, to + 64, sums_row)
            if right:
                store(0, found, 64)
                store(1, found + TILE, 64)
                store(2, found + 2 * TILE, 64)
                store(3, found + 3 * TILE, 64)
                _store_rounded(found, back + first * back_row, back_row, lane, rank, halves * SIDE)
    release()


@kernel
def _both(dy, step, rows, width, up, up_row, low, low_row, rank, back, back_row, out, scale, scratch, config):
    lanes, c = (rank + LANE - 1) // LANE, F(scale)
    sums = scratch + 8 * TILE
    right = sums + lanes * LANE * 4 * width
    _pack_rows(up, up_row, width, rank, right)
    _accumulate(dy, step, rows, width, low, low_row, rank, right, back, back_row, sums, scratch, config)
    # out = scale · sumsᵀ, 16 × 16 values at a time.
    S = row_of(sums, 0, 0, lanes * LANE * width, F(0))
    for i in range(lanes * LANE * width):
        S[i] *= c
    for lane in range(lanes):
        for s in range(width // LANE):
            transpose(sums + lane * LANE * 4 * width + 64 * s, 4 * width, out + 4 * LANE * (s * LANE * lanes + lane), 4 * LANE * lanes)


@kernel
def _all_layers(dy, dy_row, rows, x, x_row, width, low, rank, layers, scales, count, back, d_down, scratch, config):
    """`both` for each layer of a shared product, whose dy are concatenated, then `gather` of the concatenated results."""
    L, S = row_of(layers, 0, 0, 4 * count, LONG), row_of(scales, 0, 0, count, np.float64(0))
    column, before = 0, 0
    for i in range(count):
        height, own, up, d_up = L[4 * i], L[4 * i + 1], L[4 * i + 2], L[4 * i + 3]
        sides = low + 2 * before, 2 * rank, own, back + 2 * before, 2 * rank
        _both(dy + 2 * column, dy_row, rows, height, up, 2 * own, *sides, d_up, S[i], scratch, config)
        column += height
        before += own
    _accumulate(x, x_row, rows, width, back, 2 * rank, rank, 0, 0, 0, d_down, scratch, config)


def _row(x: torch.Tensor) -> int:
    return x.stride(0) * x.itemsize


def _lanes(rank: int) -> int:
    return -(-rank // LANE)


def supports(*wide: torch.Tensor) -> bool:
    """Whether AMX takes these matrices (…, K): bf16, both dimensions multiples of 32, contiguous rows, and one thread, because a
    product on several threads would have to be split."""
    return (
        not torch.compiler.is_compiling()
        and all(x.dtype == torch.bfloat16 and x.shape[1] % SIDE == 0 and x.stride(1) == 1 and x.device.type == "cpu" for x in wide)
        and wide[0].shape[0] % SIDE == 0
        and torch.get_num_threads() == 1
        and kernels.allowed()
        and is_available()
    )


@functools.cache
def is_available() -> bool:
    """Whether this CPU has AMX and the kernels compute correctly with it; tried once."""
    if not amx_attention.is_available():
        return False
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            x, low = (torch.linspace(-2, 2, 32 * n).sin().bfloat16().view(32, n) for n in (32, 3))
            back = torch.empty_like(low)
            found = [project(x, low.t().contiguous()), both(x, low, low, back), back, gather(x, low)]
            wanted = [x.float() @ low.float(), x.float().t() @ low.float(), x.float() @ low.float(), low.float().t() @ x.float()]
            return all(torch.allclose(a.float(), b, rtol=0.02, atol=0.02) for a, b in zip(found, wanted, strict=True))
    except Exception as error:
        log.warning("AMX cannot be used for LoRA's products: %s: %s", type(error).__name__, error)
        return False


_local = threading.local()  # .scratch: this thread's scratch memory


def _scratch(size: int) -> int:
    """Address of at least `size` bytes of this thread's scratch memory. Allocating a tensor per call would be one more torch
    call, and each of these hands the GIL to a waiting thread, which a virtual machine wakes slowly."""
    scratch = getattr(_local, "scratch", None)
    if scratch is None or scratch.nbytes < size:
        scratch = _local.scratch = torch.empty(size, dtype=torch.uint8)
    return scratch.data_ptr()


def _check(wide: torch.Tensor, *narrow: tuple[torch.Tensor, tuple[int, int]]) -> None:
    """Raise ValueError where a kernel would read or write out of bounds."""
    if wide.shape[0] % SIDE or wide.shape[1] % SIDE:
        raise ValueError(f"AMX takes multiples of 32, not {tuple(wide.shape)}")
    for x, shape in ((wide, tuple(wide.shape)), *narrow):
        if tuple(x.shape) != shape or x.dtype != torch.bfloat16 or x.stride(1) != 1:
            raise ValueError(f"{tuple(x.shape)} in {x.dtype} with strides {x.stride()} where rows of {shape} in bf16 are needed")


def project(x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x (T, K) · downᵀ for down (r, K), all bf16: (T, r). Raises ValueError when shapes, dtypes or strides do not match."""
    (rows, width), rank = x.shape, down.shape[0]
    _check(x, (down, (rank, width)))
    out, scratch = torch.empty(rows, rank, dtype=x.dtype), _scratch(TILE * (2 + _lanes(rank) * width // SIDE))
    x_at, down_at, out_at, config = addresses(x, down, out, shapes())
    _project(x_at, _row(x), rows, width, down_at, _row(down), rank, out_at, 2 * rank, scratch, config)
    return out


def both(dy: torch.Tensor, up: torch.Tensor, low: torch.Tensor, back: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Write dy (T, N) · up (N, r) into `back` (T, r), all bf16; return `scale` · dyᵀ · low for low (T, r): (N, r) in float32.
    Raises ValueError as `project` does."""
    (rows, width), rank = dy.shape, up.shape[1]
    _check(dy, (up, (width, rank)), (low, (rows, rank)), (back, (rows, rank)))
    lanes = _lanes(rank)
    out, scratch = torch.empty(width, lanes * LANE), _scratch(TILE * (8 + lanes * width // SIDE) + lanes * LANE * 4 * width)
    dy_at, up_at, low_at, back_at, out_at, config = addresses(dy, up, low, back, out, shapes())
    sides = dy_at, _row(dy), rows, width, up_at, _row(up), low_at, _row(low), rank
    _both(*sides, back_at, _row(back), out_at, scale, scratch, config)
    return out if lanes * LANE == rank else out[:, :rank].contiguous()


def gather(x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """lowᵀ · x for low (T, r) and x (T, K), bf16: (r, K) in float32. Raises ValueError as `project` does."""
    (rows, width), rank = x.shape, low.shape[1]
    _check(x, (low, (rows, rank)))
    sums, scratch = torch.empty(_lanes(rank) * LANE, width), _scratch(8 * TILE)
    x_at, low_at, sums_at, config = addresses(x, low, sums, shapes())
    _accumulate(x_at, _row(x), rows, width, low_at, _row(low), rank, 0, 0, 0, sums_at, scratch, config)
    return sums if sums.shape[0] == rank else sums[:rank]


# All of the layers of one product at once ---------------------------------------------------------------------------


def supports_sizes(width: int, heights: Sequence[int]) -> bool:
    """Whether layers of these sizes can be computed: all multiples of 32."""
    return not any(size % SIDE for size in (width, *heights))


class Layers:
    """Layers that read the same x (T, K): their bf16 copies of B (N, r), and the factors of dB. Raises ValueError for unsupported
    sizes or dtypes."""

    def __init__(self, ups: Sequence[torch.Tensor], scales: Sequence[float], width: int) -> None:
        if any(up.dtype != torch.bfloat16 or not up.is_contiguous() for up in ups) or not supports_sizes(
            width, [up.shape[0] for up in ups]
        ):
            raise ValueError(f"AMX takes multiples of 32 in bf16, not {[(tuple(up.shape), up.dtype) for up in ups]} and {width}")
        self.ups, self.width, self.rank, self.height = ups, width, sum(up.shape[1] for up in ups), sum(up.shape[0] for up in ups)
        self.scales = torch.tensor(scales, dtype=torch.float64)
        self.work = max(8 * TILE, *(TILE * (8 + lanes * n // SIDE) + lanes * LANE * 4 * n for n, lanes in self.sizes()))

    def sizes(self) -> list[tuple[int, int]]:
        """(N, number of 16-rank blocks) of each layer."""
        return [(up.shape[0], _lanes(up.shape[1])) for up in self.ups]


class GradientBuffer:
    """Gradients of the layers' A and B, float32: `down` (Σr, K) and `ups` (N, r), views of tensors whose ranks are padded to
    multiples of 16."""

    def __init__(self, layers: Layers) -> None:
        self.layers, self.down = layers, torch.empty(_lanes(layers.rank) * LANE, layers.width)[: layers.rank]
        wide = [torch.empty(height, lanes * LANE) for height, lanes in layers.sizes()]
        self.ups = [scratch[:, : up.shape[1]] for scratch, up in zip(wide, layers.ups, strict=True)]
        table = [[*up.shape, up.data_ptr(), own.data_ptr()] for up, own in zip(layers.ups, wide, strict=True)]
        self.table = torch.tensor(table, dtype=torch.int64)
        self.table_addresses = self.table.data_ptr(), layers.scales.data_ptr(), len(table)

    def all(self) -> list[torch.Tensor]:
        """`down`, then `ups`."""
        return [self.down, *self.ups]

    def take(self, dy: torch.Tensor, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Write the gradients given by dy (T, ΣN), x (T, K) and low = x Aᵀ (T, Σr) into this buffer; return dy B of each layer,
        concatenated, (T, Σr).

        Raises ValueError when shapes or dtypes do not match.
        """
        layers, rows = self.layers, dy.shape[0]
        _check(x, (low, (rows, layers.rank)))
        if dy.shape != (rows, layers.height) or x.shape != (rows, layers.width) or dy.dtype != low.dtype or dy.stride(1) != 1:
            raise ValueError(f"{tuple(dy.shape)} in {dy.dtype} and {tuple(x.shape)} for layers of {layers.height} by {layers.width}")
        back = torch.empty(rows, layers.rank, dtype=low.dtype)
        sides = dy.data_ptr(), 2 * dy.stride(0), rows, x.data_ptr(), 2 * x.stride(0), layers.width, low.data_ptr(), layers.rank
        _all_layers(*sides, *self.table_addresses, back.data_ptr(), self.down.data_ptr(), _scratch(layers.work), shapes().data_ptr())
        return back
