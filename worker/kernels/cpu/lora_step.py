"""LoRA forward, backward and AdamW on a CPU with AMX, with few calls between Python and torch: trainable factors are rounded to
bf16 once per step, and the gradients of A and B are written where the optimizer kernel reads them.

Parts of a pack run on parallel threads (`worker/runtime/thread_parallel.py`), and each torch call hands the GIL to another
thread, which a virtual machine wakes slowly. So a shared product makes four calls each way: one allocation, one kernel for the
low-rank products (`worker/kernels/cpu/lora_products.py`), and two torch products. Each part has gradient buffers of its own,
outside autograd; one pass sums them, another applies AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) and
rounds the factors where it writes them. The moments are those of the torch optimizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from worker.kernels.cpu import lora_products
from worker.kernels.cpu.adamw import AdamWParams, state_of
from worker.kernels.cpu.amx import SIDE
from worker.kernels.cpu.jit import F, addresses, contiguous_rows, kernel, row_of, to_bf16
from worker.kernels.cpu.lora_products import GradientBuffer, Layers
from worker.runtime.thread_parallel import ThreadParallel

HALF, LONG, DOUBLE = np.uint16(0), np.int64(0), np.float64(0)


class LoraFactor(NamedTuple):
    """An A or a B, its gradient in each part, and its bf16 `copy` times `scale`; also the transposed copy, where `transposed` is not None."""

    parameter: torch.nn.Parameter
    gradients: list[torch.Tensor]
    copy: torch.Tensor
    transposed: torch.Tensor | None
    scale: float


class LoraLayerState:
    """Bf16 copies and gradient buffers of A (r, K) and B (N, r) of layers that share a product.

    The copies are laid out as the product reads them, next to the frozen W (ΣN, K) and bias (ΣN,) or None in bf16; each of
    `parts` parts of a pack has a gradient buffer. Raises ValueError for sizes or dtypes that AMX does not take.
    """

    def __init__(
        self,
        downs: Sequence[torch.nn.Parameter],
        ups: Sequence[torch.nn.Parameter],
        scales: Sequence[float],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        abreast: ThreadParallel,
        parts: int,
    ) -> None:
        kind, (height, width) = weight.dtype, weight.shape
        self.downs, self.ups, self.scales = downs, ups, scales
        self.weight, self.transposed, self.bias, self.abreast = weight, weight.t(), bias, abreast
        self.down = torch.empty(sum(down.shape[0] for down in downs), width, dtype=kind)
        self.lifts = torch.zeros(self.down.shape[0], height, dtype=kind)  # s Bᵀ of each layer, as diagonal blocks
        self.layers = Layers([torch.empty(up.shape, dtype=kind) for up in ups], scales, width)
        self.buffers, self.filled = [GradientBuffer(self.layers) for _ in range(parts)], [False] * parts
        self.round()

    def factors(self) -> Iterator[LoraFactor]:
        row, column, buffers = 0, 0, [buffer.all() for buffer in self.buffers]
        for i, (down, up, scale) in enumerate(zip(self.downs, self.ups, self.scales, strict=True)):
            rows, columns = slice(row, row + down.shape[0]), slice(column, column + up.shape[0])
            yield LoraFactor(down, [buffer[0][rows] for buffer in buffers], self.down[rows], None, 1.0)
            yield LoraFactor(up, [buffer[1 + i] for buffer in buffers], self.layers.ups[i], self.lifts[rows, columns], scale)
            row, column = rows.stop, columns.stop

    @torch.no_grad()
    def round(self) -> None:
        """Refresh the copies from the current factors."""
        for factor in self.factors():
            factor.copy.copy_(factor.parameter * factor.scale)
            if factor.transposed is not None:
                factor.transposed.copy_(factor.copy.t())

    def supports(self, x: torch.Tensor) -> bool:
        """Whether x (…, K) can be computed here: the products' dtype, a multiple of 32 rows, and one thread."""
        rows = x.numel() // x.shape[-1]
        return x.dtype == self.weight.dtype and rows > 0 and rows % SIDE == 0 and torch.get_num_threads() == 1

    def take(self, dy: torch.Tensor, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Add the gradients of one pass to the current part's buffer; returns dy B (T, Σr)."""
        place = self.abreast.place()
        if not self.filled[place]:
            self.filled[place] = True
            return self.buffers[place].take(dy, x, low)
        more = GradientBuffer(self.layers)
        back = more.take(dy, x, low)
        for kept, added in zip(self.buffers[place].all(), more.all(), strict=True):
            kept += added
        return back

    def finish_step(self) -> bool:
        """Whether there are gradients; zeroes the buffers of parts that have none, and begins a new step."""
        found = any(self.filled)
        for buffer, filled in zip(self.buffers, self.filled, strict=True):
            if found and not filled:
                for gradient in buffer.all():
                    gradient.zero_()
        self.filled = [False] * len(self.buffers)
        return found


class Product(torch.autograd.Function):
    """x (…, K) through the layers of `own`: (…, ΣN). A factor is an argument so that autograd calls backward even where x needs
    no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: LoraLayerState, _: torch.Tensor) -> torch.Tensor:
        flat = contiguous_rows(x)
        low = lora_products.project(flat, own.down)
        y = low @ own.lifts if own.bias is None else torch.addmm(own.bias, low, own.lifts)
        y.addmm_(flat, own.transposed)
        ctx.save_for_backward(flat, low)
        ctx.own, ctx.shape = own, x.shape
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x, low), own, dy = ctx.saved_tensors, ctx.own, contiguous_rows(dy)
        back = own.take(dy, x, low)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dx = back @ own.down
        return dx.addmm_(dy, own.weight).view(ctx.shape), None, None


# A step -----------------------------------------------------------------------------------------------------------------


@kernel
def _sum_parts(table, width, start, stop):
    """Sum the parts' gradients of the factors [start, stop) into the first part's; returns the sum of squares of the results. A
    factor is a row of `width` int64: rows, columns, the row stride of its gradients in bytes, and the address of each gradient."""
    total = 0.0
    for e in range(start, stop):
        T = row_of(table, e, 8 * width, width, LONG)
        for i in range(T[0]):
            A, squares = row_of(T[3], i, T[2], T[1], F(0)), F(0.0)
            for more in range(4, width):
                B = row_of(T[more], i, T[2], T[1], F(0))
                for j in range(T[1]):
                    A[j] += B[j]
            for j in range(T[1]):
                squares += A[j] * A[j]
            total += squares  # type: ignore[assignment]  # numba makes one type of both
    return total


@kernel
def _adamw(table, rules, start, stop, clip_coefficient):
    """AdamW on the factors [start, stop). A factor is a row of ten int64: rows, columns, the gradient's row stride in bytes, the
    addresses of gradient, weight, first and second moment, copy and transposed copy (or 0), and the row stride of the last in
    bytes."""
    for e in range(start, stop):
        T, R = row_of(table, e, 80, 10, LONG), row_of(rules, e, 56, 7, DOUBLE)
        rows, columns, s = T[0], T[1], F(clip_coefficient)
        k, k1, n1, k2, n2 = F(R[0]), F(R[1]), F(1.0 - R[1]), F(R[2]), F(1.0 - R[2])
        r, d, eps, scale = F(R[3]), F(R[4]), F(R[5]), F(R[6])
        for i in range(rows):
            G, W = row_of(T[3], i, T[2], columns, F(0)), row_of(T[4], i, 4 * columns, columns, F(0))
            M, V = row_of(T[5], i, 4 * columns, columns, F(0)), row_of(T[6], i, 4 * columns, columns, F(0))
            C = row_of(T[7], i, 2 * columns, columns, HALF)
            for j in range(columns):
                g = G[j] * s
                m, v = M[j] * k1 + g * n1, V[j] * k2 + g * g * n2
                w = W[j] * k - r * m / (np.sqrt(v) * d + eps)
                M[j], V[j], W[j], C[j] = m, v, w, to_bf16(w * scale, HALF)
        if T[8] != 0:
            for j in range(columns):
                L = row_of(T[8], j, T[9], rows, HALF)
                for i in range(rows):
                    L[i] = row_of(T[7], i, 2 * columns, columns, HALF)[j]


class LoraOptimizer:
    """The optimizer step of all factors computed here. When a step's parts are done, call `squares`, then `move` if the norm is finite."""

    def __init__(self, places: Sequence[Any], optimizer: torch.optim.Optimizer, abreast: ThreadParallel) -> None:
        self.places, self.optimizer, self.abreast = places, optimizer, abreast  # places: the modules that hold a `LoraLayerState` as `own`
        self.products: list[LoraLayerState] = [place.own for place in places]
        self.every = [list(product.factors()) for product in self.products]
        self.moving: list[LoraFactor] = []  # the factors that have gradients in this step
        self.left_to_torch = False  # whether the gradients were handed to torch

    def squares(self) -> float:
        """The sum of squares of this step's gradients, summed over the parts. 0 where some passes could not use the kernels and
        left gradients in `parameter.grad`: all are then added there, for torch's optimizer."""
        self.moving = [factor for product, own in zip(self.products, self.every, strict=True) if product.finish_step() for factor in own]
        table_rows = [[*_size(f), *(g.data_ptr() for g in f.gradients)] for f in self.moving]
        total = sum(self._on_threads(_sum_parts, torch.tensor(table_rows, dtype=torch.int64), len(table_rows[0]))) if table_rows else 0.0
        self.left_to_torch = any(factor.parameter.grad is not None for own in self.every for factor in own)
        if not self.left_to_torch:
            return total
        for factor in self.moving:
            gradient, sum_ = factor.gradients[0], factor.parameter.grad
            factor.parameter.grad = gradient.clone(memory_format=torch.contiguous_format) if sum_ is None else sum_ + gradient
        self.moving = []
        return 0.0

    def move(self, clip_coefficient: float) -> None:
        """One AdamW step with `clip_coefficient` times the gradients, as torch's optimizer would take it."""
        if self.left_to_torch:
            for product in self.products:
                product.round()
        if not self.moving:
            return
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        states = [state_of(factor.parameter, self.optimizer) for factor in self.moving]
        torch._foreach_add_([state["step"] for state in states], 1)
        table_rows = [[*_size(factor), *_addresses(factor, state)] for factor, state in zip(self.moving, states, strict=True)]
        rules = [(*AdamWParams.of(groups[id(f.parameter)]).at(int(s["step"])), f.scale) for f, s in zip(self.moving, states, strict=True)]
        numbers = torch.tensor(rules, dtype=torch.float64)
        self._on_threads(_adamw, torch.tensor(table_rows, dtype=torch.int64), numbers.data_ptr(), after=(clip_coefficient,))

    def release(self) -> None:
        """Release the buffers when no step follows; the layers are computed as before."""
        for place in self.places:
            place.own = None
        self.products, self.every, self.moving, self.places = [], [], [], []

    def _on_threads(self, work: Any, table: torch.Tensor, given: int, after: Sequence[float] = ()) -> list[Any]:
        """Run a kernel over the moving factors, split into one piece of about equal size for each thread."""
        ends = torch.tensor([factor.parameter.numel() for factor in self.moving]).cumsum(0)
        cuts = torch.arange(1, self.abreast.threads) * ends[-1] // self.abreast.threads
        edges = [0, *torch.searchsorted(ends, cuts).tolist(), len(self.moving)]
        return self.abreast.map(lambda piece: work(table.data_ptr(), given, *piece, *after), list(itertools.pairwise(edges)))


def _size(factor: LoraFactor) -> tuple[int, int, int]:
    return *factor.copy.shape, factor.gradients[0].stride(0) * 4


def _addresses(factor: LoraFactor, state: dict[str, torch.Tensor]) -> Iterator[int]:
    yield from addresses(factor.gradients[0], factor.parameter, state["exp_avg"], state["exp_avg_sq"], factor.copy, factor.transposed)
    yield 0 if factor.transposed is None else factor.transposed.stride(0) * factor.transposed.itemsize
