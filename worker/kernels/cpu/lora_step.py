"""LoRA's layers on a CPU with matrix units, with few words between Python and torch: what learns is rounded once a step, and the
gradients of A and B are put where the optimizer finds them.

Parts of a pack run in threads beside each other (`worker/runtime/thread_parallel.py`), and each call of torch hands Python's lock to the other thread,
which a virtual machine wakes slowly. So a product of layers that read the same x asks for four things each way: room for what comes out,
the small products in one call of a kernel (`worker/kernels/cpu/lora_products.py`), and two products of torch's. Gradients go to a place of each part's
own, past autograd; one pass adds them, another moves the factors by AdamW (Loshchilov and Hutter 2019,
https://arxiv.org/abs/1711.05101) and rounds them where it writes them. The moments are the optimizer's own.
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
    """An A or a B, the parts' gradients of it, and where it stands in bf16 times `scale`; turned as well, where `turned` is not None."""

    parameter: torch.nn.Parameter
    gradients: list[torch.Tensor]
    copy: torch.Tensor
    turned: torch.Tensor | None
    scale: float


class LoraLayerState:
    """A (r, K) and B (N, r) of layers that read the same x, as their product reads them: with W (ΣN, K) and a bias (ΣN,) or None, in bf16,
    that they add to, and with a room for their gradients for each of `parts` of a pack. Raises ValueError where the units do not take them.
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
        self.weight, self.turned, self.bias, self.abreast = weight, weight.t(), bias, abreast
        self.down = torch.empty(sum(down.shape[0] for down in downs), width, dtype=kind)
        self.lifts = torch.zeros(self.down.shape[0], height, dtype=kind)  # all s B, turned, each beside and below the one before
        self.layers = Layers([torch.empty(up.shape, dtype=kind) for up in ups], scales, width)
        self.rooms, self.filled = [GradientBuffer(self.layers) for _ in range(parts)], [False] * parts
        self.round()

    def factors(self) -> Iterator[LoraFactor]:
        row, column, rooms = 0, 0, [room.all() for room in self.rooms]
        for i, (down, up, scale) in enumerate(zip(self.downs, self.ups, self.scales, strict=True)):
            rows, columns = slice(row, row + down.shape[0]), slice(column, column + up.shape[0])
            yield LoraFactor(down, [room[0][rows] for room in rooms], self.down[rows], None, 1.0)
            yield LoraFactor(up, [room[1 + i] for room in rooms], self.layers.ups[i], self.lifts[rows, columns], scale)
            row, column = rows.stop, columns.stop

    @torch.no_grad()
    def round(self) -> None:
        """Take the factors as they are now."""
        for factor in self.factors():
            factor.copy.copy_(factor.parameter * factor.scale)
            if factor.turned is not None:
                factor.turned.copy_(factor.copy.t())

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the units multiply x (…, K): in the type of the products, whole thirty-twos of rows, in a thread of its own."""
        rows = x.numel() // x.shape[-1]
        return x.dtype == self.weight.dtype and rows > 0 and rows % SIDE == 0 and torch.get_num_threads() == 1

    def take(self, dy: torch.Tensor, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Keep what the pass of this thread's part says of the factors, with what it said in this step before; returns dy B (T, Σr)."""
        place = self.abreast.place()
        if not self.filled[place]:
            self.filled[place] = True
            return self.rooms[place].take(dy, x, low)
        more = GradientBuffer(self.layers)
        back = more.take(dy, x, low)
        for kept, added in zip(self.rooms[place].all(), more.all(), strict=True):
            kept += added
        return back

    def settle(self) -> bool:
        """Whether there are gradients; where a part has none its room is emptied."""
        found = any(self.filled)
        for room, filled in zip(self.rooms, self.filled, strict=True):
            if found and not filled:
                for gradient in room.all():
                    gradient.zero_()
        self.filled = [False] * len(self.rooms)
        return found


class Product(torch.autograd.Function):
    """x (…, K) through the layers that `own` stands for: (…, ΣN). A factor is given so that the pass comes back also where x needs nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, own: LoraLayerState, _: torch.Tensor) -> torch.Tensor:
        flat = contiguous_rows(x)
        low = lora_products.project(flat, own.down)
        y = low @ own.lifts if own.bias is None else torch.addmm(own.bias, low, own.lifts)
        y.addmm_(flat, own.turned)
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
def _add(table, width, start, stop):
    """Add the gradients of factors in the place of the first of each; returns the sum of the squares of what comes of it. A factor has
    `width` words: rows, columns, bytes from a gradient's row to the next, and where each lies."""
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
def _move(table, rules, start, stop, shorten):
    """A factor has ten words: rows, columns, bytes from a gradient's row to the next, where it lies, and the weight, its two means, its
    copy, and that turned or 0, and bytes from a row of that to the next."""
    for e in range(start, stop):
        T, R = row_of(table, e, 80, 10, LONG), row_of(rules, e, 56, 7, DOUBLE)
        rows, columns, s = T[0], T[1], F(shorten)
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
    """All factors of a job that are computed so. When a step's parts are through, ask for `squares`, then `move` where these are finite."""

    def __init__(self, places: Sequence[Any], optimizer: torch.optim.Optimizer, abreast: ThreadParallel) -> None:
        self.places, self.optimizer, self.abreast = places, optimizer, abreast  # each of which has factors of its own
        self.products: list[LoraLayerState] = [place.own for place in places]
        self.every = [list(product.factors()) for product in self.products]
        self.moving: list[LoraFactor] = []  # what has gradients in this step
        self.elsewhere = False  # whether these were handed to torch

    def squares(self) -> float:
        """The sum of the squares of this step's gradients, those of all parts added; 0 where some lie in `parameter.grad`, of passes that
        did not fit, and all were put there."""
        self.moving = [factor for product, own in zip(self.products, self.every, strict=True) if product.settle() for factor in own]
        told = [[*_size(f), *(g.data_ptr() for g in f.gradients)] for f in self.moving]
        total = sum(self._share(_add, torch.tensor(told, dtype=torch.int64), len(told[0]))) if told else 0.0
        self.elsewhere = any(factor.parameter.grad is not None for own in self.every for factor in own)
        if not self.elsewhere:
            return total
        for factor in self.moving:
            gradient, sum_ = factor.gradients[0], factor.parameter.grad
            factor.parameter.grad = gradient.clone(memory_format=torch.contiguous_format) if sum_ is None else sum_ + gradient
        self.moving = []
        return 0.0

    def move(self, shorten: float) -> None:
        """One step of AdamW by `shorten` times the gradients, as torch's own."""
        if self.elsewhere:
            for product in self.products:
                product.round()
        if not self.moving:
            return
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        states = [state_of(factor.parameter, self.optimizer) for factor in self.moving]
        torch._foreach_add_([state["step"] for state in states], 1)
        told = [[*_size(factor), *_places(factor, state)] for factor, state in zip(self.moving, states, strict=True)]
        rules = [(*AdamWParams.of(groups[id(f.parameter)]).at(int(s["step"])), f.scale) for f, s in zip(self.moving, states, strict=True)]
        numbers = torch.tensor(rules, dtype=torch.float64)
        self._share(_move, torch.tensor(told, dtype=torch.int64), numbers.data_ptr(), after=(shorten,))

    def give_back(self) -> None:
        """Let go of all this takes, when no step follows; the layers are computed as before."""
        for place in self.places:
            place.own = None
        self.products, self.every, self.moving, self.places = [], [], [], []

    def _share(self, work: Any, table: torch.Tensor, given: int, after: Sequence[float] = ()) -> list[Any]:
        """A kernel over the factors that move, cut into as many equal pieces as there are threads."""
        ends = torch.tensor([factor.parameter.numel() for factor in self.moving]).cumsum(0)
        cuts = torch.arange(1, self.abreast.threads) * ends[-1] // self.abreast.threads
        edges = [0, *torch.searchsorted(ends, cuts).tolist(), len(self.moving)]
        return self.abreast.map(lambda piece: work(table.data_ptr(), given, *piece, *after), list(itertools.pairwise(edges)))


def _size(factor: LoraFactor) -> tuple[int, int, int]:
    return *factor.copy.shape, factor.gradients[0].stride(0) * 4


def _places(factor: LoraFactor, state: dict[str, torch.Tensor]) -> Iterator[int]:
    yield from addresses(factor.gradients[0], factor.parameter, state["exp_avg"], state["exp_avg_sq"], factor.copy, factor.turned)
    yield 0 if factor.turned is None else factor.turned.stride(0) * factor.turned.itemsize
