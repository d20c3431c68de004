"""How a lesson's rows become steps: packs of an epoch, steps in all, when to evaluate, and how long it should take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.machines.hardware import this_machine
from app.objectives import OBJECTIVES
from app.planning.duration import operations_per_token, speed_of
from app.run_settings import RunSettings
from app.spec import JobSpec
from worker.data.packing import plan, stream
from worker.modeling import packed_attention
from worker.runtime.device import Compute
from worker.training.objectives._base import TrainingObjective


@dataclass(frozen=True)
class StepPlan:
    """How a lesson's rows become steps."""

    budget: int  # tokens of a pass, at most where it has so many rows
    packs_per_epoch: int
    total_steps: int
    evaluate_every: int  # steps; total_steps when only the end is evaluated
    save_every: int | None = None  # steps; None saves at every evaluation
    most: int | None = None  # rows that a pack holds at most
    rows: int | None = None  # rows of a pass, where these are counted instead of tokens

    def due(self, step: int) -> bool:
        """Whether the held-out rows are scored after this step."""
        return step == self.total_steps or step % self.evaluate_every == 0

    def packs(self, lengths: Sequence[int], run: RunSettings, start: int) -> Iterator[tuple[int, int, list[int]]]:
        """The packs of all epochs from number `start` on."""
        return stream(lengths, self.budget, seed=run.seed, start=start, most=self.most, rows=self.rows, padded=not run.packing)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is saved after this step, whatever its score."""
        return self.due(step) if self.save_every is None else step == self.total_steps or step % self.save_every == 0


def course_of(lesson: TrainingObjective, engine: Compute) -> StepPlan:
    """The lesson's packs and steps, counted."""
    run, lengths = lesson.spec.run, lesson.train.lengths
    rows = run.batch_size and run.batch_size // run.micro_batches
    budget = sum(sorted(lengths)[-rows:]) if rows else math.ceil((run.max_tokens_per_step or 0) / run.micro_batches)
    if engine.framed and OBJECTIVES[lesson.spec.task].uniform and run.packing and not rows:
        lesson.frames = packed_attention.frames_of(lengths, budget)
    most = lesson.frames[0].max_sequences() if lesson.frames else None
    packs = len(plan(lengths, budget, seed=run.seed, epoch=0, most=most, rows=rows, padded=not run.packing))
    total = max(1, math.ceil(run.epochs * packs / run.passes))
    total = min(total, run.max_steps or total)
    every = max(1, round(packs / run.passes / run.evaluations_per_epoch)) if run.evaluations_per_epoch else run.eval_steps or total
    return StepPlan(budget, packs, total, every, run.save_steps, most, rows)


def seconds_expected(spec: JobSpec, course: StepPlan) -> float:
    """How long the training steps will take here, from past speeds or a cautious guess."""
    work = operations_per_token(spec.model.shape, spec.strategy, 1.0)
    return course.total_steps * spec.run.passes * course.budget * work / speed_of(spec, this_machine().on(spec.run.device))
