"""`{"name": …, "parameters": {…}}` as the whole answer, with or without `<|python_tag|>` before it: Llama 3.1 to 3.3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from json import JSONDecoder
from typing import Any, ClassVar

from app.answer_syntax._base import NAME, CallForm, Family, ToolCall

_decoder = JSONDecoder()


class Llama3(Family):
    name: ClassVar = "llama3"
    place: ClassVar = 30
    bare: ClassVar = True
    opens = "<|python_tag|>"

    def writes(self, template: str) -> bool:
        return "<|start_header_id|>" in template and '"parameters"' in template.replace("\\", "")

    def form(self, template: str) -> CallForm:
        return CallForm(f'{{"name": "{NAME}", "parameters": ', "}", between=None)

    def read(self, text: str, tools: Sequence[Mapping[str, Any]] = ()) -> list[ToolCall]:
        """Several calls may stand with a semicolon between them."""
        found: list[ToolCall] = []
        rest = text.strip()
        while rest:
            try:
                end = _decoder.raw_decode(rest)[1]
            except (ValueError, RecursionError):
                return []
            calls = super().read(rest[:end])
            if not calls:
                return []
            found, rest = found + calls, rest[end:].strip().removeprefix(";").strip()
        return found
