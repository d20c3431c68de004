"""What the families of tool calls have in common: markers around a call, how it is read, and the form in which it is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from app.answer_syntax._json_calls import read_calls


class ToolCall(NamedTuple):
    """One call: the function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class CallForm(NamedTuple):
    """The text of calls, for constrained decoding: `first`, then the calls with `between` them, then `last`. A call is `before` with
    the function's name in place of NAME, the arguments as JSON, and `after`. `between` is None where an answer holds one call."""

    before: str
    after: str
    between: str | None
    first: str = ""
    last: str = ""


NAME = "%NAME%"


class Family(ABC):
    """One way in which models write tool calls. `opens` is the marker before calls, and `closes` the one after them, or None where they
    go on to the next `opens` or to the end. With `bare` an answer that begins with { may be calls without any marker."""

    name: ClassVar[str]
    place: ClassVar[int]
    bare: ClassVar[bool] = False
    elements: ClassVar[bool] = False
    """Whether each argument is an element of its own and not all of them JSON."""
    opens: str
    closes: str | None = None

    @abstractmethod
    def writes(self, template: str) -> bool:
        """Whether a model with this chat template writes its calls so."""

    @abstractmethod
    def form(self, template: str) -> CallForm:
        """How calls are written under this chat template."""

    def read(self, text: str, tools: Sequence[Mapping[str, Any]] = ()) -> list[ToolCall]:
        """The calls in what is between the markers; none where it cannot be read. `tools` are those of the request, whose schemas say
        the types of arguments that are written without."""
        return [ToolCall(*call) for call in read_calls(text)]

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the family's chat templates take them."""
        return list(messages)


def parameters_of(tools: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The schema of a function's parameters; empty for one that is not among the tools."""
    found: Mapping[str, Any] = next((tool["function"] for tool in tools if tool["function"]["name"] == name), {})
    return found.get("parameters") or {}


def _types_of(schema: Any) -> set[str]:
    """The types that a schema names, in its unions too; none where it names none."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    found = {named} if isinstance(named, str) else {one for one in named if isinstance(one, str)} if isinstance(named, list) else set()
    branches = [branch for union in ("anyOf", "oneOf") for branch in schema.get(union) or []]
    return found.union(*map(_types_of, branches))


def is_text(schema: Any) -> bool:
    """Whether a value of a schema is written as it is and not as JSON: a string, or one whose type is not known."""
    types, schema = _types_of(schema), schema if isinstance(schema, Mapping) else {}
    given = [*(schema.get("enum") or []), *([schema["const"]] if "const" in schema else [])]
    return "string" in types if types else "$ref" not in schema and all(isinstance(one, str) for one in given)
