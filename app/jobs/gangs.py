"""One job on several machines: as many workers as it asks for, or none.

    a worker chooses the job ─▶ others are missing: it offers a place and waits ─▶ the last one claims the job and leads it
                                                                                   the others take the places 1, 2, …

An offer holds the worker's GPUs and nothing else: the job stays queued until the last worker that it needs comes, which claims it, for all of them
under one fence, and names the address where they meet. Only one job gathers at a time, so that two never wait for each other's machines. An
offer is withdrawn after `LUTHIER_GATHER_SECONDS`, and not made again for as long, so that smaller jobs pass; once the job has waited for
`LUTHIER_RESERVE_AFTER_SECONDS` and there are enough machines, it stays.

The leader holds the lease and records everything. The others keep their place alive, leave when the fence is no longer the job's, and say how
they ended; a place that is silent for a whole lease is lost, and with it the attempt.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from pydantic import ValidationError
from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import events
from app.jobs import lifecycle
from app.jobs.lifecycle import Claim, FenceLost
from app.leases import now
from app.machines import heartbeats
from app.settings import get_settings
from app.tables import JSON, Job, JobPlace


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """This machine's part of a job on several machines."""

    place: int
    machines: int
    address: str
    """`host:port` where the processes meet: of place 0."""


class Offered(NamedTuple):
    """A place that a worker offers; its claim would have this fence."""

    job_id: uuid.UUID
    fence: int
    worker: str


def _live() -> tuple[ColumnElement[bool], ...]:
    return JobPlace.ended.is_(None), JobPlace.seen_at > now() - timedelta(seconds=get_settings().lease_seconds)


def gather(session: Session, job: Job, worker: str, machine: str) -> Offered | int | None:
    """In the transaction that has locked the job: the number of places that others offer, where they are enough and this worker shall claim it;
    else its own offer; None where it is not to wait for this job now."""
    fence = job.fence + 1
    others = session.scalars(
        select(JobPlace).where(JobPlace.job_id == job.id, JobPlace.fence == fence, JobPlace.worker != worker, *_live())
    )
    if (count := len(others.all())) >= (job.num_machines or 1) - 1:
        return count
    gathering = select(JobPlace.job_id).join(Job, Job.id == JobPlace.job_id).where(Job.status == "queued", Job.fence + 1 == JobPlace.fence)
    if session.scalar(gathering.where(JobPlace.job_id != job.id, *_live()).limit(1)) is not None:
        return None
    mine = (JobPlace.job_id == job.id, JobPlace.fence == fence, JobPlace.worker == worker)
    if session.scalar(select(JobPlace.job_id).where(*mine, JobPlace.seen_at > now() - timedelta(seconds=get_settings().gather_seconds))):
        return None  # it waited in vain just now
    values = {"machine": machine, "place": None, "address": None, "ready": False, "ended": None, "offered_at": now(), "seen_at": now()}
    row = insert(JobPlace).values(job_id=job.id, fence=fence, worker=worker, **values)
    session.execute(row.on_conflict_do_update(index_elements=["job_id", "fence", "worker"], set_=values))
    return Offered(job.id, fence, worker)


def assign(session: Session, held: Claim, worker: str, machine: str, address: str, machines: int) -> Rendezvous:
    """Give the places to those that offered first; the leader has place 0. In the transaction of its claim."""
    waiting = select(JobPlace).where(JobPlace.job_id == held.job_id, JobPlace.fence == held.fence, JobPlace.worker != worker, *_live())
    chosen = session.scalars(waiting.order_by(JobPlace.offered_at, JobPlace.worker).limit(machines - 1).with_for_update()).all()
    for place, row in enumerate(chosen, 1):
        row.place, row.address = place, address
    mine = {"place": 0, "address": address, "machine": machine, "ready": True, "seen_at": now(), "ended": None}
    own = insert(JobPlace).values(job_id=held.job_id, fence=held.fence, worker=worker, **mine)
    session.execute(own.on_conflict_do_update(index_elements=["job_id", "fence", "worker"], set_=mine))
    names = ", ".join([machine, *(row.machine for row in chosen)])
    lifecycle.record_event(session, held.job_id, held.attempt, events.Log(level="info", message=f"{machines} machines train it: {names}."))
    return Rendezvous(0, machines, address)


def waiting(session: Session, offer: Offered) -> tuple[Claim, Rendezvous] | bool:
    """Renew an offer. What it became once the job is claimed; True while it waits; False where nobody waits for it any more."""
    mine = (JobPlace.job_id == offer.job_id, JobPlace.fence == offer.fence, JobPlace.worker == offer.worker)
    row = session.scalar(update(JobPlace).where(*mine, JobPlace.ended.is_(None)).values(seen_at=now()).returning(JobPlace))
    job = session.scalar(select(Job).where(Job.id == offer.job_id, Job.deleted_at.is_(None)))
    if row is None or job is None:
        return False
    if job.status == "running" and job.fence == offer.fence and row.place is not None:
        return lifecycle.claim_of(job), Rendezvous(row.place, job.num_machines or 1, row.address or "")
    return job.status == "queued" and job.fence + 1 == offer.fence


def stays(session: Session, offer: Offered) -> bool:
    """Whether an offer is kept beyond `LUTHIER_GATHER_SECONDS`: the job has waited long, and there are machines enough."""
    job = session.get_one(Job, offer.job_id)
    needs, since = lifecycle.needs_of(job), job.resumed_at or job.created_at
    waited = session.scalar(select(now() - since > timedelta(seconds=get_settings().reserve_after_seconds)))
    return bool(waited) and sum(one.fits(needs) for one in heartbeats.capacities()) >= (job.num_machines or 1)


def withdraw(session: Session, offer: Offered) -> bool:
    """Wait no longer; False where the place was taken just now. The row stays, so that the same worker does not begin again at once; it counts
    no more."""
    mine = (JobPlace.job_id == offer.job_id, JobPlace.fence == offer.fence, JobPlace.worker == offer.worker, JobPlace.place.is_(None))
    return (
        session.scalar(update(JobPlace).where(*mine).values(ended={"type": "withdrawn"}, seen_at=now()).returning(JobPlace.job_id))
        is not None
    )


def tell_checkpoint(session: Session, held: Claim, path: str) -> None:
    """The leader has chosen the checkpoint that all go on from; empty for none."""
    lead = (JobPlace.job_id == held.job_id, JobPlace.fence == held.fence, JobPlace.place == 0)
    session.execute(update(JobPlace).where(*lead).values(checkpoint=path))


def checkpoint_of(session: Session, held: Claim) -> str | None:
    """What the leader has chosen; None while it has not."""
    lead = (JobPlace.job_id == held.job_id, JobPlace.fence == held.fence, JobPlace.place == 0)
    return session.scalar(select(JobPlace.checkpoint).where(*lead))


def beat(session: Session, held: Claim, worker: str, counts: list[int], ready: bool) -> None:
    """A place is alive: how far its processes are, and whether its trainer starts. Raises FenceLost where the job is no longer this attempt's."""
    _write(session, held, worker, counts=counts, ready=ready)
    running = select(Job.id).where(Job.id == held.job_id, Job.fence == held.fence, Job.status == "running", Job.deleted_at.is_(None))
    if session.scalar(running) is None:
        raise FenceLost


def end(session: Session, held: Claim, worker: str, how: JSON) -> None:
    """A place is over, or about to leave: `finished`, `left`, `leaving`, or an event of the type `failed`, which its leader reads."""
    _write(session, held, worker, ended=how)


def _write(session: Session, held: Claim, worker: str, **values: object) -> None:
    mine = (JobPlace.job_id == held.job_id, JobPlace.fence == held.fence, JobPlace.worker == worker)
    session.execute(update(JobPlace).where(*mine).values(seen_at=now(), **values))


class GangState(NamedTuple):
    """What the leader sees of the other places, by their number."""

    ready: bool
    """All are about to start their trainers."""
    fault: events.Failed | None
    """Why the attempt cannot go on: a place failed, or was not heard of for a whole lease."""
    counts: dict[int, list[int]]
    """How far the processes of each place are (`worker.runtime.attendance`)."""
    leaves: str = ""
    """A machine whose worker was asked to leave."""
    over: bool = False
    """All have said how they ended."""


def look(session: Session, held: Claim, machines: int) -> GangState:
    silent = func.extract("epoch", now() - JobPlace.seen_at)
    query = select(JobPlace, silent).where(JobPlace.job_id == held.job_id, JobPlace.fence == held.fence, JobPlace.place > 0)
    rows = [(row, row.place or 0, seconds) for row, seconds in session.execute(query.order_by(JobPlace.place))]
    fault, leaves = None, ""
    for row, place, seconds in rows:
        first, last = place * held.processes, (place + 1) * held.processes - 1
        processes = f"process {first}" if first == last else f"processes {first} to {last}"
        who = f"{row.machine} ({processes} of {machines * held.processes})"
        if row.ended and row.ended.get("type") == "failed":
            try:
                failed = events.Failed.model_validate(row.ended)
            except ValidationError:
                continue
            if fault is None or fault.kind == "worker_lost":  # what a process failed of says more than that others lost it
                fault = failed.model_copy(update={"message": f"On {who}: {failed.message}"})
        elif row.ended and row.ended.get("type") == "leaving":
            leaves = row.machine
        elif row.ended is None and seconds > get_settings().lease_seconds and fault is None:
            hint = "The job goes on from its newest checkpoint with other machines."
            fault = events.Failed(kind="worker_lost", message=f"Nothing was heard of {who} for {seconds:.0f} seconds.", hint=hint)
    over = all(row.ended is not None and row.ended.get("type") != "leaving" for row, _, _ in rows)
    return GangState(all(row.ready for row, _, _ in rows), fault, {place: list(row.counts) for row, place, _ in rows}, leaves, over)


def forget(session: Session, held: Claim) -> None:
    """The places of earlier attempts tell nothing any more."""
    session.execute(delete(JobPlace).where(JobPlace.job_id == held.job_id, JobPlace.fence < held.fence))
