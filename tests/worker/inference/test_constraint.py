"""Answers of a JSON schema, by a model of random weights: whatever it would write, the answer follows the schema."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

from app.errors import BadRequest
from app.inference.protocol import Sampling
from tests.worker.inference.test_engine import crowd, engine, home, ref_of, request, run  # noqa: F401
from worker.inference import constraint, next_token
from worker.inference.next_token import NextTokenQuery
from worker.inference.sampling import Sampler

SHORT = {"type": "string", "maxLength": 12}
PERSON = {
    "type": "object",
    "properties": {
        "name": SHORT,
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": SHORT, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"enum": ["positive", "negative", "neutral"]},
    {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    {"type": "object", "properties": {"at": {"$ref": "#/$defs/point"}}, "required": ["at"], "additionalProperties": False,
     "$defs": {"point": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 2}}},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:30])
@pytest.mark.parametrize("temperature", [0, 1.3])
def test_every_answer_follows_its_schema(engine, home, schema, temperature):  # noqa: F811
    asked = request(ref_of(home), "The bridge", temperature=temperature, n=4, max_tokens=400, json_schema=schema, repetition_penalty=1.2)
    texts, reasons, _ = run(engine, asked)
    for i, text in enumerate(texts):
        assert reasons[i] == "stop", text
        jsonschema.validate(json.loads(text), schema)


def test_who_asks_for_text_in_the_same_batch_gets_the_same_text(engine, home):  # noqa: F811
    ref = ref_of(home)
    alone = run(engine, request(ref, "A cello", temperature=0.8, seed=3))[0]
    mixed = crowd(engine, [request(ref, "A cello", temperature=0.8, seed=3), request(ref, "A cello", json_schema=PERSON, max_tokens=300)])
    assert mixed[0] == alone
    jsonschema.validate(json.loads(mixed[1][0]), PERSON)


def test_an_answer_that_is_too_long_is_cut_and_says_so(engine, home):  # noqa: F811
    texts, reasons, _ = run(engine, request(ref_of(home), "x", json_schema={"type": "array", "minItems": 50}, max_tokens=10))
    assert reasons[0] == "length" and texts[0].lstrip().startswith("[")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "Invalid type"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "https://example.org/schema.json"}, "example.org"),
        ({"type": "string", "pattern": "(?=a)b"}, ""),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_before_the_first_token(engine, home, schema, words):  # noqa: F811
    with pytest.raises(BadRequest, match="The schema cannot be followed here") as refused:
        run(engine, request(ref_of(home), "x", json_schema=schema))
    assert words in refused.value.message and refused.value.param == "response_format" and refused.value.hint


def test_a_schema_of_many_branches_is_given_up_in_time(engine, home):  # noqa: F811
    """`limits` of the grammar hold: neither compiling nor a mask may take seconds. It ends in an answer or in words."""
    deep = {"type": "string", "pattern": "^" + "(a|aa|aaa){1,300}" * 40 + "$"}
    try:
        run(engine, request(ref_of(home), "x", json_schema=deep, max_tokens=8))
    except BadRequest as refused:
        assert "schema" in refused.message
    except AssertionError as error:  # in the middle of the answer
        assert "schema" in str(error)


def test_rows_that_are_read_ahead_for_a_gpu_get_the_same_mask(engine, home):  # noqa: F811
    """What a GPU's path computes for all rows at once, on a CPU: a constrained row takes allowed tokens alone."""
    place = engine.shelf.place(ref_of(home))
    size = place.lane.model.config.vocab_size
    torch.manual_seed(0)
    logits = torch.randn(2, size)
    own = constraint.of({"enum": ["yes"]}, place.tokenizer, place.stop_ids)
    for settings in ({"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_p": 1.0}):
        sampler = Sampler(Sampling(**settings), 1, [], constraint.of({"enum": ["yes"]}, place.tokenizer, place.stop_ids))
        free, bound = next_token.read_ahead(logits, [NextTokenQuery(0, None, None), NextTokenQuery(1, sampler, None)])
        assert free.likeliest == int(logits[0].argmax())
        token = bound.sampled(sampler)
        assert own.masked(logits[1])[token] > float("-inf")
    assert int((own.masked(logits[1]) > float("-inf")).sum()) < 20
    engine.shelf.release(place.lane)
