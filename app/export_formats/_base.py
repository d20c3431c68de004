"""What an export format says of itself before anything is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from app.errors import BadField
from app.languages import gettext
from app.shapes import Shape

PART = ".part"
"""What the name of a file ends with while it is written."""


class ModelFacts(NamedTuple):
    """What is known of a model without opening its weights. `strategies` are the adapters on the way from the base, in order;
    `unmergeable` is the title of the first of them that cannot be merged into the weights; `peft` says that the last has the layout of
    the peft library, `new_tokens` that an adapter added tokens."""

    name: str
    kind: str
    shape: Shape
    labels: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    unmergeable: str | None = None
    peft: bool = False
    new_tokens: bool = False


class ExportFormat(ABC):
    """One format: its name in the API, its title, and the types that its files can have; the first is written where none is named."""

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    types: ClassVar[tuple[str, ...]]
    place: ClassVar[int] = 100
    """Where it is on the page: lower is earlier."""
    merged: ClassVar[bool] = True
    """Whether it is written from the weights with every adapter merged; otherwise from the model's own folder."""
    weighted: ClassVar[tuple[str, ...]] = ()
    """Types that are quantized by an importance matrix, where the rows are there that the model was trained on."""
    proves: ClassVar[bool] = False
    """Whether the written files are run in the program they are for and compared with the studio's model."""

    @abstractmethod
    def accepts(self, facts: ModelFacts) -> str | None:
        """None, or why this model cannot be written in this format: a sentence."""

    @abstractmethod
    def bytes_of(self, facts: ModelFacts, types: Sequence[str]) -> int:
        """About how many bytes the files take, so that a disk too full for them is noticed before the start."""

    def chosen(self, types: Sequence[str] | None) -> list[str]:
        """The types that were asked for, each once, in the order of `types`. Raises BadField."""
        wanted = set(types or self.types[:1])
        if unknown := sorted(wanted - set(self.types)):
            said = gettext("%(format)s has no type “%(type)s”.", format=gettext(self.title), type=unknown[0][:40])
            raise BadField(said, hint=gettext("Use some of %(types)s.", types=", ".join(self.types)), param="types")
        return [name for name in self.types if name in wanted]


def tokens_apart(facts: ModelFacts, program: str) -> str | None:
    """Why an adapter that added tokens cannot be written without its base."""
    if facts.new_tokens:
        return gettext(
            "It has new tokens, whose rows %(program)s would not read next to an adapter. Choose a format that merges it.", program=program
        )
    return None


def needs_merging(facts: ModelFacts) -> str | None:
    """Why a model whose adapters stay apart cannot be written as plain weights."""
    if facts.unmergeable:
        method = gettext(facts.unmergeable)
        return gettext("It was fine-tuned with %(method)s, which cannot be merged into the weights.", method=method)
    return None
