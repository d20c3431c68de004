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
        {"prompt": "q", "text": "good", "rejected_text": "bad"},
        {"query": "q", "response": "good", "rejected_response": "bad"},
        {"prompt": "q", "chosen": WANTED["chosen"][0], "rejected": {"from": "gpt", "value": "bad"}},
        {"input": {"messages": WANTED["messages"]}, "preferred_output": WANTED["chosen"], "non_preferred_output": WANTED["rejected"]},
    ],
)
def test_every_way_to_write_a_preference_gives_one_shape(row):
    entry, guess = formats.rank([row])[0]
    assert entry.name == "preference"
    assert entry.check(row, guess.mapping) == []
    assert entry.normalise(row, guess.mapping) == WANTED


ASKED = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize("prompt", ["text", "messages", "conversations", "chat"])
@pytest.mark.parametrize("spelling", ["role and content", "from and value", "human and content"])
@pytest.mark.parametrize("answer", ["text", "one message", "a list"])
def test_a_pair_and_a_rated_answer_are_read_however_they_are_spelled(prompt, spelling, answer):
    def said(role, text):
        name = {"user": "human", "assistant": "gpt"}[role]
        return {
            "role and content": {"role": role, "content": text},
            "from and value": {"from": name, "value": text},
            "human and content": {"role": name, "content": text},
        }[spelling]

    def answered(text):
        return {"text": text, "one message": said("assistant", text), "a list": [said("assistant", text)]}[answer]

    asked = {"prompt": "q"} if prompt == "text" else {prompt: [said("user", "q")]}
    pair, rated = {**asked, "chosen": answered("good"), "rejected": answered("bad")}, {**asked, "response": answered("a"), "kto_tag": True}
    for row, wanted in ((pair, WANTED), (rated, RATED)):
        entry, guess = formats.rank([row] * 3)[0]
        assert entry.check(row, guess.mapping) == []
        assert entry.normalise(row, guess.mapping) == wanted
    if prompt != "text":
        talk = {prompt: [said("user", "q"), said("assistant", "a")]}
        entry, guess = formats.rank([talk] * 3)[0]
        assert entry.name == ("sharegpt" if spelling == "from and value" else "chat")
        assert entry.normalise(talk, guess.mapping) == {"messages": RATED["messages"] + RATED["answer"]}


@pytest.mark.parametrize("input_", [None, "", "a text"])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("history", [None, [["hi", "hello"]]])
@pytest.mark.parametrize("kind", ["preference", "rated", "instruction"])
def test_alpacas_keys_make_one_prompt_in_every_format(input_, system, history, kind):
    extra = {"input": input_, "system": system, "history": history}
    answers = {
        "preference": {"chosen": "good", "rejected": "bad"},
        "rated": {"output": "a", "kto_tag": "true"},
        "instruction": {"output": "a"},
    }
    row = {"instruction": "q", **{key: value for key, value in extra.items() if value is not None}, **answers[kind]}
    entry, guess = formats.rank([row] * 3)[0]
    assert entry.name == kind and entry.check(row, guess.mapping) == [] and set(guess.mapping.values()) == set(row)
    wanted = [{"role": "system", "content": system}] if system else []
    wanted += [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}] if history else []
    wanted += [{"role": "user", "content": f"q\n\n{input_}" if input_ else "q"}]
    assert entry.normalise(row, guess.mapping)["messages"][: len(wanted)] == wanted


def test_an_answer_that_is_json_stays_text():
    row = {"prompt": "q", "chosen": '{"a": [1]}', "rejected": "[]"}
    entry, guess = formats.rank([row])[0]
    found = entry.normalise(row, guess.mapping)
    assert (
        entry.check(row, guess.mapping) == [] and found["chosen"][0]["content"] == '{"a": [1]}' and found["rejected"][0]["content"] == "[]"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a", "rejected_reply": "b"},
        {"text": "a passage", "thumb": "down"},
        {"messages": "[", "utterances": ASKED, "kto_tag": False},
    ],
)
def test_what_says_which_answers_are_bad_is_never_left_aside_without_a_word(row):
    assert not formats.rank([row] * 3) or formats.rank([row] * 3)[0][0].task == "preference"


def test_missing_labels_do_not_turn_labelled_texts_into_plain_ones():
    rows = [{"text": f"text {n}", "label": "" if n % 2 else "x"} for n in range(20)]
    assert [entry.name for entry, _ in formats.rank(rows)] == ["classification", "plain_text"]


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
