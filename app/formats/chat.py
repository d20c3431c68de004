"""Chat: conversations in OpenAI's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from app.formats._base import Columns, Field, Format, Guess, Row, RowFinding, fix, parsed, shown, text_of
from app.formats._conversions import Conversion, prompt_and_completion, single
from app.formats._messages import as_messages, check_messages, is_sharegpt, normalise_messages
from app.formats._rows import Messages
from app.languages import mark


class Chat(Messages, Format):
    name: ClassVar = "chat"
    title: ClassVar = mark("Chat")
    shape: ClassVar = "chat"
    summary: ClassVar = mark("Conversations: a list of messages, each with a role and its text. The assistant's messages are trained on.")
    example: ClassVar = {
        "messages": [
            {"role": "system", "content": "You answer in one sentence."},
            {"role": "user", "content": "Why is the sky blue?"},
            {"role": "assistant", "content": "Because air scatters blue light more than red."},
        ]
    }
    fields: ClassVar = (
        Field(
            "messages",
            mark("The conversation: a list of {role, content}."),
            ("messages", "conversation", "conversations", "chat", "dialogue", "dialog", "texts", "turns"),
            holds="turns",
        ),
        Field("system", mark("The system's message."), ("system", "system_prompt"), False),
        Field("tools", mark("The tools the assistant may call."), ("tools", "functions"), False),
    )
    place: ClassVar = 10
    file_columns: ClassVar = {"messages": "messages", "system": ""}
    conversions: ClassVar = {
        "instruction": Conversion("conversations of more than one turn, or with tools or weights, are excluded", False, single),
        "completion": Conversion(
            "the system's and the user's text become the prompt; conversations of more than one turn are excluded",
            False,
            prompt_and_completion,
        ),
    }

    def tuned_kind(self, kind: str) -> str:
        return "dialogue"

    def recognise(self, rows: Sequence[Row]) -> Guess | None:
        guess = super().recognise(rows)
        if guess is None:
            return None
        turns = [parsed(row.get(guess.mapping["messages"])) for row in rows]
        other = sum(isinstance(said, list) and bool(said) and is_sharegpt(said[0]) for said in turns)
        return None if other * 2 > len(rows) else guess  # the same conversations with ShareGPT's keys are that format's

    def check(self, row: Row, mapping: Columns) -> list[RowFinding]:
        column = mapping.get("messages", "messages")
        if column not in row:
            known = ", ".join(f"“{key}”" for key in list(row)[:6]) or "nothing"
            text = f"The row has no “{column}”; it has {known}."
            return [RowFinding("missing_field", text, column, shown(row), "error", fix("Remove row", "drop_row"))]
        findings = check_messages(row[column], column)
        tools = parsed(row.get(mapping.get("tools", "tools")))
        if tools is not None and not isinstance(tools, list):
            findings.append(
                RowFinding("wrong_shape", "“tools” must be a list.", "tools", shown(tools), "error", fix("Remove row", "drop_row"))
            )
        return findings

    def normalise(self, row: Row, mapping: Columns) -> Row:
        messages = as_messages(row[mapping.get("messages", "messages")])
        system = text_of(row, mapping.get("system"))
        if system and system.strip():
            messages.insert(0, {"role": "system", "content": system})
        result: Row = {"messages": normalise_messages(messages)}
        tools = parsed(row.get(mapping.get("tools", "tools")))
        if tools:
            functions = mapping.get("tools") == "functions"  # OpenAI's older format has the bare functions
            result["tools"] = [{"type": "function", "function": tool} for tool in tools] if functions else tools
        return result
