"""The answers of a step of reinforcement: drawn, graded, and given their advantages."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from app.errors import BadData
from app.graders import Grader
from app.objectives import DrawnSettings
from app.objectives.reinforcement import PolicyLoss, ReinforcementSettings
from worker.data.batching import Row, Tokenised
from worker.data.chat_template import stop_ids
from worker.runtime.device import Compute
from worker.scoring import held_out
from worker.scoring.held_out import HeldOutPrompt
from worker.scoring.sampler import Drawing, DrawnAnswer, DrawOrder, drawing
from worker.training.graded import Answer, GivenAnswer, grading
from worker.training.tool_turns import Asked, Spoken, ToolTalk, conversing

EPSILON = 1e-4
"""Added to the standard deviation of a group's rewards, as TRL does."""
MAX_UNGRADED = 0.5
"""Share of a step's answers without a reward above which the job ends: what it would learn is chance."""
TURN_BITS = 40
"""Where the number of a turn stands in its seed."""
MAX_REFILLS = 3
"""How often a step draws further prompts for those whose answers all have one reward."""


@dataclass(frozen=True)
class RolloutPrompt:
    """A row, and what is asked of the model."""

    row: Row
    asked: HeldOutPrompt


@dataclass(frozen=True)
class Rollouts:
    """Graded answers as rows that can be packed. Answer i is row i of `data`, where its tokens are the trained ones."""

    data: Tokenised
    nats: np.ndarray  # (trained tokens,) float32: minus the log-probability under the model that drew it; NaN where it is not known
    advantages: np.ndarray  # (answers,) float32
    rewards: list[float | None]
    groups: list[int]  # of each answer, the number of its prompt in the step
    ended: list[bool]
    texts: list[str]
    faults: list[str]

    def spread(self) -> list[bool]:
        """For each prompt whether its answers have different rewards: only these teach."""
        return [
            len({r for r, g in zip(self.rewards, self.groups, strict=True) if g == group and r is not None}) > 1
            for group in sorted(set(self.groups))
        ]

    def figures(self) -> torch.Tensor:
        """The sums that `FIGURES` names, float64."""
        known, spread = [r for r in self.rewards if r is not None], self.spread()
        answers, nats = (len(self.rewards), self.ended.count(False)), (len(self.nats), float(np.nansum(self.nats)))
        return torch.tensor([len(known), sum(known), *answers, *nats, len(spread), spread.count(False)], dtype=torch.float64)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What steps learn from, for a checkpoint: all but texts and faults. An answer without a reward has NaN."""
        rewards = [float("nan") if reward is None else reward for reward in self.rewards]
        return {
            "ids": torch.from_numpy(self.data.ids),
            "trained": torch.from_numpy(self.data.trained),
            "starts": torch.from_numpy(self.data.starts),
            "nats": torch.from_numpy(self.nats),
            "advantages": torch.from_numpy(self.advantages),
            "rewards": torch.tensor(rewards, dtype=torch.float64),
            "groups": torch.tensor(self.groups),
            "ended": torch.tensor(self.ended),
        }

    @classmethod
    def of_tensors(cls, kept: dict[str, torch.Tensor]) -> Rollouts:
        """The same from a checkpoint."""
        ids, trained, starts, nats, found = (kept[name].numpy() for name in ("ids", "trained", "starts", "nats", "advantages"))
        rewards = [None if math.isnan(reward) else reward for reward in kept["rewards"].tolist()]
        data = Tokenised(ids, trained, starts, list(range(len(rewards))), 0, [])
        return cls(data, nats, found, rewards, kept["groups"].tolist(), kept["ended"].tolist(), [""] * len(rewards), [])


FIGURES = ("graded", "reward", "answers", "truncated", "tokens", "nats", "groups", "dead")


def advantages(rewards: Sequence[float | None], loss: PolicyLoss) -> list[float]:
    """The advantage of each answer to one prompt; 0 for one without a reward.

    GRPO: (r − mean) / (standard deviation + 1e-4), the deviation that of a sample (equation 3 of Shao et al. 2024); without the division in
    Dr. GRPO; RLOO: r less the mean of the others.
    """
    known = np.asarray([r for r in rewards if r is not None], np.float64)
    if len(known) < 2:
        return [0.0] * len(rewards)
    found = known - known.mean()
    if loss.baseline == "others":  # the mean of the others is that much further away
        found = found * len(known) / (len(known) - 1)
    if loss.scaled:
        found = found / (known.std(ddof=1) + EPSILON)
    each = iter(found.tolist())
    return [next(each) if r is not None else 0.0 for r in rewards]


class DrawnTexts(NamedTuple):
    """The answers to some prompts, and the prompts' token ids."""

    prompts: list[list[int]]
    answers: list[Spoken]


class Rewarding(NamedTuple):
    """How answers are drawn and graded."""

    tokenizer: Any
    settings: ReinforcementSettings
    grader: Grader
    answer: Answer
    lead: Sequence[int] = ()
    talk: ToolTalk | None = None  # where tools answer
    draw: Drawing | None = None  # None: the model itself draws


def drawn_texts(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[RolloutPrompt],
    settings: DrawnSettings,
    seed: int | None,
    engine: Compute,
    lead: Sequence[int] = (),
    talk: ToolTalk | None = None,
    draw: Drawing | None = None,
) -> Generator[float, None, DrawnTexts]:
    """Draw `group_size` answers to each prompt, or without a seed write the likeliest; yields the share that is done. `draw` does it instead of
    the model itself."""
    stops = frozenset(stop_ids(tokenizer, held_out.plain_model(model).generation_config))
    texts = [[*lead, *prompt.asked.ids] for prompt in prompts]
    count = 1 if seed is None else settings.group_size
    drawn = yield from (draw or drawing)(model, tokenizer, DrawOrder(texts, count, settings.answer_tokens, stops, seed), engine)

    def text_of(asked: HeldOutPrompt, ids: list[int]) -> str:
        return held_out.as_text(tokenizer, asked, [i for i in ids if i not in stops])

    def going_on(begun: list[list[int]], turn: int) -> Generator[float, None, list[DrawnAnswer]]:
        own = None if seed is None else seed + (turn << TURN_BITS)
        found = yield from drawing(model, tokenizer, DrawOrder(begun, 1, settings.answer_tokens, stops, own), engine)
        return [one for several in found for one in several]

    answers = [
        Spoken(place, one.ids, [True] * len(one.ids), one.nats, one.ended, text, text)
        for place, several in enumerate(drawn)
        for one in several
        for text in [text_of(prompts[place].asked, one.ids)]
    ]
    if talk:
        asked = [Asked(prompt.row, prompt.asked, ids) for prompt, ids in zip(prompts, texts, strict=True)]
        answers = yield from conversing(talk, asked, answers, going_on, text_of)
    return DrawnTexts(texts, answers)


def ungraded(drawn: DrawnTexts) -> Rollouts:
    """Answers without rewards, which teach by their tokens alone."""
    return _packed(drawn, [None] * len(drawn.answers), [0.0] * len(drawn.answers), [])


def rolled(
    model: torch.nn.Module, prompts: Sequence[RolloutPrompt], how: Rewarding, seed: int, engine: Compute
) -> Generator[float, None, Rollouts]:
    """Draw `group_size` answers to each prompt and grade them; yields the share that is done, of either. Raises BadData where most cannot be
    graded, and ModelAway."""
    drawn = yield from drawn_texts(model, how.tokenizer, prompts, how.settings, seed, engine, how.lead, how.talk, how.draw)
    grades = yield from grading(how.grader, given_answers(prompts, drawn.answers), how.answer)
    rewards, faults = [one.score for one in grades], [one.why for one in grades if one.why]
    if len(faults) > MAX_UNGRADED * len(rewards):
        raise BadData(
            f"The grader {how.grader.name} could not grade {len(faults)} of {len(rewards)} answers. {faults[0]}",
            hint="Try the grader on rows of this dataset on the page Graders.",
        )
    each = how.settings.group_size
    found = [a for at in range(0, len(rewards), each) for a in advantages(rewards[at : at + each], how.settings.loss)]
    return _packed(drawn, rewards, found, faults)


def given_answers(prompts: Sequence[RolloutPrompt], answers: Sequence[Spoken]) -> list[GivenAnswer]:
    """What a grader reads of answers to prompts."""
    return [GivenAnswer(prompts[one.prompt].row, prompts[one.prompt].asked, one.text, one.calls) for one in answers]


def _packed(drawn: DrawnTexts, rewards: list[float | None], found: Sequence[float], faults: list[str]) -> Rollouts:
    prompts, answers = drawn
    ids = [np.asarray([*prompts[one.prompt], *one.ids], np.int32) for one in answers]
    trained = [np.asarray([*[False] * len(prompts[one.prompt]), *one.drawn]) for one in answers]
    starts = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    nats = [one.nats or [float("nan")] * sum(one.drawn) for one in answers]
    return Rollouts(
        Tokenised(np.concatenate(ids), np.concatenate(trained), starts, list(range(len(ids))), 0, []),
        np.concatenate([np.asarray(values, np.float32) for values in nats]),
        np.asarray(found, np.float32),
        rewards,
        [one.prompt for one in answers],
        [one.ended for one in answers],
        [one.text for one in answers],
        faults,
    )


def joined(one: Rollouts, other: Rollouts) -> Rollouts:
    """Both, the prompts of the other numbered on."""
    more = max(one.groups, default=-1) + 1
    return Rollouts(
        replace(one.data.with_rows(other.data), lines=list(range(len(one.rewards) + len(other.rewards)))),
        np.concatenate([one.nats, other.nats]),
        np.concatenate([one.advantages, other.advantages]),
        [*one.rewards, *other.rewards],
        [*one.groups, *(more + group for group in other.groups)],
        [*one.ended, *other.ended],
        [*one.texts, *other.texts],
        [*one.faults, *other.faults],
    )


def only(rollouts: Rollouts, groups: Sequence[int]) -> Rollouts:
    """The answers to these prompts, numbered from 0."""
    numbers = {group: place for place, group in enumerate(groups)}
    kept = [i for i, group in enumerate(rollouts.groups) if group in numbers]
    counts = rollouts.data.trained_counts()
    starts = np.concatenate([[0], np.cumsum(counts)])
    nats = [rollouts.nats[starts[i] : starts[i + 1]] for i in kept]
    return Rollouts(
        rollouts.data.only({rollouts.data.lines[i] for i in kept}),
        np.concatenate(nats) if nats else rollouts.nats[:0],
        rollouts.advantages[kept],
        [rollouts.rewards[i] for i in kept],
        [numbers[rollouts.groups[i]] for i in kept],
        [rollouts.ended[i] for i in kept],
        [rollouts.texts[i] for i in kept],
        rollouts.faults,
    )
