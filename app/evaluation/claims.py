"""What a free worker takes: of all that waits and fits its machine what is next, locked until the claim is committed.

One SELECT … FOR UPDATE SKIP LOCKED per kind of work reads every row that waits, so workers that ask at once take different rows and none
waits for another. The order is that of `app.jobs.fair_share`, and what fits is what `app.machines.placement` says; tests compare both.

Reservation. A job that needs several GPUs of one machine, or one of a rare kind, could be passed for ever by small ones that take each GPU as
it gets free. So the first machine that could hold it keeps GPUs for it once it has waited `LUTHIER_RESERVE_AFTER_SECONDS` and is next there:
of those that suit the job nothing else takes any, and what gets free joins them, until it starts. A machine keeps GPUs for one job at a time.
One that is not heard of for `RESERVED_SECONDS` keeps them no longer, and another may.
"""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections import Counter
from collections.abc import Collection, Container
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import redis
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    DateTime,
    Float,
    Integer,
    Select,
    Subquery,
    Text,
    Uuid,
    all_,
    and_,
    bindparam,
    case,
    cast,
    exists,
    false,
    func,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.orm import Session, aliased

from app import leases, queue
from app.db import transaction
from app.evaluation import train_queue
from app.evaluation.train_queue import WORK
from app.jobs.fair_share import ADVANCE, Situation, Standing
from app.machines import heartbeats
from app.machines.placement import Capacity, Needs
from app.settings import get_settings
from app.tables import Job, Project

RESERVED_SECONDS = 120.0
TELL_SECONDS = 5.0
TOLD = f"{queue.PREFIX}told:train"
NEVER = -1e18
"""The end of the last turn of who had none, in seconds since 1970."""


class NextInLine(NamedTuple):
    """The row that a worker takes now. Where it does not fit yet, its machine keeps GPUs for it."""

    kind: str
    key: uuid.UUID
    needs: Needs
    fits: bool


def choose(
    session: Session,
    free: Capacity,
    whole: Capacity,
    tried: Collection[uuid.UUID] = (),
    kinds: Container[str] = tuple(WORK),
    at: float | None = None,
) -> NextInLine | None:
    """What a worker takes now that has `free` of its `whole` machine, of these kinds and without what it `tried` in vain; None where
    nothing fits. The row is locked until the end of the transaction. `at` is the time of a simulation."""
    now = train_queue.situation(session, at, waiting=False)
    taken = tuple(kind for kind in WORK if kind in kinds)
    moment, found = _moment(now, whole.host, tried), []
    for kind in taken:
        if not session.scalar(select(exists().where(WORK[kind].free()))):
            continue
        row = session.execute(_next(kind, taken, replace(free, host=""), replace(whole, host="")), moment).one_or_none()
        if row is not None:
            found.append(((not row.first, row.after, row.since, row.key.hex), kind, row))
    if not found:
        return None
    _, kind, row = min(found, key=lambda one: one[0])
    chosen = NextInLine(kind, row.key, Needs(row.gpu_bytes, row.cpu_bytes, row.num_gpus, row.gpu_type, tuple(row.labels)), row.fits)
    if not chosen.fits:
        until = datetime.fromtimestamp(now.now, UTC) + timedelta(seconds=RESERVED_SECONDS)
        session.execute(update(Job).where(Job.id == row.key).values(reserved_by=whole.host, reserved_until=until))
    return chosen


def tell_train_workers(key: uuid.UUID) -> None:
    """Have every train worker look at what waits, if anything does and no message says so yet: the one that got the last message could do
    nothing. At most every few seconds; what is lost is announced again by the reaper."""
    with contextlib.suppress(redis.RedisError, RuntimeError, BrokerError):
        with transaction() as session:
            waits = session.scalar(select(select(Job.id).where(WORK["jobs"].free()).exists()))
        if not waits or queue.backlog(queue.TRAIN) or not queue.get_redis().set(TOLD, b"1", nx=True, px=int(TELL_SECONDS * 1000)):
            return
        others = {worker.name for worker in heartbeats.alive() if worker.queue == "train"}
        for _ in range(min(len(others) - 1, leases.AT_MOST)):
            queue.celery.send_task(queue.TRAIN, args=[str(key)], retry=False)


CLOCK, UNTIL, WAITED = bindparam("clock", type_=Float), bindparam("until", type_=DateTime(timezone=True)), bindparam("waited", type_=Float)
"""Now, in seconds since 1970 and as a time, and since when a job must have waited to be reserved for."""
PEOPLE, USED, ENDED = bindparam("people", type_=ARRAY(Uuid)), bindparam("used", type_=ARRAY(Float)), bindparam("ended", type_=ARRAY(Float))
"""Everybody who has used anything, what counts as used of each, and when the last of it ends."""
BUSY, NUM_BUSY = bindparam("busy", type_=ARRAY(Uuid)), bindparam("num_busy", type_=Integer)
"""The people whose work runs."""
FULL_PEOPLE, FULL_PROJECTS = bindparam("full_people", type_=ARRAY(Uuid)), bindparam("full_projects", type_=ARRAY(Uuid))
"""Those of whom no more may run."""
HOST, TRIED = bindparam("host", type_=Text), bindparam("tried", type_=ARRAY(Uuid))


def _moment(now: Situation, host: str, tried: Collection[uuid.UUID]) -> dict[str, Any]:
    """What changes from one claim to the next. The statement itself is built once for each state of a machine: building it takes as long as it
    runs over a short queue."""
    standing = Standing(now)
    full_people, full_projects = standing.at_limit(now)
    people: list[Any] = list({**standing.used, **standing.ended})
    busy = {key for (part, key), count in standing.running.items() if part == 0 and count > 0}
    return {
        "clock": now.now, "until": datetime.fromtimestamp(now.now, UTC), "waited": now.now - get_settings().reserve_after_seconds, "host": host,
        "people": people, "used": [standing.used[person] for person in people], "ended": [max(standing.ended[person], NEVER) for person in people],
        "busy": list(busy), "num_busy": len(busy), "full_people": list(full_people), "full_projects": list(full_projects), "tried": list(tried),
    }  # fmt: skip


@functools.lru_cache(maxsize=64)
def _next(kind: str, kinds: tuple[str, ...], free: Capacity, whole: Capacity) -> Select[Any]:
    """The row that is next, locked. Its conditions are repeated outside: where another worker has just claimed it, they are looked at anew."""
    work, lined_up = WORK[kind], _lined_up(kinds, free, whole)
    query = select(*lined_up.c).select_from(work.table).join(lined_up, lined_up.c.key == work.table.id)
    query = query.where(work.free(), lined_up.c.kind == kind)
    query = query.order_by(lined_up.c.first.desc(), lined_up.c.after, lined_up.c.since, lined_up.c.key).limit(1)
    return query.with_for_update(of=work.table, skip_locked=True)


def _lined_up(kinds: tuple[str, ...], free: Capacity, whole: Capacity) -> Subquery:
    """Everything that may be claimed or reserved, with what its person will have used `after` it. Those of one person and project come in
    the order of their arrival, whatever their kind, each charged with those before it: rows that others have locked count as taken."""
    one = union_all(*(select(_waiting(kind, kinds, free, whole)) for kind in kinds)).subquery("waits")
    lane: dict[str, Any] = {"partition_by": (one.c.person, one.c.project), "order_by": (one.c.first.desc(), one.c.arrival, one.c.key)}
    before = func.sum(one.c.charge).over(**lane, rows=(None, 0)) - func.first_value(one.c.charge).over(**lane)
    after = func.first_value(one.c.after).over(**lane) + before
    needs = [one.c[name] for name in ("gpu_bytes", "cpu_bytes", "num_gpus", "gpu_type", "labels")]
    return select(one.c.key, one.c.kind, one.c.first, after.label("after"), one.c.since, one.c.fits, *needs).subquery("lined_up")


def _waiting(kind: str, kinds: tuple[str, ...], free: Capacity, whole: Capacity) -> Subquery:
    table, is_job = WORK[kind].table, kind == "jobs"
    used = select(func.unnest(PEOPLE).label("person"), func.unnest(USED).label("used"), func.unnest(ENDED).label("ended")).subquery("used")
    since = cast(func.extract("epoch", train_queue.since_of(kind)), Float)
    needs = dict(zip(("gpu_bytes", "cpu_bytes", "num_gpus", "gpu_type", "labels"), train_queue.needs_of(kind), strict=True))
    fits = _fits(needs, free)
    charge = train_queue.seconds_of(kind) * func.coalesce(needs["num_gpus"], 1) / Project.weight
    advance = case(ADVANCE, value=Job.priority) if is_job else literal(0.0)
    due = func.greatest(0.0, CLOCK - func.greatest(since, func.coalesce(used.c.ended, NEVER))) / _people(kinds)
    own: ColumnElement[bool] = _reserved()
    owed: ColumnElement[bool] = false()
    if is_job:
        owed = and_(~fits, _fits(needs, whole), or_(own, and_(since <= WAITED, ~_is_kept(Job.reserved_until), _keeps_nothing())))
    first = train_queue.interrupted(kind) | own if is_job else train_queue.interrupted(kind)
    query = select(
        table.id.label("key"), literal(kind).label("kind"), table.owner_id.label("person"), table.project_id.label("project"), since.label("since"),
        (since - advance).label("arrival"), first.label("first"), charge.label("charge"), fits.label("fits"),
        (func.coalesce(used.c.used, 0.0) + charge - due - advance).label("after"), *(what.label(name) for name, what in needs.items()),
    )  # fmt: skip
    query = query.join(Project, Project.id == table.project_id).outerjoin(used, used.c.person == table.owner_id)
    query = query.where(WORK[kind].free(), fits | owed, table.owner_id != all_(FULL_PEOPLE), table.project_id != all_(FULL_PROJECTS))
    return query.where(table.id != all_(TRIED)).subquery("waiting")


def _is_kept(reserved_until: Any) -> ColumnElement[bool]:
    return func.coalesce(reserved_until >= UNTIL, false())


def _reserved() -> ColumnElement[bool]:
    """GPUs of this machine are kept for the job."""
    return func.coalesce(Job.reserved_by == HOST, false()) & _is_kept(Job.reserved_until)


def _keeps_nothing() -> ColumnElement[bool]:
    """A machine keeps GPUs for one job at a time: those that come after it are next in the order when it has started."""
    other = aliased(Job)
    return ~exists().where(other.reserved_by == HOST, _is_kept(other.reserved_until), other.status == "queued")


def _people(kinds: tuple[str, ...]) -> ColumnElement[float]:
    """How many people have something to do: whose work waits or runs."""
    waits = [select(WORK[kind].table.owner_id.label("person")).where(WORK[kind].free()) for kind in kinds]
    everyone = waits[0].union(*waits[1:]).subquery() if len(waits) > 1 else waits[0].distinct().subquery()
    others = select(func.count()).select_from(everyone).where(everyone.c.person != all_(BUSY)).scalar_subquery()
    return cast(others + NUM_BUSY, Float)


def _fits(needs: dict[str, Any], has: Capacity) -> ColumnElement[bool]:
    """`Capacity.fits`, in SQL."""
    labelled: ColumnElement[bool] = needs["labels"].contained_by(list(has.labels))
    without_gpu = func.coalesce(needs["cpu_bytes"] * has.processes <= has.memory_bytes, false())
    if not has.cuda:
        return and_(labelled, without_gpu)
    suited: Any = literal(0)
    for card, count in Counter(has.cards).items():
        named = or_(needs["gpu_type"].is_(None), func.strpos(card.name.lower(), func.lower(needs["gpu_type"])) > 0)
        suited += case((and_(needs["gpu_bytes"] <= card.memory_bytes, named), count), else_=0)
    enough = suited >= func.coalesce(needs["num_gpus"], has.processes)
    return and_(labelled, case((needs["gpu_bytes"].is_(None), without_gpu), else_=enough))
