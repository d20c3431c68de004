"""Where the parts of a pack keep the gradients of weights that learn whole, apart from each other, until the optimizer adds them.

A gradient that is added as it comes is written by its product, read, widened and written again for each part. Where a step is one pack in
one or two parts, each part's products are put straight into a place of its own, in bf16, and `worker/kernels/cpu/adamw.py` adds them where it
reads them. Two such places are as large as one gradient in float32. What a part adds to a weight a second time goes the other way
(`Whole.add`), and takes what was kept along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from worker.kernels.cpu import adamw, jit
from worker.kernels.cpu.adamw import Moments, Pieces, Rule
from worker.runtime.thread_parallel import Abreast

if TYPE_CHECKING:
    from worker.kernels.cpu.full_tuning import Whole

MOST_PARTS = 2


class Rooms:
    """For weights (N, K) that share a product, (ΣN, K) for each part of a pack."""

    def __init__(self, wholes: Sequence[Whole]) -> None:
        self.wholes, self.heights = wholes, [whole.weight.shape[0] for whole in wholes]
        self.rooms: list[torch.Tensor] = []
        for whole in wholes:
            whole.rooms = self

    def make(self, parts: int) -> None:
        size = sum(self.heights), self.wholes[0].weight.shape[1]
        self.rooms = [torch.empty(size, dtype=self.wholes[0].kind) for _ in range(parts)]

    def enter(self, scale: float = 1.0) -> torch.Tensor | None:
        """The place that this thread's part fills now, its numbers yet to be multiplied by `scale`; None where there is none, or where
        the part filled it in this step already."""
        place = self.wholes[0].abreast.place()
        if place >= len(self.rooms) or any(place in whole.kept for whole in self.wholes):
            return None
        for whole, own in zip(self.wholes, self.rooms[place].split(self.heights), strict=True):
            whole.kept[place] = own, scale
        return self.rooms[place]

    def take(self, dy: torch.Tensor, x: torch.Tensor) -> None:
        """The gradient dyᵀ x of dy (T, ΣN) and x (T, K)."""
        room = self.enter()
        if room is not None:
            torch.mm(dy.t(), x, out=room)
            return
        for whole, own in zip(self.wholes, (dy.t() @ x).split(self.heights), strict=True):
            whole.add(own)


def keep(wholes: Sequence[Whole], parts: int, passes: int, optimizer: torch.optim.Optimizer) -> bool:
    """Have gradients kept apart in steps of `passes` packs in `parts` parts each, where that can be. Says whether it is."""
    fits = wholes and passes == 1 and parts <= MOST_PARTS and type(optimizer) is torch.optim.AdamW
    if not fits or any(whole.kind != torch.bfloat16 or whole.weight.dtype != torch.float32 for whole in wholes) or not jit.works():
        return False
    for rooms in {id(whole.rooms): whole.rooms for whole in wholes if whole.multiplies}.values():
        rooms.make(parts)
    return True


class Share(NamedTuple):
    """Rows of a weight that one thread works on."""

    whole: Whole
    pieces: Pieces
    start: int
    stop: int


def shares(wholes: Sequence[Whole], threads: int) -> list[list[Share]]:
    """The weights of which gradients are kept, cut into as many equal pieces as there are threads."""
    kept = [(whole, whole.pieces()) for whole in wholes if whole.kept]
    if not kept:
        return []
    found: list[list[Share]] = [[] for _ in range(threads)]
    size = sum(whole.weight.numel() for whole, _ in kept) / threads
    before = 0
    for whole, pieces in kept:
        height, width = whole.weight.shape
        for place, share in enumerate(found):
            start, stop = (min(height, max(0, round((size * edge - before) / width))) for edge in (place, place + 1))
            if start < stop:
                share.append(Share(whole, pieces, start, stop))
        before += whole.weight.numel()
    return found


def squares(cut: Sequence[Sequence[Share]], abreast: Abreast) -> float:
    """The sum of the squares of all gradients that are kept."""
    return sum(abreast.map(lambda own: sum(adamw.squares(share.pieces, share.start, share.stop) for share in own), cut))


def move(cut: Sequence[Sequence[Share]], abreast: Abreast, optimizer: torch.optim.Optimizer, shorten: float) -> None:
    """One step of AdamW over the weights of which gradients are kept, by `shorten` times these. The moments are the optimizer's own, as
    it would have made them."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    moments = {id(whole): _moments(whole, optimizer) for whole in _each(cut)}

    def work(own: Sequence[Share]) -> None:
        for share in own:
            rule, state = Rule.of(groups[id(share.whole.weight)]), optimizer.state[share.whole.weight]
            adamw.move_(moments[id(share.whole)], share.pieces, rule, int(state["step"]), shorten, share.start, share.stop)

    abreast.map(work, cut)
    for whole in _each(cut):
        whole.follows()


def leave(wholes: Sequence[Whole]) -> None:
    """Forget what is kept, when the step is over."""
    for whole in wholes:
        whole.kept.clear()
        whole.sparse = None


def _each(cut: Sequence[Sequence[Share]]) -> Iterator[Whole]:
    return iter({id(share.whole): share.whole for own in cut for share in own}.values())


def _moments(whole: Whole, optimizer: torch.optim.Optimizer) -> Moments:
    weight, state = whole.weight, adamw.state_of(whole.weight, optimizer)
    state["step"] += 1
    assert whole.copy is not None, "a product made the gradient, of the rounded weight"
    return Moments(weight.detach(), state["exp_avg"], state["exp_avg_sq"], whole.copy)
