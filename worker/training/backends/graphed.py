"""Steps of small models on a GPU as captured CUDA graphs: one launch for a pass through all layers in each direction.

A GPU computes a layer of a small model faster than the host launches its kernels. Packs of one shape have the same operations whatever
their rows, so the decoder's pass is captured once for each shape, forwards and backwards, and replayed from buffers that hold what
differs: token ids, positions and ends of sequences (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Gradients are
added in place, to tensors that stay where they are from the first step on. The head and the loss are not captured, because packs differ
in how many positions are trained.

Of the passes of a shape the first is computed as it is, since kernels are compiled and loaded then. So is the second, whose operations
are then captured. The third is computed both ways, and replays are trusted only if both add the same gradients. Whatever goes wrong
leaves the plain step, with a remark in the job's log.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutput

from app.strategies._model import decoder
from worker.data.batching import Batch
from worker.modeling.packed_attention import as_size
from worker.runtime import devices
from worker.runtime.device import Compute, release
from worker.runtime.devices import Graph
from worker.scoring.held_out import decoded, plain_model
from worker.training.backends._base import PlainBackend
from worker.training.objectives._base import LossOutput, TrainingObjective

CAPTURED_AT, COMPARED_AT = 2, 3
"""Which pass of a shape is captured, and which is computed both ways."""
MOVED = "weights or gradients are not where they were"
TOLERANCE = 0.05
"""Share by which the gradient of a parameter may differ in its norm: sums of bf16 products come in any order."""

Capture = Callable[..., Graph]


class PackKind(NamedTuple):
    """What the operations of a pass depend on: packs of one kind share a graph."""

    tokens: int
    places: int  # of the table of sequence ends
    longest: int  # a power of two that no sequence exceeds: attention is launched for sequences of so many tokens


def kind_of(part: Any) -> PackKind | None:
    """None for a pack that has no fixed shape."""
    if not isinstance(part, Batch) or "cu_seq_lens" not in part.arguments or "sequence_lengths" in part.arguments:
        return None
    tokens = part.input_ids.shape[1]
    longest = max(64, 1 << (part.arguments["longest"].shape[0] - 1).bit_length())
    return PackKind(tokens, part.arguments["cu_seq_lens"].shape[0] - 1, min(longest, tokens))


class CapturedPass:
    """The decoder's pass over packs of one kind, both ways, and the tensors that it reads: `batch`, and `gradient` (1, T, H), that of its
    output."""

    def __init__(self, model: torch.nn.Module, kind: PackKind, part: Batch, engine: Compute, capture: Capture) -> None:
        ends = part.arguments["cu_seq_lens"].clone()
        arguments = {**part.arguments, "cu_seq_lens": ends, "longest": as_size(kind.longest)}
        self.batch = Batch(part.input_ids.clone(), part.position_ids.clone(), part.sources, part.targets, arguments, 0, 0)
        self.anchor = torch.zeros(0, device=engine.device, requires_grad=True)  # for autograd to call `_Replayed` at all
        self.ahead = capture(lambda: decoded(model, self.batch, engine).last_hidden_state, warm=False)
        out = self.ahead.out
        self.gradient = torch.zeros_like(out)

        def backward() -> torch.Tensor:
            out.backward(self.gradient)
            return self.gradient

        self.back = capture(backward, warm=False)
        self.ahead.out = out.detach()  # autograd's graph is gone, and with it what kept the memory of the pass from the next capture

    def fill(self, part: Batch) -> None:
        own, given = self.batch, part
        own.input_ids.copy_(given.input_ids)
        own.position_ids.copy_(given.position_ids)
        own.arguments["cu_seq_lens"].copy_(given.arguments["cu_seq_lens"])

    def __call__(self, **given: Any) -> BaseModelOutput:
        """In the place of the decoder's forward, after `fill`."""
        return BaseModelOutput(last_hidden_state=_Replayed.apply(self.anchor, self))


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, captured: CapturedPass) -> torch.Tensor:
        ctx.captured = captured
        captured.ahead.replay()
        return captured.ahead.out.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.captured.gradient.copy_(gradient)
        ctx.captured.back.replay()  # adds to the gradients itself
        return None, None


class GraphedBackend(PlainBackend):
    """The plain step with captured passes."""

    name = "graphed"

    def __init__(self, engine: Compute, capture: Capture | None = None) -> None:
        super().__init__(engine)
        gpu = devices.gpu_of(engine.device)
        self.capture: Capture | None = capture or (gpu.capture if gpu else None)
        self.seen: Counter[PackKind] = Counter()
        self.captured: dict[PackKind, CapturedPass] = {}
        self.gradients: list[torch.Tensor] = []  # those that captured passes add to
        self.places: list[int] = []  # of the trained weights that captured passes read
        self.unsaid: list[str] = []

    def prepare(
        self, lesson: TrainingObjective, model: torch.nn.Module, optimizer: torch.optim.Optimizer, parts: int, saved: Path | None = None
    ) -> dict[str, Any]:
        self.decoder = decoder(plain_model(model))
        return super().prepare(lesson, model, optimizer, parts, saved)

    def passes(self, pack: Sequence[Any], learnt: int) -> list[LossOutput]:
        return [output for part in pack for output in self._pass(part, learnt)]

    def _pass(self, part: Any, learnt: int) -> list[LossOutput]:
        kind = kind_of(part)
        if kind is None or self.capture is None:
            return super().passes([part], learnt)
        self.seen[kind] += 1
        if self.seen[kind] >= COMPARED_AT:
            if self._moved():
                self._give_up(MOVED)
                return super().passes([part], learnt)
            return self._compare(kind, part, learnt) if self.seen[kind] == COMPARED_AT else self._replay(kind, part, learnt)
        before = self._rng()
        found = super().passes([part], learnt)
        if self.seen[kind] == CAPTURED_AT:
            if same(before, self._rng()):
                self._capture(kind, part)
            else:
                self._give_up("a pass draws random numbers")
        return found

    def _capture(self, kind: PackKind, part: Batch) -> None:
        assert self.capture is not None
        self.gradients, self.places = self.gradients or self._those_there_are(), self.places or self._places()
        if self._moved():
            return self._give_up(MOVED)
        release(self.engine.device)  # what the allocator holds of passes as they are; a graph has memory of its own
        try:
            self.captured[kind] = CapturedPass(self.model, kind, part, self.engine, self.capture)
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _replay(self, kind: PackKind, part: Any, learnt: int) -> list[LossOutput]:
        captured = self.captured[kind]
        captured.fill(part)
        with self._in_place_of_the_decoder(captured):
            return super().passes([part], learnt)

    def _compare(self, kind: PackKind, part: Any, learnt: int) -> list[LossOutput]:
        """Compute the pass as it is, take back its gradients and replay it. The host waits, once for each kind of pack."""
        before = [gradient.clone() for gradient in self.gradients]
        computed = super().passes([part], learnt)
        wanted = _added(self.gradients, before)
        torch._foreach_copy_(self.gradients, before)
        replayed = self._replay(kind, part, learnt)
        if agree(wanted, _added(self.gradients, before)) and agree(computed[0].loss[None], replayed[0].loss[None]):
            return replayed
        self._give_up("a replayed pass gave other gradients than a computed one")
        torch._foreach_copy_(self.gradients, before)
        return super().passes([part], learnt)

    def _give_up(self, why: str) -> None:
        """From now on every pass is computed as it is."""
        self.capture = None
        self.captured.clear()
        self.unsaid.append(f"Passes are not replayed as CUDA graphs, only computed more slowly: {why[:500]}.")

    def _rng(self) -> torch.Tensor:
        return devices.of(self.engine.device).rng_state(self.engine.device)

    def _moved(self) -> bool:
        """Whether gradients are in other tensors than those that captured passes add to, or weights in other memory than they read."""
        found = [id(gradient) for gradient in self._those_there_are()]
        return found != [id(gradient) for gradient in self.gradients] or self._places() != self.places

    def _places(self) -> list[int]:
        return [p.untyped_storage()._cdata for p in self.trained.values()]

    def _those_there_are(self) -> list[torch.Tensor]:
        return [p.grad for p in self.trained.values() if p.grad is not None]

    @contextlib.contextmanager
    def _in_place_of_the_decoder(self, captured: CapturedPass) -> Iterator[None]:
        own = self.decoder.__dict__.get("forward")
        self.decoder.forward = captured
        try:
            yield
        finally:
            del self.decoder.forward
            if own is not None:
                self.decoder.forward = own

    def zero_grad(self) -> None:
        """Their tensors stay, while graphs add to them."""
        self.optimizer.zero_grad(set_to_none=self.capture is None)

    def remarks(self) -> list[str]:
        said, self.unsaid = self.unsaid, []
        return [*super().remarks(), *said]

    def close(self) -> None:
        self.captured.clear()
        self.gradients = []
        super().close()


def _added(gradients: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of what was added to each gradient, float32."""
    return torch.stack([torch.linalg.vector_norm(g - b, dtype=torch.float32) for g, b in zip(gradients, before, strict=True)])


def same(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two states of a random generator are equal."""
    return torch.equal(before, after)


def agree(wanted: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether all numbers are equal but for rounding; not where one is not finite. The host waits for the device."""
    allowed = TOLERANCE * (wanted.abs() + 0.01 * wanted.abs().max())
    return math.isfinite(float(wanted.sum())) and bool(((wanted - got).abs() <= allowed).all())
