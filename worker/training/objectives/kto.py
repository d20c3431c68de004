"""Rated answers: those rated good become likelier than the model before tuning has them, and those rated bad less likely.

Kahneman–Tversky optimization (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, section 4.1). The reference is scored and
kept as in `dpo.py`, of each row twice: with its own answer, and with an unrelated one of another row, for the KL baseline z₀. The
paper exchanges answers within each batch; here they are exchanged once for the whole job, so that the reference reads each prompt
with one unrelated answer, and z₀ of a step is the mean over the rows of its batch.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from app.errors import BadData
from app.formats.preference import conversation_with
from app.jobs import solved_examples
from app.objectives.kto import KTOSettings
from app.spec import JobSpec
from worker.data import batching
from worker.data.batching import Batch, Row, make_batch
from worker.data.chat_template import prepare_for_answers
from worker.data.rated_rows import tokenise_rated
from worker.runtime.device import Compute
from worker.runtime.distributed import ProcessGroup
from worker.runtime.transfer import sent
from worker.scoring import held_out
from worker.scoring.held_out import HeldOutPrompt
from worker.training.objectives._base import MAX_REMEMBERED, EvalResult, LossOutput, TrainingObjective
from worker.training.objectives.dpo import DPO, PairBatch, answer_likelihoods


class RatedBatch(NamedTuple):
    """A pack of rated answers on the device, and the same prompts with unrelated answers."""

    own: PairBatch
    unrelated: PairBatch
    good: torch.Tensor  # (rows,) bool


class Weights(NamedTuple):
    """λ_D and λ_U."""

    desirable: float
    undesirable: float


def baseline_of(ratios: torch.Tensor) -> torch.Tensor:
    """z₀ in nats, a scalar, from log π / π_ref (rows,) of unrelated answers: their mean, and at least 0 (section 4.1 of the paper).

    The answers y' of other rows stand in for those that the model would write, so this is an estimate of KL(π ‖ π_ref), and biased.
    """
    return ratios.mean().clamp(min=0)


def losses_of(
    ratios: torch.Tensor, baseline: torch.Tensor, good: torch.Tensor, beta: float, weights: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of each row, margins (rows,)) from log π / π_ref of its answers (rows,) in nats and whether each is rated good.

    The loss is λ_y − v (L_KTO of the paper, equation 7 of its first version): v is λ_D σ(β (r − z₀)) for a good answer and λ_U σ(β (z₀ − r)) for a bad one. A
    margin is what σ is taken of: above 0 where the answer is told rightly. No gradient reaches z₀.
    """
    above = beta * (ratios - baseline.detach())
    margins = torch.where(good, above, -above)
    weight = torch.full_like(ratios, weights.undesirable).masked_fill(good, weights.desirable)
    return weight * torch.sigmoid(-margins), margins


def sums_of(rewards: torch.Tensor, margins: torch.Tensor, good: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
    """Sums over rows of: rows, rows told rightly (a tie counts half), good ones, their rewards, bad ones, theirs, and z₀; float64."""
    rewards, margins, good = rewards.detach().double(), margins.detach().double(), good.double()
    rows, right = torch.ones_like(good).sum(), (margins > 0).double() + 0.5 * (margins == 0).double()
    return torch.stack(
        [rows, right.sum(), good.sum(), (rewards * good).sum(), (1 - good).sum(), (rewards * (1 - good)).sum(), rows * baseline.double()]
    )


def named(sums: torch.Tensor) -> dict[str, float]:
    """The means of `sums_of`, as events carry them; without a kind of answers that there was none of."""
    rows, right, good, good_rewards, bad, bad_rewards, baselines = sums.tolist()
    found = {"rating_accuracy": right / max(rows, 1.0), "kl_baseline": baselines / max(rows, 1.0)}
    found |= {"good_reward": good_rewards / good} if good else {}
    return found | ({"bad_reward": bad_rewards / bad} if bad else {})


class KTO(DPO):
    excluded: ClassVar = "rows have no answer left"
    unit: ClassVar = "row"
    accuracy: ClassVar = "rating_accuracy"
    measures: ClassVar = 7  # those of `sums_of`

    def __init__(self, spec: JobSpec, tokenizer: Any) -> None:
        self.plain_template = prepare_for_answers(tokenizer, spec.run, spec.model.kind)
        TrainingObjective.__init__(self, spec, tokenizer)
        run, kind = spec.run, spec.model.kind
        train_rows, held_rows = batching.sides(spec)
        rated = {
            "train": tokenise_rated(tokenizer, train_rows, kind, self.longest, self.lead, seed=run.seed),
            "held_out": tokenise_rated(tokenizer, held_rows, kind, self.longest, self.lead, seed=run.seed, more=train_rows),
        }
        self.pairs = {name: rows.both for name, rows in rated.items()}
        self.train, self.held_out = (rows.own() for rows in rated.values())
        self.good = {name: rows.good for name, rows in rated.items()}  # by part, (rows,) bool
        self._set_weights(spec.preference or KTOSettings(), len(train_rows))
        kept = set(self.held_out.lines)
        held = [row for row in held_rows if row.line in kept]
        self.held_rows = [Row(line, conversation_with(row, "answer", kind)) for line, row in held]
        self.tryout = solved_examples.of_rows(train_rows, held)
        self.room = spec.model.shape.positions - run.sample_tokens - len(self.lead)
        wanted = [row for row, good in zip(self.held_rows, self.good["held_out"].tolist(), strict=True) if good]
        self.questions = held_out.questions(tokenizer, wanted, kind, run.samples, self.room)
        self.reference, self.chosen_tokens = {}, {}
        self.baseline = torch.zeros(())  # z₀ of the step that is computed, in nats

    def _set_weights(self, settings: KTOSettings, rows: int) -> None:
        """Raises BadData where there is nothing to learn from."""
        good, bad = int(self.good["train"].sum()), int((~self.good["train"]).sum())
        if not good + bad:
            raise BadData(
                f"None of the {rows} rows has an answer within {self.longest} tokens.",
                hint="Raise the max sequence length, or check the answers of the rows.",
            )
        if not good or not bad:
            raise BadData(
                f"All {good + bad} training answers are rated {'good' if good else 'bad'}.",
                hint="KTO is trained on both kinds: add rows of the other, or train on the good answers as chats.",
            )
        self.beta, self.weights = settings.beta, Weights(*settings.weights(good, bad))

    def facts(self) -> dict[str, Any]:
        return {"desirable_weight": self.weights.desirable, "undesirable_weight": self.weights.undesirable}

    # Training -----------------------------------------------------------------------------------------------------------

    def batch(self, pack: Sequence[int], engine: Compute) -> Any:
        good = sent(torch.from_numpy(self.good["train"][list(pack)]), engine.device)
        return RatedBatch(self._side(pack, 0, engine.device), self._side(pack, 1, engine.device), good)

    def _side(self, pack: Sequence[int], side: int, device: torch.device) -> PairBatch:
        """The rows of a pack with their own answers (0) or with the unrelated ones (1)."""
        data = self.pairs["train"]
        sequences = [2 * row + side for row in pack]
        batch: Batch = make_batch(data.sequences, sequences, device)
        return PairBatch(batch, [data.answer_tokens(s) for s in sequences], sent(torch.tensor(pack), device))

    def before_step(
        self, model: torch.nn.Module, batches: Sequence[Sequence[Any]], rows: int, engine: Compute, world: ProcessGroup
    ) -> None:
        """Estimate z₀ from the unrelated answers of all packs of the step. The model reads them without dropout and without gradients."""

        def read(part: RatedBatch) -> torch.Tensor:
            return self._ratios(model, part.unrelated, 1, engine).sum()

        total = torch.zeros((), device=engine.device)
        for pack in batches:
            with held_out.evaluating(model):
                for found in engine.abreast.map(read, pack):
                    total += found
        world.sum_([total])
        self.baseline = (total / rows).clamp(min=0)

    def _ratios(self, model: torch.nn.Module, given: PairBatch, side: int, engine: Compute) -> torch.Tensor:
        """log π / π_ref of one side's answers of a pack, (rows,)."""
        policy = answer_likelihoods(model, given, engine)
        return policy - self.reference["train"].index_select(0, given.pairs)[:, side].to(policy.dtype)

    def loss(self, model: torch.nn.Module, batch: Any, engine: Compute) -> LossOutput:
        """The rows' losses, and the tokens of their answers as the number of losses."""
        ratios = self._ratios(model, batch.own, 0, engine)
        baseline = self.baseline.to(engine.device)
        losses, margins = losses_of(ratios, baseline, batch.good, self.beta, self.weights)
        measured = sums_of(self.beta * ratios, margins, batch.good, baseline)
        return LossOutput(losses.sum(), batch.own.batch.tokens, batch.own.batch.trained, measured)

    def name_metrics(self, sums: torch.Tensor) -> dict[str, float]:
        return named(sums)

    # Judging ------------------------------------------------------------------------------------------------------------

    def _judged(self, part: str, policy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, sums for the metrics) of the rows of a part in float64, from log-probabilities (rows, 2) of own and unrelated answers;
        z₀ is estimated from all of them."""
        ratios = policy.double() - self.reference[part].cpu().double()
        baseline, good = baseline_of(ratios[:, 1]), torch.from_numpy(self.good[part])
        losses, margins = losses_of(ratios[:, 0], baseline, good, self.beta, self.weights)
        return losses, sums_of(self.beta * ratios[:, 0], margins, good, baseline)

    def validate(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, EvalResult]:
        policy = yield from self._score(model, self.pairs["held_out"], engine, budget)
        losses, sums = self._judged("held_out", policy)
        return EvalResult({"loss": float(losses.mean()), **named(sums)}, losses.tolist()[:MAX_REMEMBERED])

    def _asked(self, most: int) -> list[int]:
        """Of the first rows those with a good answer: a bad one is no reference to be compared with."""
        return [place for place in super()._asked(len(self.held_rows)) if self.good["held_out"][place]][:most]

    def _questions(self, places: Sequence[int]) -> dict[int, HeldOutPrompt]:
        """With the rating in front of a reference that was rated bad."""
        good = self.good["held_out"]
        return {
            place: one if good[place] else one._replace(reference=f"(rated bad) {one.reference}")
            for place, one in super()._questions(places).items()
        }
