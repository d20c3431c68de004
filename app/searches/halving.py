"""Successive halving: what a search does next, from what its trials reached. Pure.

Every trial trains to the first rung, a ninth of its own steps, and pauses there (a run too short for a rung passes it by). The best third go on from their checkpoints to the
second rung, a third of their steps, the best third of those to their end, and the best of these is run again with another seed before
it is called the winner (Jamieson and Talwalkar 2016, Non-stochastic Best Arm Identification). A paused run goes on as if it had never
paused, so a rung is a point of one and the same run, and no step is taken twice.

A score is a pair: the deciding metric, signed so that less is better, and the validation loss, which settles ties.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from app.searches.space import REDUCTION, RUNGS

Score = tuple[float, float]
END = len(RUNGS) + 1
"""The level of a run that has ended; level n below is the n-th rung."""
MAX_REPEATS = 3
"""Trials that are repeated at most. A repetition that is worse lets the next trial lead, which is then repeated itself."""
SHARES = (0.0, *RUNGS, 1.0)
"""The share of its steps that a trial has taken at each level."""
MAX_FAILED = 3
"""So many trials that failed, and none that has a score, end a search."""


@dataclass(frozen=True)
class SearchTrial:
    """One trial as the decision sees it. `at` is the level at which it pauses; None while it does not, or where a person paused it."""

    number: int
    moving: bool = False
    at: int | None = None
    out: bool = False  # pruned, cancelled or failed
    failed: bool = False
    scores: dict[int, Score] = field(default_factory=dict)
    repeats: int | None = None  # the number of the trial that this one repeats

    @property
    def ended(self) -> bool:
        return END in self.scores and not self.out


class Budget(NamedTuple):
    """Seconds of machine time: what was used, what one whole run takes, and the limit, None without one. `first` is the first level at which
    whole runs pause."""

    used: float
    run: float
    limit: float | None
    first: int = 1

    def fits(self, seconds: float) -> bool:
        return self.limit is None or self.used + seconds <= self.limit

    @property
    def over(self) -> bool:
        return self.limit is not None and self.used > self.limit


class Pruned(NamedTuple):
    number: int
    level: int
    place: int
    of: int
    kept: int
    worst_kept: Score


class NextMove(NamedTuple):
    """What a search does next. `ask` is a new trial, `repeat` the number of the one to run again, `winner` with `end` the trial that is called
    best; `prune` may come with `promote`."""

    do: Literal["wait", "ask", "go_on", "repeat", "end"]
    promote: tuple[int, ...] = ()
    prune: tuple[Pruned, ...] = ()
    repeat: int | None = None
    winner: int | None = None
    why: Literal["repeated", "time", "failed", ""] = ""


WAIT = NextMove("wait")


def affordable(budget: Budget, trials: int) -> int:
    """Trials that fit the time with their halving and one repetition: all of them without a limit, at least two."""
    if budget.limit is None:
        return trials
    return max((n for n in range(2, trials + 1) if halved_cost(n, budget.run, budget.first) + budget.run <= budget.limit), default=2)


def halved_cost(trials: int, run: float, first: int = 1) -> float:
    """Seconds of so many trials with halving, where one whole run takes `run` and pauses first at the level `first`, without a repetition."""
    shares = itertools.pairwise(SHARES)
    return sum(count * (share - before) * run for count, (before, share) in zip(going(trials, first), shares, strict=True))


def going(trials: int, first: int = 1) -> list[int]:
    """How many of so many trials go to each level."""
    found = [trials]
    for level in range(1, END):
        found.append(kept_of(found[-1]) if level >= first else found[-1])
    return found


def kept_of(count: int) -> int:
    """How many of so many trials go on."""
    return max(1, math.ceil(count / REDUCTION))


def decide(trials: Sequence[SearchTrial], wanted: int, slots: int, budget: Budget) -> NextMove:
    """The next move. `wanted` trials are tried, `slots` of them at a time."""
    firsts, repeats = [one for one in trials if one.repeats is None], [one for one in trials if one.repeats is not None]
    moving = sum(one.moving for one in trials)
    if budget.over:
        return _end(firsts, repeats, "time")
    if sum(one.failed for one in firsts) >= MAX_FAILED and not any(one.scores or one.moving for one in firsts):
        return NextMove("end", why="failed")
    if len(firsts) < wanted:
        return NextMove("ask") if moving < slots else WAIT
    if moving:
        return WAIT
    for level in range(1, END):
        if (move := _halve(firsts, level, budget)) is not None:
            return move
    return _repeat(firsts, repeats, budget)


def _halve(trials: Sequence[SearchTrial], level: int, budget: Budget) -> NextMove | None:
    """The trials that wait at this rung: the best third of all that reached it go on, as many as the time is enough for, but one at least."""
    here = {one.number for one in trials if one.at == level and not one.out}
    if not here:
        return None
    reached = sorted((one for one in trials if level in one.scores and not (one.out and one.failed)), key=lambda one: one.scores[level])
    kept = reached[: _payable(kept_of(len(reached)), level, budget)]
    best = {one.number for one in kept}
    pruned = tuple(
        Pruned(one.number, level, place, len(reached), len(kept), kept[-1].scores[level])
        for place, one in enumerate(reached, 1)
        if one.number in here - best
    )
    return NextMove("go_on", promote=tuple(one.number for one in kept if one.number in here), prune=pruned)


def _payable(count: int, level: int, budget: Budget) -> int:
    """How many of `count` trials can go on from a level and leave time for one to end and to be repeated."""
    cost = (SHARES[level + 1] - SHARES[level]) * budget.run
    later = (1 - SHARES[level + 1]) * budget.run + budget.run
    return next((n for n in range(count, 1, -1) if budget.fits(n * cost + later)), 1)


def _repeat(firsts: Sequence[SearchTrial], repeats: Sequence[SearchTrial], budget: Budget) -> NextMove:
    """Repeat the leader, or end where it was repeated and still leads."""
    order = ranking(firsts, repeats)
    if not order:
        return NextMove("end", why="failed")
    leader = order[0]
    if leader in _repeated(repeats):
        return NextMove("end", winner=leader, why="repeated")
    if not budget.fits(budget.run):
        return _end(firsts, repeats, "time")
    if len(repeats) >= MAX_REPEATS:
        return _end(firsts, repeats, "repeated")
    return NextMove("repeat", repeat=leader)


def _repeated(repeats: Sequence[SearchTrial]) -> set[int]:
    return {one.repeats for one in repeats if one.repeats is not None}


def ranking(firsts: Sequence[SearchTrial], repeats: Sequence[SearchTrial]) -> list[int]:
    """Numbers of the trials that ended, best first, by the mean over their own run and their repetitions. A repetition that failed counts
    as worse than any other."""

    def mean(trial: SearchTrial) -> Score:
        again = [one.scores.get(END, (math.inf, math.inf)) for one in repeats if one.repeats == trial.number and not one.moving]
        every = [trial.scores[END], *again]
        return sum(score for score, _ in every) / len(every), sum(loss for _, loss in every) / len(every)

    return [one.number for one in sorted((one for one in firsts if one.ended), key=lambda one: (*mean(one), one.number))]


def _end(firsts: Sequence[SearchTrial], repeats: Sequence[SearchTrial], why: Literal["time", "repeated"]) -> NextMove:
    """End with the best of those that were repeated, else without a winner."""
    repeated = _repeated([one for one in repeats if END in one.scores])
    best = next((number for number in ranking(firsts, repeats) if number in repeated), None)
    return NextMove("end", winner=best, why="repeated" if best is not None and why == "repeated" else why)
