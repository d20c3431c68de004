"""The base class of an objective's own settings: the field `preference` of a spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from app.languages import mark

LABELS = (
    mark("Answer tokens"), mark("Beta"), mark("Centering"), mark("Check prompts"), mark("Clip high"), mark("Clip low"), mark("Divergence"),
    mark("Gamma"), mark("Grader"), mark("Group size"), mark("Label smoothing"), mark("Loss"), mark("Max turns"), mark("Prompts per step"),
    mark("Teacher"), mark("Updates per batch"), mark("Variant"),
)  # fmt: skip
"""What `app.kit.forms.label_of` makes of the names of settings that have no title, for the catalogs."""


class ObjectiveSettings(BaseModel):
    """Settings of one objective. The descriptions are the help of the form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    derived: ClassVar[tuple[str, ...]] = ()  # settings whose default depends on another one; the form leaves them empty

    def unused(self) -> tuple[str, ...]:
        """Its settings that have no effect with the values of its others."""
        return ()

    def usual(self) -> Mapping[str, Any]:
        """The defaults of the `derived` settings that have an effect."""
        return {}

    def chosen(self) -> dict[str, Any]:
        """The settings without the `derived` ones that are at their default."""
        usual = type(self).model_validate(self.model_dump(exclude=set(self.derived)))
        return {name: value for name, value in self if name not in self.derived or value != getattr(usual, name)}
