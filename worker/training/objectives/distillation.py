"""On-policy distillation: the divergence from a teacher at each token of answers that the student has drawn itself.

The teacher reads the answers of a step once, without gradients, and its last hidden states are kept for the loss: from them follow its
probabilities of every token. No gradient flows through the drawing (Agarwal et al. 2023, section 3.1).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from app.kit import stats
from app.objectives.distillation import DistillationSettings
from app.spec import JobSpec
from worker.data.batching import Batch, make_batch
from worker.modeling import fused_layers, packed_attention
from worker.modeling.cross_entropy import head_of
from worker.modeling.divergence import token_divergence
from worker.modeling.loading import load_model
from worker.runtime.device import Compute
from worker.runtime.transfer import sent
from worker.scoring import held_out
from worker.scoring.metrics import contest
from worker.training.checkpoint import State
from worker.training.objectives._base import EvalResult, LossOutput
from worker.training.objectives._drawn import DrawnAnswersObjective
from worker.training.rollouts import RolloutPrompt, Rollouts, drawn_texts, ungraded

MEASURED = ("divergence", "read", "answers", "truncated", "nats")
"""Sums over a step's answers: their divergence from the teacher in nats, their tokens, how many answers there are, how many the limit cut, and
minus the log-probabilities with which their tokens were drawn."""


class TaughtBatch(NamedTuple):
    """A pack of answers on the device."""

    batch: Batch
    teacher: torch.Tensor  # (K, H) hidden states of the teacher before their tokens
    figures: torch.Tensor  # the last three of MEASURED


class Distillation(DrawnAnswersObjective):
    unit: ClassVar = "token"
    preparing: ClassVar = "Loading the teacher"
    measures: ClassVar = len(MEASURED)

    def __init__(self, spec: JobSpec, tokenizer: Any) -> None:
        assert isinstance(spec.preference, DistillationSettings) and spec.teacher is not None
        self.settings = spec.preference
        self.width = spec.teacher.shape.hidden
        self.teacher: torch.nn.Module | None = None
        self.states: torch.Tensor | None = None  # (tokens of the step, H) of the teacher; None before the first step
        super().__init__(spec, tokenizer)

    def prepare(self, model: torch.nn.Module, engine: Compute, attempt: Path, budget: int) -> Generator[float, None, None]:
        """Load the teacher, which stays in memory."""
        yield 0.0
        assert self.spec.teacher is not None
        self.teacher = load_model(self.spec.teacher, engine.frozen, packed_attention.NAME, str(engine.device)).requires_grad_(False)
        fused_layers.patch_layers(self.teacher, engine.device)

    # Training -----------------------------------------------------------------------------------------------------------

    def draw(
        self, window: Sequence[Sequence[int]], step: int, model: torch.nn.Module, engine: Compute, budget: int
    ) -> Generator[float, None, tuple[Rollouts, torch.Tensor]]:
        """Answers to the prompts of a step, and what the teacher has at each of their tokens."""
        prompts = [self.prompts[row] for pack in window for row in pack]
        return (yield from self._taught(model, prompts, self.spec.run.seed * 1_000_003 + step, engine, budget))

    def _taught(
        self, model: torch.nn.Module, prompts: Sequence[RolloutPrompt], seed: int, engine: Compute, budget: int
    ) -> Generator[float, None, tuple[Rollouts, torch.Tensor]]:
        found = ungraded((yield from drawn_texts(model, self.tokenizer, prompts, self.settings, seed, engine, self.lead)))
        assert self.teacher is not None
        counts = found.data.trained_counts()
        ends = [0, *torch.tensor(counts).cumsum(0).tolist()]
        states, read = torch.zeros(ends[-1], self.width), found.data.without(len(self.lead))

        def note(pack: Sequence[int]) -> None:
            hidden = held_out.hidden_states(self.teacher, make_batch(read, pack, engine.device), engine).float().cpu()  # type: ignore[arg-type]
            for row, part in zip(pack, hidden.split([counts[row] for row in pack]), strict=True):
                states[ends[row] : ends[row + 1]] = part

        yield from held_out.reading(self.teacher, note, read.lengths, budget, engine)
        return found, states

    def take(self, drawn: tuple[Rollouts, torch.Tensor], budget: int) -> list[list[int]]:
        rollouts, self.states = drawn
        self.take_rollouts(rollouts)
        return self.packs_of_answers(budget)

    def learnt(self, window: Sequence[Sequence[int]]) -> int:
        return sum(self.counts[row] for pack in window for row in pack)

    def batch(self, pack: Sequence[int], engine: Compute) -> Any:
        places = torch.from_numpy(self.token_places(pack))
        states = torch.zeros(len(places), self.width) if self.states is None else self.states[places]
        rollouts, figures = self.rollouts, torch.zeros(3, dtype=torch.float64)
        if 0 in pack:  # the figures of the step are in the pack with its first answer
            figures = torch.tensor([len(rollouts.ended), rollouts.ended.count(False), _sum(rollouts)], dtype=torch.float64)
        return TaughtBatch(make_batch(self.step_rows, pack, engine.device), sent(states, engine.device), sent(figures, engine.device))

    def _divergence(self, model: torch.nn.Module, batch: Batch, states: torch.Tensor, engine: Compute) -> torch.Tensor:
        hidden = held_out.hidden_states(model, batch, engine)
        student, teacher = (head_of(held_out.plain_model(one)) for one in (model, self.teacher))  # type: ignore[arg-type]  # it is loaded
        return token_divergence(hidden, student, states.to(hidden.dtype), teacher, self.settings.divergence, engine.compute)

    def loss(self, model: torch.nn.Module, batch: Any, engine: Compute) -> LossOutput:
        found = self._divergence(model, batch.batch, batch.teacher, engine)
        sums = torch.stack([found.detach().double().sum(), torch.ones_like(found, dtype=torch.float64).sum()])
        return LossOutput(found.sum(), batch.batch.tokens, batch.batch.trained, torch.cat([sums, batch.figures]))

    def name_metrics(self, measured: torch.Tensor) -> dict[str, float]:
        sums = dict(zip(MEASURED, measured.tolist(), strict=True))
        answers, read = max(sums["answers"], 1.0), max(sums["read"], 1.0)
        found = {"answer_length": sums["read"] / answers, "truncated_answers": sums["truncated"] / answers}
        return found | {"entropy": sums["nats"] / read}

    # Judging ------------------------------------------------------------------------------------------------------------

    def validate(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, EvalResult]:
        """The divergence on answers to held-out prompts, which are drawn with the same random numbers each time; and the graders' scores."""
        found, states = yield from self._taught(model, self.held_prompts, self.spec.run.seed, engine, budget)
        counts = found.data.trained_counts()
        ends = [0, *torch.tensor(counts).cumsum(0).tolist()]
        rows = [0.0] * len(counts)

        def read(pack: Sequence[int]) -> None:
            places = torch.cat([torch.arange(ends[row], ends[row + 1]) for row in pack])
            values = self._divergence(model, make_batch(found.data, pack, engine.device), states[places].to(engine.device), engine)
            for row, part in zip(pack, values.split([counts[row] for row in pack]), strict=True):
                rows[row] = float(part.sum())

        yield from held_out.reading(model, read, found.data.lengths, budget, engine)
        each = self.settings.group_size
        prompts = [sum(rows[at : at + each]) / max(sum(counts[at : at + each]), 1) for at in range(0, len(rows), each)]
        metrics = {"loss": sum(rows) / max(sum(counts), 1)}
        if self.graded is None:
            return EvalResult(metrics, prompts)
        self.newest = yield from self.graded.measuring(model, engine, self.lead, self.answer)
        return EvalResult(metrics | self.newest.means, prompts, self.newest.first, self.newest.faults)

    def _contest(self, state: State, *_: Any) -> dict[str, Any]:
        """The divergence on answers to the same prompts, before and after."""
        before, after = state.base_rows, state.best_rows or state.last_rows
        between = stats.paired(before, after) if before else None
        if between is None:
            return contest("loss", None)
        means = {"one": sum(before) / len(before), "other": sum(after) / len(after)}
        return contest("loss", {"rows": len(before), **means, "interval": between})


def _sum(rollouts: Rollouts) -> float:
    """Nats of a step's tokens, those that are not known left out."""
    return float(torch.from_numpy(rollouts.nats).double().nansum())
