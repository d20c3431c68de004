"""A reward model: a scalar head on the model's stack, and the Bradley–Terry loss of pairs of answers."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F

from app import events
from app.formats.preference import conversation_with
from app.objectives.reward import RewardSettings
from app.spec import JobSpec
from worker.data import batching
from worker.data.batching import Row
from worker.data.chat_template import prepare_for_answers, template_remark
from worker.data.preference_pairs import PreferencePairs, pairs_of_sides, sequences_of
from worker.modeling.classifier import Classifier
from worker.runtime.device import Compute
from worker.scoring.held_out import reading
from worker.scoring.metrics import contest, share_interval
from worker.training.checkpoint import State
from worker.training.objectives._base import (
    MAX_LISTED,
    MAX_REMEMBERED,
    EvalResult,
    Loader,
    LossOutput,
    TrainingObjective,
    remarks_on,
)
from worker.training.objectives.classification import SequenceClassification, pack_of
from worker.training.objectives.dpo import named, sums_of

LABEL = "reward"
"""The one output of the head."""


def losses_of(rewards: torch.Tensor, centering: float) -> torch.Tensor:
    """The loss of each pair in nats, (pairs,), from the rewards (pairs, 2) of its chosen and its rejected answer.

    −log σ(r_w − r_l) (Ouyang et al. 2022, equation 1, with pairs alone), plus `centering` times (r_w + r_l)² (Eisenstein et al. 2023,
    https://arxiv.org/abs/2312.09244, section 3.1), because a number added to all rewards changes no difference.
    """
    chosen, rejected = rewards.unbind(1)
    return -F.logsigmoid(chosen - rejected) + centering * (chosen + rejected).square()


def scoring(model: Classifier, data: PreferencePairs, budget: int, engine: Compute) -> Generator[float, None, torch.Tensor]:
    """Rewards (pairs, 2) of all pairs in float64; yields the share of the packs that are done."""
    found = torch.zeros(len(data), 2, dtype=torch.float64)

    def read(pack: Sequence[int]) -> None:
        inputs, lengths = pack_of(data.sequences, sequences_of(pack), engine.device)
        with engine.autocast():
            rewards = model(**inputs, lengths=lengths)
        found[pack] = rewards.double().cpu().view(-1, 2)

    yield from reading(model, read, data.pairs.lengths, budget, engine)
    return found


class RewardModel(SequenceClassification):
    unit: ClassVar = "pair"
    excluded: ClassVar = "pairs have no two different answers left"
    accuracy: ClassVar = "reward_accuracy"
    measures: ClassVar = 4  # those of `sums_of`

    def __init__(self, spec: JobSpec, tokenizer: Any) -> None:
        self.plain_template = prepare_for_answers(tokenizer, spec.run, spec.model.kind)
        TrainingObjective.__init__(self, spec, tokenizer)
        self.settings = spec.preference if isinstance(spec.preference, RewardSettings) else RewardSettings()
        self.labels, self.reads = [LABEL], spec.model.kind
        train_rows, held_rows = batching.sides(spec)
        self.pairs = pairs_of_sides(tokenizer, train_rows, held_rows, self.reads, self.longest, self.lead)
        self.train, self.held_out = self.pairs["train"].pairs, self.pairs["held_out"].pairs
        kept = set(self.held_out.lines)
        self.held_rows = [row for row in held_rows if row.line in kept]
        self.last: torch.Tensor | None = None  # rewards of the held-out pairs at the last validation

    def remarks(self) -> Iterator[str]:
        yield from remarks_on(self)
        if told := template_remark(self.tokenizer, self.spec.run):
            yield told
        if self.plain_template:
            yield "The model has no chat template; it is given a plain one, which is saved with the result."

    def batch(self, pack: Sequence[int], engine: Compute) -> Any:
        return pack_of(self.pairs["train"].sequences, sequences_of(pack), engine.device, self.frame_of(pack))

    def loss(self, model: torch.nn.Module, batch: Any, engine: Compute) -> LossOutput:
        inputs, lengths = batch
        with engine.autocast():
            rewards = model(**inputs, lengths=lengths)
        rewards = rewards.float().view(-1, 2)
        return LossOutput(losses_of(rewards, self.settings.centering).sum(), sum(lengths), len(rewards), sums_of(rewards))

    def name_metrics(self, measured: torch.Tensor) -> dict[str, float]:
        return named(measured)

    def validate(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, EvalResult]:
        self.last = yield from scoring(cast("Classifier", model), self.pairs["held_out"], budget, engine)
        return EvalResult(self._scores(self.last), self._losses(self.last)[:MAX_REMEMBERED])

    def _losses(self, rewards: torch.Tensor) -> list[float]:
        found: list[float] = losses_of(rewards, self.settings.centering).tolist()
        return found

    def _scores(self, rewards: torch.Tensor) -> dict[str, float]:
        return {"loss": float(np.mean(self._losses(rewards))), **named(sums_of(rewards))}

    def samples(self, model: torch.nn.Module, state: State, engine: Compute) -> list[events.Sample]:
        """The first held-out pairs with the rewards of their answers, from the validation that was just made."""
        if self.last is None:
            return []
        shown = zip(self.held_rows[: self.spec.run.samples], self.last.tolist(), strict=False)
        return [events.Sample(prompt=prompt_of(row), reference=text_of(row, "chosen"), answer=in_words(*pair)) for row, pair in shown]

    def kind(self) -> str:
        return "reward"

    # At the end -----------------------------------------------------------------------------------------------------------

    def row_losses(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, list[float]]:
        return self._losses((yield from scoring(cast("Classifier", model), self.pairs["train"], budget, engine)))

    def row_losses_before(self, base: Loader, budget: int, engine: Compute) -> Generator[float, None, list[float]]:
        """Of a model that gives both answers the same reward: before tuning there is no head."""
        yield from ()
        return [math.log(2)] * len(self.train)

    def examine(self, model: torch.nn.Module, state: State, budget: int, engine: Compute) -> Generator[float, None, Any]:
        return (yield from scoring(cast("Classifier", model), self.pairs["held_out"], budget, engine))

    def evaluation(self, state: State, examined: Any, base: Loader, budget: int, engine: Compute) -> dict[str, Any]:
        """The share of pairs told apart with its interval, beside a coin; and the pairs with the highest and the lowest loss."""
        pairs = len(self.held_out)
        if not pairs:
            return {}
        tuned: dict[str, Any] = self._scores(examined)
        share, losses = tuned[self.accuracy], self._losses(examined)
        low, high = share_interval(share, pairs)
        order = sorted(range(pairs), key=lambda i: losses[i], reverse=True)
        half = min(MAX_LISTED, max(1, pairs // 2))

        def listed(i: int) -> dict[str, Any]:
            row = self.held_rows[i]
            about = {"line": row.line, "prompt": prompt_of(row), "reference": text_of(row, "chosen")}
            return about | {"tuned_answer": in_words(*examined[i].tolist()), "tuned_loss": losses[i]}

        return {
            "rows": pairs,
            "contest": contest(self.accuracy, {"rows": pairs, "one": 0.5, "other": share, "interval": (low - 0.5, high - 0.5)}),
            "base": {self.accuracy: 0.5, "loss": math.log(2)},
            "tuned": tuned | {"intervals": {self.accuracy: [low, high]}},
            "worst": [listed(i) for i in order[:half]],
            "best": [listed(i) for i in order[::-1][:half]],
        }


def prompt_of(row: Row) -> str:
    text: str = conversation_with(row.row, "chosen", "generic")["prompt"]
    return text


def text_of(row: Row, answer: str) -> str:
    text: str = conversation_with(row.row, answer, "generic")["completion"]
    return text


def in_words(chosen: float, rejected: float) -> str:
    return f"{chosen:.2f} for the chosen answer, {rejected:.2f} for the rejected one"
