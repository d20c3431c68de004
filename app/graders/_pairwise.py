"""A judge that is asked which of two answers is better, in both orders.

Judges prefer the answer in one place, whatever it says: a verdict that changes when the sides are swapped is decided by position and
not by the answers (Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", https://arxiv.org/abs/2306.05685).
So a side wins only where the judge prefers it in both orders, and the share of rows on which it agrees with itself is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from app.graders._base import JSON, GradedSample, GradeError, Result, Steps
from app.graders._judge import Judge, result_in
from app.kit import stats
from app.kit.answers import label_in
from app.languages import gettext

Side = Literal["first", "second", "tie"]
_SAID: dict[str, Side] = {"1": "first", "2": "second", "tie": "tie"}
_SWAPPED: dict[Side, Side] = {"first": "second", "second": "first", "tie": "tie"}
SIDES: tuple[Side, ...] = ("first", "second", "tie")
INSTRUCTION = (
    "What was called the answer above is two answers by two assistants, Answer 1 and Answer 2. Decide by the same criteria which of the two "
    'is better. Answer with a JSON object {"result": "1"}, {"result": "2"} or {"result": "tie"}, and nothing else.'
)


def prefer(judge: Judge, item: JSON, first: str, second: str) -> Steps:
    """Ask a judge by its own messages, in which the answer is both answers. The reward is the place of its verdict in SIDES.

    Raises GradeError where it gives none.
    """
    both = GradedSample(f"Answer 1:\n{first}\n\nAnswer 2:\n{second}")
    reply = yield judge.ask(judge.messages(both, item, INSTRUCTION))
    found = result_in(reply.text)
    said = label_in(str(found if found is not None else reply.text), tuple(_SAID))
    if said not in _SAID:
        raise GradeError(
            "model_grader_parse_error", gettext("The judge named none of the two answers: %(text)s", text=repr(reply.text[:200]))
        )
    return Result(float(SIDES.index(_SAID[said])), tokens={reply.model or judge.model: reply.tokens})


class PairVerdict(NamedTuple):
    """The answer that a judge finds better in each order, `swapped` with the second answer in front; None where it gave no verdict, and
    why."""

    straight: Side | None
    swapped: Side | None
    why: str = ""

    @property
    def winner(self) -> Side | None:
        """The verdict of both orders; None where they differ or one is missing."""
        return self.straight if self.straight == self.swapped else None

    @property
    def position(self) -> int | None:
        """The place, 1 or 2, whose answer was found better in both orders although the answers had changed places."""
        if {self.straight, self.swapped} != {"first", "second"}:
            return None
        return 1 if self.straight == "first" else 2


def pair_verdict(straight: float | None, swapped: float | None, why: str) -> PairVerdict:
    """Of the rewards of `prefer` in both orders."""
    return PairVerdict(None if straight is None else SIDES[int(straight)], None if swapped is None else _SWAPPED[SIDES[int(swapped)]], why)


class SelfAgreement(NamedTuple):
    """How often a judge agrees with itself when the sides are swapped, with Wilson's 95% interval of the share. `by_position` counts the
    rows on which it chose the same place twice, `first_place` those of them on which that was the first. `rows` have both verdicts."""

    rows: int
    agreed: int
    low: float
    high: float
    by_position: int
    first_place: int
    wins: tuple[int, int, int]
    """Rows that the first answer won, the second, and that were a tie, each in both orders."""
    failed: int


def self_agreement(found: Sequence[PairVerdict]) -> SelfAgreement | None:
    """None where no row has both verdicts."""
    both = [one for one in found if one.straight is not None and one.swapped is not None]
    if not both:
        return None
    agreed = sum(one.winner is not None for one in both)
    places = [one.position for one in both]
    low, high = stats.wilson(agreed, len(both))
    first, second, tie = (sum(one.winner == side for one in both) for side in SIDES)
    return SelfAgreement(
        len(both), agreed, low, high, len(both) - places.count(None), places.count(1), (first, second, tie), len(found) - len(both)
    )
