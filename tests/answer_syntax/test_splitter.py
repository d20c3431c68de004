"""Answers are divided the same way however they are cut, and no text is lost."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.answer_syntax import FAMILIES, NAME, THOUGHT, Syntax, ToolCall
from app.answer_syntax._splitter import CallPiece, Said, Splitter, Thought

CALL = '<tool_call>\n{"name": "weigh", "arguments": {"of": "maple"}}\n</tool_call>'
WEIGH = ToolCall("weigh", '{"of": "maple"}')
HERMES, LLAMA, MISTRAL = (Syntax(thought=THOUGHT, calls=name) for name in ("hermes", "llama3", "mistral"))
ALONE = HERMES.model_copy(update={"parallel": False})
FRAGMENTS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", CALL, '{"name": "f", "parameters": {}}', "[ARGS]", "{}", "\n", " ", "<", "a", "é"]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12).map("".join)
SYNTAXES = st.builds(
    Syntax, thought=st.sampled_from([THOUGHT, None]), calls=st.sampled_from([None, *FAMILIES]), parallel=st.booleans(),
)  # fmt: skip


def divided(syntax: Syntax, text: str, cuts: list[int] | None = None) -> list[Thought | Said | ToolCall]:
    """The parts of a text that comes in pieces, neighboring ones of a kind joined; character by character without `cuts`."""
    splitter, found = Splitter(syntax), []
    edges = [0, *(sorted(set(cuts)) if cuts is not None else range(1, len(text))), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    for part in [part for piece in pieces for part in splitter.push(piece)] + splitter.end():
        if found and type(found[-1]) is type(part) in (Thought, Said):
            part = type(part)(found.pop().text + part.text)
        found.append(part)
    return found


@pytest.mark.parametrize(
    ("syntax", "text", "parts"),
    [
        (HERMES, "Spruce, of course.\n", [Said("Spruce, of course.\n")]),
        (HERMES, CALL, [WEIGH]),
        (HERMES, f"Let me see.\n{CALL}\n{CALL}\n", [Said("Let me see."), WEIGH, WEIGH]),
        (HERMES, f"<think>\nIt is\nmaple. \n</think>\n\nSure.\n{CALL}", [Thought("It is\nmaple."), Said("Sure."), WEIGH]),
        (HERMES, "<think>\n\n</think>\n\nYes.", [Said("Yes.")]),
        (HERMES, "A <think> in the middle </think> is text.", [Said("A <think> in the middle </think> is text.")]),
        (HERMES, "<think>It never ends", [Thought("It never ends")]),
        (HERMES, f"{CALL} and more", [WEIGH, Said("and more")]),
        (ALONE, f"a {CALL} b {CALL} c {CALL}", [Said("a"), WEIGH, Said("b\nc")]),
        (ALONE, f"{CALL}{CALL} c", [WEIGH, Said("c")]),
        (HERMES, CALL.removesuffix("\n</tool_call>"), [WEIGH]),
        (HERMES, "x <tool_call>\nno JSON\n</tool_call>\ny", [Said("x <tool_call>\nno JSON\n</tool_call>\ny")]),
        (HERMES, '<tool_call>{"name": "weigh", "argum', [Said('<tool_call>{"name": "weigh", "argum')]),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>', [Said('<tool_call>{"arguments": {}}</tool_call>')]),
        (HERMES.model_copy(update={"parallel": False}), f"{CALL}\n{CALL}", [WEIGH]),
        (HERMES.model_copy(update={"calls": None}), f"a {CALL}", [Said(f"a {CALL}")]),
        (Syntax(thought=THOUGHT, in_thought=True), "\nIt is.\n</think>\n\nMaple.", [Thought("It is."), Said("Maple.")]),
        (Syntax(thought=("<a>", "</a>"), calls="described", call_markers=("<c>", "</c>")), '<a>x</a><c>{"name": "f", "arguments": {}}</c>', [Thought("x"), ToolCall("f", "{}")]),
        (LLAMA, '{"name": "weigh", "parameters": {"of": "maple"}}', [WEIGH]),
        (LLAMA, '<|python_tag|>{"name": "weigh", "parameters": {"of": "maple"}}; {"name": "weigh", "parameters": {"of": "maple"}}', [WEIGH, WEIGH]),
        (LLAMA, '{"wood": "maple"}', [Said('{"wood": "maple"}')]),
        (LLAMA, 'It is {"name": "weigh", "parameters": {}}', [Said('It is {"name": "weigh", "parameters": {}}')]),
        (MISTRAL, '[TOOL_CALLS] [{"name": "weigh", "arguments": {"of": "maple"}}, {"name": "f", "arguments": {}}]', [WEIGH, ToolCall("f", "{}")]),
        (MISTRAL, 'Well. [TOOL_CALLS]weigh[ARGS]{"of": "maple"}[TOOL_CALLS]f{"a": 1}', [Said("Well."), WEIGH, ToolCall("f", '{"a": 1}')]),
        (MISTRAL, "[TOOL_CALLS] maple", [Said("[TOOL_CALLS] maple")]),
    ],
)  # fmt: skip
def test_what_a_model_writes_is_divided(syntax, text, parts):
    assert divided(syntax, text) == divided(syntax, text, []) == parts


@given(SYNTAXES, TEXTS, st.lists(st.integers(0, 80), max_size=8))
def test_it_is_the_same_however_the_text_is_cut(syntax, text, cuts):
    assert divided(syntax, text, [cut for cut in cuts if cut < len(text)]) == divided(syntax, text)


@given(SYNTAXES, TEXTS)
@example(ALONE, f"{CALL}<think>{CALL}<think>")
def test_no_text_is_lost(syntax, text):
    """All that is not white space is in a part, but the markers of what was understood."""
    parts = divided(syntax, text)
    told = "\n".join("" if isinstance(part, ToolCall) else part.text for part in parts)  # what a marker parts stays parted
    calls = [part for part in parts if isinstance(part, ToolCall)]
    if not calls and not any(isinstance(part, Thought) for part in parts) and THOUGHT[0] not in text:
        assert told == text
    left = iter(text)
    assert all(character in left for character in "".join(told.split())), "in their order"
    assert all(word in text for word in told.split())
    assert calls or len(told.split()) <= len(text.split()) + text.count("<")
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)


@given(
    st.sampled_from([(name, how) for name, how in FAMILIES.items() if not how.elements]),
    st.lists(st.tuples(st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True), st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=3)), min_size=1, max_size=3),
    st.sampled_from(["", "[ARGS]"]),
)  # fmt: skip
def test_calls_are_read_as_they_are_written(family, calls, template):
    """The form of constrained decoding and the reader are the same for each family."""
    name, how = family
    form = how.form(template)
    if form.between is None:
        calls = calls[:1]
    text = (form.between or "").join(form.before.replace(NAME, n) + json.dumps(a) + form.after for n, a in calls)
    parts = divided(Syntax(calls=name), form.first + text + form.last)
    assert [(part.name, json.loads(part.arguments)) for part in parts] == calls


def forced(name: str, template: str, **more) -> Syntax:
    return Syntax(calls=name, forced=FAMILIES[name].form(template), **more)


@given(
    st.sampled_from([name for name, how in FAMILIES.items() if not how.elements]),
    st.lists(st.tuples(st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True), st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.lists(st.text('{}[]"\\', max_size=4)), max_size=3)), min_size=1, max_size=3),
    st.sampled_from(["", "[ARGS]"]),
    st.none() | st.lists(st.integers(0, 200), max_size=8),
    st.sampled_from([None, 1]),
)  # fmt: skip
def test_arguments_of_forced_calls_come_in_pieces(name, calls, template, cuts, indent):
    """However the text is cut, the pieces of each call are its arguments as they were written."""
    syntax = forced(name, template)
    form = syntax.forced
    if form.between is None:
        calls = calls[:1]
    written = [(n, json.dumps(a, indent=indent, ensure_ascii=False)) for n, a in calls]
    text = form.first + (form.between or "").join(form.before.replace(NAME, n) + a + form.after for n, a in written) + form.last
    parts = divided(syntax, text, cuts if cuts is None else [cut for cut in cuts if cut < len(text)])
    assert all(isinstance(part, CallPiece) for part in parts), parts
    found: list[tuple[str, str]] = []
    for part in parts:
        if part.name is not None:
            assert part.arguments == ""
            found.append((part.name, ""))
        else:
            found[-1] = (found[-1][0], found[-1][1] + part.arguments)
    assert found == written
    if cuts is None:
        assert len(parts) == sum(1 + len(a) for _, a in written), "character by character"


def test_forced_calls_after_reasoning_cut_off_and_in_another_form():
    thinks = forced("hermes", "", thought=THOUGHT, in_thought=True)
    assert divided(thinks, f"It is.\n</think>\n\n{CALL}", [])[:2] == [Thought("It is."), CallPiece("weigh", "")]
    syntax, begin = forced("hermes", ""), '<tool_call>\n{"name": "weigh", "arguments": '
    assert divided(syntax, begin + '{"of": "ma', []) == [CallPiece("weigh", ""), CallPiece(None, '{"of": "ma')]
    assert divided(syntax, begin + '{"of": "maple"}}\n</tool', []) == [CallPiece("weigh", ""), CallPiece(None, '{"of": "maple"}')]
    assert divided(syntax, '<tool_call>\n{"name": "wei') == [Said('<tool_call>\n{"name": "wei')]
    assert divided(syntax, f"Sure. {CALL}") == [Said("Sure."), WEIGH], "what is in another form is read when it is whole"


XML = Syntax(calls="qwen_xml")
CUT = {
    "type": "object",
    "properties": {"of": {"type": "string"}, "mm": {"type": "number"}, "tags": {"anyOf": [{"type": "array"}, {"type": "null"}]}, "any": {}},
}


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        ("<parameter=of>\n3\n</parameter>\n<parameter=mm>\n3\n</parameter>", {"of": "3", "mm": 3}),
        ('<parameter=of>\ntwo\nlines <b>\n\n</parameter><parameter=tags>["a"]</parameter>', {"of": "two\nlines <b>\n", "tags": ["a"]}),
        ("<parameter=tags>\nnull\n</parameter>\n<parameter=mm>\nthin\n</parameter>", {"tags": None, "mm": "thin"}),
        ("<parameter=any>\n3\n</parameter>\n<parameter=unknown>\n3\n</parameter>", {"any": "3", "unknown": "3"}),
        ("", {}),
        ("<parameter=of>\nnever closed", None),
        ("words <parameter=of>\n3\n</parameter>", None),
    ],
)
def test_arguments_that_are_elements_have_the_types_of_their_schema(inside, arguments):
    text = f"<tool_call>\n<function=cut>\n{inside}\n</function>\n</tool_call>"
    splitter = Splitter(XML, [{"type": "function", "function": {"name": "cut", "parameters": CUT}}])
    (part,) = splitter.push(text) + splitter.end()
    assert part == (Said(text) if arguments is None else ToolCall("cut", json.dumps(arguments)))


def test_a_long_call_is_looked_at_once():
    splitter = Splitter(HERMES)
    splitter.push('<tool_call>{"name": "f", "arguments": {"x": "')
    for _ in range(200_000):
        splitter.push("a")
    assert splitter.looked > 190_000 and [part.name for part in splitter.push('"}}</tool_call>')] == ["f"]
