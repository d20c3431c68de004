"""Hostile texts of doubled length take doubled time, in every rule, format, reader and edit there is: `benchmarks/linear.py`."""

import re

import pytest

from app import formats, readers, rules
from app.edits import TEXT_EDITS
from benchmarks import linear

LENGTHS = (1 << 11, 1 << 16)
SUBJECTS = linear.subjects()


@pytest.mark.parametrize("name", SUBJECTS)
def test_twice_the_text_takes_twice_the_time(name):
    found = {text: linear.growth(SUBJECTS[name], make, *LENGTHS) for text, make in linear.hostile().items()}
    assert not {text: one for text, one in found.items() if one.ratio > linear.MAX_RATIO}


def test_everything_in_the_registries_is_measured():
    named = {*(f"rule {rule.__name__}" for rule in rules.RULES), *(f"format {name}" for name in formats.FORMATS)}
    assert named | {f"reader {kind}" for kind in readers.READERS} | {f"edit {name}" for name in TEXT_EDITS} <= set(SUBJECTS)


def test_tokens_are_counted_in_a_time_that_grows_with_the_text(tiny_model):
    name, prepare = next(reversed(linear.subjects(tiny_model).items()))
    assert name == "tokens"
    found = {text: linear.growth(prepare, make, *LENGTHS) for text, make in linear.hostile().items()}
    assert not {text: one for text, one in found.items() if one.ratio > linear.MAX_RATIO}


QUADRATIC = {
    "a pattern that begins anew": (lambda text: lambda: re.findall(r"00[1-9]\d{0,2}(?:[ /-]\d{2,}){2,}(?![\w-])", text), "'00111-'"),
    "all held against all": (lambda text: lambda: [text.find("x", at) for at in range(0, len(text), 8)], "'[INST]'"),
}


@pytest.mark.parametrize("name", QUADRATIC)
def test_the_measure_sees_what_grows_with_the_square(name):
    prepare, text = QUADRATIC[name]
    assert linear.growth(prepare, linear.hostile()[text], *LENGTHS).ratio > linear.MAX_RATIO
