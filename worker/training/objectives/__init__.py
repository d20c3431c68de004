"""What a job learns: the folder is the registry. A file here computes what the file of the same name in `app/objectives/` describes."""

from __future__ import annotations

import importlib
from typing import Any

from app.kit.registry import classes_in_module
from app.objectives import OBJECTIVES
from app.spec import JobSpec
from worker.training.objectives._base import TrainingObjective


def class_of(task: str) -> type[TrainingObjective]:
    """The class that computes an objective. Its file is imported only now: a job needs one of them."""
    name = type(OBJECTIVES[task]).__module__.rpartition(".")[2]
    found: type[TrainingObjective]
    (found,) = classes_in_module(importlib.import_module(f"{__name__}.{name}"), TrainingObjective)
    return found


def objective_of(spec: JobSpec, tokenizer: Any) -> TrainingObjective:
    """The objective of an order, its data read."""
    return class_of(spec.task)(spec, tokenizer)
