"""One optimizer step of a job: its packs laid out, passed forwards and backwards, and the weights moved. `job` is
worker.train.TrainState."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from worker.data.packing import divide
from worker.kernels.cpu import full_tuning, gradient_buffers
from worker.runtime import distributed
from worker.runtime.device import Compute
from worker.training import optim
from worker.training.objectives._base import LossOutput, Objective, body_of
from worker.training.schedule import Schedule


class StepBatch(NamedTuple):
    """What one optimizer step reads."""

    learnt: int  # over how many losses the step is averaged, in all processes
    batches: list[list[Any]]  # by pack, this process's own: what the lesson made of each part of it


def parts_of(lesson: Objective, model: torch.nn.Module, engine: Compute, course: Schedule) -> int:
    """How many parts of a pack are computed side by side. One where weights are shared out to processes, or where a pass draws random
    numbers, as dropout does: parts would draw them in whatever order they happen to run in."""
    parts = engine.parts(course.budget)
    if parts == 1 or distributed.spreads(lesson.spec.strategy):
        return 1
    lengths, before = lesson.train.lengths, torch.get_rng_state()
    with torch.no_grad():
        lesson.loss(model, lesson.batch([lengths.index(min(lengths))], engine), engine)
    drawn = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return 1 if drawn else parts


def next_window(job: Any, packs: Iterator[tuple[int, int, list[int]]]) -> StepBatch:
    """The packs of the next step, this process's share of them sent to the device."""
    rows = [pack for _, _, pack in itertools.islice(packs, job.spec.run.passes)]
    lengths = job.lesson.train.lengths
    batches = [[job.lesson.batch(part, job.engine) for part in divide(pack, lengths, job.parts)] for pack in job.world.share(rows)]
    return StepBatch(job.lesson.learnt(rows), batches)


def _pass(job: Any, learnt: int, batch: Any) -> tuple[LossOutput, Sequence[torch.Tensor | None]]:
    """One part of a pack forwards and backwards: its share of the step's loss, and where `job.apart` its gradients."""
    found = job.lesson.loss(job.model, batch, job.engine)
    loss = found.loss / learnt
    if job.scale:
        job.scale.times(loss).backward()
        gradients: Sequence[torch.Tensor | None] = ()
    elif job.apart:
        gradients = torch.autograd.grad(loss, list(job.trained.values()), allow_unused=True)
    else:
        loss.backward()
        gradients = ()
    return found._replace(loss=loss.detach()), gradients


def _add(job: Any, gradients: Sequence[torch.Tensor | None]) -> None:
    """Add a part's gradients to those of the parts before it."""
    pairs = [(p, g) for p, g in zip(job.trained.values(), gradients, strict=False) if g is not None]
    first, later = ([(p, g) for p, g in pairs if (p.grad is None) == new] for new in (True, False))
    for parameter, _ in first:
        parameter.grad = torch.empty_like(parameter)  # the fused optimizer takes both to lie alike in memory
    for add, some in ((torch._foreach_copy_, first), (torch._foreach_add_, later)):
        if some:
            add([p.grad for p, _ in some], [g for _, g in some])


def take_step(job: Any, window: StepBatch) -> list[torch.Tensor]:
    """One optimizer step over the packs of `window`. Returns its loss (nats per trained token), the gradient's length, and the sums
    of what else the lesson measures, still on the device."""
    run, state, device, abreast = job.spec.run, job.state, job.engine.device, job.engine.abreast
    total = torch.zeros((), device=device)
    measured = [torch.zeros(job.lesson.measures, dtype=torch.float64, device=device)] if job.lesson.measures else []
    tokens_here, trained_here = 0, 0
    for parts in window.batches:
        for found, gradients in abreast.map(functools.partial(_pass, job, window.learnt), parts):
            _add(job, gradients)
            total += found.loss
            tokens_here, trained_here = tokens_here + found.tokens, trained_here + found.losses
            for sums in measured:
                sums += found.measured
        full_tuning.add_parts(job.wholes)
    if job.shards:
        job.shards.collect()
    else:
        job.world.sum_gradients(job.trained.values())
    job.world.sum_([total, *measured])
    tokens, trained = job.world.count(tokens_here, trained_here)
    state.step, state.tokens, state.trained_tokens = state.step + 1, state.tokens + tokens, state.trained_tokens + trained
    if job.scale:
        job.scale.undo(job.trained.values())
    extra = job.spec.strategy.regulariser(body_of(job.model))
    if extra is not None:
        extra.backward()
        full_tuning.add_parts(job.wholes)
    apart = gradient_buffers.shares(job.wholes, abreast.threads)
    beside = job.factors.squares() if job.factors else 0.0
    norm = optim.clip_grad_norm(
        job.trained, run.max_grad_norm, job.shards.length() if job.shards else None, gradient_buffers.squares(apart, abreast) + beside
    )
    if job.scale:
        job.scale.adapt(norm)
    rate = optim.learning_rate_at(state.step, job.course.total_steps, job.spec.learning_rate, run)
    optim.set_rate(job.optimizer, rate)
    optim.optimizer_step(job.optimizer, norm + total)
    if job.wholes:
        full_tuning.move(job.wholes, abreast)
        if math.isfinite(norm + total):
            gradient_buffers.move(apart, abreast, job.optimizer, optim.clip_coefficient(norm, run.max_grad_norm))
        gradient_buffers.leave(job.wholes)
    if job.factors and math.isfinite(norm + total):
        job.factors.move(optim.clip_coefficient(norm, run.max_grad_norm))
    job.spec.strategy.after_step(body_of(job.model), state.step)
    job.optimizer.zero_grad(set_to_none=True)
    return [total, norm, *measured]
