"""What came of a job: base and result measured on the same rows and the same general texts, one model at a time.

Everything here draws no random number and changes nothing in what was learnt. It comes last, so that training starts at once.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import torch

from app import events
from app.spec import ModelRef
from worker.modeling import fused_layers
from worker.runtime.device import release
from worker.runtime.progress import ProgressReporter
from worker.scoring import forgetting
from worker.training import row_losses
from worker.training.objectives._base import Loader


class FinalScores(NamedTuple):
    forgetting: dict[str, Any] | None
    evaluation: dict[str, Any]


def compare(job: Any, result: ModelRef) -> Generator[events.Log | events.TaskProgress, None, FinalScores]:
    """Measure the result, let go of it, and measure the model before tuning. `job` is worker.train.TrainState; its backend is
    gone afterwards, and the model with it. `result` is the model as evaluations will name it. The shares it tells are what scoring every
    training row twice takes, the only part that is ever long."""
    lesson, state, engine, run, budget = job.lesson, job.state, job.engine, job.spec.run, job.course.budget
    yield events.Log(message=f"Comparing the result with {job.spec.model.name} as it was.")
    telling = ProgressReporter("Comparing base and result")
    yield events.TaskProgress(what=telling.what, share=0.0)
    examined = yield from telling(lesson.examine(job.model, state, budget, engine), 0.0, 0.05)
    losses = (yield from telling(lesson.row_losses(job.model, budget, engine), 0.05, 0.45)) if run.row_losses else []
    known = forgetting.without_measuring(job.spec, len(lesson.labels or ())) if run.forgetting else None
    writer = lesson.writer(job.model) if run.forgetting and known is None else None
    texts = forgetting.scores(job.spec, writer, lesson.tokenizer, budget, engine, lesson.lead) if writer is not None else None
    del writer
    job.backend = None  # its memory is needed
    release(engine.device)

    base = _loader(job)
    yield events.TaskProgress(what=telling.what, share=0.5)
    if losses:
        before_tuning = yield from telling(lesson.row_losses_before(base, budget, engine), 0.5, 0.9)
        parts = [row_losses.LossPart(lesson.train, before_tuning, losses)]
        if job.spec.validation is None:  # else they are rows of another dataset
            parts.append(row_losses.LossPart(lesson.held_out, state.base_rows, state.best_rows or state.last_rows, held_out=True))
        row_losses.write(job.attempt, parts)
    lost = known
    if texts:
        bits = type(job.spec.strategy).base_bits
        cache = forgetting.ProbeCache(job.spec.model, lesson.tokenizer, engine, run.new_tokens, bits)
        forgetting.ProbeCache(result, lesson.tokenizer, engine, bits=bits).keep(texts)
        before = cache.read() or cache.keep(forgetting.scores(job.spec, lesson.writer(base()), lesson.tokenizer, budget, engine))
        lost = forgetting.compared(before, texts)
    yield events.TaskProgress(what=telling.what, share=0.95)
    evaluation = lesson.evaluation(state, examined, base, budget, engine)
    if evaluation:
        evaluation["steps"] = state.step
        evaluation["curve"] = [[step, loss] for step, loss in state.curve]
    return FinalScores(lost, evaluation)


def _loader(job: Any) -> Loader:
    """Loads the model before tuning once, when somebody asks for it."""
    loaded: list[torch.nn.Module] = []

    def load() -> torch.nn.Module:
        if not loaded:
            model = job.lesson.load(job.engine)
            job.spec.strategy.initialize(model, job.spec.run.seed)
            fused_layers.patch_layers(model, job.engine.device)
            loaded.append(model)
        return loaded[0]

    return load
