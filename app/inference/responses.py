"""Responses: the items of a conversation as messages, and the entries of an answer as items, with the events that tell of them.

    items ── as_messages ──→ a chat request ──→ entries ── ResponseFold ──→ items, events

The shapes are those of OpenAI's API, where an item is a message, a piece of reasoning, a call of a function or its output.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence

from app.inference import playground
from app.inference.protocol import ChoiceFinished, Entry, Logprob, ReasoningPart, TextPart, ToolCallPart
from app.tables import JSON

Spell = Callable[[Sequence[Logprob]], list[JSON]]


def as_messages(items: Sequence[JSON], before: Sequence[JSON] = ()) -> list[JSON]:
    """The conversation `before` with these items, as chat templates take it. Reasoning, the text after it and the calls after that are one
    message of the assistant."""
    messages = [dict(message) for message in before]
    for item in items:
        last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        match item["type"]:
            case "message":
                text = playground.readable("".join(part["text"] for part in item["content"]))
                role = "system" if item["role"] == "developer" else item["role"]
                if role == "assistant" and last is not None and not last["content"] and "tool_calls" not in last:
                    last["content"] = text
                else:
                    messages.append({"role": role, "content": text})
            case "reasoning":
                text = playground.readable("".join(part["text"] for part in item["content"]))
                messages.append({"role": "assistant", "content": "", **({"reasoning_content": text} if text else {})})
            case "function_call":
                if last is None:
                    messages.append(last := {"role": "assistant", "content": ""})
                call = {"name": item["name"], "arguments": playground.readable(item["arguments"])}
                last["tool_calls"] = [*last.get("tool_calls", ()), {"id": item["call_id"], "type": "function", "function": call}]
            case "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": playground.readable(item["output"])})
    return messages


class ResponseFold:
    """One response, folded from the entries of its stream. Each method returns the server-sent events that tell what it changed."""

    def __init__(self, response: JSON, spell: Spell) -> None:
        """`response` is completed in place; `spell` writes log-probabilities as the API has them."""
        self.response, self.spell = response, spell
        self.sequence = 0
        self.item: JSON | None = None
        """The item that is being written, the last of the output."""
        self.num_calls = 0
        self.held: list[JSON] = []
        """Log-probabilities that came with no text: they go with the next."""
        self.reason: str | None = None

    def begin(self) -> list[bytes]:
        return [self._response_event("created"), self._response_event("in_progress")]

    def take(self, entries: Sequence[Entry]) -> list[bytes]:
        events: list[bytes] = []
        for entry in entries:
            match entry:
                case TextPart():
                    self.held += self.spell(entry.logprobs)
                    events += self._write_text(entry.text) if entry.text else []
                case ReasoningPart():
                    events += self._write_reasoning(entry.text) if entry.text else []
                case ToolCallPart():
                    events += self._write_call(entry)
                case ChoiceFinished():
                    self.reason = entry.reason
        return events

    def end(self, usage: JSON, proof: JSON, at: int) -> list[bytes]:
        """The answer has ended. An answer without anything is a message without text."""
        events = [] if self.response["output"] else self._open_message()
        whole = self.reason == "stop"
        status = "completed" if whole else "incomplete"
        events += self._close(status)
        self.response |= {
            "status": status,
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "completed_at": at if whole else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"], "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
                "total_tokens": usage["total_tokens"],
            },
            "luthier": proof,
        }
        return [*events, self._response_event(status)]

    def fail(self, message: str) -> list[bytes]:
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        return [self._response_event("failed")]

    # Writing ------------------------------------------------------------------------------------------------------------

    def _write_text(self, text: str) -> list[bytes]:
        events = [] if self.item and self.item["type"] == "message" else self._open_message()
        part, logprobs, self.held = self._part(), self.held, []
        part["text"] += text
        part["logprobs"] += logprobs
        return [*events, self._item_event("output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _write_reasoning(self, text: str) -> list[bytes]:
        events: list[bytes] = []
        if not self.item or self.item["type"] != "reasoning":
            events += self._open({"id": _new_id("rs"), "type": "reasoning", "summary": [], "content": []})
            events += self._open_part({"type": "reasoning_text", "text": ""})
        self._part()["text"] += text
        return [*events, self._item_event("reasoning_text.delta", content_index=0, delta=text)]

    def _write_call(self, entry: ToolCallPart) -> list[bytes]:
        events: list[bytes] = []
        if entry.place >= self.num_calls:
            self.num_calls += 1
            call = {"id": _new_id("fc"), "type": "function_call", "call_id": entry.id, "name": entry.name or "", "arguments": ""}
            events += self._open(call)
        assert self.item is not None, "a call was opened"
        self.item["arguments"] += entry.arguments
        return [*events, self._item_event("function_call_arguments.delta", delta=entry.arguments)] if entry.arguments else events

    def _open_message(self) -> list[bytes]:
        events = self._open({"id": _new_id("msg"), "type": "message", "role": "assistant", "content": []})
        return events + self._open_part({"type": "output_text", "text": "", "annotations": [], "logprobs": []})

    def _open(self, item: JSON) -> list[bytes]:
        events = self._close("completed")
        self.item = item | {"status": "in_progress"}
        self.response["output"].append(self.item)
        return [*events, self._event("output_item.added", output_index=self._place(), item=self.item)]

    def _open_part(self, part: JSON) -> list[bytes]:
        assert self.item is not None, "an item was opened"
        self.item["content"].append(part)
        return [self._item_event("content_part.added", content_index=0, part=part)]

    def _close(self, status: str) -> list[bytes]:
        """The open item has ended, if there is one."""
        if self.item is None:
            return []
        if self.item["type"] == "function_call":
            events = [self._item_event("function_call_arguments.done", name=self.item["name"], arguments=self.item["arguments"])]
        else:
            part = self._part()
            logprobs = {"logprobs": part["logprobs"]} if part["type"] == "output_text" else {}
            events = [self._item_event(f"{part['type']}.done", content_index=0, text=part["text"], **logprobs)]
            events.append(self._item_event("content_part.done", content_index=0, part=part))
        self.item["status"] = status
        events.append(self._event("output_item.done", output_index=self._place(), item=self.item))
        self.item = None
        return events

    def _part(self) -> JSON:
        assert self.item is not None, "an item was opened"
        part: JSON = self.item["content"][0]
        return part

    # Events -------------------------------------------------------------------------------------------------------------

    def _place(self) -> int:
        return len(self.response["output"]) - 1

    def _response_event(self, kind: str) -> bytes:
        return self._event(kind, response=self.response)

    def _item_event(self, kind: str, **fields: object) -> bytes:
        assert self.item is not None, "an item was opened"
        return self._event(kind, item_id=self.item["id"], output_index=self._place(), **fields)

    def _event(self, kind: str, **fields: object) -> bytes:
        """Written at once, so that it has the state of now."""
        body = {"type": f"response.{kind}", "sequence_number": self.sequence, **fields}
        self.sequence += 1
        return f"event: response.{kind}\ndata: {json.dumps(body)}\n\n".encode()


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
