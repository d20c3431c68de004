"""Can a reward teach this model? What the base answers to some prompts says it before a job has used the machine for hours.

A policy gradient learns from differences between answers to one prompt: where all of them have the same reward, the gradient is zero.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from app.graders import Grader
from app.storage.atomic import write_atomically
from worker.runtime.device import Compute
from worker.training.graded import Answer, GivenAnswer, grading
from worker.training.rollouts import Rewarding, RolloutPrompt, Rollouts, joined, rolled

FILE = "reward_check.json"
MIN_SPREAD = 0.05
"""Share of the prompts whose answers must differ in their reward."""
MORE = 4
"""How many times the prompts are asked where the answers to the first do not differ and the grader tells them from the dataset's own: none of 16
leaves room for 17% (95% bound), none of 64 for less than MIN_SPREAD."""
MIN_OF_REFERENCES = 0.5
"""Mean reward of the dataset's own answers below which the grader is doubted."""
MAX_TRUNCATED = 0.5
SAME = 1e-3
"""Difference of two mean rewards that is none."""
STRONG = 0.8
"""A correlation of the reward with the length of answers that is told."""
SLOW_SECONDS = 1.0


class RewardCheck(NamedTuple):
    """What was found. Shares and rewards are 0 to 1."""

    prompts: int
    answers: int
    reward: float  # mean over all answers
    best: float  # mean over prompts of the best answer
    spread: float  # share of prompts whose answers have different rewards
    references: float | None  # mean reward of the dataset's own answers; None where there are none
    length_correlation: float | None  # Pearson's, of reward and tokens of an answer
    repetition_correlation: float | None  # of reward and the share of an answer's words that it said before
    truncated: float  # share of answers that the limit cut
    grader_seconds: float  # of one answer
    seconds: float
    teaches: bool
    why: str
    hint: str

    @property
    def sentence(self) -> str:
        found = (
            f"Before training, {self.answers} answers to {self.prompts} prompts have a mean reward of {self.reward:.2f}, the best of each "
            f"{self.best:.2f}; on {self.spread:.0%} of the prompts they differ."
        )
        return f"{found} {self.why}".strip()


def check(
    model: torch.nn.Module, prompts: Sequence[RolloutPrompt], first: int, how: Rewarding, seed: int, engine: Compute
) -> Generator[float, None, RewardCheck]:
    """Draw and grade answers of the base to the `first` of the prompts, and to the others where these leave it open; say what follows from them."""
    began = time.monotonic()
    found = yield from rolled(model, prompts[:first], how, seed, engine)
    references, each = yield from _of_references(how.grader, prompts[:first], how.answer)
    if prompts[first:] and _is_open(found, references):
        found = joined(found, (yield from rolled(model, prompts[first:], how, seed + 1, engine)))
        further, each = yield from _of_references(how.grader, prompts[first:], how.answer)
        references += further
    return judged(found, references, each, time.monotonic() - began)


def _is_open(found: Rollouts, references: Sequence[float]) -> bool:
    """Whether too few answers differ, and the grader gives the dataset's own another reward: then right answers may only be rare."""
    if sum(found.spread()) / len(set(found.groups)) >= MIN_SPREAD:
        return False
    return bool(set(references) - {r for r in found.rewards if r is not None})


def _of_references(grader: Grader, prompts: Sequence[RolloutPrompt], answer: Answer) -> Generator[float, None, tuple[list[float], float]]:
    """(rewards of the dataset's own answers, seconds of one)."""
    began = time.monotonic()
    given = [GivenAnswer(one.row, one.asked, one.asked.reference) for one in prompts if one.asked.reference]
    grades = yield from grading(grader, given, answer)
    return [one.score for one in grades if one.score is not None], (time.monotonic() - began) / max(len(given), 1)


def judged(found: Rollouts, references: Sequence[float], grader_seconds: float, seconds: float) -> RewardCheck:
    """What follows from graded answers and from the rewards of the references."""
    known = [(r, n, t) for r, n, t in zip(found.rewards, found.data.trained_counts(), found.texts, strict=True) if r is not None]
    rewards = [r for r, _, _ in known]
    groups = sorted(set(found.groups))
    best = [
        max((r for r, g in zip(found.rewards, found.groups, strict=True) if g == group and r is not None), default=0.0) for group in groups
    ]
    spread, truncated = sum(found.spread()) / len(groups), found.ended.count(False) / len(found.ended)
    mean, of_references = float(np.mean(rewards)), float(np.mean(references)) if references else None
    by_length = _correlation(rewards, [n for _, n, _ in known])
    teaches, why, hint = _verdict(mean, spread, of_references, truncated, by_length, grader_seconds)
    return RewardCheck(
        len(groups), len(found.rewards), mean, float(np.mean(best)), spread, of_references, by_length,
        _correlation(rewards, [_repeated(text) for _, _, text in known]), truncated, grader_seconds, seconds, teaches, why, hint,
    )  # fmt: skip


def _verdict(
    mean: float, spread: float, references: float | None, truncated: float, by_length: float | None, grader_seconds: float
) -> tuple[bool, str, str]:
    """(whether to go on, why not or what to look at, what to do)."""
    doubted = references is not None and references < MIN_OF_REFERENCES
    if spread < MIN_SPREAD:
        same = f"the answers to {1 - spread:.0%} of the prompts have the same reward, so there is nothing to compare"
        if doubted:
            assert references is not None
            return (
                False,
                f"{same}, and the dataset's own answers get {references:.2f}.",
                "Try the grader on the dataset's answers: it may read the wrong field.",
            )
        if references is not None and abs(references - mean) < SAME < 1 - mean:
            return (
                False,
                f"{same}, and the dataset's own answers have it too: {references:.2f}.",
                "Take a grader that gives right and wrong answers different scores.",
            )
        if truncated > MAX_TRUNCATED and mean < 0.5:
            return (
                False,
                f"{same}; {truncated:.0%} of the answers were cut by the limit.",
                "Raise answer_tokens, or ask for short answers in the prompt.",
            )
        if mean < 0.5:
            return False, f"{same}: none is right.", "Take easier prompts, or train on worked examples first and go on from that model."
        return False, f"{same}: all are right.", "Take harder prompts, or a stricter grader."
    if doubted:
        return True, f"The dataset's own answers get only {references:.2f} by this grader: look whether it measures what is meant.", ""
    if truncated > MAX_TRUNCATED:
        return True, f"{truncated:.0%} of the answers were cut by the limit: raise answer_tokens where they need more.", ""
    if by_length is not None and abs(by_length) > STRONG:
        longer = "longer" if by_length > 0 else "shorter"
        return True, f"The reward goes with the length (correlation {by_length:.2f}): answers may become {longer}.", ""
    if grader_seconds > SLOW_SECONDS:
        return True, f"The grader takes {grader_seconds:.1f} seconds for an answer, which every step waits for.", ""
    return True, "", ""


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's; None where either is constant."""
    if len(one) < 3 or np.std(one) == 0 or np.std(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def _repeated(text: str) -> float:
    words = text.split()
    return 1 - len(set(words)) / len(words) if words else 0.0


def write(attempt: Path, found: RewardCheck) -> None:
    write_atomically(attempt / FILE, json.dumps(found._asdict(), indent=1))


def was_made(runs: Path, *, despite: bool) -> bool:
    """Whether an earlier attempt at the job made the check and went on: the reward teaches, or the job trains `despite` the check."""
    return any(despite or json.loads(path.read_text())["teaches"] for path in runs.glob(f"a*/{FILE}"))
