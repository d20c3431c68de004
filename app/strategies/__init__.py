"""The registry of strategies: the folder itself. A file here that defines a `Strategy` is a strategy, and nothing else needs to
change: the form, the API, the advisor, the guide and the tests all read `STRATEGIES`.

Files that begin with an underscore hold what several strategies share.
"""

from __future__ import annotations

import functools
import importlib
import operator
import pkgutil
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from app.strategies._base import UNNAMED, Memory, Strategy

__all__ = ["STRATEGIES", "UNNAMED", "AnyStrategy", "Memory", "Strategy"]


def _scan() -> dict[str, type[Strategy]]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Strategy) and value.__module__ == f"{__name__}.{module.name}":
                found[value.model_fields["name"].default] = value
    return dict(sorted(found.items(), key=lambda item: (item[1].place, item[0])))


STRATEGIES: dict[str, type[Strategy]] = _scan()
"""Every strategy by name, in the order the form shows them."""

if TYPE_CHECKING:
    AnyStrategy = Strategy
else:
    AnyStrategy = Annotated[functools.reduce(operator.or_, STRATEGIES.values()), Field(discriminator="name")]
"""A pydantic union over the registry, discriminated by `name`."""
