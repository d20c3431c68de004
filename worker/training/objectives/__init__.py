"""What a job learns: one file per objective."""

from __future__ import annotations

from typing import Any

from app.spec import JobSpec
from worker.training.objectives._base import Objective


def objective_of(spec: JobSpec, tokenizer: Any) -> Objective:
    """The lesson of an order's task, its data read."""
    if spec.task == "classification":
        from worker.training.objectives.classification import SequenceClassification

        return SequenceClassification(spec, tokenizer)
    if spec.task == "preference":
        from worker.training.objectives.dpo import DPO

        return DPO(spec, tokenizer)
    from worker.training.objectives.causal_lm import CausalLM

    return CausalLM(spec, tokenizer)
