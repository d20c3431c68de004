"""What a job learns: one file per objective."""

from __future__ import annotations

from typing import Any

from app.spec import JobSpec
from worker.training.objectives._base import Lesson


def lesson_of(spec: JobSpec, tokenizer: Any) -> Lesson:
    """The lesson of an order's task, its data read."""
    if spec.task == "classification":
        from worker.training.objectives.classification import Classifying

        return Classifying(spec, tokenizer)
    if spec.task == "preference":
        from worker.training.objectives.dpo import Preferring

        return Preferring(spec, tokenizer)
    from worker.training.objectives.causal_lm import Writing

    return Writing(spec, tokenizer)
