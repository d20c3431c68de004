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
from collections.abc import Collection, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

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
    device: str = "auto"

    @property
    def lane(self) -> tuple[Hashable, Hashable]:
        return self.person, self.project

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


def order(at: Situation, workers: int) -> Iterator[tuple[Waiting, float]]:
    """What waits, in the order in which `workers` will take it, each with the time when that will be; without what no limit lets run.

    What runs now is charged for what is left of it, and each turn for all that it will take, so that the order is the one that will be.
    """
    used: dict[Hashable, float] = defaultdict(float, {person: use.seconds for person, use in at.used.items()})
    ended: dict[Hashable, float] = defaultdict(lambda: -math.inf, {person: use.ended for person, use in at.used.items()})
    busy: list[tuple[float, int, tuple[Hashable, Hashable]]] = []
    count: Counter[tuple[int, Hashable]] = Counter()
    limits = {(0, key): most for key, most in at.people_limits.items()} | {(1, key): most for key, most in at.project_limits.items()}
    lanes: dict[tuple[Hashable, Hashable], list[Waiting]] = defaultdict(list)
    for one in at.waiting:
        lanes[one.lane].append(one)
    for coming in lanes.values():
        coming.sort(key=Waiting.arrival, reverse=True)

    present = Counter(lane[0] for lane in lanes)  # who has something to do: lanes that wait, and work that runs
    number = itertools.count()
    now, people = at.now, 1

    def begin(lane: tuple[Hashable, Hashable], ends: float, charge: float) -> None:
        used[lane[0]] += charge
        ended[lane[0]] = max(ended[lane[0]], ends)
        count.update(enumerate(lane))
        present[lane[0]] += 1
        heapq.heappush(busy, (ends, next(number), lane))

    def rank(lane: tuple[Hashable, Hashable]) -> tuple[bool, float, float, str]:
        one = lanes[lane][-1]
        due = max(0.0, now - max(one.since, ended[one.person])) / people
        after = used[one.person] + one.seconds / one.weight - due - ADVANCE[one.priority]
        return not one.interrupted, after, one.since, one.key.hex

    for running in at.running:
        begin((running.person, running.project), max(at.now + 1, running.ends), running.seconds_left / running.weight)
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
            begin(chosen, now + one.seconds, one.seconds / one.weight)
        elif busy:
            now, _, lane = heapq.heappop(busy)
            count.subtract(enumerate(lane))
            present[lane[0]] -= 1
        else:
            return


def next_one(at: Situation) -> Waiting | None:
    """What a worker that is free now takes; None where nothing may run."""
    for one, begins in order(at, len(at.running) + 1):
        return one if begins <= at.now else None
    return None


def without(waiting: Iterable[Waiting], keys: set[uuid.UUID], kinds: Container[str], *, gpu: bool) -> list[Waiting]:
    """Those of these kinds that may still be tried: none of `keys`, and only what trains on the CPU where no GPU is free."""
    return [one for one in waiting if one.kind in kinds and one.key not in keys and (gpu or one.device == "cpu")]
