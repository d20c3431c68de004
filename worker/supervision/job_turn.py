"""A job that a worker takes: it claims it, or offers a place in one on several machines, and carries out what becomes of it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable

from sqlalchemy.orm import Session

from app.tables import Job
from worker.supervision import gang, gpu_lease
from worker.supervision.claiming import ClaimOutcome, claimed
from worker.supervision.member import Member
from worker.supervision.train_attempt import Attempt

log = logging.getLogger(__name__)


def work(job_id: uuid.UUID, going_down: Callable[[], bool] = lambda: False) -> ClaimOutcome:
    """One attempt at this job. `going_down` says whether this worker was asked to leave."""
    found = claimed(lambda session: claim(session, job_id, going_down))
    if isinstance(found, ClaimOutcome):
        log.info("Job %s is not claimed: %s.", job_id, found.value)
        return found
    assert isinstance(found, Attempt | gang.PlaceOffer)
    return carry_out(found)


def claim(session: Session, job_id: uuid.UUID, going_down: Callable[[], bool] = lambda: False) -> Attempt | gang.PlaceOffer | ClaimOutcome:
    """Claim this job and lease the GPUs that it needs; or why not, and nothing is changed. The reaper announces what is not claimed again.
    Of a job on several machines a place is offered where the others are not there yet."""
    if going_down():
        return ClaimOutcome.LEFT
    job = session.get(Job, job_id)
    if job is None:
        return ClaimOutcome.GONE
    lease = gpu_lease.of_job(job)
    if lease is None:
        return ClaimOutcome.NO_GPU
    try:
        found = gang.claim(session, job, lease, going_down)
    except BaseException:
        lease.release()
        raise
    if isinstance(found, ClaimOutcome):
        lease.release()
    return Attempt(found[0], going_down, lease, found[1]) if isinstance(found, tuple) else found


def carry_out(found: Attempt | gang.PlaceOffer) -> ClaimOutcome:
    """The attempt, from the start of its trainer to the record of its end; of an offer once it has become one."""
    try:
        if isinstance(found, Attempt):
            found.carry_out()
            return ClaimOutcome.DONE
        taken = found.wait()
        if taken is None:
            return ClaimOutcome.NO_GPU
        Member(*taken, found.going_down, found.lease).carry_out()
        return ClaimOutcome.DONE
    finally:
        found.lease.release()
