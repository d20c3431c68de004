"""What is measured before tuning: distance over first bytes, examples as turns, labels by likelihood."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from app.evaluation.service import EvaluationSpec
from app.jobs import solved_examples
from tests.worker.orders import chat_rows, put_dataset, put_model
from tests.worker.training.test_classification import put_encoder, texts
from worker.data.batching import Row
from worker.data.chat_template import render_prompt
from worker.evaluation import baselines, scoring
from worker.modeling import packed_attention
from worker.scoring import prompt_baseline


@pytest.fixture
def reader(data_dir: Path, tiny_model: Path):
    made = scoring.Reader(put_model(tiny_model), scoring.engine_here())
    with made.loaded():
        yield made


def test_only_first_bytes_count_and_no_token_that_ends_a_text(reader) -> None:
    data = reader.tokenise([Row(1, {"text": "The bridge stands between the two sound holes."}), Row(2, {"text": "Yes."})], 256)
    cut = baselines.first_bytes(reader, data, 12)
    words = [baselines._words(reader, cut, row) for row in range(2)]
    assert all("<|" not in text for text in words) and words[1] in "Yes."
    assert (12 <= len(words[0].encode()) < 24 and "The bridge stands".endswith(words[0].split("The")[-1][-5:])) or words[0]
    special = set(reader.tokenizer.all_special_ids)
    assert not any(int(data.ids[i]) in special for i in cut.trained.nonzero()[0])


def test_noise_is_farther_than_words(reader) -> None:
    # The small model knows nothing, so a byte of either costs about the same: what is tested is that like is compared with like.
    found = baselines.distance(reader, [Row(i, row) for i, row in enumerate(chat_rows(12), 1)], 256)
    assert found["compared"] == "answers" and found["rows"] == 12 and 0.3 < found["distance"] < 3
    assert baselines.distance(reader, [Row(1, {"text": "spruce " * 20, "label": "x"})], 256)["compared"] == "texts"


def test_examples_stand_before_the_question_and_behind_the_system_message() -> None:
    asked = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    shown = prompt_baseline.SolvedExample([{"role": "system", "content": "other"}, {"role": "user", "content": "q"}], "a")
    said = solved_examples.with_examples(asked, [shown])
    assert [m["content"] for m in said] == ["S", "q", "a", "Q"]
    assert solved_examples.with_examples("Q:", [prompt_baseline.SolvedExample("q:", "a")]) == "q:a\n\nQ:"
    assert [m.get("weight") for m in prompt_baseline.last_answer(said, "A")["messages"]] == [None, None, 0, None, None]


def test_labels_are_scored_as_a_plain_forward_pass_scores_them(reader) -> None:
    labels = ["spruce", "maple and pine", "a long label of several tokens", "no", "yes", "x", "y", "z", "ninth"]
    guess = baselines.LabelScorer(reader, labels, [])
    text = "What wood is the belly made of?"
    found = guess._likelihoods(text)
    prompt = guess._prompt(text, [])
    model = copy.deepcopy(reader.model)
    model.set_attn_implementation("sdpa")
    for place, ids in enumerate(guess.ids):
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        expected = sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(ids))
        assert found[place] == pytest.approx(expected, abs=1e-3), labels[place]
    assert reader.model.config._attn_implementation == packed_attention.NAME
    assert render_prompt(reader.tokenizer, "dialogue", [{"role": "user", "content": text}])[1] != prompt


def test_examples_are_drawn_evenly_over_the_labels() -> None:
    rows = [Row(i, {"text": str(i), "label": "ab"[i % 10 == 0]}) for i in range(40)]
    drawn = baselines._balanced(rows, 6, 1)
    assert sorted(row.row["label"] for row in drawn) == ["a"] * 3 + ["b"] * 3
    assert drawn == baselines._balanced(rows, 6, 1) and len(baselines._balanced(rows[:3], 8, 1)) == 3


def test_plain_texts_hold_no_question(data_dir: Path, tiny_model: Path) -> None:
    data = put_dataset([{"text": f"The scroll is carved last, number {i}."} for i in range(20)], "plain_text")
    spec = EvaluationSpec(kind="advice", task="generation", model=put_model(tiny_model), dataset=data, rows=8, part="validation")
    found = baselines.advise(spec, scoring.engine_here(), lambda share, stage: None)
    assert found["zero_shot"] is None and "plain texts" in found["reason"] and found["distance"] > 0


def test_an_encoder_is_asked_by_its_vectors(data_dir: Path, tiny_model: Path) -> None:
    data = put_dataset(texts(40), "classification")
    spec = EvaluationSpec(kind="advice", task="classification", model=put_encoder(tiny_model), dataset=data, rows=8, part="validation")
    told: list[tuple[float, str]] = []
    found = baselines.advise(spec, scoring.engine_here(), lambda share, stage: told.append((share, stage)))
    assert found["how"] == "vectors" and found["distance"] is None and found["reason"] is None
    assert 0 <= found["zero_shot"]["accuracy"] <= 1 and 0 <= found["few_shot"]["accuracy"] <= 1 and 0 < found["chance"] < 1
    assert found["shots"] > 1 and told[-1][0] == pytest.approx(0.95) and "texts" in told[-1][1]
