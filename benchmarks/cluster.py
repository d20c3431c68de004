"""100 machines with four kinds of cards and 10,000 jobs: what the claim costs, who waits how long, and whether anything starves.

    python -m benchmarks.cluster [--machines 100] [--jobs 10000] [--people 50] [--hours 60] [--reserve 600] [--seed 1] [--json FILE]

Two parts, on a real PostgreSQL with the studio's own claim (`app/evaluation/claims.py`). The first lets all jobs wait at once and has 1, 4 and 16
workers claim as fast as they can: claims a second, their times, and the CPU time of each, which hardly depends on what else runs. The second simulates: jobs arrive through `--hours`,
a clock of its own passes, a machine asks when a job comes that it could take or when one of its jobs ends, and takes until nothing fits. A job
takes 0.7 to 1.3 times its estimate. `--reserve` is `LUTHIER_RESERVE_AFTER_SECONDS`; 1e12 switches reservation off.

No job may starve: exit code 1 where one waits more than a day longer than the longest of one card.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import random
import statistics
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from benchmarks.fair_share import HOUR, MORNING, Order, studio

GB = 10**9
DAY = 24 * HOUR
WORKERS = (1, 4, 16)
CLAIMS = 100
"""Claims of each of the first part's measurements."""
CARDS = (("RTX 4090", 24, 1, 40), ("L40S", 48, 2, 30), ("H100", 80, 4, 20), ("H100", 80, 8, 10))
"""Name, GB, cards of a machine, share of the machines in percent."""


class Size(NamedTuple):
    """A kind of job: GB of each GPU, GPUs, shortest and longest minutes, share of the jobs in percent."""

    name: str
    gigabytes: int
    gpus: int
    shortest: float
    longest: float
    share: float


SIZES = (
    Size("10 GB", 10, 1, 5, 60, 60),
    Size("40 GB", 40, 1, 30, 180, 25),
    Size("70 GB", 70, 1, 60, 360, 10),
    Size("2 × 70 GB", 70, 2, 60, 360, 3),
    Size("4 × 70 GB", 70, 4, 60, 360, 1.5),
    Size("8 × 70 GB", 70, 8, 60, 360, 0.5),
)


@dataclass
class Machine:
    """A machine of the simulation and what is free of it."""

    whole: Any
    free: Any

    def take(self, needs: Any) -> list[Any]:
        """Take the smallest cards that suit, as a lease does."""
        suited = sorted((card for card in self.free.cards if needs.suits(card)), key=lambda card: card.memory_bytes)
        taken = suited[: needs.num_gpus or 1]
        left = list(self.free.cards)
        for card in taken:
            left.remove(card)
        self.free = replace(self.free, cards=tuple(left))
        return taken

    def give_back(self, cards: Sequence[Any]) -> None:
        self.free = replace(self.free, cards=(*self.free.cards, *cards))


@dataclass
class Course:
    """What became of every job of a simulation, by its number."""

    begun: dict[int, float] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    claims: list[float] = field(default_factory=list)
    empty: list[float] = field(default_factory=list)
    longest_queue: int = 0
    kept: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--hours", type=float, default=60.0)
    parser.add_argument("--reserve", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", choices=("claims", "simulation", "both"), default="both")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from benchmarks.servers import servers

    found: dict[str, Any] = {"machines": given.machines, "jobs": given.jobs, "people": given.people, "seed": given.seed}
    with servers(fast=False, LUTHIER_RESERVE_AFTER_SECONDS=str(given.reserve)):
        from app.db import get_engine

        with Session(get_engine()) as session:
            if given.part != "simulation":
                found["rates"] = measure_claims(session, given.machines, given.jobs, given.people, given.seed)
            if given.part != "claims":
                found["simulation"] = measure(session, given.machines, given.jobs, given.people, given.hours, given.seed)
    print(as_text(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if "simulation" not in found or found["simulation"]["starved"] == 0 else 1)


def fleet(count: int) -> list[Machine]:
    from app.machines.placement import Capacity, GpuKind

    found = []
    for name, gigabytes, cards, percent in CARDS:
        for _ in range(max(1, round(count * percent / 100))):
            whole = Capacity(f"machine-{len(found)}", (GpuKind(gigabytes * GB, name),) * cards, 64 * GB, cuda=True)
            found.append(Machine(whole, whole))
    return found


def jobs(count: int, people: int, hours: float, seed: int) -> list[tuple[Order, Size]]:
    """What is ordered: a fifth of the people order half of it."""
    chance = random.Random(seed)
    weights = [4.0 if person < people / 5 else 1.0 for person in range(people)]
    found = []
    for _ in range(count):
        size = chance.choices(SIZES, [one.share for one in SIZES])[0]
        estimate = chance.uniform(size.shortest, size.longest) * 60
        order = Order(
            chance.choices(range(people), weights)[0],
            MORNING + chance.uniform(0, hours) * HOUR,
            estimate,
            estimate * chance.uniform(0.7, 1.3),
        )
        found.append((order, size))
    return sorted(found, key=lambda one: one[0].at)


def columns(size: Size) -> dict[str, Any]:
    return {"gpu_bytes": size.gigabytes * GB, "cpu_bytes": None, "num_gpus": size.gpus if size.gpus > 1 else None}


# What a claim costs -----------------------------------------------------------------------------------------------------


def measure_claims(session: Session, machines: int, count: int, people: int, seed: int) -> list[dict[str, Any]]:
    """All jobs wait, and so many workers at once claim as fast as they can, each with the machine of another kind."""
    make = studio(session, people)
    for order, size in jobs(count, people, 0.0, seed):
        make(order, **columns(size))
    session.commit()
    analyze()
    there, found = fleet(machines), []
    for workers in WORKERS:
        times: list[float] = []
        before, ours, began = postgres_seconds(), time.process_time(), time.perf_counter()
        run_workers(workers, min(CLAIMS, count // 12), random.Random(seed).sample(there, len(there)), times)
        took = time.perf_counter() - began
        spent, ours = postgres_seconds() - before, time.process_time() - ours
        each = {"postgres_ms": 1000 * spent / len(times), "python_ms": 1000 * ours / len(times)}
        found.append({"workers": workers, "claims": len(times), "per_second": len(times) / took, **each, **quantiles(times)})
    session.rollback()
    for table in ("machine_uses", "events", "jobs", "datasets", "models", "users", "projects"):
        session.connection().exec_driver_sql(f"TRUNCATE {table} CASCADE")
    session.commit()
    return found


def run_workers(workers: int, count: int, there: list[Machine], times: list[float]) -> None:
    """`count` claims by so many threads, each with a connection of its own."""
    turns = itertools.cycle(there)
    numbers = iter(range(count))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in numbers:
                began = time.perf_counter()
                claim_one(next(turns))
                times.append(time.perf_counter() - began)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def claim_one(machine: Machine) -> None:
    from app.db import transaction
    from app.evaluation import claims
    from app.jobs import lifecycle

    with transaction() as session:
        chosen = claims.choose(session, machine.whole, machine.whole, kinds=("jobs",))
        assert chosen is not None and chosen.fits
        assert lifecycle.claim(session, chosen.key, machine.whole.host, chosen.needs.num_gpus or 1) is not None


def analyze() -> None:
    """What autovacuum does within a minute."""
    from app.db import get_engine

    with get_engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")


def postgres_seconds() -> float:
    """CPU seconds of all PostgreSQL processes of this benchmark, those that ended included."""
    total = 0.0
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if "postgres" in process.name():
                spent = process.cpu_times()
                total += spent.user + spent.system + spent.children_user + spent.children_system
        except psutil.Error:
            continue
    return total


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(times) or [0.0]
    return {f"p{part}_ms": 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * part / 100))] for part in (50, 95, 99)}


# A simulation -----------------------------------------------------------------------------------------------------------


def measure(session: Session, machines: int, count: int, people: int, hours: float, seed: int) -> dict[str, Any]:
    orders, there = jobs(count, people, hours, seed), fleet(machines)
    before, began = postgres_seconds(), time.perf_counter()
    course = simulate(session, orders, there, people)
    took = time.perf_counter() - began
    last = max(course.ended.values())
    cards = sum(len(one.whole.cards) for one in there)
    worked = sum(order.seconds * size.gpus for order, size in orders)
    waits = {size.name: sorted(course.begun[n] - order.at for n, (order, kind) in enumerate(orders) if kind is size) for size in SIZES}
    longest = max(itertools.chain.from_iterable(times for name, times in waits.items() if name in ("10 GB", "40 GB", "70 GB")))
    return {
        "cards": cards, "hours": (last - MORNING) / HOUR, "gpu_hours": worked / HOUR, "use": worked / (cards * (last - MORNING)),
        "seconds": took, "postgres_cores": (postgres_seconds() - before) / took, "longest_queue": course.longest_queue, "reservations": course.kept,
        "claim": {"count": len(course.claims), **quantiles(course.claims)}, "empty": {"count": len(course.empty), **quantiles(course.empty)},
        "waits": {name: wait_row(times) for name, times in waits.items() if times}, "people": by_person(orders, course, people),
        "starved": sum(wait > longest + DAY for times in waits.values() for wait in times),
    }  # fmt: skip


def wait_row(times: Sequence[float]) -> dict[str, float]:
    """Hours."""
    return {
        "jobs": len(times),
        "median": statistics.median(times) / HOUR,
        "p95": times[int(len(times) * 0.95)] / HOUR,
        "longest": times[-1] / HOUR,
    }


def by_person(orders: Sequence[tuple[Order, Size]], course: Course, people: int) -> dict[str, dict[str, float]]:
    """Of those who ordered much and of the others: GPU-hours, median wait, and the longest of anybody's median."""
    medians: dict[int, float] = {}
    hours: Counter[int] = Counter()
    each: dict[int, list[float]] = defaultdict(list)
    for number, (order, size) in enumerate(orders):
        each[order.person].append(course.begun[number] - order.at)
        hours[order.person] += order.seconds * size.gpus / HOUR
    medians = {person: statistics.median(times) for person, times in each.items()}
    groups = {"heavy": [p for p in each if p < people / 5], "light": [p for p in each if p >= people / 5]}
    return {
        name: {
            "people": len(group), "gpu_hours": statistics.mean(hours[p] for p in group),
            "median_wait": statistics.median(medians[p] for p in group) / HOUR, "worst_median": max(medians[p] for p in group) / HOUR,
        }
        for name, group in groups.items()
    }  # fmt: skip


def simulate(session: Session, orders: Sequence[tuple[Order, Size]], there: list[Machine], people: int) -> Course:
    """Jobs come, machines take them and they end, until all have."""
    make, course = studio(session, people), Course()
    keys: dict[uuid.UUID, int] = {}
    coming = iter(enumerate(orders))
    arrival = next(coming, None)
    busy: list[tuple[float, int, Machine, list[Any], uuid.UUID, int]] = []
    while arrival is not None or busy:
        if arrival is not None and (not busy or arrival[1][0].at <= busy[0][0]):
            number, (order, size) = arrival
            keys[make(order, **columns(size))] = number
            session.commit()
            arrival = next(coming, None)
            needs = needs_of(size)
            asks = next((one for one in there if one.free.fits(needs)), None)
            now = order.at
        else:
            now, number, asks, cards, key, fence = heapq.heappop(busy)
            end(session, key, fence, course.begun[number], now)
            course.ended[number] = now
            asks.give_back(cards)
            if len(course.ended) % 500 == 0:
                analyze()
        course.longest_queue = max(course.longest_queue, len(keys) - len(course.begun))
        while asks is not None and (taken := take(session, asks, now, course, keys)) is not None:
            number, cards, key, fence = taken
            heapq.heappush(busy, (now + orders[number][0].seconds, number, asks, cards, key, fence))
    return course


def needs_of(size: Size) -> Any:
    from app.machines.placement import Needs

    return Needs(size.gigabytes * GB, None, size.gpus if size.gpus > 1 else None)


def take(
    session: Session, machine: Machine, now: float, course: Course, keys: dict[uuid.UUID, int]
) -> tuple[int, list[Any], uuid.UUID, int] | None:
    """One claim of this machine, as a worker's turn makes it; None where nothing fits what is free, or that is kept for others."""
    from app.evaluation import claims
    from app.jobs import lifecycle
    from app.tables import MachineUse

    tried: set[uuid.UUID] = set()
    free = machine.free
    while free.cards:
        began = time.perf_counter()
        chosen = claims.choose(session, free, machine.whole, tried, ("jobs",), now)
        if chosen is None or not chosen.fits:
            session.commit()
            course.empty.append(time.perf_counter() - began)
            if chosen is None:
                return None
            course.kept += 1
            tried.add(chosen.key)
            free = free.without_cards_for(chosen.needs)
            continue
        held = lifecycle.claim(session, chosen.key, machine.whole.host, chosen.needs.num_gpus or 1)
        assert held is not None
        session.commit()
        course.claims.append(time.perf_counter() - began)
        session.execute(update(MachineUse).where(MachineUse.row_id == chosen.key).values(started_at=func.to_timestamp(now)))
        session.commit()
        course.begun[keys[chosen.key]] = now
        return keys[chosen.key], machine.take(chosen.needs), chosen.key, held.fence
    return None


def end(session: Session, key: uuid.UUID, fence: int, begun: float, now: float) -> None:
    from app import leases
    from app.jobs import lifecycle
    from app.tables import MachineUse

    leases.finish_if_held(session, lifecycle.WORK, key, fence, status="succeeded")
    used = update(MachineUse).where(MachineUse.row_id == key)
    session.execute(used.values(started_at=func.to_timestamp(begun), ended_at=func.to_timestamp(now)))
    session.commit()


# The tables -------------------------------------------------------------------------------------------------------------


def as_text(found: dict[str, Any]) -> str:
    lines = [f"{found['machines']} machines, {found['jobs']:,} jobs of {found['people']} people, seed {found['seed']}", ""]
    if "rates" in found:
        lines += [
            "| workers at once | claims/s | p50, ms | p95, ms | p99, ms | CPU of PostgreSQL for each, ms | of the worker, ms |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {one['workers']} | {one['per_second']:.1f} | {one['p50_ms']:.0f} | {one['p95_ms']:.0f} | {one['p99_ms']:.0f} | "
            f"{one['postgres_ms']:.0f} | {one['python_ms']:.0f} |"
            for one in found["rates"]
        ]
        lines.append("")
    if one := found.get("simulation"):
        lines += [
            f"{one['cards']} cards, {one['gpu_hours']:,.0f} GPU-hours in {one['hours']:.0f} hours: {one['use']:.0%} in use; up to "
            f"{one['longest_queue']:,} jobs waited at once; {one['reservations']:,} looks found GPUs kept for others",
            f"simulated in {one['seconds']:.0f} s with {one['postgres_cores']:.2f} cores of PostgreSQL; {told('claims', one['claim'])}; "
            f"{told('looks in vain', one['empty'])}",
            "",
            "| size | jobs | median wait, h | p95, h | longest, h |",
            "|---|---|---|---|---|",
            *(
                f"| {name} | {row['jobs']:,} | {row['median']:.2f} | {row['p95']:.2f} | {row['longest']:.2f} |"
                for name, row in one["waits"].items()
            ),
            "",
            "| people | count | GPU-hours each | median wait, h | longest median, h |",
            "|---|---|---|---|---|",
            *(
                f"| {name} | {row['people']} | {row['gpu_hours']:.0f} | {row['median_wait']:.2f} | {row['worst_median']:.2f} |"
                for name, row in one["people"].items()
            ),
            "",
            f"{one['starved']} jobs starved",
        ]
    return "\n".join(lines)


def told(what: str, times: dict[str, float]) -> str:
    return f"{times['count']:,} {what} of {times['p50_ms']:.0f} ms (p95 {times['p95_ms']:.0f}, p99 {times['p99_ms']:.0f})"


if __name__ == "__main__":
    main()
