"""Reinforcement learning: answers are drawn from the model, graded, and made more or less likely by how they compare with others to their prompt.

Policy optimization without a value model, in the variants of `app/objectives/reinforcement.py`. The first step on a
batch of answers has the weights that drew them, so the ratio of an answer's probabilities differs from 1 only by how the sampler's arithmetic
differs from the trainer's; in further steps on it (`updates_per_batch`) it is how far the policy has moved, and is clipped. Its spread is
shown with each step. What a step draws follows from its number, the seed and the weights: a resumed job draws
the same answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from app import graders
from app.errors import BadData
from app.graders import SimulatedTools
from app.kit import stats
from app.objectives.reinforcement import PolicyLoss, ReinforcementSettings
from app.spec import JobSpec
from worker.data.answer_form import family
from worker.data.batching import Batch
from worker.data.packing import best_fit
from worker.data.shared_prompts import Bundle, bundles_batch, bundles_of
from worker.modeling import packed_attention
from worker.modeling.cross_entropy import head_of
from worker.modeling.token_logprobs import token_nats
from worker.runtime import distributed
from worker.runtime.device import Compute
from worker.runtime.transfer import sent
from worker.scoring import held_out
from worker.scoring.metrics import contest
from worker.scoring.sampler import Drawing
from worker.training import reward_check, watch
from worker.training.asking import Asker
from worker.training.checkpoint import State
from worker.training.graded import GradedRows, RowGrades
from worker.training.objectives._base import EvalResult, LossOutput
from worker.training.objectives._drawn import DrawnAnswersObjective
from worker.training.rollouts import (
    FIGURES,
    MAX_REFILLS,
    Rewarding,
    RolloutPrompt,
    Rollouts,
    drawn_texts,
    given_answers,
    joined,
    only,
    rolled,
)
from worker.training.server_sampler import ServerSampler
from worker.training.tool_turns import ToolTalk

MEASURED = (*FIGURES, "kl", "clipped", "log_ratio", "log_ratio_squared", "read")
"""Sums over a step's answers: `FIGURES`, and over their tokens the KL divergence from the base in nats, how many ratios were clipped, the
logarithm of the ratio, its square, and how many tokens there are."""


class AnswerBatch(NamedTuple):
    """A pack of answers on the device."""

    batch: Batch
    counts: list[int]  # tokens of each answer
    old: torch.Tensor  # (K,) log-probabilities when they were drawn; NaN where these are not known
    base: torch.Tensor | None  # (K,) log-probabilities under the base
    advantages: torch.Tensor  # (answers,)
    figures: torch.Tensor  # of the step, in the pack with its first answer; zeros in others


class PolicyLosses(NamedTuple):
    """What a pass over answers found."""

    losses: torch.Tensor  # (answers,)
    sums: torch.Tensor  # those of MEASURED behind FIGURES


def policy_losses(
    new: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    counts: Sequence[int],
    loss: PolicyLoss,
    limit: float,
    base: torch.Tensor | None = None,
    kl: float = 0.0,
) -> PolicyLosses:
    """The loss of each answer from log-probabilities (K,) of its tokens, in nats, now and when they were drawn.

    −min(ρ A, clip(ρ) A) (equation 7 of Schulman et al. 2017, https://arxiv.org/abs/1707.06347), ρ the ratio of a token's probabilities, or of
    the answer's: their geometric mean in GSPO (equation 7 of Zheng et al. 2025), their product in RLOO. `limit` is what the sum over an
    answer's tokens is divided by where that is not their number: the maximum number of tokens, or the step's mean number. `kl` adds
    its estimate exp(base − new) − (base − new) − 1 of the divergence from the base (Schulman 2020, k3) to each token.
    """
    lengths = torch.tensor(counts, device=new.device)
    answer = torch.repeat_interleave(torch.arange(len(counts), device=new.device), lengths, output_size=len(new))
    divisor: Any = {"answer": lengths.clamp(min=1), "sum": 1}.get(loss.average, limit)

    def summed(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(counts), dtype=values.dtype, device=values.device).index_add(0, answer, values)

    log_ratio = new - old
    ratio, each = log_ratio.exp(), advantages.index_select(0, answer)
    if loss.ratio != "token":
        whole = summed(log_ratio) / (lengths.clamp(min=1) if loss.ratio == "mean" else 1)
        ratio = whole.exp().index_select(0, answer)
    low, high = 1 - loss.clip[0], 1 + loss.clip[1]
    found = -torch.minimum(ratio * each, ratio.clamp(low, high) * each)
    # Where an answer has one ratio, all of its tokens have the same loss, which counts once.
    losses = summed(found) / (divisor if loss.ratio == "token" else lengths.clamp(min=1))
    clipped = ((ratio < low) & (each < 0)) | ((ratio > high) & (each > 0))
    divergence = torch.zeros_like(new)
    if base is not None:
        divergence = (base - new).exp() - (base - new) - 1
        losses = losses + kl * summed(divergence) / divisor
    measured = [divergence, clipped, log_ratio, log_ratio.square(), torch.ones_like(new)]
    return PolicyLosses(losses, torch.stack([values.detach().double().sum() for values in measured]))


class Reinforcement(DrawnAnswersObjective):
    unit: ClassVar = "answer"
    preparing: ClassVar = "Checking whether the reward can teach"
    accuracy: ClassVar = "reward"
    measures: ClassVar = len(MEASURED)

    def __init__(self, spec: JobSpec, tokenizer: Any) -> None:
        assert isinstance(spec.preference, ReinforcementSettings)
        self.settings, self.grader = spec.preference, graders.parse(spec.preference.grader)
        self.base: np.ndarray | None = None  # log-probabilities under the base, where they are needed
        self.shares = False  # whether answers to one prompt are packed behind it; known once the model is loaded
        super().__init__(spec, tokenizer)
        self.check: reward_check.RewardCheck | None = None
        self.talk = self._talk() if self.settings.max_turns > 1 else None

    def _talk(self) -> ToolTalk:
        """Raises BadData where no tool could be called, or none answered."""
        if family(self.tokenizer) is None:
            hint = "Choose the chat template hermes, or a model whose own template writes tool calls."
            raise BadData("The model's chat template writes no tool calls, so max_turns cannot be above 1.", hint=hint)
        tools = SimulatedTools(self.settings.tool_source)
        items = [graders.item_of(one.row.row, one.asked.text, one.asked.reference) for one in self.prompts if one.asked.tools]
        if not any(tools.answers_for(item) for item in items):
            what = "results in a column tool_results, and there is no tool_source" if items else "tools"
            raise BadData(f"No row has {what}, so max_turns cannot be above 1.", hint="Add the column, or leave max_turns out.")
        most, room = self.settings.answer_tokens, self.longest
        return ToolTalk(self.tokenizer, self.spec.model.kind, tools, self.settings.max_turns, most, room)

    def judging_graders(self) -> list[dict[str, Any]]:
        """The reward, and behind it the others."""
        return [self.settings.grader, *(one for one in self.spec.graders if one != self.settings.grader)]

    def load(self, engine: Compute) -> torch.nn.Module:
        model = super().load(engine)
        self.shares = engine.device.type == "cpu" and not self.lead and packed_attention.takes_branches(held_out.plain_model(model))
        return model

    def facts(self) -> dict[str, Any]:
        return super().facts() | ({"shared_prompts": True} if self.shares else {})

    # Before training ----------------------------------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, engine: Compute, attempt: Path, budget: int) -> Generator[float, None, None]:
        """Have the base answer some prompts, unless an earlier attempt did. Raises BadData where the reward teaches nothing."""
        if (
            distributed.rank()
            or not self.settings.check_prompts
            or reward_check.was_made(attempt.parent, despite=self.settings.despite_check)
        ):
            return
        draw = random.Random(f"luthier/check/{self.spec.run.seed}")
        first = self.settings.check_prompts
        asked = draw.sample(self.prompts, min(reward_check.MORE * first, len(self.prompts)))
        how = self.rewarding._replace(lead=(), draw=self._server_at(None))  # the strategy is not attached yet
        self.check = yield from reward_check.check(model, asked, first, how, self.spec.run.seed, engine)
        reward_check.write(attempt, self.check)
        if not self.check.teaches and not self.settings.despite_check:
            raise BadData(f"Not worth starting: {self.check.why}", hint=self.check.hint)

    def details(self) -> dict[str, Any]:
        return {"reward_check": self.check._asdict()} if self.check else {}

    def prepared(self) -> Iterator[str]:
        if self.check:
            yield self.check.sentence

    # Training -----------------------------------------------------------------------------------------------------------

    def draw(
        self, window: Sequence[Sequence[int]], step: int, model: torch.nn.Module, engine: Compute, budget: int
    ) -> Generator[float, None, tuple[Rollouts, np.ndarray | None]]:
        """Graded answers to the prompts of a step, and the base's log-probabilities of their tokens where these are needed."""
        prompts = [self.prompts[row] for pack in window for row in pack]
        order = random.Random(f"luthier/refill/{self.spec.run.seed}/{step}")
        found = yield from self._rolled(model, prompts, step, 0, engine)
        for turn in range(1, MAX_REFILLS + 1):
            spread = found.spread()
            if not self.settings.loss.refills or all(spread):
                break
            more = order.sample(self.prompts, min(spread.count(False), len(self.prompts)))
            others = yield from self._rolled(model, more, step, turn, engine)
            found = joined(found, others)
            spread = found.spread()
            best = sorted(range(len(spread)), key=lambda group: not spread[group])[: len(prompts)]
            found = only(found, best)
        if self.updates > 1 and np.isnan(found.nats).any():  # padded models do not tell with which probability they drew
            found = replace(found, nats=-(yield from self._log_probabilities(model, found, engine, budget)))
        if not self.settings.reads_base:
            return found, None
        with model.disable_adapter():  # type: ignore[operator]  # peft's; `app/planning/reinforcement.py` refuses others
            return found, (yield from self._log_probabilities(model, found, engine, budget))

    def _rolled(
        self, model: torch.nn.Module, prompts: Sequence[RolloutPrompt], step: int, turn: int, engine: Compute
    ) -> Generator[float, None, Rollouts]:
        seed = (self.spec.run.seed * 1_000_003 + step) * (MAX_REFILLS + 1) + turn
        how = self.rewarding._replace(draw=self._server_at(step))
        found = yield from rolled(model, prompts, how, seed, engine)
        return found

    def _server_at(self, step: int | None) -> Drawing | None:
        """How a server draws with the weights of a step, or with the base's; None where the worker draws."""
        if self.settings.sampler == "worker":
            return None
        assert isinstance(self.answer, Asker), "what trains without a studio is refused a server"
        return ServerSampler(self.answer, self.spec.strategy, self.attempt).at(step)

    @property
    def rewarding(self) -> Rewarding:
        return Rewarding(self.tokenizer, self.settings, self.grader, self.answer, self.lead, self.talk)

    def _log_probabilities(
        self, model: torch.nn.Module, found: Rollouts, engine: Compute, budget: int
    ) -> Generator[float, None, np.ndarray]:
        counts = found.data.trained_counts()
        ends = np.cumsum([0, *counts])
        told = np.zeros(len(found.nats), np.float32)

        bundles = self._bundles(found, budget)

        def read(pack: Sequence[int]) -> None:
            rows = [row for place in pack for row in bundles[place].rows]
            values = self._now(model, bundles_batch(found.data, [bundles[place] for place in pack], engine.device), engine).float().cpu()
            for row, part in zip(rows, values.split([counts[row] for row in rows]), strict=True):
                told[ends[row] : ends[row + 1]] = part

        yield from held_out.reading(model, read, [bundle.tokens for bundle in bundles], budget, engine)
        return told

    def take(self, drawn: tuple[Rollouts, np.ndarray | None], budget: int) -> list[list[int]]:
        """The packs of a step's answers."""
        rollouts, self.base = drawn
        self.take_rollouts(rollouts)
        return self.packs_of_answers(budget)

    def kept(self) -> dict[str, torch.Tensor]:
        base = {} if self.base is None else {"base": torch.from_numpy(self.base)}
        return self.rollouts.tensors() | base

    def put_back(self, kept: dict[str, torch.Tensor]) -> None:
        self.base = kept["base"].numpy() if "base" in kept else None
        self.take_rollouts(Rollouts.of_tensors(kept))

    @property
    def updates(self) -> int:
        return self.settings.updates_per_batch

    @property
    def limit(self) -> float:
        """What the sum over an answer's tokens is divided by, where that is not their number."""
        mean = max(1.0, float(self.ends[-1]) / len(self.counts))
        return float(self.settings.answer_tokens) if self.settings.loss.average == "limit" else mean

    def take_rollouts(self, rollouts: Rollouts) -> None:
        super().take_rollouts(rollouts)
        self.bundles = bundles_of(rollouts.data, rollouts.groups, 0)

    def _bundles(self, rollouts: Rollouts, budget: int) -> list[Bundle]:
        """Answers that share their prompt: so few together that a pack of `budget` tokens has parts for two threads."""
        return bundles_of(rollouts.data, rollouts.groups, budget // 2 if self.shares else 0)

    def packs_of_answers(self, budget: int) -> list[list[int]]:
        self.bundles = self._bundles(self.rollouts, budget)
        return best_fit(range(len(self.bundles)), self.pack_lengths, budget)

    @property
    def pack_lengths(self) -> list[int]:
        return [bundle.tokens for bundle in self.bundles]

    def learnt(self, window: Sequence[Sequence[int]]) -> int:
        return sum(len(self.bundles[place].rows) for pack in window for place in pack)

    def batch(self, pack: Sequence[int], engine: Compute) -> Any:
        bundles = [self.bundles[place] for place in pack]
        rows = [row for bundle in bundles for row in bundle.rows]
        places = self.token_places(rows)
        figures = self.rollouts.figures() if 0 in rows else torch.zeros(len(FIGURES), dtype=torch.float64)
        old, advantages = (
            sent(torch.from_numpy(values), engine.device) for values in (-self.rollouts.nats[places], self.rollouts.advantages[rows])
        )
        base = None if self.base is None else sent(torch.from_numpy(self.base[places]), engine.device)
        batch = bundles_batch(self.step_rows, bundles, engine.device)
        return AnswerBatch(batch, [self.counts[row] for row in rows], old, base, advantages, sent(figures, engine.device))

    def _now(self, model: torch.nn.Module, batch: Batch, engine: Compute) -> torch.Tensor:
        hidden = held_out.hidden_states(model, batch, engine)
        return -token_nats(hidden, head_of(held_out.plain_model(model)), batch.targets, engine.compute)

    def loss(self, model: torch.nn.Module, batch: Any, engine: Compute) -> LossOutput:
        new = self._now(model, batch.batch, engine)
        old = torch.where(batch.old.isnan(), new.detach(), batch.old.to(new.dtype))
        found = policy_losses(
            new, old, batch.advantages.to(new.dtype), batch.counts, self.settings.loss, self.limit,
            None if batch.base is None else batch.base.to(new.dtype), self.settings.kl,
        )  # fmt: skip
        return LossOutput(found.losses.sum(), batch.batch.tokens, batch.batch.trained, torch.cat([batch.figures, found.sums]))

    def name_metrics(self, measured: torch.Tensor) -> dict[str, float]:
        sums = dict(zip(MEASURED, measured.tolist(), strict=True))
        read, answers = max(sums["read"], 1.0), max(sums["answers"], 1.0)
        mean = sums["log_ratio"] / read
        found = {
            "reward": sums["reward"] / max(sums["graded"], 1.0),
            "answer_length": sums["tokens"] / answers,
            "entropy": sums["nats"] / max(sums["tokens"], 1.0),
            "zero_variance_groups": sums["dead"] / max(sums["groups"], 1.0),
            "truncated_answers": sums["truncated"] / answers,
            "clip_fraction": sums["clipped"] / read,
            "ratio_std": max(sums["log_ratio_squared"] / read - mean * mean, 0.0) ** 0.5,
        }
        return found | ({"kl": sums["kl"] / read} if self.settings.reads_base else {})

    def watch_step(self, state: State, metrics: dict[str, float]) -> None:
        if self.settings.max_kl:
            watch.watch_kl(state, metrics["kl"], self.settings.max_kl)

    def watch_evaluation(self, state: State) -> None:
        if self.settings.stop_when_parted and self.graded and self.newest and self.newest.others:
            watch.watch_graders(state, self.graded.graders[1].name, state.last["reward"], self.newest.others[0])

    # Judging ------------------------------------------------------------------------------------------------------------

    def validate(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, EvalResult]:
        """The likeliest answer to each held-out prompt, graded by the reward and by the job's other graders. The best checkpoint is that of the
        first of the others: the reward is what is optimized, and judges nothing."""
        yield 0.0
        assert self.graded is not None
        self.newest = yield from self._graded_answers(model, self.graded, engine)
        means, first, faults = self.newest.means, self.newest.first, self.newest.faults
        known = [score for score in first if score is not None]
        reward = sum(known) / max(len(known), 1)
        own = self.graded.names[0]
        rest = {name: value for name, value in means.items() if name != own}
        rows = [float("nan") if score is None else 1 - score for score in first]
        other = [score for score in self.newest.others[0] if score is not None] if self.newest.others else []
        value = 1 - fmean(other) if other else None
        return EvalResult({"loss": 1 - reward, "reward": reward, **rest}, rows, first, faults, value)

    def _graded_answers(self, model: torch.nn.Module, graded: GradedRows, engine: Compute) -> Generator[float, None, RowGrades]:
        """The grades of the likeliest answers; of whole conversations where tools answer."""
        if self.talk is None:
            return (yield from graded.measuring(model, engine, self.lead, self.answer))
        prompts = [RolloutPrompt(*row) for row in graded.rows]
        drawn = yield from drawn_texts(model, self.tokenizer, prompts, self.settings, None, engine, self.lead, self.talk)
        found = yield from graded.grades_of(given_answers(prompts, drawn.answers), self.answer)
        return found._replace(answers=[one.shown for one in drawn.answers])

    def _contest(self, state: State, *_: Any) -> dict[str, Any]:
        """The rewards of the held-out prompts, before and after, where both answers have one."""
        both = zip(state.base_rows, state.best_rows or state.last_rows, strict=True)
        graded = [(1 - before, 1 - after) for before, after in both if not math.isnan(before + after)]
        one, other = ([pair[side] for pair in graded] for side in (0, 1))
        if not graded:
            return contest("reward", None)
        between = stats.paired(one, other) or (math.nan, math.nan)
        return contest("reward", {"rows": len(graded), "one": fmean(one), "other": fmean(other), "interval": between})
