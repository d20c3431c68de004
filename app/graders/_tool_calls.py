"""Tool calls in the text of an answer."""

from __future__ import annotations

import json
import re
from typing import Any

from app.kit.json_safe import too_deep

JSON = dict[str, Any]
MAX_CALLS = 64
_MARKED = re.compile(r"<tool_call>([^<]*(?:<(?!/?tool_call>)[^<]*)*)</tool_call>")


def calls_in(text: str) -> list[JSON]:
    """Tool calls as the API sends them: of `<tool_call>{…}</tool_call>`, or of an answer that is nothing but the JSON of one call or
    of several. An answer without any has none."""
    if marked := _MARKED.findall(text):
        found = [call for part in marked[:MAX_CALLS] for call in _read(part)]
    else:
        found = _read(text) if text.lstrip()[:1] in ("{", "[") else []
    return [
        {"id": f"call_{place}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for place, (name, arguments) in enumerate(found[:MAX_CALLS])
    ]


def _read(text: str) -> list[tuple[str, str]]:
    """(name, arguments as JSON text) of each call."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if too_deep(value):
        return []
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call is not None]


def _call(value: Any) -> tuple[str, str] | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if arguments is None:
        return None  # an object that happens to have a name
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
