"""The registry of dataset formats: the folder itself. One file per format, one class per file.

A *normalised row* is a dict of one of these shapes; it is what the Parquet file of a dataset holds and what the trainer
reads, so nothing after this folder knows which keys a person's file used:

    chat            {"messages": [{"role", "content", "weight"?: 0|1, "name"?, "tool_calls"?}, …], "tools"?: […]}
    instruction     {"messages": [system?, user, assistant]}
    completion      {"prompt": str, "completion": str}
    plain_text      {"text": str}
    preference      {"messages": […], "chosen": [message, …], "rejected": [message, …], "tools"?: […]}
    rated           {"messages": […], "answer": [message, …], "good": bool}
    classification  {"text": str, "label": str}

Any of them may carry "metadata": {column: value} with the columns that no field of the format claimed.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Sequence

from app.errors import BadField
from app.formats._base import Field, Finding, Format, Guess, Row

__all__ = ["FORMATS", "Field", "Finding", "Format", "Guess", "Row", "get", "rank"]


def _scan() -> dict[str, Format]:
    found: dict[str, Format] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        full_name = f"{__name__}.{module.name}"
        for value in vars(importlib.import_module(full_name)).values():
            if isinstance(value, type) and issubclass(value, Format) and value.__module__ == full_name and not inspect.isabstract(value):
                found[value.name] = value()
    return dict(sorted(found.items(), key=lambda item: (item[1].place, item[0])))


FORMATS: dict[str, Format] = _scan()
"""Every format by name, in the order lists show them."""


def get(name: str) -> Format:
    """A format by its name. Raises BadField that lists the names there are."""
    try:
        return FORMATS[name]
    except KeyError:
        raise BadField(f"There is no format “{name[:80]}”.", way_out=f"Choose one of {', '.join(FORMATS)}.", param="format") from None


def rank(rows: Sequence[Row]) -> list[tuple[Format, Guess]]:
    """The formats that fit these rows, best first; the earlier `place` wins a tie."""
    guesses = [(entry, guess) for entry in FORMATS.values() if (guess := entry.recognise(rows)) is not None]
    return sorted(guesses, key=lambda pair: -pair[1].score)
