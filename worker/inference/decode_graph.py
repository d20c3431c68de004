"""Decoding on a GPU as captured CUDA graphs: one launch per step instead of some fifty per layer.

A step that only decodes has the same operations whatever its tokens, so it is captured once for each number of rows and size of their
slots, and replayed from buffers that hold what differs: token ids, positions and slots (as vLLM does, Kwon et al. 2023,
https://arxiv.org/abs/2309.06180). Rows are padded to a power of two by repeating the last one, which writes the same keys to the same
place again. Attention then reads all of a slot, and masks what is not written yet. The first step of a kind is computed as it is, because
many kinds occur once, and so is every step that reads a prompt too.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch

from worker.modeling.kv_cache import Blocks, DecodeGroup, ForwardPass, Segment, Selection
from worker.runtime.devices import Graph
from worker.runtime.transfer import pinned

log = logging.getLogger(__name__)

MAX_GRAPHS = 32
"""Graphs kept per model; the least recently used is dropped first."""

Forward = Callable[[ForwardPass, torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits (N, V) of a step for ids (1, N) and positions (1, N)."""


class _Captured:
    """One graph and its inputs. `numbers` (4, N) int64 holds ids, positions, slots, and the row of the step each row repeats."""

    def __init__(self, groups: list[tuple[Blocks, int]], selection: Selection | None, device: torch.device) -> None:
        self.rows = [rows for _, rows in groups]
        self.begins = [0, *itertools.accumulate(self.rows)]
        self.numbers = torch.zeros(4, self.begins[-1], dtype=torch.int64, device=device)
        self.mask: torch.Tensor | None = None
        if selection is not None and selection.mask is not None:
            self.mask = selection.mask.new_zeros(self.begins[-1], selection.mask.shape[1])
            selection = Selection(selection.low, selection.high, self.mask)
        self.groups, self.selection, self.device = groups, selection, device
        self.graph: Graph | None = None

    def capture(self, make: Callable[[Callable[[], torch.Tensor]], Graph], forward: Forward) -> None:
        """After `fill`, because it may compute the step."""
        self.graph = make(lambda: self._run(forward))
        self.groups = []  # what the cache gives up is free, though a graph that is never replayed again still names it

    def replay(self, segments: list[list[Segment]]) -> torch.Tensor:
        """The logits (N, V) of the step that `fill` was given, without the padding."""
        assert self.graph is not None
        self.graph.replay()
        out = self.graph.out
        parts = [out[begin : begin + len(some)] for begin, some in zip(self.begins, segments, strict=False)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def fill(self, step: ForwardPass, segments: list[list[Segment]], ids: list[int], positions: list[int]) -> None:
        padded = [s for some, rows in zip(segments, self.rows, strict=True) for s in (some + [some[-1]] * (rows - len(some)))]
        at = [s.start for s in padded]
        host = torch.tensor([[ids[i] for i in at], [positions[i] for i in at], [s.slot.index for s in padded], at])
        self.numbers.copy_(pinned(host, self.device), non_blocking=True)
        if self.mask is not None:
            assert step.selection is not None and step.selection.mask is not None
            torch.index_select(step.selection.mask, 0, self.numbers[3], out=self.mask)

    def _run(self, forward: Forward) -> torch.Tensor:
        ids, positions, slots, _ = self.numbers
        spans = zip(self.groups, itertools.pairwise(self.begins), strict=True)
        groups = [DecodeGroup.of_whole_slots(blocks, begin, slots[begin:end], positions[begin:end]) for (blocks, _), (begin, end) in spans]
        return forward(ForwardPass.of(groups, self.device, self.selection), ids[None], positions[None])


class DecodeGraphs:
    """The graphs of one loaded model, which they do not hold: its memory is free when it is dropped. `graph` captures, as the
    device's kind does it; tests give one that runs without a GPU."""

    def __init__(self, device: torch.device, graph: Callable[[Callable[[], torch.Tensor]], Graph]) -> None:
        self.device, self.graph = device, graph
        self.known: dict[tuple[Any, ...], _Captured | None] = {}  # in order of last use; None: computed once as it is
        self.failed = False

    def logits(self, forward: Forward, step: ForwardPass, ids: list[int], positions: list[int], stack: int) -> torch.Tensor | None:
        """Logits (N, V) of a step that only decodes, as `forward` would compute them; None where the caller has to. `stack` changes with
        the adapters that are loaded."""
        if self.failed or step.prefill or not step.decode:
            return None
        found = itertools.groupby(step.decode, key=lambda segment: segment.slot.blocks)
        segments = [(blocks, list(some)) for blocks, some in found]
        groups = [(blocks, 1 << (len(some) - 1).bit_length()) for blocks, some in segments]
        chosen = step.selection
        about = None if chosen is None else (chosen.low, chosen.high, chosen.mask is not None)
        key = (stack, about, *((blocks.stamp, rows) for blocks, rows in groups))
        known = key in self.known
        captured = self.known[key] = self.known.pop(key, None)
        while len(self.known) > MAX_GRAPHS:
            del self.known[next(iter(self.known))]
        if not known:
            return None
        try:
            rows = [some for _, some in segments]
            captured = captured or _Captured(groups, chosen, self.device)
            captured.fill(step, rows, ids, positions)
            if captured.graph is None:
                captured.capture(self.graph, forward)
                self.known[key] = captured
            return captured.replay(rows)
        except Exception as error:
            # A model whose operations depend on values, such as one that routes tokens to experts, cannot be captured.
            self.failed = True
            self.known.clear()
            log.warning("Decoding is not captured in a CUDA graph, only slower: %s", error)
            return None
