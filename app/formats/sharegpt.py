"""ShareGPT: conversations with `from` and `value`, or with its other pair of keys."""

from __future__ import annotations

from typing import ClassVar

from app.formats._base import Columns, Field, Format, Row, RowFinding, fix, parsed, shown, text_of
from app.formats._messages import as_messages, check_messages, is_sharegpt, normalise_messages
from app.formats._rows import Messages
from app.languages import mark


class ShareGpt(Messages, Format):
    name: ClassVar = "sharegpt"
    title: ClassVar = "ShareGPT"
    shape: ClassVar = "chat"
    summary: ClassVar = mark("Conversations as a list of {from, value}, or of {human, assistant} pairs.")
    example: ClassVar = {"conversations": [{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "Hello!"}]}
    fields: ClassVar = (
        Field(
            "conversations",
            mark("The conversation: a list of {from, value}."),
            ("conversations", "conversation", "dialogue", "dialog", "messages", "chat", "texts", "turns", "items"),
            holds="turns",
        ),
        Field("system", mark("The system's message."), ("system", "system_prompt"), False),
        Field("tools", mark("The tools the assistant may call."), ("tools",), False),
    )
    place: ClassVar = 15

    def check(self, row: Row, mapping: Columns) -> list[RowFinding]:
        column = mapping.get("conversations", "conversations")
        if column not in row:
            return [RowFinding("missing_field", f"The row has no “{column}”.", column, shown(row), "error", fix("Remove row", "drop_row"))]
        turns = parsed(row[column])
        if not isinstance(turns, list) or not all(map(is_sharegpt, turns)):
            text = f"“{column}” must be a list of {{from, value}}, or of {{human, assistant}}."
            return [RowFinding("wrong_shape", text, column, shown(row[column]), "error", fix("Remove row", "drop_row"))]
        return check_messages(turns, column)

    def normalise(self, row: Row, mapping: Columns) -> Row:
        turns = parsed(row[mapping.get("conversations", "conversations")])
        messages, system = as_messages(turns), text_of(row, mapping.get("system"))
        if system and system.strip():
            messages.insert(0, {"role": "system", "content": system})
        result: Row = {"messages": normalise_messages(messages)}
        tools = parsed(row.get(mapping.get("tools", "tools")))
        if isinstance(tools, list) and tools:
            result["tools"] = tools
        return result
