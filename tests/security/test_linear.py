"""Hostile texts of doubled length take doubled time, in every rule, format, reader and edit there is: `benchmarks/linear.py`."""

import re

import pytest

from app import formats
from app.datasets import readers, rules
from app.datasets.edits import TEXT_EDITS
from app.datasets.rules._base import seen
from app.datasets.rules.secrets import MAX_LOOKED_AT, Secrets, mask
from benchmarks import linear

LENGTHS = (1 << 11, 1 << 16)
SUBJECTS = linear.subjects()
pytestmark = pytest.mark.timeout(900)  # what is quadratic on purpose takes long where other tests run beside it


@pytest.mark.long
@pytest.mark.parametrize("name", SUBJECTS)
def test_twice_the_text_takes_twice_the_time(name):
    assert not linear.too_fast(SUBJECTS[name], *LENGTHS)


DEEPER = [("reader json", repr("\\")), ("overlap", repr("\u0300\u0316")), ("format rated", "pairs"), ("reader txt", "'a'")]


@pytest.mark.long
@pytest.mark.parametrize(("name", "text"), DEEPER)
def test_what_shows_in_long_texts_only(name, text):
    assert linear.growth(SUBJECTS[name], linear.hostile()[text], 1 << 16).ratio <= linear.MAX_RATIO


def test_the_rest_of_a_text_beyond_all_measure_is_said_not_to_be_looked_at():
    said = []
    rule = Secrets(lambda line, finding: said.append(finding), formats.FORMATS["plain_text"], {})
    far = "a" * MAX_LOOKED_AT + " mail anna.berg@posteo.de"
    rule.see(seen(1, {"text": far}))
    assert [finding.rule for finding in said] == ["not_looked_at"] and "1,048,576" in said[0].message and said[0].severity == "note"
    assert mask(far).endswith("mail [e-mail address]")


def test_everything_in_the_registries_is_measured():
    named = {*(f"rule {rule.__name__}" for rule in rules.RULES), *(f"format {name}" for name in formats.FORMATS)}
    assert named | {f"reader {kind}" for kind in readers.READERS} | {f"edit {name}" for name in TEXT_EDITS} <= set(SUBJECTS)


@pytest.mark.long
def test_tokens_are_counted_in_a_time_that_grows_with_the_text(tiny_model):
    name, prepare = next(reversed(linear.subjects(tiny_model).items()))
    assert name == "tokens"
    assert not linear.too_fast(prepare, *LENGTHS)


QUADRATIC = {
    "a pattern that begins anew": (lambda text: lambda: re.findall(r"00[1-9]\d{0,2}(?:[ /-]\d{2,}){2,}(?![\w-])", text), "'00111-'"),
    "all held against all": (lambda text: lambda: [text.find("x", at) for at in range(0, len(text), 8)], "'[INST]'"),
}


@pytest.mark.parametrize("name", QUADRATIC)
def test_the_measure_sees_what_grows_with_the_square(name):
    prepare, text = QUADRATIC[name]
    assert linear.growth(prepare, linear.hostile()[text], *LENGTHS).ratio > linear.MAX_RATIO
