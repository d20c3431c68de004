"""How models write reasoning and tool calls, and how both are told from the content of an answer. No torch.

The registry of the families of tool calls is the folder: one file per family. `Syntax` says which one a model has, as its worker found
it; `Splitter` divides an answer by it, piece by piece.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from app.answer_syntax._base import NAME, CallForm, Family, ToolCall
from app.answer_syntax._described import Described, calls_of, thought_of
from app.kit.registry import classes_in

__all__ = ["FAMILIES", "NAME", "THOUGHT", "CallForm", "Family", "Syntax", "ToolCall", "family_of", "thought_markers"]

FAMILIES: dict[str, Family] = {
    family.name: family for family in sorted((cls() for cls in classes_in(__name__, Family)), key=lambda family: family.place)
}
"""Every family by name, in the order in which a chat template is looked at."""
THOUGHT = ("<think>", "</think>")
"""The markers that nearly every model that thinks has around its reasoning."""


class Syntax(BaseModel):
    """How the answer to one request is written. `thought` are the markers around reasoning; with `in_thought` the prompt has opened it
    already. `calls` names the family of the tool calls, None where none is looked for; `call_markers` are those of a described one.
    `forced` is the exact form of the calls where a grammar binds the whole answer to them: their arguments are told as they come."""

    model_config = ConfigDict(frozen=True)

    thought: tuple[str, str] | None = None
    in_thought: bool = False
    calls: str | None = None
    call_markers: tuple[str, str] | None = None
    parallel: bool = True
    forced: CallForm | None = None

    @property
    def family(self) -> Family | None:
        if self.calls is None:
            return None
        return Described(*self.call_markers) if self.call_markers else FAMILIES[self.calls]

    @property
    def markers(self) -> list[str]:
        """The markers that may stand in an answer."""
        family = self.family
        found = [*(self.thought or ()), *((family.opens, family.closes, *ARGUMENT_MARKERS) if family else ())]
        return [marker for marker in found if marker]


ARGUMENT_MARKERS = ("[ARGS]",)
"""Markers inside of calls, which some families have as tokens of their own."""


def family_of(template: str, description: Any = None) -> Family | None:
    """The family of the calls that a model writes, by its tokenizer's description or else by its chat template; None for an unknown one."""
    return calls_of(description) or next((family for family in FAMILIES.values() if family.writes(template)), None)


def thought_markers(template: str, description: Any = None) -> tuple[str, str] | None:
    """The markers around a model's reasoning; None for a model that has none."""
    return thought_of(description) or (THOUGHT if any(marker in template for marker in THOUGHT) else None)
