"""The registry of objectives: the folder itself. A file here says what an objective is; the file of the same name in
`worker/training/objectives/` computes it. Nothing else needs an edit: forms, the API, planning, evaluation and pages read `OBJECTIVES`.

A job's spec and a dataset call an objective by its name in the field `task`.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any, Literal

from app.kit.registry import classes_in
from app.objectives._base import Objective
from app.objectives._drawn import DrawnSettings
from app.objectives._settings import ObjectiveSettings

__all__ = ["DEFAULT", "METHODS", "OBJECTIVES", "SETTINGS", "DrawnSettings", "Objective", "ObjectiveSettings", "Task", "get", "of_rows"]

OBJECTIVES: dict[str, Objective] = {cls.name: cls() for cls in sorted(classes_in(__name__, Objective), key=lambda cls: cls.place)}
"""Every objective by name, in the order lists show them."""
DEFAULT = next(iter(OBJECTIVES))
"""The objective of a request on rows that have not been parsed yet."""
METHODS = tuple(dict.fromkeys(entry.method for entry in OBJECTIVES.values()))
"""Values of `method.type` in the fine-tuning API, each of some objective."""

if TYPE_CHECKING:
    Task = str
    SETTINGS = Any
else:
    Task = Literal[tuple(OBJECTIVES)]
    SETTINGS = functools.reduce(operator.or_, (entry.settings for entry in OBJECTIVES.values() if entry.settings))
"""The name of an objective, and a pydantic union of the objectives' settings."""


def of_rows(task: str | None, format_: str | None) -> list[str]:
    """The objectives that train on rows of a dataset for `task` in this format, its own first."""
    own = get(task).name
    return [own, *(name for name, entry in OBJECTIVES.items() if name != own and format_ in entry.formats)]


def get(task: str | None) -> Objective:
    """An objective by its name; the default one for None, as in a dataset that is still being parsed."""
    return OBJECTIVES[task or DEFAULT]
