"""Successive halving as pure decisions: played to its end on made-up losses."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from app.searches import halving
from app.searches.halving import END, Budget, SearchTrial, decide
from app.searches.space import rungs_of

FREE = Budget(0.0, 1.0, None)


def play(
    losses: dict[int, float], wanted: int, *, limit: float | None = None, slots: int = 1, again=lambda number: 0.0, seconds: float = 9.0
):
    """Every decision until the end, where a trial's loss at a rung is its last one and what is left to go. Gives the trials, the last move, and
    the seconds used; `again` is added to the loss of a repetition."""
    trials: list[SearchTrial] = []
    used, moves = 0.0, []
    for _ in range(500):
        move = decide(trials, wanted, slots, Budget(used, seconds, limit))
        moves.append(move)
        if move.do == "end":
            return trials, move, used, moves
        if move.do == "wait":  # the first that moves arrives
            number, level = next((one.number, max(one.scores, default=0)) for one in trials if one.moving)
            place = number - 1
            one = trials[place]
            of = one.repeats or number
            to = END if one.repeats else level + 1
            used += seconds * (halving.SHARES[to] - halving.SHARES[level])
            loss = losses[of] + (3 - to) * 0.01 + (again(of) if one.repeats else 0.0)
            trials[place] = dataclasses.replace(one, moving=False, at=to if to < END else None, scores={**one.scores, to: (loss, loss)})
        elif move.do == "ask":
            trials.append(SearchTrial(len(trials) + 1, moving=True))
        elif move.do == "repeat":
            trials.append(SearchTrial(len(trials) + 1, moving=True, repeats=move.repeat))
        else:
            for pruned in move.prune:
                trials[pruned.number - 1] = dataclasses.replace(trials[pruned.number - 1], out=True, at=None)
            for number in move.promote:
                trials[number - 1] = dataclasses.replace(trials[number - 1], moving=True, at=None)
    raise AssertionError("no end")


@pytest.mark.parametrize("slots", [1, 3])
def test_of_twelve_four_go_on_then_two_and_the_best_is_repeated(slots):
    draw = random.Random(4)
    losses = {number: draw.random() for number in range(1, 13)}
    trials, end, used, moves = play(losses, 12, slots=slots)
    best = sorted(losses, key=losses.__getitem__)
    assert [one.number for one in trials if 2 in one.scores and not one.repeats] == sorted(best[:4])
    assert [one.number for one in trials if one.ended and not one.repeats] == sorted(best[:2])
    assert (end.winner, end.why, trials[-1].repeats) == (best[0], "repeated", best[0])
    assert used == pytest.approx(halving.halved_cost(12, 9.0) + 9.0)
    assert used < 0.45 * 13 * 9.0, "less than half of what the trials would take"
    first = next(move for move in moves if move.prune)
    assert [(one.place, one.of, one.kept) for one in first.prune] == [(place, 12, 4) for place in range(5, 13)]
    assert all(one.worst_kept == (losses[best[3]] + 0.02,) * 2 for one in first.prune)


def test_a_repetition_that_is_worse_lets_the_next_lead_and_that_is_repeated_too():
    losses = {1: 0.50, 2: 0.52, **{number: 1.0 + number / 100 for number in range(3, 13)}}
    trials, end, _, _ = play(losses, 12, again=lambda number: 0.3 if number == 1 else 0.0)
    assert [one.repeats for one in trials if one.repeats] == [1, 2] and end.winner == 2
    trials, end, _, _ = play(losses, 12, again=lambda _: 0.3)
    assert [one.repeats for one in trials if one.repeats] == [1, 2] and end.winner == 1, "both are worse, and the first still leads"


def test_the_time_decides_how_many_are_tried_and_is_kept():
    losses = {number: 1 / number for number in range(1, 41)}
    for limit in (20.0, 30.0, 60.0, 120.0):
        wanted = halving.affordable(Budget(0.0, 9.0, limit), 40)
        _, end, used, _ = play(losses, wanted, limit=limit)
        assert used <= limit and end.winner is not None and end.why == "repeated", limit
    assert [halving.affordable(Budget(0.0, 9.0, limit), 40) for limit in (20.5, 30.5, 60.5)] == [3, 9, 19]
    assert halving.affordable(Budget(0.0, 9.0, None), 40) == 40


def test_a_search_that_takes_longer_than_its_estimate_ends_when_its_time_is_over():
    trials = [SearchTrial(1, scores={1: (0.5, 0.5), END: (0.4, 0.4)}), SearchTrial(2, moving=True)]
    assert decide(trials, 9, 1, Budget(10.1, 1.0, 10.0)) == halving.NextMove("end", why="time"), "nobody is called a winner unrepeated"
    again = [*trials, SearchTrial(3, scores={END: (0.41, 0.41)}, repeats=1)]
    assert decide(again, 9, 1, Budget(10.1, 1.0, 10.0)).winner == 1
    late = [SearchTrial(n, at=1, scores={1: (n, n)}) for n in range(1, 10)]
    assert len(decide(late, 9, 1, FREE).promote) == 3
    assert len(decide(late, 9, 1, Budget(0.0, 9.0, 9 + 9.0)).promote) == 1, "one at least, whatever the time"


def test_what_failed_or_was_paused_by_hand_is_left_out():
    failed = [SearchTrial(n, out=True, failed=True) for n in (1, 2)]
    assert decide(failed, 9, 1, FREE).do == "ask", "two may be bad luck"
    assert decide([*failed, SearchTrial(3, out=True, failed=True)], 9, 1, FREE) == halving.NextMove("end", why="failed")
    by_hand = [SearchTrial(1), SearchTrial(2, at=1, scores={1: (1.0, 1.0)}), SearchTrial(3, at=1, scores={1: (2.0, 2.0)})]
    assert decide(by_hand, 3, 1, FREE).promote == (2,)
    worse = (
        SearchTrial(4, scores={END: (0.1, 0.1)}),
        SearchTrial(5, repeats=4, out=True, failed=True),
        SearchTrial(6, scores={END: (9.0, 9.0)}),
    )
    assert halving.ranking([worse[0], worse[2]], [worse[1]]) == [6, 4], "a repetition that fails is worse than any other"


def test_equal_scores_are_settled_by_the_loss():
    trials = [SearchTrial(n, at=1, scores={1: (-0.9, loss)}) for n, loss in ((1, 0.3), (2, 0.1), (3, 0.2))]
    assert decide(trials, 3, 1, FREE).promote == (2,)
    assert math.isclose(halving.halved_cost(9, 9.0), 9 + 3 * 2 + 6)


def test_a_run_too_short_for_a_rung_is_not_compared_there() -> None:
    assert rungs_of(90) == ([10, 30], 10) and rungs_of(45) == ([5, 15], 5)
    assert rungs_of(40) == ([None, 13], 13) and rungs_of(12) == ([None, None], None), (
        "two steps say which rate is the highest, and nothing else"
    )
    assert [halving.going(12, first) for first in (1, 2, 3)] == [[12, 4, 2], [12, 12, 4], [12, 12, 12]]
    assert halving.halved_cost(12, 9.0, 3) == pytest.approx(12 * 9) and halving.halved_cost(12, 9.0, 2) == pytest.approx(12 * 3 + 4 * 6)
    assert halving.affordable(Budget(0.0, 9.0, 60.5, 3), 40) == 5 < halving.affordable(Budget(0.0, 9.0, 60.5, 1), 40)
