"""One optimizer step of a job: its packs laid out and computed by the job's backend. `job` is worker.train.TrainState."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import Any

import torch

from app import events
from worker.data.packing import divide
from worker.runtime.device import Compute
from worker.runtime.progress import ProgressReporter
from worker.training import optim
from worker.training.backends._base import StepBackend, StepBatch
from worker.training.objectives._base import TrainingObjective, body_of
from worker.training.schedule import StepPlan


def take_step(job: Any, batch: StepBatch) -> list[torch.Tensor]:
    """One optimizer step over the packs of `batch`. Returns its loss (nats per trained token), the gradient's norm, and the sums of
    what else the objective measures, still on the device."""
    run, state, backend, strategy = job.spec.run, job.state, job.backend, job.spec.strategy
    job.lesson.before_step(backend.model, batch.batches, batch.learnt, job.engine, backend.world)
    loss, measured, tokens, losses = backend.backward(batch)
    state.step, state.tokens, state.trained_tokens = state.step + 1, state.tokens + tokens, state.trained_tokens + losses
    extra = strategy.regulariser(body_of(backend.model))
    if extra is not None:
        backend.add_loss(extra)
    norm = backend.grad_norm()
    backend.step(optim.learning_rate_at(state.step, job.course.total_steps, job.spec.learning_rate, run), run.max_grad_norm)
    strategy.after_step(body_of(backend.model), state.step)
    job.lesson.after_change()
    backend.zero_grad()
    return [loss, norm, *measured]


def next_batch(job: Any, packs: Iterator[tuple[int, int, list[int]]]) -> Generator[events.TaskProgress, None, StepBatch]:
    """The packs of the next step, this process's share of them sent to the device."""
    if job.state.step % job.course.updates:
        rows = job.lesson.packs_of_answers(job.course.budget)
    else:
        rows = [pack for _, _, pack in itertools.islice(packs, job.spec.run.passes)]
        if job.lesson.draws:
            rows = yield from _drawn(job, rows)
    lengths, parts = job.lesson.pack_lengths, job.backend.parts
    batches = [[job.lesson.batch(part, job.engine) for part in divide(pack, lengths, parts)] for pack in job.world.share(rows)]
    return StepBatch(job.lesson.learnt(rows), batches)


def _drawn(job: Any, rows: list[list[int]]) -> Generator[events.TaskProgress, None, list[list[int]]]:
    """The packs of what the first process draws from the model with its present weights."""
    lesson, found = job.lesson, None
    with job.backend.gathered(job.attempt):
        if job.world.first:
            drawing = lesson.draw(rows, job.state.step, job.model, job.engine, job.course.budget)
            found = yield from ProgressReporter("Drawing and grading answers")(drawing)
    packs: list[list[int]] = lesson.take(job.world.tell(found), job.course.budget)
    return packs


def parts_of(backend: StepBackend, lesson: TrainingObjective, model: torch.nn.Module, engine: Compute, course: StepPlan) -> int:
    """How many parts of a pack are computed by a thread each. One where a pass draws random numbers, as dropout does: parts would draw
    them in whatever order they happen to run in."""
    parts = engine.parts(course.budget) if backend.in_parts else 1
    if parts == 1:
        return 1
    lengths, before = lesson.train.lengths, torch.get_rng_state()
    with torch.no_grad():
        lesson.loss(model, lesson.batch([lengths.index(min(lengths))], engine), engine)
    drawn = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return 1 if drawn else parts
