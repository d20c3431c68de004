"""Preference tuning: of two answers to a prompt, the chosen one becomes likelier than the rejected one.

Direct preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7) and its relatives
(`losses_of`). The reference is the model before tuning. It scores every pair once, before the strategy is attached, so there is
never a second copy of it in memory, and a strategy may change the base's own weights. Its scores are kept beside the checkpoints:
a resumed job reads the very same numbers. Losses without a reference (ORPO, SimPO, CPO) leave all of that out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from app.errors import StudioError
from app.formats.preference import conversation_with
from app.jobs import solved_examples
from app.kit import manifest
from app.objectives.dpo import PreferenceSettings
from app.spec import JobSpec
from worker.data import batching
from worker.data.batching import Batch, Row, make_batch
from worker.data.chat_template import prepare_for_answers
from worker.data.preference_pairs import PreferencePairs, pairs_of_sides, sequences_of
from worker.modeling.cross_entropy import head_of
from worker.modeling.packed_attention import PackShape
from worker.modeling.token_logprobs import token_nats
from worker.runtime import distributed
from worker.runtime.device import Compute
from worker.runtime.transfer import sent
from worker.scoring import held_out
from worker.scoring.metrics import contest, difference_interval, share_interval
from worker.training.checkpoint import State, write_folder
from worker.training.objectives._base import MAX_REMEMBERED, EvalResult, Loader, LossOutput, TrainingObjective
from worker.training.objectives.causal_lm import CausalLM

REFERENCE = "reference"
PARTS = ("train", "held_out")


class PairBatch(NamedTuple):
    """A pack of pairs on the device."""

    batch: Batch
    counts: list[int]  # tokens of each answer
    pairs: torch.Tensor  # (pairs,) their numbers


def pair_batch(data: PreferencePairs, pack: Sequence[int], device: torch.device, frame: PackShape | None = None) -> PairBatch:
    sequences = sequences_of(pack)
    counts = [data.answer_tokens(s) for s in sequences]
    batch = make_batch(data.sequences, sequences, device, frame)
    batch.sources, batch.targets = batch.sources[: batch.trained], batch.targets[: batch.trained]  # what follows pads the loss of a frame
    return PairBatch(batch, counts, sent(torch.tensor(pack), device))


def answer_likelihoods(model: torch.nn.Module, given: PairBatch, engine: Compute, *, mean: bool = False) -> torch.Tensor:
    """Log-probabilities (answers,) of the answers of a pack in nats: sums over the tokens of each answer, or means. Gradients flow."""
    hidden = held_out.hidden_states(model, given.batch, engine)
    nats = token_nats(hidden, head_of(held_out.plain_model(model)), given.batch.targets, engine.compute)
    return -torch.stack([part.mean() if mean else part.sum() for part in nats.split(given.counts)])


def log_likelihoods(model: torch.nn.Module, given: PairBatch, engine: Compute, *, mean: bool = False) -> tuple[torch.Tensor, int, int]:
    """(log-probabilities (pairs, 2) of the chosen and the rejected answers in nats, tokens read, tokens of answers) of a pack of pairs."""
    return answer_likelihoods(model, given, engine, mean=mean).view(-1, 2), given.batch.tokens, given.batch.trained


def losses_of(
    policy: torch.Tensor, reference: torch.Tensor | None, settings: PreferenceSettings, chosen_tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of each pair, rewards (pairs, 2) of its answers), in nats.

    `policy` (pairs, 2) are log-probabilities of the chosen and the rejected answers, sums or means over tokens as `settings.means`
    says; `reference` those of the model before tuning, None for a loss without; `chosen_tokens` (pairs,) counts the tokens of the
    chosen answers, which only CPO asks for. An answer's reward r is β times its log-probability, less the reference's.

    dpo: −log σ(r_w − r_l) (Rafailov et al. 2023, equation 7); with label smoothing ε every label is taken to be wrong with that
    probability (Mitchell 2023, conservative DPO).
    robust_dpo: the same with the weights (1 − ε) / (1 − 2ε) and −ε / (1 − 2ε), whose mean over labels that are exchanged with
    probability ε is DPO's loss on the true ones (Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409, section 3.1).
    ipo: the difference of the log-ratios is pulled to 1 / 2β, so that it does not grow without end (Azar et al. 2023,
    https://arxiv.org/abs/2310.12036, equation 17).
    orpo: cross-entropy of the chosen answer per token, plus β times −log σ of the log odds ratio, log P / (1 − P) with log P the mean
    per token (Hong et al. 2024, https://arxiv.org/abs/2403.07691, equations 3 to 7; their λ is β).
    simpo: −log σ(r_w − r_l − γ) with means per token (Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6).
    cpo: −log σ(r_w − r_l) without a reference, plus the cross-entropy of the chosen answer per token, weighted (Xu et al. 2024,
    https://arxiv.org/abs/2401.08417, equation 3 and its term L_NLL; their program averages that over tokens too).
    """
    ratios = policy if reference is None else policy - reference
    rewards = settings.beta * ratios
    margin = rewards[:, 0] - rewards[:, 1]
    match settings.loss:
        case "ipo":
            return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * settings.beta)).square(), rewards
        case "orpo":
            odds = log_odds(policy)
            return -policy[:, 0] - settings.beta * F.logsigmoid(odds[:, 0] - odds[:, 1]), rewards
        case "simpo":
            return -F.logsigmoid(margin - (settings.gamma or 0.0)), rewards
        case "cpo":
            assert chosen_tokens is not None
            return -F.logsigmoid(margin) - (settings.nll_weight or 0.0) * policy[:, 0] / chosen_tokens, rewards
    smoothing = settings.label_smoothing
    if settings.loss == "robust_dpo":
        scale = 1 - 2 * smoothing
        return -(1 - smoothing) / scale * F.logsigmoid(margin) + smoothing / scale * F.logsigmoid(-margin), rewards
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin), rewards


def log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log P / (1 − P) from log P, elementwise; finite, and without a gradient, where P is 1 but for rounding."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


def sums_of(rewards: torch.Tensor) -> torch.Tensor:
    """Sums over pairs of: pairs, reward of chosen, of rejected, and pairs told apart rightly; a tie counts half."""
    chosen, rejected = rewards.detach().double().unbind(1)
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return torch.stack([torch.ones_like(chosen).sum(), chosen.sum(), rejected.sum(), right.sum()])


def named(sums: torch.Tensor) -> dict[str, float]:
    """The means of `sums_of`, as events carry them."""
    pairs, chosen, rejected, right = sums.tolist()
    means = {"reward_margin": chosen - rejected, "reward_accuracy": right, "chosen_reward": chosen, "rejected_reward": rejected}
    return {name: value / max(pairs, 1.0) for name, value in means.items()}


class DPO(CausalLM):
    excluded: ClassVar = "pairs have no two different answers left"
    unit: ClassVar = "pair"
    balances: ClassVar = False
    preparing: ClassVar = TrainingObjective.preparing
    accuracy: ClassVar = "reward_accuracy"
    measures: ClassVar = 4  # those of `sums_of`
    means: bool = False  # whether an answer's log-probability is the mean over its tokens rather than the sum
    reads_base: bool = True  # whether rewards are measured from the model before tuning
    counts_tokens: bool = False  # whether the loss asks for the number of tokens of the chosen answers

    def __init__(self, spec: JobSpec, tokenizer: Any) -> None:
        self.plain_template = prepare_for_answers(tokenizer, spec.run, spec.model.kind)
        TrainingObjective.__init__(self, spec, tokenizer)
        self.settings = spec.preference or PreferenceSettings()
        self.means, self.reads_base = self.settings.means, self.settings.reads_base
        self.counts_tokens = self.settings.loss == "cpo"
        run, kind = spec.run, spec.model.kind
        train_rows, held_rows = batching.sides(spec)
        self.pairs = pairs_of_sides(tokenizer, train_rows, held_rows, kind, self.longest, self.lead)
        self.train, self.held_out = self.pairs["train"].pairs, self.pairs["held_out"].pairs
        kept = set(self.held_out.lines)
        # As rows that end with the better answer, which is what samples and evaluations compare with.
        self.held_rows = [Row(line, conversation_with(row, "chosen", kind)) for line, row in held_rows if line in kept]
        self.tryout = solved_examples.of_rows(train_rows, [row for row in held_rows if row.line in kept])
        self.room = spec.model.shape.positions - run.sample_tokens - len(self.lead)
        self.questions = held_out.questions(tokenizer, self.held_rows, kind, run.samples, self.room)
        self.reference: dict[str, torch.Tensor] = {}  # by part, (pairs, 2); empty for a loss without
        self.chosen_tokens: dict[str, torch.Tensor] = {}  # by part, (pairs,), for the loss that asks for it

    # The reference ------------------------------------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, engine: Compute, attempt: Path, budget: int) -> Generator[float, None, None]:
        """Score all pairs with the model before tuning, or read what an earlier attempt at this job found."""
        if self.counts_tokens:
            self.chosen_tokens = {name: pairs.chosen_tokens().to(engine.device) for name, pairs in self.pairs.items()}
        if not self.reads_base:
            return
        digest = self._digest(engine)
        found = _kept(attempt.parent, digest)
        if found is None:
            found = {}
            for name in PARTS:
                found[name] = yield from self._score(model, self.pairs[name].without_lead(), engine, budget)
            if not distributed.rank():  # of several processes that train together the first one alone writes
                write_folder(attempt / REFERENCE, lambda folder: save_file(found, folder / f"{REFERENCE}.safetensors"), of=digest)
        self.reference = {name: tensor.to(engine.device) for name, tensor in found.items()}

    def _score(self, model: torch.nn.Module, data: PreferencePairs, engine: Compute, budget: int) -> Generator[float, None, torch.Tensor]:
        """Log-probabilities, (pairs, 2), of all pairs; sums or means as the loss takes them."""
        found = torch.zeros(len(data), 2)

        def read(pack: Sequence[int]) -> None:
            given = pair_batch(data, pack, engine.device)
            found[pack] = log_likelihoods(model, given, engine, mean=self.means)[0].float().cpu()

        yield from held_out.reading(model, read, data.pairs.lengths, budget, engine)
        return found

    def _digest(self, engine: Compute) -> str:
        """What the reference's figures follow from."""
        spec = self.spec
        said = spec.model_dump_json(include={"model", "dataset", "validation", "split", "run", "preference", "strategy"})
        as_what = "texts" if spec.model.kind == "generic" else "conversations"
        return hashlib.sha256(f"{said}\n{engine.rounding}\n{engine.name}\n{as_what}".encode()).hexdigest()

    # Training -----------------------------------------------------------------------------------------------------------

    def learnt(self, window: Sequence[Sequence[int]]) -> int:
        return sum(len(pack) for pack in window)

    def batch(self, pack: Sequence[int], engine: Compute) -> Any:
        return pair_batch(self.pairs["train"], pack, engine.device, self.frame_of(pack))

    def loss(self, model: torch.nn.Module, batch: Any, engine: Compute) -> LossOutput:
        """The pairs' losses, and the tokens of their answers as the number of losses."""
        policy, tokens, answers = log_likelihoods(model, batch, engine, mean=self.means)
        reference, chosen_tokens = (
            found["train"].index_select(0, batch.pairs).to(policy.dtype) if found else None
            for found in (self.reference, self.chosen_tokens)
        )
        losses, rewards = losses_of(policy, reference, self.settings, chosen_tokens)
        return LossOutput(losses.sum(), tokens, answers, sums_of(rewards))

    def name_metrics(self, sums: torch.Tensor) -> dict[str, float]:
        return named(sums)

    def row_losses(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, list[float]]:
        """Each pair's loss: one that grew says that the worse answer is still the likelier one, as where the two stand exchanged."""
        policy = yield from self._score(model, self.pairs["train"], engine, budget)
        return self._judged("train", policy)[0].tolist()

    def row_losses_before(self, base: Loader, budget: int, engine: Compute) -> Generator[float, None, list[float]]:
        if self.reference:
            policy = self.reference["train"].cpu()
        else:
            policy = yield from self._score(base(), self.pairs["train"].without_lead(), engine, budget)
        return self._judged("train", policy)[0].tolist()

    def _judged(self, part: str, policy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, rewards) of the pairs of a part in float64, from their log-probabilities (pairs, 2)."""
        reference, chosen_tokens = (found[part].cpu().double() if found else None for found in (self.reference, self.chosen_tokens))
        return losses_of(policy.double(), reference, self.settings, chosen_tokens)

    # Judging ------------------------------------------------------------------------------------------------------------

    def validate(self, model: torch.nn.Module, budget: int, engine: Compute) -> Generator[float, None, EvalResult]:
        policy = yield from self._score(model, self.pairs["held_out"], engine, budget)
        losses, rewards = self._judged("held_out", policy)
        metrics = {"loss": float(losses.mean()), **named(sums_of(rewards))}
        return EvalResult(metrics, losses.tolist()[:MAX_REMEMBERED])

    def _few_shot_rows(self, most: int) -> None:
        """No prompt can be scored by pairs."""
        return None

    def _contest(self, state: State, *_: Any) -> dict[str, Any]:
        """Pairs told apart, against the base; where rewards are measured from the base both of its rewards are zero, so against a coin."""
        share, pairs = float((state.best or state.last)[self.accuracy]), len(self.held_out)
        if not self.reads_base:
            before = float(state.before["reward_accuracy"])
            interval = difference_interval(before, share, pairs)
            return contest("ranking_accuracy", {"rows": pairs, "one": before, "other": share, "interval": interval})
        low, high = share_interval(share, pairs)
        return contest(self.accuracy, {"rows": pairs, "one": 0.5, "other": share, "interval": (low - 0.5, high - 0.5)})


def _kept(runs: Path, digest: str) -> dict[str, torch.Tensor] | None:
    """The reference's figures of an earlier attempt whose files are whole."""
    for folder in sorted(runs.glob(f"a*/{REFERENCE}")):
        try:
            if manifest.verify(folder).get("of") == digest:
                return load_file(folder / f"{REFERENCE}.safetensors")
        except (StudioError, OSError):
            continue
    return None
