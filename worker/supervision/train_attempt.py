"""One attempt at one job: claim it, start its trainer, record its events, and bring it to an end.

    claim ─▶ spec.json ─▶ Popen(python -m worker.run) ─▶ pipe ─▶ events ─▶ Postgres ─▶ finish | fail | stopped | lost

The trainer is a process of its own with no database address: it can be killed, run out of memory or hang without affecting
anything but its attempt. This process holds the lease and its fence, and never imports torch.

Three threads: this one records events and supervises the trainer; one reads the pipe, so that the trainer does not block while
the database is unreachable; one sends heartbeats, so that a slow transaction does not cost the lease.
"""

from __future__ import annotations

import collections
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from app import events, limits
from app.db import transaction
from app.errors import BadData
from app.inference import residency
from app.jobs import checkpoint_folders, gangs, lifecycle, usage
from app.jobs.gangs import Rendezvous
from app.jobs.lifecycle import Claim, FenceLost
from app.kit import child_process, tracing
from app.kit.child_process import Child
from app.kit.confinement import confined
from app.kit.logs import turn_over
from app.machines import energy
from app.models import integrity
from app.settings import get_settings
from app.storage import places
from app.storage.atomic import write_atomically
from app.tables import Job
from worker.supervision import answering, confinement, exit_codes, gang, storing
from worker.supervision.claiming import retry_until_database
from worker.supervision.gpu_lease import GpuLease

log = logging.getLogger(__name__)

MAX_HELD_EVENTS = 200_000
"""Events kept in memory while the database is unreachable, some 100 MB. Beyond it the trainer blocks on its pipe."""

FIRST_STEP_SECONDS = 1800.0
"""Maximum silence while a model is loaded."""

MIN_PATIENCE_SECONDS = 600.0
"""Minimum silence of a step before the trainer is taken to hang, however short the steps before it were."""

BATCH = 500
LOOK_SECONDS = 0.5  # polling interval of a silent trainer
LOG_LIMIT_BYTES = 32 * 2**20
"""Maximum size of a trainer's log; as much of the previous log is kept next to it."""

GATHER_SECONDS = 0.1
"""Events within this time are recorded together."""


class Attempt:
    """One attempt at a job, from the start of its trainer to the record of its end."""

    def __init__(self, held: Claim, going_down: Callable[[], bool], lease: GpuLease | None = None, together: Rendezvous | None = None):
        self.held = held
        self.together = together  # with other machines
        self.machines = together.machines if together else 1
        self.checkpoint = ""  # that all machines go on from
        self.going_down = going_down
        self.lease = lease or GpuLease()
        self.meter = energy.Meter(self.lease.gpus)
        self.folder: Path = get_settings().data_dir / held.folder
        self.heard: collections.deque[events.TrainerEvent] = collections.deque()
        self.recorded = 0  # number of the next event
        self.said_last: events.Finished | events.Failed | None = None
        self.woken = threading.Event()  # an event, a request or a lost lease
        self.fence_lost = threading.Event()
        self.over = threading.Event()  # the trainer has exited: heartbeats continue until the end is recorded
        self.space = confinement.MountSpace()  # the trainer's mount namespace
        self.wishes = lifecycle.ControlFlags(False, False, False)
        self.beaten_at = time.monotonic()
        self.stop_at: float | None = None  # when the trainer was asked to stop
        self.stop_reason = ""
        self.hung = False
        self.started = False  # before it has, it would die of the signal to save
        self.save_sent = False
        self.checkpoints = storing.CheckpointStore(held, self._say)
        self.pace = exit_codes.HangDetector(FIRST_STEP_SECONDS, MIN_PATIENCE_SECONDS)
        self.desk: answering.QuestionDesk | None = None  # where graders ask models, and a server draws
        self.gang = gangs.GangState(False, None, {})  # what the leader saw last of the others

    # The main path --------------------------------------------------------------------------------------------------

    def carry_out(self) -> None:
        held = self.held
        log.info("Job %s: attempt %d with fence %d.", held.job_id, held.attempt, held.fence)
        try:
            with tracing.span("trainer", attempt=held.attempt, strategy=held.spec.strategy.name, model=held.spec.model.name) as span:
                self.run()
                if span is not None:
                    span.set_attributes({"step": self.pace.step or 0, "outcome": type(self.said_last).__name__.lower()})
        except FenceLost:
            log.warning("Job %s: its fence was lost; nothing more is written.", held.job_id)

    def run(self) -> None:
        try:
            memory = exit_codes.OomWatch()
            code = self._train()
            self._renew()  # with the energy of the last seconds
            self._record_all()
            self._conclude(code, memory)
        except FenceLost:
            raise
        except storing.Leaving:
            self._stopped("the object storage was away")
        except integrity.BadModel as error:
            integrity.tell(error)
            self._fail(events.Failed(kind="bad_model", message=error.message, hint=error.hint))
        except gang.PlaceLost as error:
            self._fail(error.fault)
        except BadData as error:  # rows that are damaged in the object storage
            self._fail(events.Failed(kind="bad_data", message=error.message, hint=error.hint))
        except OSError as error:
            self._fail(exit_codes.of_os_error(error))
        except Exception as error:
            if isinstance(error, DBAPIError) and exit_codes.is_away(error):
                raise  # this worker is leaving and the database is gone: the reaper finds the expired lease
            log.exception("Job %s: the supervisor failed.", self.held.job_id)
            self._fail(events.Failed(kind="crashed", message=f"The job could not be recorded: {error}", hint="Look at the worker's log."))
        finally:
            self.over.set()
            self.checkpoints.end()

    def _stopped(self, reason: str) -> None:
        self._retry_until_database(lambda session: lifecycle.stopped(session, self.held, self.pace.step, reason))

    def _fail(self, fault: events.Failed) -> None:
        self._retry_until_database(lambda session: lifecycle.fail(session, self.held, fault))

    def _train(self) -> int:
        """Start the trainer and supervise it to its end; returns its exit code, negative for a signal."""
        brought = storing.bring(self.held, self._go_on, self._say, self.machines, self._chosen())
        with places.held(brought, self._go_on):
            self.checkpoint = storing.checkpoint_in(brought)
            return self._supervised()

    def _supervised(self) -> int:
        self._ask_room()
        for model in filter(None, (self.held.spec.model, self.held.spec.teacher)):
            integrity.check_model(model, self._beat_when_due)  # reading a large one takes longer than a lease
        self._meet()
        self.trainer = self._start()
        self.trainer.listen(self._hear, over=self.woken.set)
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        try:
            self._watch()
        finally:
            self.trainer.kill_group()  # also what the trainer itself started
            self.space.end()
            code = self.trainer.end()
            confinement.clean(self.folder)
        return code

    def _chosen(self) -> str | None:
        """The checkpoint that another machine has chosen for all."""

    def _meet(self) -> None:
        """Tell the other machines which checkpoint all go on from, and wait until they have it."""
        if self.together:
            self._retry_until_database(lambda session: gangs.tell_checkpoint(session, self.held, self.checkpoint))
        while self.together and not self.gang.ready:
            self._go_on()
            if self.gang.fault:
                raise gang.PlaceLost(self.gang.fault)
            time.sleep(LOOK_SECONDS)

    def _start(self) -> Child:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        spec = self.folder / "spec.json"
        write_atomically(spec, self.held.spec.model_dump_json(indent=1))
        environment = exit_codes.trainer_environment(os.environ, self.folder, self.held.spec.run.device) | self.lease.environment()
        environment |= {"LUTHIER_GPUS_PER_JOB": str(self.held.processes)}
        room = confinement.room_of(self.held.spec, self.folder, environment, self.held.processes, self.machines)
        if answering.asks(self.held.spec):
            self.desk = retry_until_database(lambda: answering.QuestionDesk(self.held, self.over, self.folder), self._give_up)
        options, files = (self.desk.options, self.desk.files) if self.desk else ([], ())
        with (self.folder / "trainer.log").open("ab") as out:
            child = child_process.start(
                lambda pipe: confined([*exit_codes.trainer_command(self.held, spec, pipe, self.together, self.checkpoint), *options], room),
                env=environment,
                output=out,
                keeps=[*self.lease.files, *files],
            )
        if self.desk:
            self.desk.listen()
        return child

    def _watch(self) -> None:
        """Record and watch until the trainer is gone."""
        while self.trainer.is_running():
            if self.fence_lost.is_set():
                raise FenceLost
            self.space.look(self.trainer.pid)
            self._hear_wishes()
            self._look_for_hang()
            self._record_some()
            turn_over(self.folder / "trainer.log", LOG_LIMIT_BYTES)
            self.woken.wait(LOOK_SECONDS)
            self.woken.clear()
            time.sleep(GATHER_SECONDS)

    # Hearing ----------------------------------------------------------------------------------------------------------

    def _hear(self, line: bytes) -> None:
        """Take one event off the pipe. While too many wait to be recorded, so does the trainer."""
        while len(self.heard) > MAX_HELD_EVENTS and not self.over.is_set():
            time.sleep(0.5)
        try:
            event = confinement.believed(events.read_line(line), self.held.folder)
        except ValidationError as error:
            event = events.Log(level="warn", message=f"The trainer said something unknown: {line[:200]!r} ({error.errors()[0]['msg']})")
        self.started = self.started or isinstance(event, events.Started)
        if isinstance(event, events.Saved):
            self.checkpoints.saved(event)
        self.pace.note(event)
        if isinstance(event, events.Finished | events.Failed):
            # Recorded with the end of the job, in one transaction. Processes that lost another one say so after its own last word.
            if not (isinstance(self.said_last, events.Failed) and isinstance(event, events.Failed) and event.kind == "worker_lost"):
                self.said_last = event
        else:
            self.heard.append(event)
        self.woken.set()

    def _say(self, words: str) -> None:
        """Tell the job's watchers."""
        self.heard.append(events.Log(level="warn", message=words))
        self.woken.set()

    def _record_some(self) -> None:
        """Record one batch, if there is one. While the database is unreachable the events wait in order."""
        batch = [self.heard[i] for i in range(min(len(self.heard), BATCH))]
        if not batch:
            return
        try:
            self._record(batch)
        except DBAPIError as error:
            if not exit_codes.is_away(error):
                raise
            log.warning("Job %s: the database is unreachable; %d events wait.", self.held.job_id, len(self.heard))
            time.sleep(0.5)
        if self.heard:
            self.woken.set()

    def _record_all(self) -> None:
        while self.heard:
            retry_until_database(lambda: self._record([self.heard[i] for i in range(min(len(self.heard), BATCH))]), self._give_up)

    def _record(self, batch: list[events.TrainerEvent]) -> None:
        with transaction() as session:
            lifecycle.record(session, self.held, self.recorded, batch)
            if not self.checkpoints.used and any(isinstance(event, events.Saved) for event in batch):
                checkpoint_folders.keep_newest(session, self.held.job_id, get_settings().keep_checkpoints)
        for _ in batch:
            self.heard.popleft()
        self.recorded += len(batch)

    # Beating and stopping ---------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Renew the lease, and the request that this machine's idle models are evicted, until the attempt is over."""
        while not self.over.is_set():
            self._ask_room()
            self._renew()
            self.woken.set()
            if self.fence_lost.is_set():
                break
            self.over.wait(get_settings().beat_seconds)
        residency.give_room_back(self.held.job_id)

    def _ask_room(self) -> None:
        residency.ask_room(self.held.job_id, self.held.memory_bytes, self.held.spec.run.device, self.lease.gpus)

    def _renew(self) -> None:
        """One heartbeat, which also reads stop and save requests."""
        try:
            with transaction() as session:
                self.wishes = lifecycle.heartbeat(session, self.held)
                if self.together:
                    self.gang = gangs.look(session, self.held, self.machines)
                usage.record_energy(session, self.held.job_id, self.held.fence, self.meter.joules())
                if self.desk:
                    limits.count_meter(session, Job, self.held.job_id, self.desk.meter)
        except FenceLost:
            if not self.over.is_set():
                self.fence_lost.set()
        except SQLAlchemyError as error:
            log.warning("Job %s: no heartbeat: %s", self.held.job_id, type(error).__name__)

    def _beat_when_due(self) -> None:
        """Heartbeats before there is a trainer and a heartbeat thread. Raises FenceLost."""
        if time.monotonic() > self.beaten_at + get_settings().beat_seconds:
            self.beaten_at = time.monotonic()
            self._ask_room()
            self._renew()
        if self.fence_lost.is_set():
            raise FenceLost

    def _go_on(self) -> None:
        """A heartbeat before there is a trainer. Raises FenceLost, and Leaving where nobody waits for the trainer any more."""
        self._beat_when_due()
        self._record_some()
        if self.wishes.cancel or self.wishes.pause or self.going_down():
            raise storing.Leaving

    def _go_on_storing(self) -> None:
        """The same after the trainer has ended, while the beating thread renews the lease."""
        self._record_some()
        if self.fence_lost.is_set():
            raise FenceLost
        if self.going_down() and self.stop_at is None:
            self.stop_at = time.monotonic()
        if self.wishes.cancel or self._give_up():
            raise storing.Leaving

    def _hear_wishes(self) -> None:
        """Stop or save as requested. A trainer that does not leave within its grace period is killed."""
        if not self.wishes.save:
            self.save_sent = False  # a heartbeat has seen the last request fulfilled
        if self.stop_at is None:
            if self.wishes.cancel or self.wishes.pause:
                self._stop("asked for")
            elif self.going_down():
                self._stop("the worker is going down")
            elif self.gang.leaves:
                self._stop(f"{self.gang.leaves} is going down")
            elif self.wishes.save and self.started and not self.save_sent:
                self.save_sent = exit_codes.ask_to_save(self.trainer.pid, self.held.processes * self.machines)
        elif time.monotonic() > self.stop_at + get_settings().stop_grace_seconds:
            self.trainer.kill_group()
        if self.gang.fault:
            self.trainer.kill_group()  # its processes would wait for those of the other machine for minutes

    def _stop(self, reason: str) -> None:
        self.stop_at, self.stop_reason = time.monotonic(), reason
        os.kill(self.trainer.pid, signal.SIGTERM)  # not yet reaped, so the number is still the trainer's

    def _look_for_hang(self) -> None:
        if self.stop_at is None and self.pace.silent_too_long():
            self.hung = True
            others = f", while its other processes wait for {who}" if (who := gang.waited_for(self.held, self.folder, self.gang)) else ""
            self._stop(f"nothing was heard of the trainer for {self.pace.patience():.0f} seconds{others}")

    # The end ----------------------------------------------------------------------------------------------------------

    def _conclude(self, code: int, memory: exit_codes.OomWatch) -> None:
        """Move the job to the state that the trainer's exit stands for."""
        last, held = self.said_last, self.held
        self.checkpoints.finish(last.path if isinstance(last, events.Finished) and code == 0 else None, self._go_on_storing)
        if isinstance(last, events.Finished) and code == 0:
            return self._finish(last)
        if (
            self.together
            and self.stop_at is None
            and code != exit_codes.STOPPED
            and (fault := gang.fault_elsewhere(self.held, self.machines, last))
        ):
            return self._fail(fault)
        if self.hung:
            return self._fail(events.Failed(kind="no_progress", message=f"The trainer hung: {self.stop_reason}.", hint="Look at its log."))
        if isinstance(last, events.Failed):
            return self._fail(
                (gang.lost_process(self.held, self.machines, self.folder, self.gang, memory) if last.kind == "worker_lost" else None)
                or last
            )
        if code == exit_codes.STOPPED or self.stop_at is not None:
            return self._stopped(self.stop_reason)
        said = exit_codes.tail(self.folder / "trainer.log")
        failed = gang.lost_process(self.held, self.machines, self.folder, self.gang, memory) or exit_codes.classify(
            code, said, memory.killed_since()
        )
        log.error("Job %s: %s", held.job_id, failed.message)
        return self._fail(failed)

    def _finish(self, finished: events.Finished) -> None:
        fault = exit_codes.check_result(get_settings().data_dir / finished.path)
        if fault is None:
            return self._retry_until_database(lambda session: lifecycle.finish(session, self.held, finished))
        return self._fail(fault)

    def _retry_until_database(self, move: Callable[..., None]) -> None:
        def once() -> None:
            with transaction() as session:
                move(session)

        retry_until_database(once, self._give_up)

    def _give_up(self) -> bool:
        """Whether waiting for the database is pointless: the fence is lost, or this worker has been leaving for a while."""
        leaving = self.stop_at is not None and time.monotonic() > self.stop_at + get_settings().stop_grace_seconds
        return self.fence_lost.is_set() or (leaving and self.going_down())
