"""Answers whose tokens are drawn at random under a grammar call tools as they must, whatever the model would have written."""

from __future__ import annotations

import json
import random
import uuid

import jsonschema
import pytest

from app.answer_syntax import FAMILIES, THOUGHT, Syntax, ToolCall
from app.answer_syntax._splitter import Said, Splitter, Thought
from app.errors import BadRequest
from app.inference.protocol import GenerateRequest, Sampling, ToolUse
from app.spec import ModelRef
from tests.tiny import build_tokenizer
from worker.inference import constraint
from worker.inference.answer_grammar import grammar_of

POINT = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 2}
MOVE = {
    "type": "object",
    "properties": {"to": {"$ref": "#/$defs/point"}, "mood": {"enum": ["calm", "loud"]}},
    "required": ["to"],
    "additionalProperties": False,
    "$defs": {"point": POINT},
}
TOOLS = [
    {"type": "function", "function": {"name": "move", "parameters": MOVE}},
    {"type": "function", "function": {"name": "stop"}},
]
TEMPLATES = {
    "hermes": "<tool_call>",
    "qwen_xml": "<function=",
    "llama3": "",
    "mistral": "[TOOL_CALLS]",
    "mistral, named": "[TOOL_CALLS]name[ARGS]",
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def special():
    """A tokenizer that has the markers as tokens of its own."""
    made = build_tokenizer()
    made.add_tokens(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "</think>"], special_tokens=True)
    return made


def asked(schema=None, tools=TOOLS, **use) -> GenerateRequest:
    ref = ModelRef.model_construct(name="tiny")
    return GenerateRequest.model_construct(
        id=uuid.uuid4(), model=ref, messages=[], tools=tools, tool_use=ToolUse(**use), sampling=Sampling(json_schema=schema), split=True
    )


def written(tokenizer, request: GenerateRequest, syntax: Syntax, template: str, seed: int) -> str:
    """A random answer under the request's grammar."""
    stops = [tokenizer.eos_token_id]
    held = constraint._constraint(grammar_of(request, syntax, template, tokenizer), tokenizer, stops, "tools")
    rng, ids = random.Random(seed), []
    while not held.is_complete() and len(ids) < 300:
        bits = held._matcher.compute_bitmask()
        allowed = [i for i in range(len(tokenizer)) if bits[i // 8] >> (i % 8) & 1]
        token = tokenizer.eos_token_id if tokenizer.eos_token_id in allowed and rng.random() < 0.3 else rng.choice(allowed)
        if token in stops:
            break
        held.take(token)
        ids.append(token)
    assert len(ids) < 300
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def parts(syntax: Syntax, text: str) -> list:
    splitter = Splitter(syntax, TOOLS)
    return splitter.push(text) + splitter.end()


def check(call: ToolCall) -> None:
    if call.name == "move":
        jsonschema.validate(json.loads(call.arguments), MOVE)
    else:
        assert (call.name, json.loads(call.arguments)) == ("stop", {})


@pytest.mark.parametrize("markers", ["text", "tokens"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_required_call_comes_and_follows_its_schema(tokenizer, special, template, markers):
    syntax, own = Syntax(calls=template.partition(",")[0]), special if markers == "tokens" else tokenizer
    numbers = set()
    for seed in range(6):
        found = parts(syntax, written(own, asked(calls="required"), syntax, TEMPLATES[template], seed))
        assert found and all(isinstance(part, ToolCall) for part in found)
        for call in found:
            check(call)
        numbers.add(len(found))
        one = parts(syntax, written(own, asked(calls="required", function="stop", parallel=False), syntax, TEMPLATES[template], seed))
        assert [part.name for part in one] == ["stop"]
    assert template == "llama3" or max(numbers) > 1, "several calls can come in one answer"


@pytest.mark.parametrize("markers", ["text", "tokens"])
@pytest.mark.parametrize("template", ["hermes", "qwen_xml", "mistral", "mistral, named"])
def test_a_strict_function_may_be_called_and_is_then_called_by_its_schema(tokenizer, special, template, markers):
    """After any text: the grammar takes the marker, and then nothing but a call of the schema."""
    syntax, own = Syntax(calls=template.partition(",")[0]), special if markers == "tokens" else tokenizer
    request = asked(strict=("move",))
    matcher = constraint._constraint(grammar_of(request, syntax, TEMPLATES[template], own), own, [own.eos_token_id], "tools")._matcher
    opens = FAMILIES[syntax.calls].opens
    good = {
        "hermes": '\n{"name": "move", "arguments": {"to": [1, 2]}}\n</tool_call>',
        "qwen_xml": "\n<function=move>\n<parameter=to>\n[1, 2]\n</parameter>\n<parameter=mood>\ncalm\n</parameter>\n</function>\n</tool_call>",
        "mistral": ' [{"name": "move", "arguments": {"to": [1, 2]}}, {"name": "stop", "arguments": {"free": 1}}]',
        "mistral, named": 'move[ARGS]{"to": [1, 2]}',
    }[template]
    for text, fits in (
        (f"Well. {opens}{good}", True),
        ("No call at all.", True),
        (f"{opens}{good.replace('[1, 2]', '3')}", False),
        (f"a {opens} b", False),
    ):
        ids = own(text, add_special_tokens=False)["input_ids"]
        matcher.reset()
        assert (matcher.validate_tokens(ids) == len(ids)) == fits, text
        if fits:
            matcher.consume_tokens(ids)
            assert matcher.is_accepting() and any(isinstance(part, ToolCall) for part in parts(syntax, text)) == (
                "call" not in text or opens in text
            )


def test_llama_writes_words_or_a_call(tokenizer):
    syntax = Syntax(calls="llama3")
    for seed in range(4):
        (found,) = parts(syntax, written(tokenizer, asked(strict=("move", "stop")), syntax, "", seed)) or [Said("")]
        assert isinstance(found, Said) or check(found) is None


def test_with_a_schema_too_the_answer_follows_it_or_calls(tokenizer):
    syntax, kinds, schema = Syntax(calls="hermes"), set(), {"enum": ["yes", "no"]}
    for seed in range(8):
        found = parts(syntax, written(tokenizer, asked(schema, strict=("move", "stop")), syntax, TEMPLATES["hermes"], seed))
        kinds |= {type(part) for part in found}
        assert isinstance(found[0], ToolCall) or json.loads(found[0].text) in ("yes", "no")
    assert kinds == {Said, ToolCall}
    (must,) = parts(syntax, written(tokenizer, asked(schema, calls="required", function="stop", parallel=False), syntax, "", 0))
    assert must == ToolCall("stop", "{}"), "a call that is required comes, whatever the form of other answers"


@pytest.mark.parametrize("markers", ["text", "tokens"])
def test_reasoning_that_the_prompt_has_opened_comes_first(tokenizer, special, markers):
    own, syntax = (special if markers == "tokens" else tokenizer), Syntax(thought=THOUGHT, in_thought=True, calls="hermes")
    matcher = constraint._constraint(
        grammar_of(asked(calls="required"), syntax, TEMPLATES["hermes"], own), own, [own.eos_token_id], "tools"
    )._matcher
    text = 'It has to move.\n</think>\n\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    assert matcher.consume_tokens(own(text, add_special_tokens=False)["input_ids"]) and matcher.is_accepting()
    assert parts(syntax, text) == [Thought("It has to move."), ToolCall("stop", "{}")]
    alone = Syntax(thought=THOUGHT, in_thought=True)
    matcher = constraint._constraint(
        grammar_of(asked({"enum": [1]}, tools=None), alone, "", own), own, [own.eos_token_id], "tools"
    )._matcher
    assert matcher.consume_tokens(own("hm\n</think>\n\n1", add_special_tokens=False)["input_ids"]) and matcher.is_accepting()


def test_free_answers_have_no_grammar(tokenizer):
    hermes = Syntax(calls="hermes", thought=THOUGHT)
    assert grammar_of(asked(), hermes, "", tokenizer) is None and grammar_of(asked(tools=None), None, "", tokenizer) is None
    assert grammar_of(asked({"enum": [1]}, tools=None), Syntax(thought=THOUGHT), "", tokenizer) is None, "the schema alone is enough"


def test_strings_as_elements_are_any_text_and_have_no_bounds(tokenizer):
    syntax = Syntax(calls="qwen_xml")
    words = {"type": "object", "properties": {"of": {"type": "string"}, "n": {"type": ["integer", "null"]}}, "required": ["of"]}
    request = asked(tools=[{"type": "function", "function": {"name": "f", "parameters": words}}], calls="required")
    matcher = constraint.of_request(request, syntax, tokenizer, [tokenizer.eos_token_id])._matcher
    text = "<tool_call>\n<function=f>\n<parameter=of>\na < b\n</param\n</parameter>\n<parameter=n>\nnull\n</parameter>\n</function>\n</tool_call>"
    assert matcher.consume_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]) and matcher.is_accepting()
    words["properties"]["of"]["maxLength"] = 3
    with pytest.raises(BadRequest, match=r"maxLength of f\.of cannot be followed") as refused:
        constraint.of_request(request, syntax, tokenizer, [tokenizer.eos_token_id])
    assert refused.value.param == "tools"


def test_parameters_that_cannot_be_followed_are_refused(tokenizer):
    broken = [{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}]
    with pytest.raises(BadRequest, match="The schema of a function's parameters cannot be followed here") as refused:
        constraint.of_request(asked(tools=broken, calls="required"), Syntax(calls="hermes"), tokenizer, [tokenizer.eos_token_id])
    assert refused.value.param == "tools" and refused.value.hint
