"""What a chat template knows of tools and thinking is found out by asking it."""

from __future__ import annotations

import uuid

import pytest

from app.answer_syntax import THOUGHT, Syntax
from app.answer_syntax._splitter import Said, Splitter, ToolCall
from app.errors import BadRequest
from app.inference.protocol import GenerateRequest, Sampling, ToolUse
from app.spec import ModelRef
from tests.tiny import AGENT_TEMPLATE, CHAT_TEMPLATE, build_tokenizer
from worker.data import answer_form
from worker.data.chat_template import render_prompt
from worker.inference import answer_plan
from worker.inference.answer_plan import Abilities, abilities
from worker.inference.request import render
from worker.inference.sampling import Detokenizer

ASK = [{"role": "user", "content": "What does it weigh?"}]
TOOLS = [{"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}}}]
EFFORT = "{{ 'Reasoning: ' + (reasoning_effort or 'medium') + '\n' }}" + CHAT_TEMPLATE
ALWAYS = CHAT_TEMPLATE.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
MENTIONED = CHAT_TEMPLATE + "{% if tools_in_another_form and enable_thinking is undefined %}x{% endif %}"


def with_template(template: str, *special: str):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def asked(**more) -> GenerateRequest:
    ref = ModelRef.model_construct(name="tiny", kind="dialogue")
    given = {
        "id": uuid.uuid4(),
        "model": ref,
        "messages": ASK,
        "tools": None,
        "tool_use": ToolUse(),
        "effort": None,
        "prompt": None,
        "tokens": None,
    }
    return GenerateRequest.model_construct(**given | {"split": True, "sampling": Sampling()} | more)


@pytest.mark.parametrize(
    ("template", "tools", "switch", "levels", "family", "thought"),
    [
        (AGENT_TEMPLATE, True, "enable_thinking", False, "hermes", THOUGHT),
        (CHAT_TEMPLATE, False, None, False, None, None),
        (MENTIONED, False, None, False, None, None),
        (EFFORT, False, None, True, None, None),
        (ALWAYS, False, None, False, None, THOUGHT),
        (AGENT_TEMPLATE.replace("enable_thinking", "thinking"), True, "thinking", False, "hermes", THOUGHT),
    ],
)
def test_a_template_is_asked_what_it_knows(template, tools, switch, levels, family, thought):
    tokenizer = with_template(template)
    assert abilities(tokenizer) == Abilities(tools, switch, levels) and answer_form.thought(tokenizer) == thought
    found = answer_form.family(tokenizer)
    assert (found.name if found else None) == family


def test_another_template_of_the_same_tokenizer_is_asked_again():
    tokenizer = with_template(CHAT_TEMPLATE)
    assert not abilities(tokenizer).tools
    tokenizer.chat_template = AGENT_TEMPLATE
    assert abilities(tokenizer).tools and abilities(tokenizer) is abilities(tokenizer)


@pytest.mark.parametrize(
    ("template", "effort", "ends"),
    [
        (AGENT_TEMPLATE, None, "assistant\n"),
        (AGENT_TEMPLATE, "none", "assistant\n<think>\n\n</think>\n\n"),
        (AGENT_TEMPLATE, "low", "assistant\n<think>\n"),
        (CHAT_TEMPLATE, "none", "assistant\n"),
    ],
)
def test_effort_reaches_the_prompt(template, effort, ends):
    request, tokenizer = asked(effort=effort), with_template(template)
    text, _ = render(request, tokenizer, 512)
    assert text.endswith(ends)
    syntax = answer_plan.syntax_of(request, tokenizer, text)
    assert syntax == (Syntax(thought=THOUGHT, in_thought=effort == "low") if template == AGENT_TEMPLATE else None)


def test_levels_reach_the_prompt():
    text, _ = render(asked(effort="high"), with_template(EFFORT), 512)
    assert text.startswith("Reasoning: high\n")


@pytest.mark.parametrize(("template", "effort"), [(CHAT_TEMPLATE, "high"), (ALWAYS, "none"), (ALWAYS, "low")])
def test_an_effort_that_a_template_does_not_know_is_refused(template, effort):
    with pytest.raises(BadRequest, match="tiny") as refused:
        render(asked(effort=effort), with_template(template), 512)
    assert refused.value.param == "reasoning_effort" and refused.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("template", "words"),
    [(CHAT_TEMPLATE, "knows no tools"), (AGENT_TEMPLATE.replace("<tool_call>", "<call>"), "in a form that the studio cannot read")],
)
def test_tools_that_a_template_does_not_know_are_refused(template, words):
    with pytest.raises(BadRequest, match=words) as refused:
        render(asked(tools=TOOLS), with_template(template), 512)
    assert refused.value.param == "tools" and refused.value.code == "unsupported_parameter"


def test_arguments_of_earlier_calls_are_written_as_objects():
    """The API has them as JSON text, which a template's tojson would quote once more; rows of training data have either."""

    def turns(arguments):
        call = {"id": "a", "type": "function", "function": {"name": "weigh", "arguments": arguments}}
        return [*ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "a", "content": "68 g"}]

    tokenizer = with_template(AGENT_TEMPLATE)
    text, ids = render_prompt(tokenizer, "dialogue", turns('{"of": "maple"}'), TOOLS)
    assert '{"name": "weigh", "arguments": {"of": "maple"}}\n</tool_call><|im_end|>\n<|im_start|>tool\n68 g<|im_end|>' in text
    assert (text, ids) == render_prompt(tokenizer, "dialogue", turns({"of": "maple"}), TOOLS)
    assert '"arguments": "no JSON"' in render_prompt(tokenizer, "dialogue", turns("no JSON"), TOOLS)[0]


def test_markers_that_are_special_tokens_are_read_and_never_shown():
    tokenizer = with_template(AGENT_TEMPLATE, "<tool_call>", "</tool_call>", "<think>", "</think>")
    syntax = answer_plan.syntax_of(asked(tools=TOOLS), tokenizer, "x")
    hidden = answer_form.hidden_tokens(tokenizer, syntax)
    written = 'Let me see.<|im_start|>\n<tool_call>\n{"name": "weigh", "arguments": {}}\n</tool_call>'
    text, splitter, parts = Detokenizer(tokenizer, [5, 6], (), hidden), Splitter(syntax), []
    for token in tokenizer(written, add_special_tokens=False)["input_ids"]:
        parts += splitter.push(text.push(token))
    parts += splitter.push(text.end()) + splitter.end()
    assert "".join(part.text for part in parts if isinstance(part, Said)) == "Let me see." and parts[-1] == ToolCall("weigh", "{}")
    tokenizer.response_template = {
        "fields": {"tool_calls": {"open": "<c>", "close": "</c>", "content": "json", "transform": {"function": "{content}"}}}
    }
    assert answer_plan.syntax_of(asked(tools=TOOLS), tokenizer, "x").call_markers == ("<c>", "</c>"), "its own description comes first"
    assert len(answer_form.special_markers(tokenizer, syntax)) == 4
    plain = with_template(AGENT_TEMPLATE)
    assert answer_form.hidden_tokens(plain, answer_plan.syntax_of(asked(tools=TOOLS), plain, "x")) is None
