"""Tools and thinking through the unmodified client, answered by a real worker with a model of random weights."""

from __future__ import annotations

import json

import jsonschema
import openai
import pytest
from sqlalchemy import select

from app.tables import Answer, Exchange
from tests.generating import _workers, answering_dir, generate_worker, register_agent, register_tiny  # noqa: F401

ASK = [{"role": "user", "content": "What does the belly weigh?"}]
WEIGH = {
    "type": "object",
    "properties": {"of": {"enum": ["belly", "back", "neck"]}, "grams": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["of", "grams"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weigh", "description": "Weighs a part.", "parameters": WEIGH, "strict": True}},
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.fixture
def client(openai_client, generate_worker, session):  # noqa: F811
    register_agent(session)
    return openai_client


def answer(client, **more):
    return client.chat.completions.create(**{"model": "agent", "messages": ASK, "max_tokens": 120, "temperature": 1, "seed": 3, **more})


def weighed(call) -> dict:
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, WEIGH)
    assert call.type == "function" and call.id.startswith("call_") and call.function.name == "weigh"
    return arguments


def test_an_agent_of_three_turns_calls_gets_results_and_answers(client, session):
    """A call that is required, a call of a named function, and an answer in words: each turn goes on from the one before."""
    named = {"type": "function", "function": {"name": "weigh"}}
    messages = list(ASK)
    for choice in ("required", named):
        said = answer(client, messages=messages, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).choices[0]
        assert said.finish_reason == "tool_calls" and said.message.content is None
        (call,) = said.message.tool_calls
        result = weighed(call) if call.function.name == "weigh" else {}
        messages += [said.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)}]
    last = answer(client, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=8).choices[0]
    assert last.finish_reason in ("stop", "length") and last.message.content and last.message.tool_calls is None
    rows = session.scalars(select(Answer).order_by(Answer.created_at)).all()
    assert [bool(row.tool_calls) for row in rows] == [True, True, False] and rows[0].text == ""
    assert rows[1].tool_calls[0]["function"]["name"] == "weigh" and "<tools>" in rows[1].rendered_prompt
    prompt = rows[2].rendered_prompt
    assert prompt.count("<tool_call>\n{") == 2 and prompt.count("<|im_start|>tool\n{") == 2 and "<tools>" not in prompt


def test_streamed_calls_are_the_whole_ones(client):
    order = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weigh"}}}
    whole = answer(client, **order).choices[0]
    with client.chat.completions.stream(model="agent", messages=ASK, max_tokens=120, temperature=1, seed=3, **order) as events:
        seen = [event for event in events if event.type == "tool_calls.function.arguments.done"]
        streamed = events.get_final_completion().choices[0]
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    told = [[(c.function.name, c.function.arguments) for c in one.message.tool_calls] for one in (whole, streamed)]
    assert told[0] == told[1] == [(event.name, event.arguments) for event in seen] and weighed(whole.message.tool_calls[0])
    chunks = list(answer(client, stream=True, n=2, **order))
    pieces = [(choice.index, one) for chunk in chunks for choice in chunk.choices for one in choice.delta.tool_calls or []]
    assert not any("<" in (choice.delta.content or "") for chunk in chunks for choice in chunk.choices)
    for index in (0, 1):
        first, *rest = [one for choice, one in pieces if choice == index]
        assert first.id.startswith("call_") and (first.type, first.function.name, first.function.arguments) == ("function", "weigh", "")
        assert len(rest) > 3 and {one.index for one in rest} == {0}, "the arguments come as they are written"
        assert all((one.id, one.type, one.function.name) == (None, None, None) and one.function.arguments for one in rest)
        jsonschema.validate(json.loads("".join(one.function.arguments for one in rest)), WEIGH)
    said = "".join(one.function.arguments for choice, one in pieces if choice == 0)
    assert said == whole.message.tool_calls[0].function.arguments, "the first answer is that of the same seed"


def test_arguments_that_are_cut_off_stay_a_call(client):
    """What was streamed is not taken back, so the whole answer has the piece of a call too."""
    order = {"tools": TOOLS[:1], "tool_choice": "required", "max_tokens": 40}
    whole = answer(client, **order).choices[0]
    assert whole.finish_reason == "length" and whole.message.content is None
    (call,) = whole.message.tool_calls
    assert call.function.name == "weigh" and call.function.arguments.startswith("{") and not call.function.arguments.endswith("}")
    deltas = [one for chunk in answer(client, stream=True, **order) for one in chunk.choices[0].delta.tool_calls or []]
    assert "".join(one.function.arguments for one in deltas) == call.function.arguments


def test_responses_stream_the_same_pieces(client):
    tools = [{"type": "function", **TOOLS[0]["function"]}]
    events = list(client.responses.create(model="agent", input=ASK[0]["content"], tools=tools, tool_choice="required", parallel_tool_calls=False, max_output_tokens=120, temperature=1, stream=True))  # fmt: skip
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert len(deltas) > 3 and "".join(deltas) == done.arguments
    jsonschema.validate(json.loads(done.arguments), WEIGH)


def test_a_free_answer_is_content_and_log_probabilities_are_complete(client):
    said = answer(client, tools=TOOLS[1:], logprobs=True, max_tokens=None, max_completion_tokens=12)
    assert said.choices[0].message.content and said.choices[0].message.tool_calls is None
    assert 0 < len(said.choices[0].logprobs.content) <= said.usage.completion_tokens == 12


def test_thinking_is_told_from_the_answer(client, session):
    """Switched off, the answer is that of a schema; switched on, random weights think to the end."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["spruce"]}}}
    off = answer(client, reasoning_effort="none", response_format=form)
    assert off.choices[0].message.content == '"spruce"' and not hasattr(off.choices[0].message, "reasoning_content")
    on = answer(client, reasoning_effort="high", max_tokens=20)
    message = on.choices[0].message
    assert message.content == "" and message.reasoning_content and on.choices[0].finish_reason == "length"
    assert on.usage.completion_tokens_details.reasoning_tokens > 0
    chunks = list(answer(client, reasoning_effort="high", max_tokens=20, stream=True))
    parts = [getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks]
    assert "".join(parts) == message.reasoning_content
    assert session.scalars(select(Answer).order_by(Answer.created_at)).all()[1].reasoning == message.reasoning_content


def test_labels_are_kept_with_the_answer(client, session):
    answer(client, max_tokens=1, user="me", safety_identifier="x", metadata={"team": "a"})
    client.completions.create(model="agent", prompt="The bridge", max_tokens=1, user="you")
    rows = session.scalars(select(Exchange).order_by(Exchange.created_at)).all()
    assert [row.sampling["labels"] for row in rows] == [{"user": "me", "safety_identifier": "x"}, {"user": "you"}]
    assert [row.user_metadata for row in rows] == [{"team": "a"}, None]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools.0.function.parameters"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"enum": ["x" * 300_000]}}}]}, "tools"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}]}, "messages.1.tool_calls.0.function.arguments"),
        ({"messages": [*ASK, {"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]}, "messages.1.function_call"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(api, tiny_registered, change, param):
    refused = api.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, **change})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text


def test_a_model_that_knows_neither_tools_nor_thinking_says_so(client, session):
    register_tiny(session)
    for change, param in (({"tools": TOOLS}, "tools"), ({"reasoning_effort": "low"}, "reasoning_effort")):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="chat template") as caught:
                answer(client, model="tiny", stream=stream, **change)
            assert caught.value.param == param and caught.value.code == "unsupported_parameter"
    assert answer(client, model="tiny", tools=TOOLS, tool_choice="none", max_tokens=2).choices, "which were not asked for"


def test_only_allowed_tools_are_shown_to_the_model(client, session):
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "stop"}}]}
    said = answer(client, tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert {call.function.name for call in said.choices[0].message.tool_calls} == {"stop"}
    prompt = session.scalars(select(Answer)).one().rendered_prompt
    assert '"stop"' in prompt and '"weigh"' not in prompt and "strict" not in prompt
