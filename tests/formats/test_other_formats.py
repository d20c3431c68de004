"""Instruction, preference and classification rows, and telling formats apart."""

import pytest

from app import formats
from app.formats.classification import Classification
from app.formats.instruction import Instruction
from app.formats.preference import Preference


def test_an_instruction_with_input_system_and_history():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["hi", "hello"]]}
    mapping = Instruction().guess_mapping(list(row))
    assert Instruction().check(row, mapping) == []
    assert Instruction().normalise(row, mapping)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "Add.\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]


WANTED = {
    "messages": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": WANTED["messages"], "chosen": WANTED["chosen"], "rejected": WANTED["rejected"]},
        {"chosen": WANTED["messages"] + WANTED["chosen"], "rejected": WANTED["messages"] + WANTED["rejected"]},
        {"prompt": "q", "chosen": WANTED["messages"] + WANTED["chosen"], "rejected": WANTED["messages"] + WANTED["rejected"]},
        {"input": {"messages": WANTED["messages"]}, "preferred_output": WANTED["chosen"], "non_preferred_output": WANTED["rejected"]},
    ],
)
def test_every_way_to_write_a_preference_gives_one_shape(row):
    entry, guess = formats.rank([row])[0]
    assert entry.name == "preference"
    assert entry.check(row, guess.mapping) == []
    assert entry.normalise(row, guess.mapping) == WANTED


def test_equal_answers_and_a_missing_prompt_are_errors():
    mapping = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    assert [f.rule for f in Preference().check({"prompt": "q", "chosen": "a", "rejected": "a"}, mapping)] == ["same_answers"]
    assert [f.rule for f in Preference().check({"prompt": "", "chosen": "a", "rejected": "b"}, mapping)] == ["empty"]
    assert [f.rule for f in Preference().check({"prompt": 3, "chosen": "a", "rejected": "b"}, mapping)] == ["wrong_shape"]


def test_labels_may_be_whole_numbers_but_not_fractions():
    mapping = {"text": "text", "label": "label"}
    assert Classification().normalise({"text": "a", "label": 3.0}, mapping) == {"text": "a", "label": "3"}
    assert [f.rule for f in Classification().check({"text": "a", "label": 0.5}, mapping)] == ["wrong_label"]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"prompt": "a", "response": "b"}, "completion"),
        ({"question": "a", "answer": "b"}, "instruction"),
        ({"text": "a", "category": "b"}, "classification"),
        ({"text": "a"}, "plain_text"),
        ({"text": "a", "source": "web"}, "plain_text"),
        ({"Instruction": "a", "Output": "b"}, "instruction"),
        ({"messages": '[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]'}, "chat"),
        ({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "chat"),
        ({"instruction": "a", "input": "", "output": "b", "text": "long"}, "instruction"),
    ],
)
def test_the_format_is_recognised_by_columns_and_rows(row, name):
    entry, guess = formats.rank([row] * 5)[0]
    assert entry.name == name
    assert guess.reason


def test_columns_nobody_claims_are_metadata():
    row = {"question": "a", "answer": "b", "source": "web", "id": 3}
    mapping = Instruction().guess_mapping(list(row))
    assert Instruction().metadata(row, mapping) == {"source": "web", "id": 3}


RATED = {"messages": [{"role": "user", "content": "q"}], "answer": [{"role": "assistant", "content": "a"}], "good": True}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": RATED["messages"], "completion": RATED["answer"], "label": "true"},
        {"messages": RATED["messages"] + RATED["answer"], "label": 1},
        {"conversations": RATED["messages"] + RATED["answer"], "kto_tag": True},
        {"instruction": "q", "output": "a", "kto_tag": "1"},
    ],
)
def test_every_way_to_write_a_rated_answer_gives_one_shape(row):
    entry, guess = formats.rank([row])[0]
    assert entry.name == "rated"
    assert entry.check(row, guess.mapping) == []
    assert entry.normalise(row, guess.mapping) == RATED
    wrong = {key: value for key, value in row.items() if key not in ("label", "kto_tag")} | {guess.mapping["label"]: "perhaps"}
    assert [(f.rule, f.severity) for f in entry.check(wrong, guess.mapping)] == [("wrong_label", "error")]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"text": "It is good.", "label": True}, "classification"),
        ({"question": "Good?", "label": 1}, "classification"),
        ({"prompt": "p", "completion": "c", "label": "sports"}, "completion"),
        ({"messages": RATED["messages"] + RATED["answer"], "rating": 4.5}, "chat"),
    ],
)
def test_a_truth_value_alone_makes_no_rated_answer(row, name):
    assert formats.rank([row] * 5)[0][0].name == name


def test_a_rated_answer_without_an_answer_or_a_prompt_is_an_error():
    mapping = {"prompt": "prompt", "completion": "completion", "label": "label"}
    from app.formats.rated import Rated

    assert [f.rule for f in Rated().check({"prompt": "q", "completion": " ", "label": True}, mapping)] == ["empty_answer"]
    assert [f.rule for f in Rated().check({"prompt": "", "completion": "a", "label": True}, mapping)] == ["empty"]
    assert [f.rule for f in Rated().check({"prompt": "q", "completion": "a", "label": None}, mapping)] == ["no_label"]
    assert [f.rule for f in Rated().check({"prompt": 3, "completion": "a", "label": False}, mapping)] == ["wrong_shape"]
