"""How a lesson's rows become steps: packs of an epoch, steps in all, when to evaluate, and how long it should take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from app.machines.hardware import this_machine
from app.objectives import OBJECTIVES
from app.planning.duration import speed_of, work_per_token
from app.planning.memory import pads
from app.planning.rehearsal import ROW_TOKENS
from app.spec import JobSpec
from worker.data.packing import plan, stream, with_general
from worker.modeling import packed_attention
from worker.runtime.device import Compute
from worker.training.objectives._base import TrainingObjective


@dataclass(frozen=True)
class StepPlan:
    """How a lesson's rows become steps."""

    budget: int  # tokens of a pass, at most where it has so many rows
    own: int  # tokens of it that are rows of the dataset; the others are general ones
    packs_per_epoch: int
    total_steps: int
    evaluate_every: int  # steps; total_steps when only the end is evaluated
    save_every: int | None = None  # steps; None saves at every evaluation
    most: int | None = None  # rows that a pack holds at most
    rows: int | None = None  # rows of a pass, where these are counted instead of tokens
    updates: int = 1  # steps on the same packs, one after the other

    def due(self, step: int) -> bool:
        """Whether the held-out rows are scored after this step."""
        return step == self.total_steps or step % self.evaluate_every == 0

    def position(self, step: int) -> int:
        """How many steps' packs have been taken from the epochs after this step."""
        return -(-step // self.updates)

    def packs(self, lesson: TrainingObjective, start: int = 0) -> Iterator[tuple[int, int, list[int]]]:
        """The packs of all epochs from number `start` on, as numbers of the lesson's `step_rows`."""
        run, lengths, share = lesson.spec.run, lesson.train.lengths, lesson.spec.run.rehearsal_fraction
        first = 0 if share else start
        padded = pads(lesson.spec.model.shape, run)
        packs = stream(lengths, self.own, seed=run.seed, start=first, most=self.most, rows=self.rows, padded=padded)
        if not share:
            return packs
        # What a pack gets of the general rows depends on those before it, so a resumed job plans from the beginning.
        every = lesson.step_rows.lengths
        mixed = with_general(packs, every, len(lengths), share, seed=run.seed, room=self.budget, most=self.most)
        return itertools.islice(mixed, start, None)

    def rehearsed(self, lesson: TrainingObjective) -> dict[str, int | float]:
        """How many general rows there are, how often one is played in until the last step, and their share of all tokens."""
        if not lesson.spec.run.rehearsal_fraction:
            return {}
        lengths, own = lesson.step_rows.lengths, len(lesson.train)
        packs = itertools.islice(self.packs(lesson), self.total_steps * lesson.spec.run.passes)
        played = [row for _, _, pack in packs for row in pack]
        general = [lengths[row] for row in played if row >= own]
        share = sum(general) / max(sum(lengths[row] for row in played), 1)
        return {"general_rows": len(lengths) - own, "general_rows_played": len(general), "general_share": round(share, 4)}

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is saved after this step, whatever its score."""
        return self.due(step) if self.save_every is None else step == self.total_steps or step % self.save_every == 0


def course_of(lesson: TrainingObjective, engine: Compute) -> StepPlan:
    """The lesson's packs and steps, counted."""
    run, lengths, share = lesson.spec.run, lesson.train.lengths, lesson.spec.run.rehearsal_fraction
    rows = lesson.rows_per_pass or (run.batch_size and run.batch_size // run.micro_batches)
    own = (
        sum(sorted(lengths)[-rows:])
        if rows and not lesson.draws
        else math.ceil((run.max_tokens_per_step or 0) * (1 - share) / run.micro_batches)
    )
    general = ROW_TOKENS + len(lesson.lead)
    budget = math.ceil(own / (1 - share)) + general if share else own
    per_row = OBJECTIVES[lesson.spec.task].sequences_per_row
    decodes = lesson.spec.model.shape.architecture == "decoder"  # blocks of encoders are not compiled
    if engine.framed and decodes and OBJECTIVES[lesson.spec.task].uniform and run.packing and not rows:
        lesson.frames = packed_attention.frames_of([*lengths, general] if share else lengths, budget, per_row)
    most = lesson.frames[0].max_sequences() // per_row if lesson.frames else None
    packs = len(plan(lengths, own, seed=run.seed, epoch=0, most=most, rows=rows, padded=pads(lesson.spec.model.shape, run)))
    updates = lesson.updates
    total = max(1, math.ceil(run.epochs * packs / run.passes) * updates)
    total = min(total, run.max_steps or total)
    every = (
        max(1, round(packs * updates / run.passes / run.evaluations_per_epoch)) if run.evaluations_per_epoch else run.eval_steps or total
    )
    return StepPlan(budget, own, packs, total, every, run.save_steps, most, rows, updates)


def seconds_expected(spec: JobSpec, course: StepPlan) -> float:
    """How long the training steps will take here, from past speeds or a cautious guess."""
    work = work_per_token(spec, 1.0)
    return course.total_steps * spec.run.passes * course.budget * work / speed_of(spec, this_machine().on(spec.run.device))
