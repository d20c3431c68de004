"""Tool calls in the text of an answer."""

from __future__ import annotations

import re
from typing import Any

from app.answer_syntax._json_calls import MAX_CALLS, read_calls

JSON = dict[str, Any]
_MARKED = re.compile(r"<tool_call>([^<]*(?:<(?!/?tool_call>)[^<]*)*)</tool_call>")


def calls_in(text: str) -> list[JSON]:
    """Tool calls as the API sends them: of `<tool_call>{…}</tool_call>`, or of an answer that is nothing but the JSON of one call or
    of several. An answer without any has none."""
    if marked := _MARKED.findall(text):
        found = [call for part in marked[:MAX_CALLS] for call in read_calls(part)]
    else:
        found = read_calls(text) if text.lstrip()[:1] in ("{", "[") else []
    return [
        {"id": f"call_{place}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for place, (name, arguments) in enumerate(found[:MAX_CALLS])
    ]


def without_calls(text: str) -> str:
    """What an answer says beside its calls."""
    return "" if not _MARKED.search(text) and calls_in(text) else _MARKED.sub("", text).strip()
