"""Whose work is next, as a pure function: least used first, waiting ages, priorities, limits, what lost its worker."""

from __future__ import annotations

import itertools
import uuid

from hypothesis import given
from hypothesis import strategies as st

from app.jobs.fair_share import ADVANCE, Running, Situation, Use, Waiting, decayed, next_one, order
from app.machines.placement import Needs

NOW = 1_000_000.0
_number = itertools.count(1)


def waits(person: str, since: float = NOW, seconds: float = 600.0, project: str | None = None, **more) -> Waiting:
    return Waiting(uuid.UUID(int=next(_number)), "jobs", person, project or person, since, seconds, **more)


def people(at: Situation, workers: int = 1) -> list[str]:
    return [str(one.person) for one, _ in order(at, workers)]


def test_first_come_first_served_while_nobody_has_used_anything():
    ordered = [waits("a", NOW - 30), waits("b", NOW - 20), waits("c", NOW - 10)]
    assert people(Situation(NOW, ordered[::-1])) == ["a", "b", "c"]


def test_who_has_used_less_is_next():
    at = Situation(NOW, [waits("heavy", NOW - 60), waits("light", NOW - 1)], used={"heavy": Use(3600, NOW - 60), "light": Use(60, NOW - 9)})
    assert people(at) == ["light", "heavy"]


def test_a_sweep_takes_turns_with_the_others():
    """Each turn is charged before the next is given, so a hundred runs at once are no hundred turns."""
    sweep = [waits("a", NOW - 100 + n) for n in range(4)]
    at = Situation(NOW, [*sweep, waits("b"), waits("b"), waits("c")])
    assert people(at) == ["a", "b", "c", "a", "b", "a", "a"]


def test_short_work_does_not_wait_for_long():
    assert people(Situation(NOW, [waits("a", NOW - 60, 3600), waits("b", NOW, 60)])) == ["b", "a"]
    assert people(Situation(NOW, [waits("a", NOW - 7200, 3600), waits("b", NOW, 60)])) == ["a", "b"], "but long work comes too"


def test_waiting_pays_for_use_by_the_part_that_was_due():
    used = {"heavy": Use(3600, NOW - 10 * 3600), "light": Use(0, NOW - 10 * 3600)}
    assert people(Situation(NOW, [waits("heavy", NOW - 7199), waits("light", NOW)], used=used)) == ["light", "heavy"]
    assert people(Situation(NOW, [waits("heavy", NOW - 7201), waits("light", NOW)], used=used)) == ["heavy", "light"]


def test_waiting_counts_from_the_last_turn():
    """A hundred runs that were queued yesterday do not age a hundredfold while they are served."""
    used = {"a": Use(100, NOW - 1), "b": Use(100, NOW - 500)}
    assert people(Situation(NOW, [waits("a", NOW - 86_400), waits("b", NOW - 50)], used=used)) == ["b", "a"]


def test_a_project_of_twice_the_weight_is_charged_half():
    at = Situation(NOW, [waits("a", weight=2.0) for _ in range(40)] + [waits("b") for _ in range(40)])
    first = people(at)[:30]
    assert 18 <= first.count("a") <= 21, "two thirds, in the long run"


def test_priorities_are_worth_a_day_of_use():
    used = {"light": Use(0), "heavy": Use(80_000)}
    assert people(Situation(NOW, [waits("light"), waits("heavy", priority="high")], used=used)) == ["heavy", "light"]
    used["heavy"] = Use(90_000)
    assert people(Situation(NOW, [waits("light"), waits("heavy", priority="high")], used=used)) == ["light", "heavy"], "nobody is starved"
    own = [waits("a", NOW - 60, priority="low"), waits("a", NOW), waits("a", NOW, priority="high")]
    assert [one.priority for one, _ in order(Situation(NOW, own), 1)] == ["high", "normal", "low"]
    own[0] = waits("a", NOW - 86_401, priority="low")
    assert [one.priority for one, _ in order(Situation(NOW, own), 1)] == ["high", "low", "normal"], "a low one is behind for a day"


def test_what_lost_its_worker_goes_on_first():
    at = Situation(NOW, [waits("light", NOW - 99), waits("heavy", interrupted=True)], used={"heavy": Use(9e5, NOW)})
    assert people(at) == ["heavy", "light"]


def test_starts_follow_from_the_estimates_and_from_what_runs():
    first, second, third = waits("a", NOW - 3, 10), waits("b", NOW - 2, 50), waits("c", NOW - 1, 100)
    running = [Running("x", "x", NOW + 30, 30)]
    assert [begins - NOW for _, begins in order(Situation(NOW, [first, second, third], running), 1)] == [30, 40, 90]
    assert [begins - NOW for _, begins in order(Situation(NOW, [first, second, third], running), 2)] == [0, 10, 30]


def test_what_runs_is_charged_with_what_is_left_of_it():
    """Two workers that get free at once do not both go to one person."""
    at = Situation(NOW, [waits("a", NOW - 9), waits("b", NOW)], [Running("a", "a", NOW + 600, 600)])
    assert next_one(at).person == "b"


def test_a_limit_lets_wait_and_nothing_else():
    mine = [waits("a", NOW - 9, 60), waits("a", NOW - 8, 60)]
    at = Situation(NOW, [*mine, waits("b", NOW, 60)], people_limits={"a": 1})
    assert [(one.person, begins - NOW) for one, begins in order(at, 3)] == [("a", 0), ("b", 0), ("a", 60)]
    busy = Situation(NOW, mine, [Running("a", "a", NOW - 5, 0)], people_limits={"a": 1})
    assert next_one(busy) is None, "one that takes longer than estimated still runs"
    assert next_one(Situation(NOW, mine, people_limits={"a": 0})) is None
    team = Situation(NOW, [waits("a", project="team"), waits("b", project="team")], project_limits={"team": 1})
    assert [begins - NOW for _, begins in order(team, 2)] == [0, 600]
    own = Situation(NOW, [waits("a", project="team"), waits("a", NOW + 1)], [Running("b", "team", NOW + 9, 9)], project_limits={"team": 1})
    assert next_one(own).project == "a", "what is blocked in one project keeps nothing of another from running"


def test_what_a_worker_does_not_take_keeps_nothing_from_running_and_its_person_still_has_something_to_do():
    first, second, other = waits("a", NOW - 9), waits("a", NOW - 8), waits("b", NOW)
    at = Situation(NOW, [first, second, other])
    assert next_one(at, lambda one: one is not first) is second and next_one(at, lambda one: False) is None
    used = {"a": Use(300, NOW - 1000)}
    heavy, light, far = waits("a", NOW - 1000), waits("b", NOW), waits("c", NOW)
    assert next_one(Situation(NOW, [heavy, light], used=used)) is heavy, "a half of the wait pays for what was used"
    assert next_one(Situation(NOW, [heavy, light, far, waits("d", NOW)], used=used), lambda one: one is not far) is light, (
        "a quarter does not"
    )


def test_several_gpus_are_charged_for_each():
    two = waits("a", NOW, 100, needs=Needs(num_gpus=2))
    assert people(Situation(NOW, [two, waits("b", NOW, 150)])) == ["b", "a"] and two.charge == 200


def test_half_of_the_use_is_left_after_the_half_life():
    assert abs(decayed(NOW - 1, NOW, NOW, 3600) - 1) < 1e-3
    assert abs(decayed(NOW - 3601, NOW - 3600, NOW, 3600) - 0.5) < 1e-3
    assert abs(decayed(NOW - 100, NOW, NOW, 1e12) - 100) < 0.1


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 9e4), st.floats(1, 9e3), st.sampled_from(sorted(ADVANCE))), max_size=30), st.integers(1, 3))  # fmt: skip
def test_everything_is_served_once_and_in_time(asked, workers):
    at = Situation(NOW, [waits(person, NOW - age, seconds, priority=priority) for person, age, seconds, priority in asked])
    served = list(order(at, workers))
    assert sorted(one.key for one, _ in served) == sorted(one.key for one in at.waiting)
    begins = [when for _, when in served]
    assert begins == sorted(begins) and all(when >= NOW for when in begins)
    for when in begins:
        assert sum(start <= when < start + one.seconds for one, start in served) <= workers
    first = next_one(at)
    assert (first is None) == (not served) and (first is None or first.key == served[0][0].key)


@given(st.lists(st.floats(900, 3600), min_size=1, max_size=12), st.floats(0, 9e4))
def test_nobody_is_left_behind(others, used):
    """Against newcomers who come without end: a heavy user's turn comes once what was due while waiting has paid for the use."""
    clock, ends = NOW, [NOW - 1]
    for seconds in itertools.cycle(others):  # each is gone before the next one comes: two people have something to do
        fresh = waits(f"newcomer {len(ends)}", clock, seconds)
        at = Situation(clock, [waits("heavy", NOW - 1), fresh], used={"heavy": Use(used, NOW - 1)})
        if next_one(at).person == "heavy":
            break
        clock += seconds
        ends.append(clock)
    assert clock - NOW <= 2 * (used + 600) + max(others)
