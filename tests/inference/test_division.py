"""Entries of an answer become reasoning, content and calls, and an external server's own division is taken as it is."""

from __future__ import annotations

import json
import uuid

import pytest

from app.answer_syntax import THOUGHT, Syntax
from app.errors import BadField, Unavailable
from app.inference import external_tools
from app.inference.answer_fold import AnswerFold
from app.inference.division import Division
from app.inference.external_server import Address, Fold
from app.inference.protocol import (
    AnswerStarted,
    ChoiceFinished,
    Done,
    ExternalEngine,
    GenerateRequest,
    Logprob,
    RenderedPrompt,
    Sampling,
    TextPart,
    ToolUse,
    pack,
    unpack,
)
from app.spec import ModelRef

WRITTEN = '<think>\nhm\n</think>\n\nSure. <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SERVER = Address("http://10.0.0.1/v1", None)


def told(syntax: Syntax | None) -> AnswerFold:
    started = AnswerStarted(rendered_prompt="x", prompt_tokens=1, max_tokens=90, context=512, syntax=syntax)
    letters = [
        TextPart(index=0, text=c, tokens=i + 1, logprobs=[Logprob(token=c, bytes=[ord(c)], logprob=-1)]) for i, c in enumerate(WRITTEN)
    ]
    ends = [ChoiceFinished(index=0, reason="stop", tokens=len(WRITTEN)), Done(prompt_tokens=1, completion_tokens=len(WRITTEN), first_token_seconds=None, tokens_per_second=None)]  # fmt: skip
    division, fold = Division(), AnswerFold()
    for entry in unpack(pack([started, *letters, *ends])):
        fold.take(division.take([entry]))
    return fold


def test_an_answer_is_divided_and_keeps_its_log_probabilities():
    fold = told(Syntax(thought=THOUGHT, calls="hermes"))
    choice = fold.choices[0]
    assert (choice.reasoning, choice.text, choice.finish_reason, choice.tokens) == ("hm", "Sure.", "stop", len(WRITTEN))
    (call,) = choice.calls
    assert call["id"].startswith("call_") and call["type"] == "function" and call["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert "".join(one.token for one in choice.logprobs) == WRITTEN
    assert 0 < fold.usage()["completion_tokens_details"]["reasoning_tokens"] <= WRITTEN.index("</think>")


def test_an_answer_without_a_syntax_is_passed_on():
    choice = told(None).choices[0]
    assert (choice.text, choice.reasoning, choice.calls) == (WRITTEN, "", [])


def asked(via="chat", **more) -> GenerateRequest:
    given = {"engine": ExternalEngine(url=SERVER.url, model="m", via=via), "messages": [{"role": "user", "content": "a"}], "tools": TOOLS}
    return GenerateRequest.model_construct(id=uuid.uuid4(), model=ModelRef.model_construct(name="tiny"), seed=1, **given | {"tool_use": ToolUse(), "effort": None, "split": True, "sampling": Sampling(), "prompt": None, "tokens": None} | more)  # fmt: skip


def events(*deltas, reason="tool_calls") -> list[str]:
    choices = [{"index": 0, "delta": delta} for delta in deltas] + [{"index": 0, "delta": {}, "finish_reason": reason}]
    return [json.dumps({"choices": [choice]}) for choice in choices]


def test_a_server_that_takes_messages_is_sent_the_tools_and_its_calls_are_taken():
    request = asked(tool_use=ToolUse(calls="required", function="f", strict=("f",), parallel=False), effort="low")
    fold, heard = Fold(request, None, SERVER), AnswerFold()
    body = fold.body()
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}} and body["parallel_tool_calls"] is False
    assert body["tools"][0]["function"]["strict"] is True and body["reasoning_effort"] == "low" and "strict" not in TOOLS[0]["function"]
    calls = (
        [{"index": 4, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x"'}}],
        [{"index": 4, "function": {"arguments": ": 1}"}}],
    )
    for event in events({"role": "assistant", "reasoning_content": "hm"}, {"content": "Sure."}, *({"tool_calls": call} for call in calls)):
        heard.take(Division().take(fold.take(event)))
    heard.take(fold.end())
    choice = heard.choices[0]
    assert (choice.reasoning, choice.text, choice.finish_reason) == ("hm", "Sure.", "stop")
    assert choice.calls == [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]


def test_a_server_that_calls_nothing_though_it_must_is_an_error():
    fold = Fold(asked(tool_use=ToolUse(calls="required")), None, SERVER)
    assert fold.body()["tool_choice"] == "required"
    for event in events({"content": "No."}, reason="stop"):
        fold.take(event)
    with pytest.raises(Unavailable, match="called no tool"):
        fold.end()


@pytest.mark.parametrize(
    "delta", [{"tool_calls": 3}, {"tool_calls": [3]}, {"tool_calls": [{"index": 0}]}, {"tool_calls": [{"function": {}}]}]
)
def test_calls_in_no_form_of_the_api_are_an_error(delta):
    with pytest.raises(Unavailable, match="no OpenAI-compatible server"):
        Fold(asked(), None, SERVER).take(events(delta)[0])


def test_a_server_that_takes_tokens_is_told_to_keep_special_markers():
    prompt = RenderedPrompt(text="x", tokens=[1], stop_tokens=[2], max_tokens=9, context=16, syntax=Syntax(calls="hermes"), special=True)
    fold = Fold(asked("tokens"), prompt, SERVER)
    assert fold.body()["skip_special_tokens"] is False and "tools" not in fold.body() and fold.started().syntax == prompt.syntax
    plain = Fold(asked("tokens"), prompt.model_copy(update={"special": False}), SERVER)
    assert "skip_special_tokens" not in plain.body()


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_use": ToolUse(calls="required")}, "tool_choice"),
        ({"tool_use": ToolUse(strict=("f",))}, "tools"),
        ({"sampling": Sampling(json_schema={"type": "object"})}, "tools"),
    ],
)
def test_what_a_server_that_takes_tokens_cannot_be_bound_to_is_refused(more, param):
    with pytest.raises(BadField, match="is sent tokens") as refused:
        external_tools.check(asked("tokens", **more))
    assert refused.value.param == param
    external_tools.check(asked("chat", **more))
    external_tools.check(asked("tokens"))
