"""What is told of an optimizer step, and the watch over a loss that goes wrong. `job` is worker.train.TrainState."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from app import events
from worker.runtime import devices
from worker.runtime.failures import Diverged
from worker.runtime.transfer import AsyncScalars

DIVERGED_STEPS = 15
"""Steps in a row whose loss is far above that of the first ones, after which a job is given up."""


def step_event(job: Any) -> events.Step:
    """The step as far as it is known without waiting for the device."""
    state = job.state
    return events.Step(
        step=state.step,
        epoch=round(state.step * job.spec.run.passes / (job.course.packs_per_epoch * job.course.updates), 4),
        loss=0.0,
        learning_rate=job.backend.optimizer.param_groups[0]["lr"],
        grad_norm=0.0,
        tokens=state.tokens,
        trained_tokens=state.trained_tokens,
        tokens_per_second=0.0,
        memory_bytes=0,
        seconds=0.0,
    )


def report(job: Any, step: events.Step, figures: AsyncScalars) -> events.Step:
    """The finished event of a step. Raises Diverged after several steps in a row without a finite loss."""
    state = job.state
    read = figures.read()
    loss_value, norm_value = read[:2].tolist()
    now = time.perf_counter()
    state.seconds += now - job.lap
    job.lap = now
    job.pace.append((step.tokens, state.seconds))
    state.not_finite = 0 if math.isfinite(loss_value) and math.isfinite(norm_value) else state.not_finite + 1
    if state.not_finite >= (limit := job.backend.max_not_finite):
        raise Diverged(
            f"The loss was not a finite number in {limit} steps in a row, the last being step {step.step}.",
            hint=f"Lower the learning rate to {job.spec.learning_rate / 10:.1g}, or raise the warm-up.",
        )
    watch_divergence(job, step.step, loss_value)
    metrics = job.lesson.name_metrics(read[2:]) if len(read) > 2 else {}
    job.lesson.watch_step(state, metrics)
    return step.model_copy(
        update={
            "loss": loss_value,
            "metrics": metrics,
            "grad_norm": norm_value,
            "tokens_per_second": _speed(job),
            "memory_bytes": devices.of(job.engine.device).peak_memory(job.engine.device),
            "seconds": state.seconds,
        }
    )


def watch_divergence(job: Any, step: int, loss: float) -> None:
    """Stop a job whose loss has left its start far behind: each of the newest steps above twice that of the first ones and a nat more.
    A few hard packs, or new layers that overshoot at first, do not stay there so long. Raises Diverged."""
    state = job.state
    if len(state.first_losses) < 3:
        state.first_losses = [*state.first_losses, loss]
    state.recent_losses = [*state.recent_losses[-DIVERGED_STEPS + 1 :], loss]
    began, now = statistics.median(state.first_losses), min(state.recent_losses)
    if len(state.recent_losses) == DIVERGED_STEPS and now > 2 * abs(began) + 1:
        raise Diverged(
            f"The training loss rose from {began:.3g} and stayed above {now:.3g} until step {step}: the weights move too far at each step.",
            hint=f"Lower the learning rate to {job.spec.learning_rate / 10:.1g}, or raise the warm-up.",
        )


def _speed(job: Any) -> float:
    """Tokens per second over the last steps of this attempt, evaluations left out."""
    (tokens, seconds), (last_tokens, last_seconds) = job.pace[0], job.pace[-1]
    if last_seconds > seconds:
        return (last_tokens - tokens) / (last_seconds - seconds)
    return job.state.tokens / job.state.seconds if job.state.seconds else 0.0
