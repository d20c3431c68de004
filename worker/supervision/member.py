"""A machine's part in a job that another machine leads: its trainer's processes, under the leader's fence.

The leader holds the lease, records what happens and ends the job. A member brings what its processes read, starts them, says that it is alive and
how far they are, and how they ended; it leaves when the fence is no longer the attempt's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from app import events
from app.db import transaction
from app.jobs import gangs
from app.jobs.gangs import Rendezvous
from app.jobs.lifecycle import Claim, FenceLost
from app.settings import get_settings
from app.tables import JSON
from worker.runtime import attendance
from worker.supervision import exit_codes, gang, gpu_lease
from worker.supervision.claiming import retry_until_database
from worker.supervision.gang import LAUNCHER_BYTES
from worker.supervision.train_attempt import Attempt

log = logging.getLogger(__name__)


class Member(Attempt):
    """An attempt that is led from elsewhere."""

    def __init__(self, held: Claim, together: Rendezvous, going_down: Callable[[], bool], lease: gpu_lease.GpuLease) -> None:
        super().__init__(held, going_down, lease, together)
        self.checkpoints.used = False  # the leader has them
        self.ready = False

    def carry_out(self) -> None:
        assert self.together is not None
        log.info("Job %s: place %d of %d.", self.held.job_id, self.together.place, self.machines)
        try:
            self.run()
        except FenceLost:
            log.info("Job %s: the attempt is over; its place is left.", self.held.job_id)

    def _chosen(self) -> str | None:
        while (chosen := retry_until_database(self._look, self.going_down)) is None:
            self._go_on()
            time.sleep(gang.LOOK_SECONDS)
        return chosen

    def _look(self) -> str | None:
        with transaction() as session:
            return gangs.checkpoint_of(session, self.held)

    def _meet(self) -> None:
        self.ready = True
        self._renew()

    def _record(self, batch: list[events.TrainerEvent]) -> None:
        for _ in batch:  # what the first process says is the leader's
            self.heard.popleft()

    def _renew(self) -> None:
        place = self.together.place if self.together else 0
        said = exit_codes.tail(self.folder / attendance.FILE, LAUNCHER_BYTES)
        counts = attendance.counts(said, self.held.processes, place * self.held.processes)
        try:
            with transaction() as session:
                gangs.beat(session, self.held, gang.worker_name(), counts, self.ready)
        except FenceLost:
            if not self.over.is_set():
                self.fence_lost.set()
        except SQLAlchemyError as error:
            log.warning("Job %s: no heartbeat: %s", self.held.job_id, type(error).__name__)
        self.beaten_at = time.monotonic()

    def _hear_wishes(self) -> None:
        """People's wishes reach the leader. A member that is to leave asks it to save and stop, and its own processes with it."""
        if self.stop_at is None and self.going_down():
            self.stop_at, self.stop_reason = time.monotonic(), "the worker is going down"
            self._tell_end({"type": "leaving"})
        elif self.stop_at is not None and time.monotonic() > self.stop_at + get_settings().stop_grace_seconds:
            self.trainer.kill_group()

    def _look_for_hang(self) -> None:
        """The leader does."""

    def _stopped(self, reason: str) -> None:
        self._tell_end({"type": "left"})

    def _fail(self, fault: events.Failed) -> None:
        self._tell_end(fault.model_dump(mode="json"))

    def _tell_end(self, how: JSON) -> None:
        self._retry_until_database(lambda session: gangs.end(session, self.held, gang.worker_name(), how))

    def _conclude(self, code: int, memory: exit_codes.OomWatch) -> None:
        """What its own processes ended of. That they lost those of another machine is for that one to explain."""
        last = self.said_last
        if isinstance(last, events.Failed) and last.kind != "worker_lost":
            return self._fail(last)
        said = exit_codes.tail(self.folder / "trainer.log", LAUNCHER_BYTES)
        if (
            code
            and self.stop_at is None
            and (ended := exit_codes.of_process(said, self.held.processes * self.machines, memory.killed_since()))
        ):
            return self._fail(ended)
        if code < 0 and self.stop_at is None:
            return self._fail(exit_codes.classify(code, said, memory.killed_since()))
        return self._tell_end({"type": "finished" if code == 0 else "left"})
