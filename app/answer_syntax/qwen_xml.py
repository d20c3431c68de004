"""`<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`: Qwen 3 Coder and Qwen 3.5."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from app.answer_syntax._base import NAME, CallForm, Family, ToolCall, is_text, parameters_of

_FUNCTION = re.compile(r"\s*<function=([^<>\n]{1,128})>")
_KEY = re.compile(r"([^<>\n]{1,256})>")
_OPENS, _CLOSES, _END = "<parameter=", "</parameter>", "</function>"


class QwenXml(Family):
    name: ClassVar = "qwen_xml"
    place: ClassVar = 15
    elements: ClassVar = True
    opens = "<tool_call>"
    closes: str | None = "</tool_call>"

    def writes(self, template: str) -> bool:
        return self.opens in template and "<function=" in template

    def form(self, template: str) -> CallForm:
        return CallForm(f"{self.opens}\n<function={NAME}>\n", f"{_END}\n{self.closes}", between="\n")

    def read(self, text: str, tools: Sequence[Mapping[str, Any]] = ()) -> list[ToolCall]:
        named = _FUNCTION.match(text)
        if named is None or _END not in text:
            return []
        elements = text[named.end() : text.rindex(_END)].split(_OPENS)
        properties = parameters_of(tools, named[1]).get("properties") or {}
        arguments: dict[str, Any] = {}
        for element in elements[1:]:
            key, closed = _KEY.match(element), element.find(_CLOSES)
            if key is None or closed < 0:
                return []
            value = element[key.end() : closed].removeprefix("\n").removesuffix("\n")
            arguments[key[1]] = _typed(value, properties.get(key[1]))
        return [] if elements[0].strip() else [ToolCall(named[1], json.dumps(arguments, ensure_ascii=False))]


def _typed(value: str, schema: Any) -> Any:
    """The value that a text stands for under its schema: the text itself where that is no JSON."""
    if is_text(schema):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
