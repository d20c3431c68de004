"""A tokenizer's own description of answers (`response_template` of transformers 5), as far as it is literal markers around JSON.

Its patterns are regular expressions of the model's author, which could take any time, so none is ever run: one that is a literal with
`\\s*` at its ends is read as that literal, and a description with any other is left to the families.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from app.answer_syntax.hermes import Hermes

MAX_MARKER = 64
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_SPECIAL = re.compile(r"(?<!\\)[.^$*+?()\[\]{}|]")
_WHOLE_CALL = "{content}"
_CALL_OF_PARTS = {"name": "{content.name}", "arguments": "{content.arguments}"}


class Described(Hermes):
    """Calls as JSON between the two markers of a description."""

    name: ClassVar = "described"

    def __init__(self, opens: str, closes: str) -> None:
        self.opens, self.closes = opens, closes

    def writes(self, template: str) -> bool:
        return False


def fields_of(description: Any) -> dict[str, Any]:
    fields = description.get("fields") if isinstance(description, dict) else None
    return {k: v for k, v in fields.items() if isinstance(v, dict)} if isinstance(fields, dict) else {}


def thought_of(description: Any) -> tuple[str, str] | None:
    """The markers around reasoning; None where the description has none that can be read."""
    fields = fields_of(description)
    field: dict[str, Any] = next((fields[name] for name in _THOUGHTS if name in fields), {})
    opens, closes = _marker(field, "open"), _marker(field, "close")
    return (opens, closes) if opens and closes else None


def calls_of(description: Any) -> Described | None:
    """The family of the calls; None where the description has none that can be read."""
    field = fields_of(description).get("tool_calls", {})
    opens, closes = _marker(field, "open"), _marker(field, "close")
    made = field.get("transform")
    function = made.get("function") if isinstance(made, dict) else None
    if not opens or not closes or field.get("content") != "json" or field.get("content_args"):
        return None
    return Described(opens, closes) if function in (_WHOLE_CALL, _CALL_OF_PARTS) else None


def _marker(field: dict[str, Any], end: str) -> str | None:
    literal, pattern = field.get(end), field.get(f"{end}_pattern")
    if isinstance(literal, str):
        return literal if 0 < len(literal) <= MAX_MARKER else None
    if not isinstance(pattern, str) or len(pattern) > 2 * MAX_MARKER:
        return None
    bare = pattern.removeprefix(r"\s*").removesuffix(r"\s*")
    if _SPECIAL.search(bare) or re.search(r"\\[A-Za-z0-9]", bare):
        return None
    return re.sub(r"\\(.)", r"\1", bare)[:MAX_MARKER] or None
