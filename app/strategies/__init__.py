"""The registry of strategies: the folder itself. A file here that defines a `Strategy` is a strategy, and nothing else needs to
change: the form, the API, the advisor, the guide and the tests all read `STRATEGIES`.

Files that begin with an underscore hold what several strategies share.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from app.kit.registry import classes_in
from app.strategies._base import UNNAMED, Memory, Strategy

__all__ = ["STRATEGIES", "UNNAMED", "AnyStrategy", "Memory", "Strategy"]


_found = {cls.model_fields["name"].default: cls for cls in classes_in(__name__, Strategy)}
STRATEGIES: dict[str, type[Strategy]] = dict(sorted(_found.items(), key=lambda item: (item[1].place, item[0])))
"""Every strategy by name, in the order the form shows them."""

if TYPE_CHECKING:
    AnyStrategy = Strategy
else:
    AnyStrategy = Annotated[functools.reduce(operator.or_, STRATEGIES.values()), Field(discriminator="name")]
"""A pydantic union over the registry, discriminated by `name`."""
