"""OpenAI's rules for conversations."""

import pytest

from app.formats.chat import Chat
from app.formats.sharegpt import ShareGpt

MAPPING = {"messages": "messages"}


def user(text="hi"):
    return {"role": "user", "content": text}


def answer(text="hello", **rest):
    return {"role": "assistant", "content": text, **rest}


def rules(*messages, **rest):
    return [finding.rule for finding in Chat().check({"messages": list(messages), **rest}, MAPPING) if finding.severity == "error"]


@pytest.mark.parametrize(
    "messages",
    [
        (user(), answer()),
        ({"role": "system", "content": "s"}, user(), answer()),
        ({"role": "developer", "content": "s"}, user(), answer(), user(), answer(weight=1)),
        (user(), answer(weight=0), user(), answer()),
        (user(), answer("", weight=0), user(), answer()),
        (
            user(),
            answer(None, tool_calls=[{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
            {"role": "tool", "tool_call_id": "a", "content": "3"},
            answer(),
        ),
        ({"role": "user", "content": [{"type": "text", "text": "part"}]}, answer()),
    ],
)
def test_good_conversations(messages):
    assert rules(*messages) == []


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ((user(), user(), answer()), "wrong_role_order"),
        ((user(), answer(), answer()), "wrong_role_order"),
        ((user(), answer(), user()), "wrong_role_order"),
        ((user(), {"role": "system", "content": "late"}, answer()), "wrong_role_order"),
        (({"role": "tool", "content": "3"}, user(), answer()), "wrong_role_order"),
        ((user(),), "no_answer"),
        ((user(), answer("  ")), "empty_answer"),
        ((user(), answer(None)), "empty_answer"),
        ((user(""), answer()), "empty"),
        ((user(), answer(weight=0)), "nothing_to_learn"),
        ((user(), answer(weight=2)), "wrong_weight"),
        ((user(), answer(weight=True)), "wrong_weight"),
        (({"role": "customer", "content": "hi"}, answer()), "wrong_role"),
        (({"content": "hi"}, answer()), "wrong_role"),
        ((user(), {"role": "assistant", "content": 3}), "wrong_shape"),
        ((user(), "hello"), "wrong_shape"),
        (({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, answer()), "not_text"),
        ((user(), answer(None, tool_calls=["f"])), "wrong_shape"),
    ],
)
def test_bad_conversations(messages, rule):
    assert rule in rules(*messages)


def test_a_finding_says_where_and_offers_a_hint():
    (finding,) = Chat().check({"messages": [user(), {"role": "Human", "content": "x"}, answer()]}, MAPPING)
    assert finding.column == "messages[1].role"
    assert finding.value == "Human"
    assert finding.fix == {"label": "Change to “user”", "operation": "role", "arguments": {"name": "human", "role": "user"}}


def test_normalising_keeps_weight_name_calls_and_tools_and_joins_text_parts():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            answer(None, tool_calls=[call], weight=0, extra=1),
            {"role": "tool", "tool_call_id": "a", "content": "3"},
            answer("done"),
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    result = Chat().normalise(row, {"messages": "messages", "tools": "tools"})
    assert result["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab", "name": "ann"},
        {"role": "assistant", "content": "", "weight": 0, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "a"},
        {"role": "assistant", "content": "done"},
    ]
    assert result["tools"] == row["tools"]


def test_both_spellings_of_sharegpt_give_the_same_messages():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    pairs = [{"human": "a", "assistant": "b"}]
    mapping = {"conversations": "c"}
    first, second = (ShareGpt().normalise({"c": value}, mapping) for value in (turns, pairs))
    assert first == second == {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_two_people_may_speak_one_after_the_other():
    ann, bob = {**user(), "name": "ann"}, {**user(), "name": "bob"}
    assert (
        rules(ann, bob, answer()) == []
        and "wrong_role_order" in rules(ann, ann, answer())
        and "wrong_role_order" in rules(user(), bob, answer())
    )


def test_an_unknown_speaker_is_named():
    (finding,) = ShareGpt().check({"c": [{"from": "narrator", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"conversations": "c"})
    assert finding.rule == "wrong_role"
    assert "narrator" in finding.message
