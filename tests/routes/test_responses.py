"""`/v1/responses` through the unmodified client, answered by a real worker with a model of random weights."""

from __future__ import annotations

import json

import openai
import pytest
from sqlalchemy import select

from app.tables import Answer, Exchange, TokenUse
from tests.generating import (  # noqa: F401
    _workers,
    answering_dir,
    generate_worker,
    leave_while_it_speaks,
    register_agent,
    register_long,
    register_tiny,
    stored_answers,
)
from tests.routes.test_chat import Person
from tests.routes.test_tools import WEIGH

ASK = "What wood is the belly made of?"
WEIGHS = {"type": "function", "name": "weigh", "description": "Weighs a part.", "parameters": WEIGH, "strict": True}
STOPS = {"type": "function", "name": "stop", "parameters": None, "strict": None}


@pytest.fixture
def client(openai_client, generate_worker, session):  # noqa: F811
    register_tiny(session)
    return openai_client


def answer(client, **more):
    return client.responses.create(**{"model": "tiny", "input": ASK, "max_output_tokens": 8, "temperature": 0, **more})


def test_a_response_says_what_a_chat_completion_says(client, session):
    """One way to the engine: the same prompt, seed and settings give the same text, and the tokens count once."""
    said = answer(client, instructions="Be short.", metadata={"team": "a"}, user="me", safety_identifier="x", extra_body={"seed": 4})
    asked = [{"role": "system", "content": "Be short."}, {"role": "user", "content": ASK}]
    chat = client.chat.completions.create(model="tiny", messages=asked, max_tokens=8, temperature=0, seed=4)
    assert said.output_text == chat.choices[0].message.content and said.id.startswith("resp_") and said.object == "response"
    assert said.usage.output_tokens == chat.usage.completion_tokens and said.usage.input_tokens == chat.usage.prompt_tokens
    assert said.status == {"stop": "completed", "length": "incomplete"}[chat.choices[0].finish_reason]
    assert (said.instructions, said.metadata, said.temperature, said.model) == ("Be short.", {"team": "a"}, 0, "tiny")
    row, other = session.scalars(select(Answer).order_by(Answer.created_at)).all()
    assert row.rendered_prompt == other.rendered_prompt and row.text == said.output_text
    assert session.get(Exchange, row.exchange_id).sampling["labels"] == {"user": "me", "safety_identifier": "x"}
    assert session.scalars(select(TokenUse)).one().written == said.usage.output_tokens + chat.usage.completion_tokens


def test_events_are_the_whole_response_in_parts(client):
    whole = answer(client)
    events = list(answer(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        f"response.{kind}" for kind in ("created", "in_progress", "output_item.added", "content_part.added")
    ]
    last = events[-1]
    assert last.type == f"response.{whole.status}" and last.response.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert client.responses.retrieve(last.response.id) == last.response, "kept before its last event was sent"
    with client.responses.stream(
        model="tiny", input=ASK, max_output_tokens=200, temperature=1, text_format=Person, extra_body={"seed": 4}
    ) as stream:
        kinds = {event.type for event in stream}
        person = stream.get_final_response().output_parsed
    assert isinstance(person, Person) and "response.output_text.done" in kinds
    parsed = client.responses.parse(
        model="tiny", input=ASK, max_output_tokens=200, temperature=1, text_format=Person, extra_body={"seed": 4}
    )
    assert parsed.output_parsed == person and parsed.status == "completed"


def test_a_conversation_goes_on_from_a_response(client, session):
    first = answer(client, instructions="Be short.", input=[{"role": "user", "content": [{"type": "input_text", "text": "One."}]}])
    second = answer(client, previous_response_id=first.id, input="Two.", instructions="Be long.")
    # deleting the first deletes the record of its call
    client.responses.delete(first.id)
    third = answer(client, previous_response_id=second.id, input="Three.")
    prompts = [row.rendered_prompt for row in session.scalars(select(Answer).order_by(Answer.created_at))]
    assert "Be long." in prompts[0] and "Be short." not in prompts[0], "instructions are of one response"
    before = ("One.", f"<|im_start|>assistant\n{first.output_text}", "Two.", second.output_text, "Three.")
    assert all(text in prompts[1] for text in before) and "Be long." not in prompts[1] and third.previous_response_id == second.id
    for key in (first.id, "resp_" + "0" * 32, "nothing", answer(client, store=False).id):
        with pytest.raises(openai.NotFoundError) as caught:
            answer(client, previous_response_id=key)
        assert caught.value.param == "previous_response_id"


def test_what_is_stored_is_retrieved_listed_and_deleted(client, session):
    items = [
        {"role": "developer", "content": "Be short."},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Ask."}]},
        {"role": "user", "content": "What wood?"},
    ]
    said = answer(client, input=items)
    assert client.responses.retrieve(said.id) == said
    listed = list(client.responses.input_items.list(said.id, limit=2, order="asc"))  # in pages
    assert [(item.role, item.content[0].type, item.content[0].text) for item in listed] == [
        ("developer", "input_text", "Be short."), ("assistant", "output_text", "Ask."), ("user", "input_text", "What wood?")
    ]  # fmt: skip
    assert [item.id for item in client.responses.input_items.list(said.id)] == [item.id for item in reversed(listed)]
    for wrong in ({"stream": True}, {"include": ["message.output_text.logprobs"]}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.retrieve(said.id, **wrong)
        assert refused.value.param == next(iter(wrong))
    client.responses.delete(said.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as caught:
            call(said.id)
        assert caught.value.param == "response_id"
    assert session.scalars(select(Exchange)).all() == []
    chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=1, store=True)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(chat.id.replace("chatcmpl-", "resp_"))
    answer(client)
    assert [one.id for one in client.chat.completions.list()] == [chat.id], "each API lists its own"


def test_an_agent_of_two_turns_calls_gets_a_result_and_answers(client, session):
    register_agent(session)
    order = {"model": "agent", "tools": [WEIGHS, STOPS], "max_output_tokens": 120, "temperature": 1, "extra_body": {"seed": 3}}
    said = answer(client, **order, tool_choice={"type": "function", "name": "weigh"}, parallel_tool_calls=False)
    (call,) = [item for item in said.output if item.type == "function_call"]
    assert call.name == "weigh" and set(json.loads(call.arguments)) == {"of", "grams"} and said.tool_choice.name == "weigh"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "41 grams"}
    last = answer(client, **order | {"max_output_tokens": 8}, tool_choice="none", previous_response_id=said.id, input=[result])
    assert last.output_text
    by_hand = [{"role": "user", "content": ASK}, *(item.to_dict() for item in said.output), result]
    assert answer(client, **order | {"max_output_tokens": 8}, tool_choice="none", input=by_hand).output_text == last.output_text
    prompts = [row.rendered_prompt for row in session.scalars(select(Answer).order_by(Answer.created_at))]
    assert prompts[1] == prompts[2] and prompts[1].count("<tool_call>\n{") == 1 and "<|im_start|>tool\n41 grams" in prompts[1]
    events = list(answer(client, **order, tool_choice="required", stream=True))
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert deltas == "".join(event.arguments for event in done) and done[0].name in ("weigh", "stop")


def test_reasoning_is_an_item_and_is_switched_off(client, session):
    register_agent(session)
    on = answer(client, model="agent", reasoning={"effort": "high"}, max_output_tokens=20, temperature=1)
    assert [item.type for item in on.output] == ["reasoning"] and on.output[0].content[0].text and on.status == "incomplete"
    assert on.usage.output_tokens_details.reasoning_tokens > 0 and on.reasoning.effort == "high"
    form = {"format": {"type": "json_schema", "name": "a", "schema": {"enum": ["spruce"]}}}
    off = answer(client, model="agent", reasoning={"effort": "none"}, text=form, max_output_tokens=60)
    assert off.output_text == '"spruce"' and off.text.format.schema_ == {"enum": ["spruce"]}


def test_log_probabilities_are_included_where_they_are_asked_for(client):
    said = answer(client, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = said.output[0].content[0].logprobs
    assert 0 < len(logprobs) <= said.usage.output_tokens and all(len(one.top_logprobs) == 2 for one in logprobs)
    events = list(answer(client, include=["message.output_text.logprobs"], top_logprobs=2, stream=True))
    told = [log.token for event in events if event.type == "response.output_text.delta" for log in event.logprobs]
    assert told == [one.token for one in logprobs] and answer(client).output[0].content[0].logprobs == []


def test_who_leaves_stops_the_answer_and_nothing_is_stored(client, served, session):
    register_long(session, "long")
    body = {"model": "long", "input": ASK, "max_output_tokens": 8000, "stream": True, "logit_bias": {"70": 100}}
    headers = {"authorization": f"Bearer {client.api_key}", "content-type": "application/json"}
    leave_while_it_speaks(served, "/v1/responses", json.dumps(body).encode(), headers)
    (row,) = stored_answers(session)
    assert row.finish_reason == "cancelled" and session.get(Exchange, row.exchange_id).stored is None


def test_what_the_engine_refuses_has_the_names_of_this_api(client, session):
    for change, param in (
        ({"input": "wood " * 3000}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "strin"}}}}, "text.format"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"tools": [WEIGHS]}, "tools"),
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                answer(client, stream=stream, **change)
            assert caught.value.param == param, change
    assert all(row.stored is None for row in session.scalars(select(Exchange)))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.message.content.0.type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input.0.function_call.arguments"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{**STOPS, "parameters": {"type": "string"}}]}, "tools.0.parameters"),
        ({"tools": [STOPS], "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(api, tiny_registered, change, param):
    refused = api.post("/v1/responses", json={"model": "tiny", "input": ASK, **change})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text


def test_lone_surrogates_are_survived(client, served):
    """In a text that is read they are replaced or refused, and never a fault of the studio."""
    import httpx

    headers = {"authorization": f"Bearer {client.api_key}", "content-type": "application/json"}
    for field in (b'"input": "a\\ud83eb"', b'"input": "x", "instructions": "\\ud83e"', b'"input": "x", "metadata": {"a": "\\ud83e"}'):
        body = b'{"model": "tiny", "max_output_tokens": 2, "stream": true, ' + field + b"}"
        said = httpx.post(f"{served}/v1/responses", content=body, headers=headers)
        assert said.status_code in (200, 400) and ("response.in_progress" in said.text or "error" in said.json()), said.text
