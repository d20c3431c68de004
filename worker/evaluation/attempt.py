"""One attempt at an evaluation: claim it, run `python -m worker.evaluation.process`, and record how it ends.

The child is a process of its own without the database's address, like a trainer: it can run out of memory or be killed without
taking this worker with it. This process holds the lease and its fence, and never imports torch. A partial evaluation is worth
nothing, so a stopped one is killed, and one whose worker leaves starts again elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import events, graders, limits
from app.db import transaction
from app.errors import BadData, StudioError
from app.evaluation import grading, predictions
from app.evaluation import service as evaluations
from app.evaluation.service import EvaluationClaim, EvaluationSpec
from app.inference import judges, residency
from app.jobs import usage
from app.kit import child_process
from app.kit.child_process import Child
from app.kit.confinement import confined
from app.kit.logs import turn_over
from app.kit.token_meter import TokenCounts, TokenMeter
from app.machines import energy
from app.machines.hardware import this_machine
from app.models import integrity
from app.models.integrity import BadModel
from app.settings import get_settings
from app.storage import places
from app.storage.atomic import write_atomically
from app.tables import Evaluation
from worker.evaluation.turns import Turns
from worker.supervision import confinement, exit_codes, gpu_lease, storing
from worker.supervision.claiming import ClaimOutcome, claimed, retry_until_database
from worker.supervision.train_attempt import LOG_LIMIT_BYTES

log = logging.getLogger(__name__)

ROOM_SECONDS = 2.0
"""Pause between two looks whether there is room beside a job that trains."""
ROOM_SHARE = 0.95
MAX_SILENT_SECONDS = 1800.0
"""A child that has reported nothing for this long is taken to hang; loading a large model takes minutes without a report."""


def work(evaluation_id: uuid.UUID, going_down: Callable[[], bool] = lambda: False) -> ClaimOutcome:
    """One attempt at this evaluation. `going_down` says whether this worker was asked to leave."""
    return _work(evaluation_id, lambda session: claim(session, evaluation_id, going_down))


def work_beside_training(evaluation_id: uuid.UUID, going_down: Callable[[], bool] = lambda: False) -> ClaimOutcome:
    """One attempt in an evaluate worker."""
    return _work(evaluation_id, lambda session: claim_beside_training(session, evaluation_id, going_down))


def claim(session: Session, evaluation_id: uuid.UUID, going_down: Callable[[], bool]) -> EvaluationAttempt | ClaimOutcome:
    """Claim this evaluation and lease a GPU for it; or why not, and nothing is changed. The reaper announces what is not claimed again."""
    lease = gpu_lease.take(1) if this_machine().cuda else gpu_lease.GpuLease()
    return ClaimOutcome.NO_GPU if lease is None else _claim(session, evaluation_id, going_down, lease)


def claim_beside_training(session: Session, evaluation_id: uuid.UUID, going_down: Callable[[], bool]) -> EvaluationAttempt | ClaimOutcome:
    """The same on a GPU that is free, else where it has room beside the jobs that train."""
    lease = (gpu_lease.take(1) if this_machine().cuda else None) or gpu_lease.GpuLease()
    if not lease.files and not _fits(session, evaluation_id):
        residency.say_no_room(evaluation_id)
        return ClaimOutcome.NO_ROOM
    return _claim(session, evaluation_id, going_down, lease)


def _claim(
    session: Session, evaluation_id: uuid.UUID, going_down: Callable[[], bool], lease: gpu_lease.GpuLease
) -> EvaluationAttempt | ClaimOutcome:
    try:
        held = None if going_down() else evaluations.claim(session, evaluation_id, len(lease.files))
    except BaseException:
        lease.release()
        raise
    if held is None:
        lease.release()
        return ClaimOutcome.GONE
    return EvaluationAttempt(held, going_down, lease)


def carry_out(attempt: EvaluationAttempt) -> None:
    try:
        attempt.run()
    finally:
        attempt.lease.release()


def _work(evaluation_id: uuid.UUID, claim_it: Callable[[Session], EvaluationAttempt | ClaimOutcome]) -> ClaimOutcome:
    found = claimed(claim_it)
    if isinstance(found, ClaimOutcome):
        log.info("Evaluation %s is not claimed: %s.", evaluation_id, found.value)
        return found
    carry_out(found)
    return ClaimOutcome.DONE


_turn = Turns(1, lasting=True)


def begin(evaluation_id: uuid.UUID, going_down: Callable[[], bool] = lambda: False) -> None:
    """The body of the task PREDICT: see to it that it is done in its turn, beside what trains, and return at once."""

    def has_room() -> bool:
        with transaction() as session:
            return _fits(session, evaluation_id)

    def when_there_is_room() -> None:
        while not going_down() and not has_room():
            time.sleep(ROOM_SECONDS)
        _work(evaluation_id, lambda session: _claim(session, evaluation_id, going_down, gpu_lease.GpuLease()))

    _turn.begin(evaluation_id, when_there_is_room)


def _fits(session: Session, evaluation_id: uuid.UUID) -> bool:
    """Whether its model has room beside the jobs that train here. One that waits no more need not wait for that."""
    spec = evaluations.waiting(session, evaluation_id)
    here = this_machine()
    try:
        taken = residency.room_asked(here.cuda)
    except redis.RedisError:
        return True
    total = (here.gpu_memory_bytes or 0) if here.cuda else here.memory_bytes
    return spec is None or not taken or taken + weight_bytes(spec) <= ROOM_SHARE * total


def weight_bytes(spec: EvaluationSpec) -> int:
    """What its weights take at most, those of fp32."""
    return 4 * spec.model.shape.parameters()


class EvaluationAttempt:
    """One try of an evaluation, from the start of its process to the record of its end. While it runs beside jobs that train, idle
    models make room for it."""

    def __init__(self, held: EvaluationClaim, going_down: Callable[[], bool], lease: gpu_lease.GpuLease) -> None:
        self.held, self.going_down, self.lease = held, going_down, lease
        self.meter, self.tokens = energy.Meter(lease.gpus), TokenMeter()
        self.told = TokenMeter().counts()  # of the child, by its last line
        self.folder: Path = get_settings().data_dir / "evaluations" / str(held.id) / f"a{held.fence}"
        self.progress, self.stage = 0.0, ""
        self.result: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.space = confinement.MountSpace()  # the child's mount namespace
        self.heard_at, self.next_beat = time.monotonic(), 0.0
        self.lost = self.leaving = self.hung = self.ended = False

    def run(self) -> None:
        memory = exit_codes.OomWatch()
        try:
            brought = storing.patiently(lambda: storing.bring_spec(self.held.spec, self._go_on), self._go_on, self._say)
            with places.held(brought, self._go_on):
                code = self._assess()
            if not self.lost:
                self._conclude(code, memory.killed_since())
        except storing.Leaving:
            if not self.lost:
                self._record(lambda session: evaluations.release(session, self.held))
        except BadModel as error:
            integrity.tell(error)
            self._finish(error=error.as_problem())
        except BadData as error:  # rows that are damaged in the object storage
            self._finish(error=error.as_problem())
        except OSError as error:
            failed = exit_codes.of_os_error(error)
            self._finish(error=_error(failed, failed.message))
        finally:
            residency.give_room_back(self.held.id)
            shutil.rmtree(self.folder.parent if self.ended else self.folder, ignore_errors=True)

    def _assess(self) -> int:
        """Start the child and watch it to its end; returns its exit code, negative for a signal."""
        for ref in (self.held.spec.model, self.held.spec.base):
            if ref is not None:
                integrity.check_model(ref, self._beat_when_due)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        spec = self.folder / "spec.json"
        write_atomically(spec, self.held.spec.model_dump_json(indent=1))
        environment = exit_codes.trainer_environment(os.environ, self.folder) | self.lease.environment()
        room = confinement.room_of(self.held.spec, self.folder, environment)
        with (self.folder / "assess.log").open("ab") as out:
            child = child_process.start(
                lambda pipe: confined(assess_command(spec, pipe), room), env=environment, output=out, keeps=self.lease.files
            )
        child.listen(self._hear)
        try:
            self._watch(child)
        finally:
            child.kill_group()
            self.space.end()
            code = child.end()
        return code

    def _watch(self, child: Child) -> None:
        """Beat until the child is gone, or until there is a reason to end it."""
        while child.is_running():
            self._beat_when_due()
            self.space.look(child.pid)
            turn_over(self.folder / "assess.log", LOG_LIMIT_BYTES)
            self.leaving = self.going_down()
            self.hung = time.monotonic() - self.heard_at > MAX_SILENT_SECONDS
            if self.lost or self.leaving or self.hung:
                return
            time.sleep(0.1)

    def _beat_when_due(self) -> None:
        if time.monotonic() >= self.next_beat:
            self.next_beat = time.monotonic() + get_settings().beat_seconds
            residency.ask_room(self.held.id, weight_bytes(self.held.spec), gpus=self.lease.gpus)
            self.lost = not self._beat()

    def _say(self, words: str) -> None:
        self.stage = words

    def _go_on(self) -> None:
        """A heartbeat while what it reads is brought. Raises Leaving."""
        self._beat_when_due()
        if self.lost or self.going_down():
            raise storing.Leaving

    def _beat(self) -> bool:
        try:
            with transaction() as session:
                usage.record_energy(session, self.held.id, self.held.fence, self.meter.joules())
                limits.count_meter(session, Evaluation, self.held.id, self.tokens)
                return evaluations.heartbeat(session, self.held, self.progress, self.stage)
        except SQLAlchemyError as error:
            log.warning("Evaluation %s: no heartbeat: %s", self.held.id, type(error).__name__)
            return True  # the lease decides whether it is still ours once the database is back

    def _hear(self, line: bytes) -> None:
        """Take what the child says off the pipe, one JSON object a line."""
        self.heard_at = time.monotonic()
        try:
            said = json.loads(line)
        except ValueError:
            return  # a kill may cut the last line short
        self.progress, self.stage = said.get("progress", self.progress), said.get("stage", self.stage)
        self.result, self.error = said.get("result", self.result), said.get("error", self.error)
        if "written" in said:
            before, now = self.told, TokenCounts(read=said["read"], written=said["written"], encoded=said["encoded"])
            self.tokens.add(now["read"] - before["read"], now["written"] - before["written"], now["encoded"] - before["encoded"])
            self.told = now

    def _conclude(self, code: int, out_of_memory: bool) -> None:
        held = self.held
        if self.result is not None and code == 0:
            return self._hand_over() if self._graded() else None
        if self.error is not None:
            return self._finish(error=self.error)
        if self.leaving:
            return self._record(lambda session: evaluations.release(session, held))
        if self.hung:
            return self._record(lambda session: evaluations.release(session, held, "Nothing was heard of its process for half an hour."))
        failed = exit_codes.classify(code, exit_codes.tail(self.folder / "assess.log"), out_of_memory)
        message = failed.message.replace("The trainer", "Its process").replace("the trainer", "its process")
        log.error("Evaluation %s: %s", held.id, message)
        if failed.kind in events.TRANSIENT or (failed.kind == "out_of_memory" and held.deaths == 0):
            return self._record(lambda session: evaluations.release(session, held, message))
        return self._finish(error=_error(failed, message))

    def _graded(self) -> bool:
        """Grade the answers where that was ordered. False: the lease was lost, or this worker leaves and another one starts again."""
        assert self.result is not None
        rows, spec = self.result.pop("to_grade", []), self.held.spec
        if not spec.graders:
            return True
        answer = judges.answers(self.held.owner, spec.judges, judges.send_and_wait, self.tokens)
        found = grading.measure([graders.parse(one) for one in spec.graders], rows, answer, self._going)
        if found is not None:
            self.result |= found
        elif not self.lost:
            self._record(lambda session: evaluations.release(session, self.held))
        return found is not None

    def _going(self, share: float) -> bool:
        self.progress, self.stage = share, "Grading the answers"
        self._beat_when_due()
        self.leaving = self.going_down()
        return not (self.lost or self.leaving)

    def _hand_over(self) -> None:
        """Move predictions to their place before they are announced, and delete them when the evaluation is gone."""
        size = 0
        if self.held.spec.kind == "predictions":
            try:
                size = predictions.keep(self.held.id, self.folder, self._beat_when_due)
            except StudioError as fault:
                return self._finish(error=fault.as_problem())
        self._finish(result=self.result, output_bytes=size)
        if self.held.spec.kind == "predictions" and not self.ended:
            self._record(lambda session: predictions.forget_unless_wanted(session, self.held.id))

    def _finish(self, **outcome: Any) -> None:
        """Record how it ended. Only then are the folders of all attempts removed: after a lost lease another attempt is using one."""

        def move(session: Session) -> None:
            self.ended = evaluations.finish(session, self.held, **outcome)

        self._record(move)

    def _record(self, move: Callable[..., Any]) -> None:
        def once() -> None:
            with transaction() as session:
                limits.count_meter(session, Evaluation, self.held.id, self.tokens)
                move(session)

        retry_until_database(once, self.going_down)


def _error(failed: events.Failed, message: str) -> dict[str, Any]:
    """The error as it is stored. An evaluation has no steps to split and no checkpoint to resume, so its hints are its own."""
    hints = {"disk_full": "Make room on the disk of the data folder, then start it again."}
    if failed.kind.endswith("out_of_memory"):
        hints[failed.kind] = "Take a smaller model, shorter rows, or run fewer things at a time."
    return {"code": failed.kind, "message": message, "hint": hints.get(failed.kind, failed.hint)}


def assess_command(spec: Path, write_end: int) -> list[str]:
    return [sys.executable, "-m", "worker.evaluation.process", "--spec", str(spec), "--events-fd", str(write_end)]
