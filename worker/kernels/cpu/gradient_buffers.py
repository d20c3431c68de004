"""Gradient buffers of full fine-tuning: each part of a pack keeps its gradients in bf16, apart from the others', until AdamW sums
them.

A gradient that is accumulated in float32 is written by its product, then read, widened and written again for each part. Where a
step is one pack in one or two parts, each part's products go straight into a buffer of its own, in bf16, and
`worker/kernels/cpu/adamw.py` sums them where it reads them. Two such buffers are as large as one float32 gradient. What a part
adds to a weight a second time is accumulated in `weight.grad` (`MasterWeight.add`), together with what the buffers hold.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from worker.kernels.cpu import adamw
from worker.kernels.cpu.adamw import AdamWParams, AdamWState, SplitGradient
from worker.runtime.thread_parallel import ThreadParallel

MAX_PARTS = 2
MAX_HELD_BACK = 2
"""Slices of the head's gradient that a part may hold back while it waits for its turn."""


class MasterWeight:
    """A trainable float32 weight, its copy rounded to `kind` (made when a product first needs it), and its gradient. The
    parameter refers to it as `weight.whole`."""

    def __init__(self, weight: torch.nn.Parameter, kind: torch.dtype, abreast: ThreadParallel) -> None:
        self.weight, self.kind, self.abreast = weight, kind, abreast
        self.copy: torch.Tensor | None = None
        self.memory: torch.Tensor | None = None  # of the gradient, reused in every step, so that a thread's arena is not fragmented
        self.multiplies = False  # used in products, not only as an embedding
        self.kept: dict[int, tuple[torch.Tensor, float]] = {}  # by part: a gradient of this step, and the factor not applied to it yet
        self.sparse: tuple[torch.Tensor, torch.Tensor] | None = None  # embedding rows and their gradients, in addition to `kept`
        self.buffers = GradientBuffers([self])
        self.rounded_at: tuple[int, int] | None = None
        self.lock = threading.Lock()
        self.read: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # (part, embedding rows, their gradients), not added yet
        weight.whole = self  # type: ignore[attr-defined]

    def rounded(self) -> torch.Tensor:
        """The current value of the weight, in `kind`."""
        if self.weight.dtype == self.kind:
            return self.weight.detach()
        version = (self.weight.data_ptr(), self.weight._version)
        if self.rounded_at != version:
            with self.lock:
                if self.copy is None:
                    self.copy = torch.empty_like(self.weight, dtype=self.kind)
                if self.rounded_at != version:
                    self.copy.copy_(self.weight.detach())
                    self.rounded_at = version
        assert self.copy is not None
        return self.copy

    def moved(self) -> None:
        """Mark the copy as stale: torch's fused optimizer does not bump a tensor's version."""
        self.rounded_at = None

    def follows(self) -> None:
        """Mark the copy as current: the kernel that updated the weight wrote both."""
        self.rounded_at = (self.weight.data_ptr(), self.weight._version)

    def add(self, gradient: torch.Tensor) -> None:
        """Add a part's gradient to `weight.grad`, in the order of the parts."""
        with self.abreast.turn(id(self.weight)):
            if self.weight.grad is None:
                self.weight.grad = self._gradient_memory().copy_(gradient)
            else:
                self.weight.grad += gradient

    def add_rows(self, gradients: Iterable[tuple[slice, torch.Tensor]], scale: float) -> None:
        """Add `scale` times a part's gradients of slices of rows, each row at most once, in the order of the parts within each
        slice. A slice whose turn has not come is held back, because the parts arrive here at the same time and sleeping takes
        longer than going on."""
        held_back: deque[tuple[slice, torch.Tensor]] = deque()

        def add_first() -> None:
            rows, gradient = held_back.popleft()
            with self.abreast.turn((id(self.weight), rows.start)):
                if self.weight.grad is None:
                    self.weight.grad = self._gradient_memory().zero_()
                self.weight.grad[rows].add_(gradient, alpha=scale)

        for rows, gradient in gradients:
            held_back.append((rows, gradient))
            while held_back and (len(held_back) > MAX_HELD_BACK or self.abreast.has_turn((id(self.weight), held_back[0][0].start))):
                add_first()
        while held_back:
            add_first()

    def take_gradient(self, gradient: Any, scale: float) -> None:
        """Keep `scale` times what a loss found, a `HeadGradient`: in this part's buffer, or added in its turn."""
        buffer = self.buffers.enter(scale)
        if buffer is None:
            self.add_rows(gradient.pieces(), scale)
        else:
            gradient.write(buffer)

    def _gradient_memory(self) -> torch.Tensor:
        if self.memory is None:
            self.memory = torch.empty_like(self.weight)
        return self.memory

    def add_parts(self) -> None:
        """Add what the parts collected for embedding rows, and the buffered gradients where they have to be accumulated after all."""
        read = sorted(self.read, key=lambda kept: kept[0])
        self.read.clear()
        if self.kept and self.weight.grad is None:
            self.sparse = _sum_of_rows(read) if read else None
            return
        whole = self.weight.grad
        if whole is None:
            if not read:
                return
            whole = self.weight.grad = self._gradient_memory().zero_()
        for _, (gradient, scale) in sorted(self.kept.items()):
            whole.add_(gradient, alpha=scale)
        self.kept.clear()
        if self.sparse is not None:
            whole.index_add_(0, *self.sparse)
            self.sparse = None
        for _, rows, gradients in read:
            whole.index_add_(0, rows, gradients)

    def pieces(self) -> SplitGradient:
        """The buffered gradient as the AdamW kernel reads it."""
        first, *more = (self.kept[place] for place in sorted(self.kept))
        second = more[0] if more else (first[0], 0.0)
        height, width = self.weight.shape
        if self.sparse is None:
            return SplitGradient(first[0], second[0], (first[1], second[1]), torch.zeros(1, width), None)
        rows, gradients = self.sparse
        place = torch.full((height,), len(rows), dtype=torch.int32)
        place[rows] = torch.arange(len(rows), dtype=torch.int32)
        return SplitGradient(first[0], second[0], (first[1], second[1]), F.pad(gradients, (0, 0, 0, 1)), place)


class GradientBuffers:
    """For weights (N, K) that share a product, one buffer (ΣN, K) for each part of a pack."""

    def __init__(self, wholes: Sequence[MasterWeight]) -> None:
        self.wholes, self.heights = wholes, [whole.weight.shape[0] for whole in wholes]
        self.tensors: list[torch.Tensor] = []
        for whole in wholes:
            whole.buffers = self

    def make(self, parts: int) -> None:
        size = sum(self.heights), self.wholes[0].weight.shape[1]
        self.tensors = [torch.empty(size, dtype=self.wholes[0].kind) for _ in range(parts)]

    def enter(self, scale: float = 1.0) -> torch.Tensor | None:
        """The buffer for the current part's product, whose values are still to be multiplied by `scale`; None where there is
        none, or where the part filled it earlier in this step."""
        place = self.wholes[0].abreast.place()
        if place >= len(self.tensors) or any(place in whole.kept for whole in self.wholes):
            return None
        for whole, own in zip(self.wholes, self.tensors[place].split(self.heights), strict=True):
            whole.kept[place] = own, scale
        return self.tensors[place]

    def take(self, dy: torch.Tensor, x: torch.Tensor) -> None:
        """Take the gradient dyᵀ x of dy (T, ΣN) and x (T, K): into the buffer where it is free, else added to `weight.grad`."""
        buffer = self.enter()
        if buffer is not None:
            torch.mm(dy.t(), x, out=buffer)
            return
        for whole, own in zip(self.wholes, (dy.t() @ x).split(self.heights), strict=True):
            whole.add(own)


def keep(wholes: Sequence[MasterWeight], parts: int) -> bool:
    """Have gradients kept apart in steps of one pack in `parts` parts, moved by AdamW, where the weights allow it. Says whether they do."""
    if not wholes or parts > MAX_PARTS or any(w.kind != torch.bfloat16 or w.weight.dtype != torch.float32 for w in wholes):
        return False
    for buffers in {id(whole.buffers): whole.buffers for whole in wholes if whole.multiplies}.values():
        buffers.make(parts)
    return True


class RowRange(NamedTuple):
    """Rows of a weight that one thread updates."""

    whole: MasterWeight
    pieces: SplitGradient
    start: int
    stop: int


def shares(wholes: Sequence[MasterWeight], threads: int) -> list[list[RowRange]]:
    """The buffered weights, cut into one piece of equal size for each thread."""
    kept = [(whole, whole.pieces()) for whole in wholes if whole.kept]
    if not kept:
        return []
    found: list[list[RowRange]] = [[] for _ in range(threads)]
    size = sum(whole.weight.numel() for whole, _ in kept) / threads
    before = 0
    for whole, pieces in kept:
        height, width = whole.weight.shape
        for place, share in enumerate(found):
            start, stop = (min(height, max(0, round((size * edge - before) / width))) for edge in (place, place + 1))
            if start < stop:
                share.append(RowRange(whole, pieces, start, stop))
        before += whole.weight.numel()
    return found


def squares(cut: Sequence[Sequence[RowRange]], abreast: ThreadParallel) -> float:
    """The sum of squares of all buffered gradients."""
    return sum(abreast.map(lambda own: sum(adamw.squares(share.pieces, share.start, share.stop) for share in own), cut))


def move(cut: Sequence[Sequence[RowRange]], abreast: ThreadParallel, optimizer: torch.optim.Optimizer, clip_coefficient: float) -> None:
    """One AdamW step over the buffered weights with `clip_coefficient` times their gradients. The moments are
    those of the torch optimizer, so its state can be saved and loaded as usual."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    moments = {id(whole): _moments(whole, optimizer) for whole in _each(cut)}

    def work(own: Sequence[RowRange]) -> None:
        for share in own:
            params, state = AdamWParams.of(groups[id(share.whole.weight)]), optimizer.state[share.whole.weight]
            adamw.move_(moments[id(share.whole)], share.pieces, params, int(state["step"]), clip_coefficient, share.start, share.stop)

    abreast.map(work, cut)
    for whole in _each(cut):
        whole.follows()


def leave(wholes: Sequence[MasterWeight]) -> None:
    """Discard the buffered gradients, when the step is over."""
    for whole in wholes:
        whole.kept.clear()
        whole.sparse = None


def _each(cut: Sequence[Sequence[RowRange]]) -> Iterator[MasterWeight]:
    return iter({id(share.whole): share.whole for own in cut for share in own}.values())


def _moments(whole: MasterWeight, optimizer: torch.optim.Optimizer) -> AdamWState:
    weight, state = whole.weight, adamw.state_of(whole.weight, optimizer)
    state["step"] += 1
    assert whole.copy is not None, "a product made the gradient, of the rounded weight"
    return AdamWState(weight.detach(), state["exp_avg"], state["exp_avg_sq"], whole.copy)


def _sum_of_rows(read: Sequence[tuple[int, torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct rows (R,) that were read, and the sums of their gradients (R, K)."""
    rows, which = torch.cat([rows for _, rows, _ in read]).unique(return_inverse=True)
    gradients = torch.cat([gradients for *_, gradients in read]).float()
    return rows, torch.zeros(len(rows), gradients.shape[1]).index_add_(0, which, gradients)
