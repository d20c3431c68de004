"""Tools and reasoning of answers that an external server gives: what it is asked, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.errors import BadField, Unavailable
from app.inference.protocol import Entry, GenerateRequest, ReasoningPart, ToolCallPart
from app.languages import gettext

JSON = dict[str, Any]


def check(request: GenerateRequest) -> None:
    """Raises BadField where a server is sent a rendered prompt and the answer would need a grammar of ours."""
    engine, use = request.engine, request.tool_use
    if engine is None or engine.via == "chat" or not request.tools or not (use.constrains or request.sampling.json_schema is not None):
        return
    raise BadField(
        gettext(
            "The engine at %(engine)s is sent tokens, so it cannot be bound to call a tool or to keep to its parameters.",
            engine=engine.host,
        ),
        hint=gettext("Take the built-in engine or one that is sent messages; or omit tool_choice, strict and response_format."),
        param="tool_choice" if use.calls == "required" else "tools",
        code="unsupported_parameter",
    )


def fields(request: GenerateRequest) -> JSON:
    """The fields of a chat completion by which a server honors tools; none where the request has no tools."""
    if not request.tools:
        return {}
    use = request.tool_use
    choice: Any = {"type": "function", "function": {"name": use.function}} if use.function else use.calls
    found: JSON = {"tools": [_with_strict(tool, use.strict) for tool in request.tools]}
    found |= {"tool_choice": choice} if choice != "auto" else {}
    return found | ({} if use.parallel else {"parallel_tool_calls": False})


def _with_strict(tool: JSON, strict: tuple[str, ...]) -> JSON:
    function = tool["function"]
    return {**tool, "function": {**function, "strict": True}} if function["name"] in strict else tool


class ServersCalls:
    """The reasoning and the tool calls in the deltas of a server that renders the messages itself and tells both from the text."""

    def __init__(self, num_choices: int) -> None:
        self._places: list[dict[int, int]] = [{} for _ in range(num_choices)]
        """For each choice the place of a call by the server's own number."""

    def without_calls(self) -> list[int]:
        """The choices that have called nothing."""
        return [index for index, places in enumerate(self._places) if not places]

    def check(self, request: GenerateRequest, reasons: Mapping[int, str], host: str) -> None:
        """Raises Unavailable for an answer that had to call a tool, has come to its end and called none."""
        if request.tool_use.calls == "required" and any(reasons.get(index) == "stop" for index in self.without_calls()):
            raise Unavailable(
                gettext("The engine at %(engine)s called no tool, though it had to.", engine=host),
                hint=gettext("Take a server that honors tool_choice, or the built-in engine."),
                code="engine_failed",
            )

    def entries(self, index: int, delta: JSON, tokens: int) -> list[Entry]:
        """The entries of one delta. Raises KeyError and TypeError for one that is not of the API."""
        found: list[Entry] = []
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            found.append(ReasoningPart(index=index, text=str(thought), tokens=tokens))
        for call in delta.get("tool_calls") or []:
            found.append(self._call(index, call, tokens))
        return found

    def _call(self, index: int, call: JSON, tokens: int) -> ToolCallPart:
        function, places = call.get("function") or {}, self._places[index]
        fresh = call["index"] not in places
        place = places.setdefault(call["index"], len(places))
        named = {"id": str(call.get("id") or f"call_{index}_{place}"), "name": str(function["name"])} if fresh else {}
        return ToolCallPart(index=index, place=place, arguments=str(function.get("arguments") or ""), tokens=tokens, **named)
