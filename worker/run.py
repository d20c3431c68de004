"""The training process: `python -m worker.run`. Reads a spec, trains, and reports each event as a line of JSON on a pipe.

Exits: 0 after `finished`, 75 after SIGTERM or at `--pause-at` once the state is saved, 1 after `failed`. SIGUSR1 saves a checkpoint and continues.
It has no database address; its supervisor records its events.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app import events
from app.errors import BadData, DoesNotFit, StudioError
from app.graders import Ask, Reply, no_models
from app.kit import logs, tracing
from app.objectives import OBJECTIVES
from app.settings import get_settings
from app.spec import JobSpec
from worker import kernels
from worker.runtime import attendance
from worker.runtime.failures import OUT_OF_MEMORY, disk_is_full, memory_ran_out, of_gpu, of_peer
from worker.runtime.fast_import import importing
from worker.training.tensorboard import curves

log = logging.getLogger("luthier.trainer")
STOPPED = 75
RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # read before torch is imported


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logs.configure()
    tracing.adopt()
    spec = JobSpec.model_validate_json(Path(options.spec).read_bytes())
    root = get_settings().data_dir
    folder, runs = root / options.folder, root / options.resume_from
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    answer = no_models if options.questions_fd is None else _asker(options.questions_fd, options.answers_fd)
    with os.fdopen(_pipe(options.events_fd), "w", encoding="utf-8", buffering=1) as pipe:
        return attempt(spec, folder, runs, pipe, options.profile, answer, options.pause_at, options.resume_step)


def _asker(questions: int, answers: int) -> Callable[[Ask], Reply]:
    from worker.training.asking import Asker

    return Asker(questions, answers)


def attempt(
    spec: JobSpec, folder: Path, runs: Path, pipe: Any, profile: bool = False, answer: Callable[[Ask], Reply] = no_models,
    pause_at: int | None = None, resume_step: int | None = None,
) -> int:  # fmt: skip
    """One attempt at a job; returns its exit code. Every failure is reported on the pipe before the process ends."""
    asked = _Asked(pause_at, resume_step)
    log.info("training starts: %s", spec.strategy.name)
    step: int | None = None
    started: events.Started | None = None

    def tell(event: events.TrainerEvent) -> None:
        pipe.write(event.model_dump_json() + "\n")

    try:
        if RANK:  # only rank 0 reports
            collections.deque(_events(spec, folder, runs, asked, answer), maxlen=0)
            return STOPPED if asked.stopped else 0
        with curves(folder / "tensorboard", tell) as note:
            told = _events(spec, folder, runs, asked, answer)
            if profile:
                from worker.training.profiler import profiled

                told = profiled(told, spec, folder)
            for event in told:
                tell(event)
                note(event)
                step = getattr(event, "step", step)
                if isinstance(event, events.Started):
                    started = event
                if isinstance(event, events.Finished):
                    calibrate(spec, started, event)
                    return 0
        return STOPPED
    except BrokenPipeError:
        return STOPPED  # nobody reads the pipe any more; the next attempt resumes from the newest checkpoint
    except BaseException as error:
        with contextlib.suppress(OSError):  # the log may be on the very disk that is full
            traceback.print_exc(file=sys.stderr)
        with contextlib.suppress(OSError):
            tell(_named(failed(error, spec, step, folder, started.details.get("longest_row", 0) if started else 0), error))
        return 1


def _pipe(descriptor: int) -> int:
    """The file descriptor to write events to. torchrun closes it in the processes it starts, but holds it open itself."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return descriptor
    return os.open(f"/proc/{os.getppid()}/fd/{descriptor}", os.O_WRONLY)


class _Asked:
    """The signals received so far. Handlers are installed before the slow imports, so that none is lost."""

    def __init__(self, pause_at: int | None = None, resume_step: int | None = None) -> None:
        self.pause_at, self.resume_step = pause_at, resume_step
        self.stop = False
        self.save = False
        self.stopped = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop", True))
        signal.signal(signal.SIGINT, lambda *_: setattr(self, "stop", True))
        signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "save", True))


def _events(spec: JobSpec, folder: Path, runs: Path, asked: _Asked, answer: Callable[[Ask], Reply]) -> Iterator[events.TrainerEvent]:
    with importing():
        from transformers.utils import logging as transformers_logging

        from worker.train import train

    transformers_logging.disable_progress_bar()
    yield from train(spec, folder, runs, asked, answer)  # type: ignore[arg-type]  # it has the fields that matter


# What a failure is called ---------------------------------------------------------------------------------------------


def _recompute(spec: JobSpec, folder: Path | None) -> dict[str, Any] | None:
    """The setting that saves most GPU memory without changing the result, where it was not tried yet. A file in the attempt's folder
    tells the next attempt (`worker/train.py`), which starts by itself (`app/jobs/lifecycle.py`)."""
    setting = spec.run.gradient_checkpointing
    if folder is None or setting == "all" or (setting == "auto" and memory_ran_out(folder.parent)):
        return None
    if setting == "auto":
        try:
            (folder / OUT_OF_MEMORY).touch()
        except OSError:  # a full disk: the next attempt would not know, and run out of memory as this one did
            return None
    return {"gradient_checkpointing": "all"}


def _smaller_passes(spec: JobSpec, longest: int) -> dict[str, Any] | None:
    """The setting that shrinks the largest pass: more passes, or shorter rows where the longest row alone is the largest pass."""
    run, twice = spec.run, spec.run.micro_batches * 2
    if run.batch_size:
        return None if run.batch_size % twice else {"micro_batches": twice}
    return {"max_length": longest // 2} if longest >= (run.max_tokens_per_step or 0) / run.micro_batches else {"micro_batches": twice}


def failed(error: BaseException, spec: JobSpec, step: int | None, folder: Path | None = None, longest: int = 0) -> events.Failed:
    """The failure's class, its hint and, where one setting fixes it, that setting. `folder` is the attempt's; `longest` is the number of
    tokens of the longest row, where the data were read."""
    smaller = _smaller_passes(spec, longest)
    if PROCESSES > 1 and isinstance(error, RuntimeError):
        lost = of_peer(str(error), attendance.waited_for(attendance.read(folder), PROCESSES) if folder else "")
        if lost is not None:
            return lost.model_copy(update={"step": step})
    if isinstance(error, RuntimeError) and (fault := of_gpu(f"{type(error).__name__}: {error}")) is not None:  # torch's are all of these
        suggestion = (_recompute(spec, folder) or smaller) if fault.kind == "cuda_out_of_memory" else None
        return fault.model_copy(update={"step": step, "suggestion": suggestion})
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        message, hint = "The machine ran out of memory.", "Split each batch over more passes (micro_batches), or cut the rows shorter."
        return events.Failed(kind="out_of_memory", message=message, hint=hint, step=step, suggestion=smaller)
    if disk_is_full(error):
        message, hint = "The disk of the data folder is full.", "Free some space and resume; the newest checkpoint is whole."
        return events.Failed(kind="disk_full", message=message, hint=hint, step=step)
    if isinstance(error, StudioError):
        return _of_studio(error, spec, step)
    message = f"{type(error).__name__}: {error}"[:2000]
    return events.Failed(kind="crashed", message=message, hint="Look at the attempt's log; if you see no reason, report it.", step=step)


def _named(fault: events.Failed, error: BaseException) -> events.Failed:
    """The failure with the process that it happened to, where there are several and it did not happen to all of them."""
    alike = isinstance(error, StudioError) or fault.kind == "worker_lost"
    return fault if PROCESSES == 1 or alike else fault.model_copy(update={"message": f"Process {RANK} of {PROCESSES}: {fault.message}"})


def _of_studio(error: StudioError, spec: JobSpec, step: int | None) -> events.Failed:
    line, suggestion = getattr(error, "line", None), None
    kind: events.FailureKind = "crashed"
    if error.code == "diverged":
        kind = "diverged"
        suggestion = {"learning_rate": spec.learning_rate / 10}
    elif error.code == "model_away":
        kind = "model_away"
    elif error.code == "bad_model" or isinstance(error, DoesNotFit):
        kind = "bad_model"
    elif isinstance(error, BadData):
        kind = "bad_data"
    message = f"Line {line}: {error.message}" if line is not None else error.message
    return events.Failed(kind=kind, message=message, hint=error.hint, step=step, line=line, suggestion=suggestion)


# Beside the pipe ------------------------------------------------------------------------------------------------------


MIN_TOKENS = 500
"""Fewer tokens say little about a machine's speed: the first steps are slow."""


def calibrate(spec: JobSpec, started: events.Started | None, finished: events.Finished) -> None:
    """Keep how fast this machine was, so that the next estimate is better. A frozen model only reads; where its vectors were
    kept from an earlier job it read nothing, and there is nothing to learn from that. The job is finished, whatever goes wrong here."""
    # A plain job is no measure for others, nor one that may have written general answers before its first step.
    if kernels.allowed() and not spec.run.rehearsal_fraction:
        with contextlib.suppress(Exception):
            _calibrate(spec, started, finished)


def _calibrate(spec: JobSpec, started: events.Started | None, finished: events.Finished) -> None:
    from app.machines import hardware
    from app.planning import duration

    measured, shape = finished.measured, spec.model.shape
    if started is None or started.resumed_from is not None or measured.tokens < MIN_TOKENS or not measured.tokens_per_second:
        return
    share = 0.0 if OBJECTIVES[spec.task].heads else measured.trained_tokens / measured.tokens
    recomputed = int(started.details.get("recomputed_layers", 0)) / shape.layers
    features = type(spec.strategy).recipe == "features"
    work = duration.forward_operations(shape, 0.0) if features else duration.work_per_token(spec, share, recomputed)
    speed = measured.tokens_per_second * work
    course = duration.Workload(
        train=started.train_tokens,
        held_out=started.train_tokens / max(started.train_rows, 1) * started.validation_rows,
        longest=0,
        tokens=measured.tokens,
        own=measured.tokens,
        steps=measured.steps,
        trained_share=share,
        rows=started.train_rows,
        labels=len(finished.labels or ()),
    )
    pace = duration.pace_from(spec, course, speed, recomputed, measured.seconds, started.seconds_to_load)
    if pace is not None:  # a job that found part of its embeddings cached says nothing
        hardware.calibrate(duration.work_of(spec, started.precision), pace, spec.run.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.run", description="Train one attempt of a job.")
    parser.add_argument("--spec", required=True, help="file with the specification as JSON")
    parser.add_argument("--folder", required=True, help="the attempt's folder, relative to the data folder")
    parser.add_argument("--resume-from", required=True, help="the job's folder; the newest whole checkpoint in it is gone on from")
    parser.add_argument("--events-fd", required=True, type=int, help="open file descriptor that takes one event per line")
    parser.add_argument("--questions-fd", type=int, help="open file descriptor that takes one question of a grader to a model per line")
    parser.add_argument("--answers-fd", type=int, help="open file descriptor from which the answers come")
    parser.add_argument("--pause-at", type=int, help="step after which the state is saved and the process ends, as after SIGTERM")
    parser.add_argument("--resume-step", type=int, help="the step of the checkpoint that all machines of a job go on from; 0 for none")
    parser.add_argument("--profile", action="store_true", help="record a few steps: a trace and a summary in the attempt's folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
