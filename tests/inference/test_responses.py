"""Items as messages, and entries as items with their events: without a model."""

from __future__ import annotations

import json

from app.inference.protocol import ChoiceFinished, Logprob, ReasoningPart, TextPart, ToolCallPart
from app.inference.responses import ResponseFold, as_messages

USAGE = {
    "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 2, "audio_tokens": 0},
}  # fmt: skip


def text(value: str, *logs: str) -> TextPart:
    return TextPart(index=0, text=value, tokens=1, logprobs=[Logprob(token=t, bytes=list(t.encode()), logprob=-1.0) for t in logs])


def call(place: int, arguments: str, name: str | None = None) -> ToolCallPart:
    return ToolCallPart(index=0, place=place, id=f"call_{place}" if name else None, name=name, arguments=arguments, tokens=1)


def fold(*entries, reason: str = "stop") -> tuple[dict, list[dict]]:
    """(the response, its events), each entry taken alone."""
    made = ResponseFold({"id": "resp_1", "output": []}, lambda logs: [log.model_dump() for log in logs])
    sent = made.begin()
    for entry in (*entries, ChoiceFinished(index=0, reason=reason, tokens=4)):
        sent += made.take([entry])
    sent += made.end(USAGE, {"model": "tiny"}, 9)
    events = [json.loads(one.split(b"data: ")[1]) for one in sent]
    assert [one.split(b"\n")[0].decode() for one in sent] == [f"event: {event['type']}" for event in events]
    return made.response, events


def names(events: list[dict]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_text_comes_in_the_order_of_the_api():
    response, events = fold(text("Spr"), text("uce."))
    assert names(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(10))
    assert events[0]["response"]["output"] == [] and events[2]["item"]["content"] == [], "each event has the state of its time"
    assert events[2]["item"]["status"] == "in_progress" and events[-2]["item"]["status"] == "completed"
    assert events[-1]["response"] == response and response["output"][0]["content"][0]["text"] == "Spruce."
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 1 and response["usage"]["output_tokens_details"] == {
        "reasoning_tokens": 2
    }
    assert (response["status"], response["completed_at"], response["incomplete_details"]) == ("completed", 9, None)


def test_reasoning_text_and_calls_are_items_of_their_own():
    response, events = fold(
        ReasoningPart(index=0, text="Hm", tokens=1), ReasoningPart(index=0, text=".", tokens=2), text("I look."), call(0, '{"a"', "look"),
        call(0, ": 1}"), call(1, "{}", "stop"),
    )  # fmt: skip
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert response["output"][0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert [(one["call_id"], one["name"], one["arguments"]) for one in response["output"][2:]] == [
        ("call_0", "look", '{"a": 1}'),
        ("call_1", "stop", "{}"),
    ]
    told = [(event["output_index"], event["delta"]) for event in events if event["type"].endswith("arguments.delta")]
    assert told == [(2, '{"a"'), (2, ": 1}"), (3, "{}")]
    done = [event for event in events if event["type"].endswith("arguments.done")]
    assert [(event["item_id"], event["name"], event["arguments"]) for event in done] == [
        (one["id"], one["name"], one["arguments"]) for one in response["output"][2:]
    ]
    assert names(events).count("output_item.added") == names(events).count("output_item.done") == 4
    assert all(item["status"] == "completed" for item in response["output"]) and len({item["id"] for item in response["output"]}) == 4


def test_a_cut_answer_is_incomplete_and_an_empty_one_is_a_message():
    cut, events = fold(text("Spr"), reason="length")
    assert names(events)[-1] == "incomplete" and cut["output"][0]["status"] == "incomplete"
    assert (cut["status"], cut["incomplete_details"], cut["completed_at"]) == ("incomplete", {"reason": "max_output_tokens"}, None)
    empty, _ = fold()
    assert empty["status"] == "completed" and empty["output"][0]["content"][0]["text"] == ""


def test_log_probabilities_without_a_text_go_with_the_next_one():
    response, events = fold(text("", "a"), text("Spruce", "b"))
    deltas = [event for event in events if event["type"].endswith("text.delta")]
    assert [[log["token"] for log in event["logprobs"]] for event in deltas] == [["a", "b"]]
    assert [log["token"] for log in response["output"][0]["content"][0]["logprobs"]] == ["a", "b"]


def test_what_fails_is_told_by_the_last_event():
    made = ResponseFold({"id": "resp_1", "output": []}, lambda logs: [])
    made.begin()
    made.take([text("Spr")])
    (last,) = made.fail("The worker stopped.")
    event = json.loads(last.split(b"data: ")[1])
    assert event["type"] == "response.failed" and event["response"]["error"] == {"code": "server_error", "message": "The worker stopped."}


def message(role: str, value: str) -> dict:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": value}]}


def test_items_are_the_messages_of_a_chat():
    """Reasoning, text and calls of one answer are one message, and what a function returned is one of the role tool."""
    items = [
        message("developer", "Be short."), message("user", "Weigh it."),
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}, message("assistant", "I look."),
        {"type": "function_call", "call_id": "c1", "name": "weigh", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "stop", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "3 g"}, {"type": "function_call_output", "call_id": "c2", "output": "ok"},
        message("assistant", "3 g."), message("assistant", "That is all."),
    ]  # fmt: skip
    calls = [
        {"id": key, "type": "function", "function": {"name": name, "arguments": "{}"}} for key, name in (("c1", "weigh"), ("c2", "stop"))
    ]
    assert as_messages(items[1:], [{"role": "system", "content": "Be short."}]) == as_messages(items) == [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "Weigh it."},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "3 g"}, {"role": "tool", "tool_call_id": "c2", "content": "ok"},
        {"role": "assistant", "content": "3 g."}, {"role": "assistant", "content": "That is all."},
    ]  # fmt: skip
    alone = as_messages([items[4]])
    assert alone == [{"role": "assistant", "content": "", "tool_calls": calls[:1]}]
    before = [{"role": "assistant", "content": "", "tool_calls": calls[:1]}]
    as_messages([items[5]], before)
    assert before[0]["tool_calls"] == calls[:1], "what was stored is not changed"
