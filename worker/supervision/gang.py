"""How a worker takes part in a job on several machines (`app/jobs/gangs.py`): it offers a place, leads, or is led."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sqlalchemy.orm import Session

from app import events
from app.db import get_engine, transaction
from app.evaluation import claims
from app.jobs import gangs, lifecycle
from app.jobs.gangs import Offered, Rendezvous
from app.jobs.lifecycle import Claim
from app.machines import heartbeats
from app.settings import get_settings
from app.tables import Job
from worker.runtime import attendance, failures
from worker.supervision import exit_codes, gpu_lease
from worker.supervision.claiming import ClaimOutcome, retry_until_database

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
LAUNCHER_BYTES = 16_000
"""As much of the log's end holds what the processes of a job and their launcher say last."""
LAST_WORDS_SECONDS = 3.0
"""How long the other machines of an attempt that ended have to say what they ended of."""
_TOKEN = secrets.token_hex(3)


class PlaceLost(Exception):
    """A place of the job was lost before its processes met."""

    def __init__(self, fault: events.Failed) -> None:
        super().__init__(fault.message)
        self.fault = fault


def worker_name() -> str:
    """Of this process. Hosts may share a name, as containers do, so it ends with a number of its own."""
    return f"{socket.gethostname()}:{os.getpid()}:{_TOKEN}"


def own_address() -> str:
    """Where other machines reach this one: LUTHIER_WORKER_ADDRESS, or the address from which it reaches the database."""
    if given := get_settings().worker_address:
        return given
    url = urlsplit(str(get_engine().url.render_as_string(hide_password=True)))
    if not url.hostname:
        return "127.0.0.1"  # a database behind a socket file: all workers are on this machine
    with socket.socket(socket.AF_INET6 if ":" in url.hostname else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((url.hostname, url.port or 5432))  # sends nothing: it chooses the interface
        return str(probe.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def claim(
    session: Session, job: Job, lease: gpu_lease.GpuLease, going_down: Callable[[], bool]
) -> tuple[Claim, Rendezvous | None] | PlaceOffer | ClaimOutcome:
    """Claim a job. One on several machines is claimed, and led, by the last worker that it needs; those before offer a place."""
    machines = job.num_machines or 1
    if machines > 1:
        session.refresh(job, with_for_update=True)  # two that come at once would both offer a place, and neither claim it
        found = gangs.gather(session, job, worker_name(), heartbeats.machine_name())
        if isinstance(found, Offered):
            return PlaceOffer(found, lease, going_down)
        if found is None:
            return ClaimOutcome.NO_GPU
    held = lifecycle.claim(session, job.id, f"{socket.gethostname()}:{os.getpid()}", len(lease.files) * machines)
    if held is None:
        return ClaimOutcome.GONE
    return held, _lead(session, held, machines) if machines > 1 else None


def _lead(session: Session, held: Claim, machines: int) -> Rendezvous:
    """Name the address and give the others their places, in the transaction of the claim."""
    gangs.forget(session, held)
    return gangs.assign(session, held, worker_name(), heartbeats.machine_name(), f"{own_address()}:{_free_port()}", machines)


def waited_for(held: Claim, folder: Path, others: gangs.GangState) -> str:
    """The process, of several that train the job, that the others wait for; empty where there is none."""
    here = attendance.counts(exit_codes.tail(folder / attendance.FILE), held.processes)
    return attendance.behind([*here, *(count for place in sorted(others.counts) for count in others.counts[place])])


def lost_process(held: Claim, machines: int, folder: Path, others: gangs.GangState, memory: exit_codes.OomWatch) -> events.Failed | None:
    """What became of the process that the others of this job lost, as the log and their attendance tell it."""
    if (size := held.processes * machines) == 1:
        return None
    said = exit_codes.tail(folder / "trainer.log", LAUNCHER_BYTES)
    ended = exit_codes.of_process(said, size, memory.killed_since())
    return ended or failures.of_peer(said, waited_for(held, folder, others))


def fault_elsewhere(held: Claim, machines: int, last: events.TrainerEvent | None) -> events.Failed | None:
    """What another machine of an attempt that has ended failed of, once it has said so; None where none does, or `last`, which this one said,
    tells more than that it lost others."""
    if isinstance(last, events.Failed) and last.kind != "worker_lost":
        return None
    until = time.monotonic() + LAST_WORDS_SECONDS
    while True:
        with transaction() as session:
            state = gangs.look(session, held, machines)
        if state.fault or state.over or time.monotonic() > until:
            return state.fault
        time.sleep(LOOK_SECONDS)


@dataclass
class PlaceOffer:
    """A place that this worker offers, with the GPUs that it keeps for it."""

    offered: Offered
    lease: gpu_lease.GpuLease
    going_down: Callable[[], bool]

    def wait(self) -> tuple[Claim, Rendezvous] | None:
        """Wait until the others are there and the job is claimed; its claim and this worker's place in it, or None where it waited in vain."""
        log.info("Job %s needs several machines: waiting for the others.", self.offered.job_id)
        claims.tell_train_workers(self.offered.job_id)
        until = time.monotonic() + get_settings().gather_seconds
        told = time.monotonic()
        while True:
            found = retry_until_database(self._look, self.going_down)
            if isinstance(found, tuple):
                return found
            if not found:
                return None
            late = time.monotonic() > until and not retry_until_database(self._stays, self.going_down)
            if (late or self.going_down()) and retry_until_database(self._withdraw, lambda: True):
                return None
            if time.monotonic() > told + claims.TELL_SECONDS:
                claims.tell_train_workers(self.offered.job_id)
                told = time.monotonic()
            time.sleep(LOOK_SECONDS)

    def _look(self) -> tuple[Claim, Rendezvous] | bool:
        with transaction() as session:
            return gangs.waiting(session, self.offered)

    def _stays(self) -> bool:
        with transaction() as session:
            return gangs.stays(session, self.offered)

    def _withdraw(self) -> bool:
        with transaction() as session:
            return gangs.withdraw(session, self.offered)
