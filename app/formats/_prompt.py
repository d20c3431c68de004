"""Prompts before an answer, shared by the formats for compared or rated answers."""

from __future__ import annotations

from typing import Any, TypeGuard

from app.formats._base import Columns, Field, Row, parsed, text_of
from app.formats._messages import as_messages
from app.languages import mark

PROMPT = (
    "prompt", "instruction", "question", "query", "messages", "conversations", "conversation", "dialogue", "dialog", "chat", "input", "user",
)  # fmt: skip
FIELDS = (
    Field("input", mark("The text an instruction is about; it is put below the prompt."), ("input", "context"), False),
    Field("system", mark("How the assistant should behave."), ("system", "system_prompt"), False),
    Field("history", mark("Earlier turns, as pairs of question and answer."), ("history",), False),
    Field("tools", mark("The tools the assistant may call."), ("tools", "functions"), False),
)


NOT_GUESSED = {"input": "", "system": "", "history": ""}
"""Fields that are never guessed among the columns of a file that Luthier wrote."""


def joined(ask: str, about: str | None) -> str:
    """An instruction and its input, as one message."""
    return f"{ask}\n\n{about}" if about and about.strip() else ask


def is_history(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in value
    )


def prompt_of(row: Row, mapping: Columns) -> tuple[list[Row], list[Any] | None]:
    """The messages before the answer, and the tools. Raises TypeError or KeyError for a prompt that is neither text nor messages."""
    value = parsed(row.get(mapping["prompt"])) if "prompt" in mapping else None
    tools = parsed(row.get(mapping["tools"])) if "tools" in mapping else None
    if isinstance(value, dict) and "messages" in value:  # OpenAI: {"input": {"messages": […], "tools": […]}}
        value, tools = value["messages"], value.get("tools")
    messages = as_messages(value if isinstance(value, list | dict) else row.get(mapping.get("prompt", "")), "user")
    about = text_of(row, mapping.get("input"))
    if about and about.strip():
        if not messages:
            messages = [{"role": "user", "content": about}]
        elif messages[-1].get("role") == "user" and isinstance(messages[-1].get("content"), str):
            messages[-1] = {**messages[-1], "content": joined(messages[-1]["content"], about)}
    history = parsed(row.get(mapping["history"])) if "history" in mapping else None
    before = [
        {"role": role, "content": text}
        for pair in (history if is_history(history) else [])
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    messages = [*before, *messages]
    system = text_of(row, mapping.get("system"))
    if system and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return messages, tools if isinstance(tools, list) and tools else None
