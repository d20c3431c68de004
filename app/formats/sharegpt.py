"""ShareGPT: conversations with `from` and `value`, under either of its two spellings."""

from __future__ import annotations

from typing import Any, ClassVar

from app.formats._base import Columns, Field, Finding, Format, Row, fix, parsed, shown, text_of
from app.formats._messages import check_messages, normalise_messages

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
    "function_call": "assistant",
}


class ShareGpt(Format):
    name: ClassVar = "sharegpt"
    title: ClassVar = "ShareGPT"
    shape: ClassVar = "chat"
    summary: ClassVar = "Conversations as a list of {from, value}, or of {human, assistant} pairs."
    example: ClassVar = {"conversations": [{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "Hello!"}]}
    fields: ClassVar = (
        Field(
            "conversations", "The conversation: a list of {from, value}.", ("conversations", "conversation", "dialogue", "texts", "items")
        ),
        Field("system", "The system's message.", ("system", "system_prompt"), False),
        Field("tools", "The tools the assistant may call.", ("tools",), False),
    )
    place: ClassVar = 15

    def check(self, row: Row, mapping: Columns) -> list[Finding]:
        column = mapping.get("conversations", "conversations")
        if column not in row:
            return [Finding("missing_field", f"The row has no “{column}”.", column, shown(row), "error", fix("Drop the row", "drop_row"))]
        turns = parsed(row[column])
        if not isinstance(turns, list) or not all(isinstance(turn, dict) and ("from" in turn or "human" in turn) for turn in turns):
            text = f"“{column}” must be a list of {{from, value}}, or of {{human, assistant}}."
            return [Finding("wrong_shape", text, column, shown(row[column]), "error", fix("Drop the row", "drop_row"))]
        return check_messages(_messages(turns, None), column)

    def normalise(self, row: Row, mapping: Columns) -> Row:
        turns = parsed(row[mapping.get("conversations", "conversations")])
        result: Row = {"messages": normalise_messages(_messages(turns, text_of(row, mapping.get("system"))))}
        tools = parsed(row.get(mapping.get("tools", "tools")))
        if isinstance(tools, list) and tools:
            result["tools"] = tools
        return result


def _messages(turns: list[Row], system: str | None) -> list[Row]:
    """The turns as messages. An unknown speaker keeps its name, so that the check can say which one it was."""
    messages: list[Row] = [{"role": "system", "content": system}] if system and system.strip() else []
    for turn in turns:
        if "human" in turn:
            messages.append({"role": "user", "content": turn["human"]})
            messages.append({"role": "assistant", "content": turn.get("assistant")})
            continue
        speaker: Any = turn.get("from")
        role = SPEAKERS.get(speaker.strip().lower(), speaker) if isinstance(speaker, str) else speaker
        message: Row = {"role": role, "content": turn.get("value")}
        if "weight" in turn:
            message["weight"] = turn["weight"]
        messages.append(message)
    return messages
