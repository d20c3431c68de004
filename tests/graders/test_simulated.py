"""Simulated tools: by a table, by a function, and what is refused."""

from __future__ import annotations

import json

import pytest

from app.errors import BadField
from app.graders import SimulatedTools

TABLE = [{"name": "add", "arguments": {"a": 1, "b": 2}, "result": 3}, {"name": "now", "result": {"hour": 7}}]


def test_a_table_answers_by_name_and_arguments() -> None:
    tools, item = SimulatedTools(), {"tool_results": TABLE}
    assert tools.answer("add", '{"b": 2.0, "a": 1}', item) == "3" and tools.answer("now", "", item) == '{"hour": 7}'
    assert tools.answer("now", "{}", {"tool_results": json.dumps(TABLE)}) == '{"hour": 7}', "a column of a CSV file is text"
    for name, arguments in (("add", '{"a": 1}'), ("subtract", "{}")):
        assert "no result for these arguments" in json.loads(tools.answer(name, arguments, item))["error"]
    assert json.loads(tools.answer("add", "{", item))["error"] == "the arguments are not JSON"
    assert tools.answers_for(item) and not tools.answers_for({"tool_results": "none"}) and not tools.answers_for({})


def test_a_function_answers_in_the_sandbox() -> None:
    tools = SimulatedTools("def call(name, arguments, item):\n    return {name: sum(arguments['n']) * item['times']}")
    assert tools.answers_for({}) and tools.answer("sum", '{"n": [1, 2]}', {"times": 2}) == '{"sum": 6}'
    assert "KeyError" in json.loads(tools.answer("sum", "{}", {"times": 2}))["error"]
    forever = SimulatedTools("def call(name, arguments, item):\n    while True:\n        pass")
    assert json.loads(forever.answer("sum", "{}", {}))["error"]
    opening = SimulatedTools("def call(name, arguments, item):\n    return open('/etc/passwd').read()")
    assert "error" in json.loads(opening.answer("sum", "{}", {}))


@pytest.mark.parametrize(
    ("source", "words"),
    [("x = 1", "no function call"), ("call = 1", "call is no function"), ("def call(", "does not run"), ("1 / 0", "does not run")],
)
def test_code_that_cannot_answer_is_refused(source: str, words: str) -> None:
    with pytest.raises(BadField, match=words) as refused:
        SimulatedTools(source).prove("preference.tool_source")
    assert refused.value.param == "preference.tool_source"
    SimulatedTools().prove("preference.tool_source")
