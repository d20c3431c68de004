"""Whose work is next: fair sharing of the train workers among people, as a pure function of what waits and what was used.

Two well-known schemes together. As in HTCondor (https://htcondor.readthedocs.io/en/latest/admin-manual/cm-configuration.html), and first
in J. Kay and P. Lauder, "A Fair Share Scheduler", CACM 31(1), 1988, each person has used so many seconds of the machine, a sum that
decays with a half-life; in a project of weight w each second counts 1/w. And as in weighted fair queueing (A. Demers, S. Keshav and
S. Shenker, SIGCOMM 1989), next is the work after which its person will have used least: so short work does not wait for long, and
nothing ends much later than if everybody had an equal part of the machine at every moment.

Waiting counts too. Where n people have something to do, each is due 1/n of the machine: every second of waiting, from one's last turn,
takes 1/n of a second from what counts as used. So nobody is left behind, and a hundred runs queued at once age as one. Where nobody has
used anything and all work is alike, it is first come, first served. A priority is worth a day of use.

Whatever lost its worker goes on first: it has had its turn.
"""

from __future__ import annotations

import heapq
import itertools
import math
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from app.machines.placement import Needs

ANYWHERE = Needs()

Priority = Literal["low", "normal", "high"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
ADVANCE: dict[str, float] = {"low": -86_400.0, "normal": 0.0, "high": 86_400.0}
"""Seconds of use that a priority is worth."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job or an evaluation that waits for a train worker. Times are seconds of one clock."""

    key: uuid.UUID
    kind: str
    person: Hashable
    project: Hashable
    since: float
    seconds: float
    """How long it will take, as far as is known."""
    weight: float = 1.0
    priority: str = "normal"
    interrupted: bool = False
    """It lost its worker, and nobody stopped it."""
    needs: Needs = ANYWHERE

    @property
    def lane(self) -> tuple[Hashable, Hashable]:
        return self.person, self.project

    @property
    def charge(self) -> float:
        """What it will count as used: each of its GPUs counts."""
        return self.seconds * (self.needs.num_gpus or 1) / self.weight

    def arrival(self) -> tuple[bool, float, str]:
        """The order within one lane."""
        return not self.interrupted, self.since - ADVANCE[self.priority], self.key.hex


@dataclass(frozen=True, slots=True)
class Running:
    """Work that a worker does now."""

    person: Hashable
    project: Hashable
    ends: float
    seconds_left: float
    """Of its time; of each of its GPUs, where it asked for several."""
    weight: float = 1.0
    kind: str = "jobs"


@dataclass(frozen=True, slots=True)
class Use:
    """What a person has used, decayed and weighted, and when the last of it ended."""

    seconds: float = 0.0
    ended: float = -math.inf


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything that decides whose work is next."""

    now: float
    waiting: Sequence[Waiting]
    running: Sequence[Running] = ()
    used: Mapping[Hashable, Use] = field(default_factory=dict)
    people_limits: Mapping[Hashable, int] = field(default_factory=dict)
    """Most jobs of a person that run at once, where there is a limit."""
    project_limits: Mapping[Hashable, int] = field(default_factory=dict)


def decayed(began: float, ended: float, now: float, half_life: float) -> float:
    """What is left at `now` of the seconds between two times, each of which halves within `half_life`."""
    rate = math.log(2) / half_life
    return (math.exp(-rate * (now - ended)) - math.exp(-rate * (now - began))) / rate


class Standing:
    """What counts as used of each person, when the last of it ends, and how much runs of each person and each project, numbered 0 and 1.
    What runs is charged for what is left of it."""

    def __init__(self, at: Situation) -> None:
        self.used: dict[Hashable, float] = defaultdict(float, {person: use.seconds for person, use in at.used.items()})
        self.ended: dict[Hashable, float] = defaultdict(lambda: -math.inf, {person: use.ended for person, use in at.used.items()})
        self.running: Counter[tuple[int, Hashable]] = Counter()
        for one in at.running:
            self.begin((one.person, one.project), ends_of(one, at.now), one.seconds_left / one.weight)

    def begin(self, lane: tuple[Hashable, Hashable], ends: float, charge: float) -> None:
        self.used[lane[0]] += charge
        self.ended[lane[0]] = max(self.ended[lane[0]], ends)
        self.running.update(enumerate(lane))

    def at_limit(self, at: Situation) -> tuple[set[Hashable], set[Hashable]]:
        """The people, and the projects, of whom no more may run."""
        people = {key for key, most in at.people_limits.items() if self.running[0, key] >= most}
        return people, {key for key, most in at.project_limits.items() if self.running[1, key] >= most}


def ends_of(running: Running, now: float) -> float:
    """When it ends, as far as is known: what takes longer than estimated still runs."""
    return max(now + 1, running.ends)


def anything(_: Waiting) -> bool:
    return True


def order(at: Situation, workers: int, takes: Callable[[Waiting], bool] = anything) -> Iterator[tuple[Waiting, float]]:
    """What waits, in the order in which `workers` will take it, each with the time when that will be; without what no limit lets run, and
    without what they do not take.

    What runs now is charged for what is left of it, and each turn for all that it will take, so that the order is the one that will be.
    """
    standing = Standing(at)
    used, ended = standing.used, standing.ended
    busy: list[tuple[float, int, tuple[Hashable, Hashable]]] = []
    count = standing.running
    limits = {(0, key): most for key, most in at.people_limits.items()} | {(1, key): most for key, most in at.project_limits.items()}
    lanes: dict[tuple[Hashable, Hashable], list[Waiting]] = defaultdict(list)
    for one in filter(takes, at.waiting):
        lanes[one.lane].append(one)
    for coming in lanes.values():
        coming.sort(key=Waiting.arrival, reverse=True)

    # Who has something to do: what waits by its lane, whoever takes it, and what runs.
    present = Counter(lane[0] for lane in {one.lane for one in at.waiting})
    number = itertools.count()
    now, people = at.now, 1

    def runs(lane: tuple[Hashable, Hashable], ends: float) -> None:
        present[lane[0]] += 1
        heapq.heappush(busy, (ends, next(number), lane))

    def rank(lane: tuple[Hashable, Hashable]) -> tuple[bool, float, float, str]:
        one = lanes[lane][-1]
        due = max(0.0, now - max(one.since, ended[one.person])) / people
        after = used[one.person] + one.charge - due - ADVANCE[one.priority]
        return not one.interrupted, after, one.since, one.key.hex

    for running in at.running:
        runs((running.person, running.project), ends_of(running, at.now))
    while lanes:
        free: Collection[tuple[Hashable, Hashable]] = lanes if len(busy) < workers else ()
        if limits and free:
            free = [lane for lane in lanes if all(count[part] < limits.get(part, math.inf) for part in enumerate(lane))]
        if free:
            people = len(+present)
            chosen = min(free, key=rank)
            one = lanes[chosen].pop()
            if not lanes[chosen]:
                del lanes[chosen]
                present[chosen[0]] -= 1
            yield one, now
            standing.begin(chosen, now + one.seconds, one.charge)
            runs(chosen, now + one.seconds)
        elif busy:
            now, _, lane = heapq.heappop(busy)
            count.subtract(enumerate(lane))
            present[lane[0]] -= 1
        else:
            return


def next_one(at: Situation, takes: Callable[[Waiting], bool] = anything) -> Waiting | None:
    """What a worker that is free now takes; None where nothing may run. `app.evaluation.claims` says the same in SQL."""
    for one, begins in order(at, len(at.running) + 1, takes):
        return one if begins <= at.now else None
    return None
