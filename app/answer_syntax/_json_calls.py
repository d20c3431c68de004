"""Tool calls as JSON."""

from __future__ import annotations

import json
from typing import Any

from app.kit.json_safe import too_deep

MAX_CALLS = 64


def read_calls(text: str) -> list[tuple[str, str]]:
    """(name, arguments as JSON text) of each call in the JSON of one call or of a list of them; none in any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if too_deep(value):
        return []
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call is not None][:MAX_CALLS]


class JsonEnd:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self.depth, self.in_text, self.escaped, self.ended = 0, False, False, False

    def find(self, piece: str) -> int:
        """How much of the next piece is part of the object; all of it while the object is not `ended`."""
        for place, character in enumerate(piece):
            if self.escaped:
                self.escaped = False
            elif self.in_text:
                self.escaped, self.in_text = character == "\\", character != '"'
            elif character == '"':
                self.in_text = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    self.ended = True
                    return place + 1
        return len(piece)


def _call(value: Any) -> tuple[str, str] | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if arguments is None:
        return None  # an object that happens to have a name
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
