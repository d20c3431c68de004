"""Every type of grader on answers whose grade is known."""

import json

import pytest

from app import graders
from app.errors import BadField
from app.graders import GRADERS, GradedSample, GradeError, Reply
from app.kit import similarity

ITEM = {"reference": "The cat sat on the mat.", "number": 12, "deep": {"list": [{"name": "a b"}]}, "call": {"city": "Oslo"}}
ANSWER = "{{sample.output_text}}"


def made(kind: str, **fields):
    return graders.read({"type": kind, "name": "g", **fields})


def score(grader, text: str, item=None, answer=graders.no_models) -> float:
    found = graders.scored(grader, graders.grade(grader, GradedSample(text), ITEM if item is None else item, answer))
    assert found.error is None, found.error
    return found.score


def fault(grader, text: str, item=None, answer=graders.no_models) -> tuple[str, str]:
    found = graders.scored(grader, graders.grade(grader, GradedSample(text), ITEM if item is None else item, answer))
    assert found.error is not None, found
    assert found.score is None
    return found.error


def refused(kind: str, **fields) -> BadField:
    with pytest.raises(BadField) as caught:
        made(kind, **fields)
    return caught.value


@pytest.mark.parametrize("kind", GRADERS)
def test_the_example_of_each_type_is_a_grader(kind):
    example = dict(GRADERS[kind].example)
    grader = made(kind, **example | ({"model": "judge"} if "model" in example else {}))
    assert graders.to_json(graders.read(graders.to_json(grader))) == graders.to_json(grader)
    assert GRADERS[kind].title and GRADERS[kind].summary.endswith(".")


@pytest.mark.parametrize(
    ("operation", "text", "expected"),
    [
        ("eq", "The cat sat on the mat.", 1), ("eq", "the cat sat on the mat.", 0), ("ne", "no", 1), ("ne", "The cat sat on the mat.", 0),
        ("like", "He said: The cat sat on the mat.", 1), ("like", "THE CAT SAT ON THE MAT.", 0), ("ilike", "THE CAT SAT ON THE MAT.", 1),
    ],
)  # fmt: skip
def test_string_check(operation, text, expected):
    assert score(made("string_check", input=ANSWER, operation=operation, reference="{{item.reference}}"), text) == expected


METRICS = ("fuzzy_match", *similarity.BY_WORDS)


@pytest.mark.parametrize("metric", METRICS)
def test_similarity_is_1_for_the_same_text_and_0_for_another(metric):
    grader = made("text_similarity", input=ANSWER, reference="{{item.reference}}", evaluation_metric=metric)
    same, near, far = (score(grader, text) for text in (ITEM["reference"], "The cat sat on the mat today.", "xyz qqq"))
    assert same == pytest.approx(1, abs=0.01) and 0 < near < same and far < 0.35 and far < near
    assert score(grader, "") == 0


def test_bleu_is_that_of_sacrebleu():
    from sacrebleu.metrics.bleu import BLEU

    theirs = BLEU(effective_order=True, tokenize="none", lowercase=True)
    pairs = [
        ("the cat sat on the mat", "the cat is on the mat"),
        ("a b", "a b c d e"),
        ("one two three four five six", "two three four one"),
        ("x", "x y"),
    ]
    for answer, reference in pairs:
        expected = theirs.sentence_score(answer, [reference]).score / 100
        assert similarity.bleu(answer.split(), reference.split()) == pytest.approx(expected, abs=1e-6), answer


def test_rouge_and_gleu_and_meteor_by_hand():
    answer, reference = ["the", "cat", "the", "cat"], ["the", "cat", "sat"]
    assert similarity.rouge_n(answer, reference, 1) == pytest.approx(2 * 2 / 7)
    assert similarity.rouge_n(answer, reference, 2) == pytest.approx(2 * 1 / 5)
    assert similarity.rouge_l(answer, reference) == pytest.approx(2 * 2 / 7)
    assert similarity.gleu(answer, reference) == pytest.approx(3 / 10)  # the, cat, the cat of 10 n-grams
    # 2 matches in one chunk: P = 2/4, R = 2/3, F = 10PR/(R+9P), penalty 0.5·(1/2)³.
    assert similarity.meteor(answer, reference) == pytest.approx((10 / 3) / (2 / 3 + 4.5) * (1 - 0.5 / 8))
    assert similarity.meteor(["b", "a"], ["a", "b"]) == pytest.approx(0.5)  # every word in a chunk of its own


def test_cosine_asks_for_embeddings():
    asked = []

    def answer(ask):
        asked.append(ask)
        return Reply(vectors=((1.0, 0.0), (0.6, 0.8)), tokens=7, model="encoder")

    grader = made("text_similarity", input=ANSWER, reference="{{item.reference}}", evaluation_metric="cosine")
    assert list(grader.models()) == [None]
    assert score(grader, "hello", answer=answer) == pytest.approx(0.6)
    assert asked[0].texts == ("hello", ITEM["reference"])
    assert score(grader, " ", answer=answer) == 0 and len(asked) == 1  # nothing to embed


DOCUMENTED = """
from rapidfuzz import fuzz, utils

def grade(sample, item) -> float:
    output_text = sample["output_text"]
    reference_answer = item["reference_answer"]
    return fuzz.WRatio(output_text, reference_answer, processor=utils.default_process) / 100.0
"""


def test_the_python_grader_of_the_documentation_runs_unchanged():
    grader = made("python", source=DOCUMENTED, image_tag="2025-05-08")
    assert score(grader, "FUZZY WUZZY had no hair!", {"reference_answer": "fuzzy wuzzy had no hair"}) == 1
    assert 0.3 < score(grader, "fuzzy", {"reference_answer": "fuzzy wuzzy was a bear"}) < 1


def test_a_python_grader_sees_the_sample():
    source = "def grade(sample, item):\n    assert sample['choices'][0]['message']['content'] == sample['output_text']\n    return sample['output_json']['n'] / item['number']"
    grader = made("python", source=source)
    assert score(grader, '{"n": 6}') == 0.5
    kind, message = fault(grader, "no json")
    assert kind == "python_grader_runtime_error" and "TypeError" in message and "line 3" in message


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("x = 1", "defines no function grade"), ("grade = 3", "no function"), ("def grade(sample):\n    return 1", "two values"),
        ("async def grade(sample, item):\n    return 1", "async"), ("def grade(sample, item:\n  return 1", "does not run"),
        ("import numpy\ndef grade(sample, item):\n    return 1", "numpy"), ("def grade(sample, item):\n    import requests\n    return 1", "requests"),
        ("def grade(sample, item):\n    from difflib import SequenceMatcher\n    return 1", "difflib"),
        ("def grade(sample, item):\n    yield 1", "yield"), ("class A(dict):\n    pass\ndef grade(sample, item):\n    return 1", "inheritance"),
        ("def grade(sample, item):\n    return eval_not_there", ""), ("def grade(sample, item):\n    return globals()", "globals"),
        ("1/0\ndef grade(sample, item):\n    return 1", "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_what_python_cannot_do_is_said_when_it_is_saved(source, word):
    if not word:  # a name of the code's own is known only when it is called
        assert fault(made("python", source=source), "x")[0] == "python_grader_runtime_error"
        return
    error = refused("python", source=source)
    assert word in error.message and error.param == "grader.source" and error.hint


@pytest.mark.parametrize("value", ["None", "'1'", "[1]", "{}"])
def test_a_python_grader_must_return_a_number(value):
    kind, message = fault(made("python", source=f"def grade(sample, item):\n    return {value}"), "x")
    assert kind == "python_grader_runtime_error" and "must return a number" in message


@pytest.mark.parametrize("value", ["2", "-0.5", "float('nan')", "float('inf')"])
def test_a_reward_outside_the_range_is_no_score(value):
    assert "between 0 and 1" in fault(made("python", source=f"def grade(sample, item):\n    return {value}"), "x")[1]


def test_nothing_is_kept_between_two_answers():
    source = "seen = []\ndef grade(sample, item):\n    seen.append(1)\n    return 1.0 if len(seen) == 1 else 0.0"
    grader = made("python", source=source)
    assert [score(grader, "x") for _ in range(3)] == [1, 1, 1]
    drawn = made("python", source="import random\ndef grade(sample, item):\n    return random.random()")
    assert len({score(drawn, "x") for _ in range(3)}) == 1


JUDGE = {
    "model": "judge",
    "input": [{"role": "developer", "content": "Be strict."}, {"role": "user", "content": "Grade {{sample.output_text}}."}],
}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ('{"result": 4}', 0.75),
        ('I think ```{"steps": [1], "result": 5.0}```', 1.0),
        ("4", 0.75),
        ("The score is 1", 0.0),
        ('{"result": "3"}', 0.5),
    ],
)
def test_a_judge_gives_a_number(said, expected):
    asked = []

    def answer(ask):
        asked.append(ask)
        return Reply(text=said, tokens=9, model="judge")

    grader = made("score_model", **JUDGE, range=[1, 5], sampling_params={"temperature": 0.3, "seed": 4, "max_completions_tokens": 20})
    found = graders.scored(grader, graders.grade(grader, GradedSample("{{item.reference}}"), ITEM, answer))
    assert found.score == pytest.approx(expected) and found.tokens == {"judge": 9}
    (ask,) = asked
    assert [message["role"] for message in ask.messages] == ["system", "user"]
    assert ask.messages[1]["content"].startswith("Grade {{item.reference}}.")  # what was put in is not read again
    assert (ask.temperature, ask.seed, ask.max_tokens) == (0.3, 4, 20)


@pytest.mark.parametrize("said", ["no idea", '{"result": 7}', "", "{" * 5000])
def test_a_judge_that_gives_no_number_in_its_range_gives_no_score(said):
    grader = made("score_model", **JUDGE, range=[1, 5])
    assert fault(grader, "x", answer=lambda ask: Reply(text=said, model="judge"))[0] == "model_grader_parse_error"


@pytest.mark.parametrize(("said", "expected"), [("good", 1), ("Bad.", 0), ('{"result": "good"}', 1), ("It is very good", 1)])
def test_a_judge_gives_a_label(said, expected):
    grader = made("label_model", **JUDGE, labels=["good", "bad"], passing_labels=["good"])
    assert score(grader, "x", answer=lambda ask: Reply(text=said)) == expected
    assert fault(grader, "x", answer=lambda ask: Reply(text="maybe"))[0] == "model_grader_parse_error"


def test_judges_refuse_what_they_cannot_honor():
    picture = [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]
    assert "input_image" in refused("score_model", model="j", input=picture).message
    assert "reasoning_effort" in refused("score_model", **JUDGE, sampling_params={"reasoning_effort": "high"}).param
    assert "none of the labels" in refused("label_model", **JUDGE, labels=["a", "b"], passing_labels=["c"]).message
    assert "lower number" in refused("score_model", **JUDGE, range=[1, 1]).message


def test_a_combination():
    parts = {
        "same": {"type": "string_check", "name": "same", "input": ANSWER, "operation": "eq", "reference": "{{item.reference}}"},
        "short": {"type": "length", "name": "short", "unit": "words", "max": 3},
    }
    grader = made("multi", graders=parts, calculate_output="0.75 * same + (0.5 ^ 2) * min(short, 1)")
    found = graders.scored(grader, graders.grade(grader, GradedSample("one two"), ITEM))
    assert found.score == 0.25 and found.parts == {"same": 0, "short": 1}
    assert score(grader, ITEM["reference"]) == 0.75
    assert (
        score(made("multi", graders=parts["short"], calculate_output="1 - short"), "a b c d") == 1
    )  # the newest client's type: one grader
    assert score(made("multi", graders=list(parts.values()), calculate_output="max(same, short)"), "a") == 1
    divided = made("multi", graders=parts, calculate_output="1 / same")
    assert fault(divided, "no")[0] == "formula_parse_error"


@pytest.mark.parametrize("formula", ["same +", "other", "same.real", "__import__('os')", "same if same else 1", "[same]", "abs()", "'a'", "True", "same << 2", "lambda: 1", "sum(same)", "min(same, key=abs)"])  # fmt: skip
def test_a_formula_may_hold_little(formula):
    part = {"same": {"type": "length", "name": "same", "max": 3}}
    assert "formula" in refused("multi", graders=part, calculate_output=formula).message


def test_a_combination_proves_its_parts():
    part = {"code": {"type": "python", "name": "code", "source": "import numpy\ndef grade(sample, item): return 1"}}
    assert "numpy" in refused("multi", graders=part, calculate_output="code").message
    assert "cannot hold another" in refused("multi", graders={"m": {"type": "multi", "name": "m"}}, calculate_output="m").message


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$"},
        "ages": {"type": "array", "items": {"$ref": "#/$defs/age"}, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"age": {"anyOf": [{"type": "integer", "minimum": 0}, {"const": None}]}},
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "ann"}', 1), ('{"name": "ann", "ages": [1, null]}', 1), ('{"name": "Ann"}', 0), ('{"name": "ann", "ages": [-1]}', 0),
        ('{"name": "ann", "ages": [true]}', 0), ('{"name": "ann", "ages": [1, 2, 3]}', 0), ('{"name": "ann", "more": 1}', 0), ("{}", 0),
        ("[]", 0), ("nothing", 0), ('{"name": "ann"} ', 1), ('{"name": NaN}', 0),
    ],
)  # fmt: skip
def test_json_schema(text, expected):
    assert score(made("json_schema", schema=SCHEMA), text) == expected


def test_our_schema_check_agrees_with_jsonschema():
    import jsonschema
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from app.graders._schema import SchemaCheck, fault_in

    leaf = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 1.0, "a", "bb", ""]))
    values = st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6
    )
    simple = st.one_of(
        st.builds(lambda t: {"type": t}, st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])),
        st.builds(lambda v: {"const": v}, leaf), st.builds(lambda v: {"enum": v}, st.lists(leaf, min_size=1, max_size=3)),
        st.builds(lambda k, n: {k: n}, st.sampled_from(["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"]), st.integers(0, 2)),
        st.builds(lambda k, n: {k: n}, st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]), st.integers(-2, 2)),
        st.builds(lambda n: {"multipleOf": n}, st.sampled_from([1, 2, 0.5])), st.booleans(),
    )  # fmt: skip
    schemas = st.recursive(
        simple,
        lambda inner: st.one_of(
            st.builds(lambda k, v: {k: v}, st.sampled_from(["anyOf", "allOf", "oneOf"]), st.lists(inner, min_size=1, max_size=3)),
            st.builds(lambda v: {"not": v}, inner), st.builds(lambda v: {"items": v}, inner),
            st.builds(lambda p, r, a: {"properties": p, "required": r, "additionalProperties": a}, st.dictionaries(st.sampled_from("abc"), inner, max_size=2), st.lists(st.sampled_from("abc"), unique=True, max_size=2), inner),
        ),
        max_leaves=5,
    )  # fmt: skip

    @settings(max_examples=400, deadline=None)
    @given(schemas.filter(lambda s: isinstance(s, dict)), values)
    def agrees(schema, value):
        assert fault_in(schema) == ""
        assert SchemaCheck(schema).fits(value) == jsonschema.Draft202012Validator(schema).is_valid(value)

    agrees()


@pytest.mark.parametrize(
    "schema", [{"patternProperties": {}}, {"type": "text"}, {"$ref": "http://x/y"}, {"$ref": "#/$defs/none"}, {"pattern": "(?=a)"}, {"required": "a"}, {"properties": {"a": {"format": "date"}}}, {"minimum": "1"}]
)  # fmt: skip
def test_a_schema_that_would_not_be_honored_is_refused(schema):
    assert refused("json_schema", schema=schema).param == "grader.schema"


CALL = json.dumps({"name": "weather", "arguments": {"city": "Oslo", "days": 2}})


@pytest.mark.parametrize(
    ("fields", "text", "expected"),
    [
        ({"tool": "weather"}, f"<tool_call>\n{CALL}\n</tool_call>", 1), ({"tool": "weather"}, CALL, 1), ({"tool": "news"}, CALL, 0),
        ({"tool": "weather", "arguments": '{"days": 2.0, "city": "Oslo"}'}, CALL, 1), ({"tool": "weather", "arguments": '{"city": "Oslo"}'}, CALL, 0),
        ({"tool": "weather", "arguments": "{{item.call}}", "match": "subset"}, CALL, 1), ({"tool": "weather", "arguments": '{"city": "Rom"}', "match": "subset"}, CALL, 0),
        ({"tool": ""}, "It is sunny.", 1), ({"tool": ""}, CALL, 0), ({"tool": "none"}, "Sunny.", 1), ({"tool": "none"}, CALL, 0), ({"tool": "weather"}, "It is sunny.", 0),
        ({"tool": "weather"}, f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>", 0),
        ({"tool": "weather"}, '{"tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]}', 1),
    ],
)  # fmt: skip
def test_tool_call(fields, text, expected):
    assert score(made("tool_call", **fields), text) == expected


NEWS = '{"name": "news", "arguments": {}}'


@pytest.mark.parametrize(
    ("reference", "text", "expected", "parts"),
    [
        (CALL, CALL, 1, {"valid_json": 1, "right_tool": 1, "right_arguments": 1}),
        (f"[{CALL}, {NEWS}]", f"<tool_call>{NEWS}</tool_call> <tool_call>{CALL}</tool_call>", 1, {"valid_json": 1, "right_tool": 1, "right_arguments": 1}),
        (f"[{CALL}, {CALL}]", CALL, 0, {"valid_json": 1, "right_tool": 0, "right_arguments": 0}),
        (CALL, '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}', 0, {"valid_json": 1, "right_tool": 1, "right_arguments": 0}),
        (CALL, NEWS, 0, {"valid_json": 1, "right_tool": 0, "right_arguments": 0}),
        (CALL, "<tool_call>weather in Oslo", 0, {"valid_json": 0, "right_tool": 0, "right_arguments": 0}),
        (CALL, "Sunny.", 0, {"right_tool": 0, "right_arguments": 0}),
        ("Sunny.", CALL, 0, {"valid_json": 1, "needless_call": 1}),
        ("Sunny.", "Rainy.", 1, {"needless_call": 0}),
    ],
)  # fmt: skip
def test_the_calls_of_the_reference_are_the_right_ones(reference, text, expected, parts):
    found = graders.grade(made("tool_call"), GradedSample(text), {"reference": reference})
    assert (found.reward, found.parts, found.error) == (expected, parts, None)


def test_a_tool_call_without_anything_to_compare_with():
    assert graders.grade(made("tool_call"), GradedSample(CALL), {}).error[0] == "invalid_variable_error"
    assert "there is no tool" in refused("tool_call", arguments="{}").message


@pytest.mark.parametrize(
    ("fields", "text", "expected"),
    [({}, "It is 12.", 1), ({}, "It is 13", 0), ({}, "1,012 or $12.00", 1), ({}, "none", 0), ({"tolerance": 1}, "13", 1), ({"relative": 0.1}, "13.1", 1), ({"relative": 0.1}, "13.5", 0)],
)  # fmt: skip
def test_numeric(fields, text, expected):
    assert score(made("numeric", reference="{{item.number}}", **fields), text) == expected
    assert fault(made("numeric", reference="{{item.reference}}"), text)[0] == "invalid_variable_error"


def test_regex_and_length():
    assert score(made("regex", pattern=r"^\d+$"), "123") == 1 and score(made("regex", pattern=r"^\d+$"), "12a") == 0
    assert score(made("regex", pattern="ABC", ignore_case=True), "xabcx") == 1
    assert refused("regex", pattern="(").param == "grader.pattern" and "RE2" in refused("regex", pattern=r"(a)\1").hint
    assert score(made("length", unit="words", min=2, max=3), "a b") == 1 and score(made("length", unit="lines", max=1), "a\nb") == 0
    assert score(made("length", max=2), "abc") == 0
    assert "larger" in refused("length", min=3, max=2).message and "min, max" in refused("length").message


# Templates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{{item.number}}", "12"), ("{{ item.deep.list[0].name }}", "a b"), ("{{item['deep']['list'][0][\"name\"]}}", "a b"), ("{{item.deep}}", '{"list": [{"name": "a b"}]}'),
        ("{{sample.output_json.a[1]}}", "true"), ("{{sample.output_tools}}", "[]"), ("{{sample.choices[0].message.content}}", '{"a": [1, true]}'), ("no { } {% x %}", "no { } {% x %}"),
    ],
)  # fmt: skip
def test_templates(template, filled):
    assert score(made("string_check", input=template, operation="eq", reference=filled), '{"a": [1, true]}') == 1


@pytest.mark.parametrize(("template", "kind"), [("{{item.nothing}}", "invalid_variable_error"), ("{{item.deep.list[3]}}", "invalid_variable_error"), ("{{item.number.x}}", "invalid_variable_error"), ("{{sample.output_json.b}}", "invalid_variable_error")])  # fmt: skip
def test_an_absent_name_is_an_error_and_no_empty_text(template, kind):
    got, message = fault(made("string_check", input=template, operation="ne", reference="x"), '{"a": 1}')
    assert got == kind and template.strip("{}") in message
    assert (
        fault(made("string_check", input="{{sample.output_json.a}}", operation="ne", reference="x"), "no json")[0] == "sample_parse_error"
    )


@pytest.mark.parametrize("template", ["{{7*7}}", "{{sample}}", "{{sample.nothing}}", "{{config}}", "{{item.__class__()}}", "{{}}"])
def test_what_is_no_name_is_refused_when_it_is_saved(template):
    assert refused("string_check", input=template, operation="eq", reference="x").param == "grader.input"


def test_refusals_name_the_field():
    assert refused("nothing").param == "grader.type" and "string_check" in refused("nothing").hint
    assert refused("string_check", input="a", operation="eq").param == "grader.reference"
    assert refused("string_check", input="a", operation="eq", reference="b", more=1).param == "grader.more"
    assert refused("text_similarity", input="a", reference="b", evaluation_metric="best").param == "grader.evaluation_metric"
    assert refused("python", source="def grade(s, i): return 1", image_tag="mine").param == "grader.image_tag"


def test_the_answer_in_the_form_of_the_api():
    grader = made("string_check", input="{{item.none}}", operation="eq", reference="x")
    found = graders.as_openai(grader, graders.grade(grader, GradedSample("x"), {}))
    assert found["reward"] == 0 and found["metadata"]["errors"]["invalid_variable_error"] is True
    assert sum(value is True for value in found["metadata"]["errors"].values()) == 1
    broken = made("score_model", **JUDGE)

    def away(ask):
        raise GradeError("model_grader_server_error", "It is away.")

    errors = graders.as_openai(broken, graders.grade(broken, GradedSample("x"), {}, away))["metadata"]["errors"]
    assert errors["model_grader_server_error"] is True and errors["model_grader_server_error_details"] == "It is away."
