"""A format owns its row's shape: what is asked of rows elsewhere follows from what the format says."""

from __future__ import annotations

from typing import ClassVar

import pytest

from app import formats
from app.formats import FORMATS, Format, RowFinding
from app.formats._base import Columns, Field, Row, check_text
from app.graders import GradedSample


class Quiz(Format):
    """A shape of its own that says no more than how a text model reads it."""

    name: ClassVar = "quiz"
    title: ClassVar = "Quiz"
    shape: ClassVar = "quiz"
    summary: ClassVar = "A question, what may be answered, and the right answer."
    example: ClassVar = {"asks": "Which wood?", "options": ["maple", "spruce"], "right": "spruce"}
    fields: ClassVar = (
        Field("asks", "What is asked.", ("asks",)),
        Field("options", "Answers.", ("options",)),
        Field("right", "The right one.", ("right",)),
    )
    keys: ClassVar = ("asks", "options", "right")

    def check(self, row: Row, mapping: Columns) -> list[RowFinding]:
        return check_text(row, mapping["asks"], "asks")

    def normalise(self, row: Row, mapping: Columns) -> Row:
        return {name: row[mapping[name]] for name in self.keys}

    def render(self, row: Row) -> Row:
        asked = f"{row['asks']} ({' or '.join(row['options'])})"
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row["right"]}]}


def test_the_owner_of_a_row_is_found_by_its_keys():
    for entry in FORMATS.values():
        row = entry.normalise(entry.example, entry.guess_mapping(list(entry.example)))
        owner = "chat" if entry.shape == "instruction" else entry.shape  # an instruction is a conversation of one turn
        assert formats.of(row).name == owner
        assert formats.of({**row, "metadata": {"label": "x", "chosen": "y"}}).name == owner


@pytest.mark.parametrize("name", FORMATS)
def test_every_shape_answers_every_question(name):
    entry = FORMATS[name]
    row = entry.normalise(entry.example, entry.guess_mapping(list(entry.example)))
    shape = formats.get(entry.shape)
    made = shape.render(row)
    assert formats.of(made).render(made) == made, "a rendered row is rendered already"
    texts = [text for _, text in shape.texts(row)]
    given, everything = shape.given_and_all(row)
    assert texts and everything and (given or not shape.before_answer(row) or entry.task == "classification")
    asked, trained = shape.asked_and_trained(row)
    assert bool(trained) == shape.asks and asked
    assert bool(shape.compared(row)[0]) == shape.asks == bool(shape.solved(row)[0])
    assert shape.question(row) and shape.about(row) and set(shape.keys) <= set(row)
    assert [formats.of(one).render(one) for one in shape.sequences(row, "dialogue")]


def test_a_new_shape_follows_from_how_it_is_rendered():
    quiz = Quiz()
    row = quiz.normalise(quiz.example, {name: name for name in quiz.keys})
    asked = "Which wood? (maple or spruce)"
    assert list(quiz.texts(row)) == [("messages[0].content", asked), ("messages[1].content", "spruce")]
    assert quiz.asked_and_trained(row) == (asked, "spruce") and quiz.given_and_all(row) == (asked, f"{asked}\nspruce")
    assert quiz.solved(row)[:2] == (asked, "spruce") and quiz.about(row) == quiz.question(row) == asked
    assert quiz.before_answer(row) == [{"role": "user", "content": asked}]
    assert quiz.exchange(row) == {"system": "", "prompt": asked, "reference": "spruce"}
    assert quiz.sequences(row, "generic") == [quiz.render(row)]
    assert quiz.file_mapping == {"asks": "asks", "options": "options", "right": "right"} == quiz.identity(row) and quiz.file_row(row) == row


def test_a_trainer_renders_a_new_shape(monkeypatch, tiny_model):
    from transformers import AutoTokenizer

    from worker.data.chat_template import prepare_tokenizer, render_row, sample_of

    quiz = Quiz()
    monkeypatch.setattr(formats, "_KEYS", [(frozenset(quiz.keys), quiz), *formats._KEYS])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prepare_tokenizer(tokenizer)
    row = quiz.normalise(quiz.example, {name: name for name in quiz.keys})
    rendered = render_row(tokenizer, row, "dialogue", 999)
    assert rendered == render_row(tokenizer, quiz.render(row), "dialogue", 999) and any(rendered.trained)
    assert sample_of(row, "dialogue")[1] == "spruce"


def test_the_answer_of_a_row_that_calls_tools_has_its_calls():
    call = {"id": "call_1", "type": "function", "function": {"name": "weigh", "arguments": '{"of": "maple"}'}}
    row = {"messages": [{"role": "user", "content": "How heavy?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    question, answer, _ = formats.of(row).solved(row)
    assert question == "How heavy?" and [found["function"] for found in GradedSample(answer).output_tools] == [call["function"]]
