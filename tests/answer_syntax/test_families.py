"""Which family of tool calls a model is of, by its chat template or by its tokenizer's own description."""

from __future__ import annotations

import pytest

from app.answer_syntax import FAMILIES, THOUGHT, family_of, thought_markers
from app.answer_syntax.mistral import Mistral
from tests.tiny import AGENT_TEMPLATE, CHAT_TEMPLATE

LLAMA = '{{- \'<|start_header_id|>system<|end_header_id|>\n\n{"name": function name, "parameters": dictionary}\' }}'
JSON = {"open": "<c>", "close": "</c>", "repeats": True, "content": "json", "transform": {"type": "function", "function": "{content}"}}


def described(**fields):
    return {"start_anchor": "<|im_start|>", "fields": fields | {"content": {"content": "text"}}}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (CHAT_TEMPLATE, None),
        (AGENT_TEMPLATE, "hermes"),
        (LLAMA, "llama3"),
        (LLAMA.replace('"', '\\"'), "llama3"),
        ("{{ '[TOOL_CALLS] ' }}", "mistral"),
        ("{{ '<tool_call>\n<function=' + call.name }}", "qwen_xml"),
        ("{{ '<call>' + call.name }}", None),
    ],
)
def test_the_family_is_found_in_the_template(template, name):
    found = family_of(template)
    assert (found.name if found else None) == name and set(FAMILIES) == {"hermes", "qwen_xml", "llama3", "mistral"}


@pytest.mark.parametrize(
    ("field", "markers"),
    [
        (JSON, ("<c>", "</c>")),
        ({**JSON, "transform": {"function": {"name": "{content.name}", "arguments": "{content.arguments}"}}}, ("<c>", "</c>")),
        ({k: v for k, v in JSON.items() if k != "open"} | {"open_pattern": r"\s*<\|call\|>"}, ("<|call|>", "</c>")),
        ({k: v for k, v in JSON.items() if k != "open"} | {"open_pattern": r"<c(a|aa)+>"}, None),
        ({k: v for k, v in JSON.items() if k != "open"} | {"open_pattern": r"<call:(?P<name>\w+)"}, None),
        ({**JSON, "content": "xml-inline"}, None),
        ({**JSON, "content_args": {"unquoted_keys": True}}, None),
        ({**JSON, "open": ["<c>", "<d>"]}, None),
        ({**JSON, "close": None}, None),
        ({**JSON, "transform": None}, None),
        ("no field", None),
    ],
)
def test_a_description_of_literal_markers_comes_first(field, markers):
    """What it cannot read is left to the families: here to hermes."""
    found = family_of(AGENT_TEMPLATE, described(tool_calls=field))
    assert (found.opens, found.closes) == (markers or ("<tool_call>", "</tool_call>"))
    assert found.name == ("described" if markers else "hermes")


@pytest.mark.parametrize("broken", [None, [], "x", {"fields": []}, {"fields": {"tool_calls": 3, "thinking": None}}])
def test_a_description_that_is_none_is_none(broken):
    assert family_of(CHAT_TEMPLATE, broken) is None and thought_markers(CHAT_TEMPLATE, broken) is None


def test_markers_of_reasoning():
    assert thought_markers(AGENT_TEMPLATE) == THOUGHT and thought_markers(CHAT_TEMPLATE) is None
    own = described(thinking={"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"})
    assert thought_markers(AGENT_TEMPLATE, own) == ("<|channel>thought\n", "<channel|>")


def test_ids_for_mistral_have_nine_letters_and_digits_and_go_on_belonging_together():
    call = {"id": "call_0123456789abcdef", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    told = Mistral().messages([{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": call["id"], "content": "3"}])
    short = told[0]["tool_calls"][0]["id"]
    assert short == told[1]["tool_call_id"] and len(short) == 9 and short.isalnum() and call["id"].startswith("call_")
    assert Mistral().messages([{"role": "tool", "tool_call_id": "abcDEF123"}])[0]["tool_call_id"] == "abcDEF123"
