"""Rules that compare many rows: the folder is the registry. One file per rule, one class per file.

A rule sees every valid row in one pass and may keep a little of each; what it can know only at the end it reports then.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from app.datasets.rules._base import Rule, Seen

__all__ = ["RULES", "Rule", "Seen"]


def _scan() -> list[type[Rule]]:
    found: list[type[Rule]] = []
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        full_name = f"{__name__}.{module.name}"
        for value in vars(importlib.import_module(full_name)).values():
            if isinstance(value, type) and issubclass(value, Rule) and value.__module__ == full_name and not inspect.isabstract(value):
                found.append(value)
    return sorted(found, key=lambda rule: rule.__module__)


RULES: list[type[Rule]] = _scan()
"""Every rule of this folder, by file name."""
