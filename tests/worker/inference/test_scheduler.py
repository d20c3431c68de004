"""Whose turn it is, as arithmetic: nobody can take everything, and nobody is left out."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from worker.inference import scheduler


def asked(owner, bulk=False, arrived=0.0):
    return SimpleNamespace(account=(owner, bulk), request=SimpleNamespace(bulk=bulk), arrived=arrived)


def fill(requests, most_rows, rows=None):
    """Begin rows until nobody may any more."""
    rows = Counter() if rows is None else rows
    while best := next((r for r in scheduler.in_turn(requests, rows) if scheduler.may_begin(r, rows, most_rows)), None):
        rows[best.account] += 1
    return rows


def test_one_person_leaves_rows_for_the_next_and_runs_leave_half():
    assert fill([asked("a")], 16) == {("a", False): 12}
    assert fill([asked("a", bulk=True), asked("b", bulk=True)], 16).total() == 8
    full = fill([asked("a"), asked("a", bulk=True)], 16)
    assert full[("a", True)] <= 8 and full.total() < 16, "somebody else finds no row"
    assert scheduler.may_begin(asked("new"), full, 16) and fill([asked("a")], 1).total() == 1


def test_the_order_is_by_what_each_has_then_people_then_arrival():
    rows = Counter({("a", False): 2, ("b", False): 1})
    waiting = [asked("a", arrived=0), asked("b", arrived=1), asked("c", bulk=True, arrived=0), asked("d", arrived=5), asked("e", arrived=2)]
    assert [r.account[0] for r in scheduler.in_turn(waiting, rows)] == ["e", "d", "c", "b", "a"]


def test_a_long_prompt_takes_what_others_leave():
    assert scheduler.shares([("a", 8000), ("b", 20)], 64) == [44, 20]
    assert scheduler.shares([("a", 8000), ("b", 8000), ("b", 10)], 64) == [32, 22, 10]
    assert scheduler.shares([("a", 8000)], 64) == [64] and scheduler.shares([], 64) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 500)), max_size=9), st.integers(9, 512))
def test_shares_are_whole_and_nobody_waits(needs, budget):
    found = scheduler.shares(needs, budget)
    assert sum(found) == min(budget, sum(need for _, need in needs))
    assert all(0 <= share <= need for share, (_, need) in zip(found, needs, strict=True))
    mine = Counter()
    for share, (who, _) in zip(found, needs, strict=True):
        mine[who] += share
    owed = {who: min(sum(n for w, n in needs if w == who), budget // len(mine)) for who in mine}
    assert all(mine[who] >= owed[who] for who in mine)
