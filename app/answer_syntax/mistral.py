"""`[TOOL_CALLS]` and a list of calls, or in newer models `[TOOL_CALLS]name[ARGS]{…}` for each call: Mistral, Mixtral, Ministral."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from app.answer_syntax._base import NAME, CallForm, Family, ToolCall

_CALL = re.compile(r"\s*([a-zA-Z0-9_.-]{1,128})\s*(?:\[ARGS\])?\s*(?=\{)")
_ID = re.compile(r"[a-zA-Z0-9]{9}")


class Mistral(Family):
    name: ClassVar = "mistral"
    place: ClassVar = 20
    opens = "[TOOL_CALLS]"

    def writes(self, template: str) -> bool:
        return self.opens in template

    def form(self, template: str) -> CallForm:
        if "[ARGS]" in template:
            return CallForm(f"{self.opens}{NAME}[ARGS]", "", between="")
        return CallForm(f'{{"name": "{NAME}", "arguments": ', "}", between=", ", first=f"{self.opens} [", last="]")

    def read(self, text: str, tools: Sequence[Mapping[str, Any]] = ()) -> list[ToolCall]:
        named = _CALL.match(text)
        if named is None:
            return super().read(text)
        try:
            arguments = json.loads(text[named.end() :])
        except (ValueError, RecursionError):
            return []
        return [ToolCall(named[1], json.dumps(arguments, ensure_ascii=False))]

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Its templates take ids of nine letters and digits alone; any other becomes nine of its hash."""
        return [_with_short_ids(message) for message in messages]


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    found = dict(message)
    if isinstance(found.get("tool_call_id"), str):
        found["tool_call_id"] = _short(found["tool_call_id"])
    if found.get("tool_calls"):
        found["tool_calls"] = [
            call | {"id": _short(call["id"])} if isinstance(call.get("id"), str) else call for call in found["tool_calls"]
        ]
    return found


def _short(name: str) -> str:
    return name if _ID.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()[:9]
