"""Every format in the registry keeps the same promises."""

import json

import pytest

from app import formats
from app.errors import BadField
from app.formats import FORMATS

SETTLED = {
    "chat": {"messages"},
    "instruction": {"messages"},
    "completion": {"prompt", "completion"},
    "plain_text": {"text"},
    "preference": {"messages", "chosen", "rejected"},
    "rated": {"messages", "answer", "good"},
    "classification": {"text", "label"},
}
"""Keys of the rows that datasets of earlier versions hold."""
SHAPES = {entry.shape: set(FORMATS[entry.shape].keys) for entry in FORMATS.values()}


def test_stored_rows_keep_their_shapes():
    assert SHAPES.items() >= SETTLED.items()


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_is_recognised_as_its_own_format_and_normalises_to_its_shape(name):
    entry = FORMATS[name]
    ranked = formats.rank([entry.example] * 3)
    assert ranked[0][0].name == name
    mapping = ranked[0][1].mapping
    assert entry.check(entry.example, mapping) == []
    row = entry.normalise(entry.example, mapping)
    assert set(row) - {"tools"} == SHAPES[entry.shape]
    json.dumps(row)


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_row_and_rows_of_wrong_types_are_findings_not_crashes(name):
    entry = FORMATS[name]
    mapping = entry.guess_mapping(list(entry.example))
    values = [None, "", [], {}, 0, 1.5, True, [1], [[]], {"a": 1}, [None], [{"role": 3}], "[1", [{"from": 3}], [{"human": 1}]]
    rows = [{}] + [{column: value for column in entry.example} for value in values]
    for row in rows:
        findings = entry.check(row, mapping)
        for finding in findings:
            assert finding.rule and finding.message
        if not any(finding.severity == "error" for finding in findings):
            entry.normalise(row, mapping)
    assert any(finding.severity == "error" for finding in entry.check({}, mapping))


@pytest.mark.parametrize("name", FORMATS)
def test_every_field_has_a_help_text_and_lower_case_synonyms(name):
    for field in FORMATS[name].fields:
        assert field.help.endswith(".")
        assert all(synonym == synonym.lower() for synonym in field.synonyms)


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(BadField) as caught:
        formats.get("excel")
    assert "chat" in caught.value.hint
