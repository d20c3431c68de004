"""The page of a finished job: scores of base and tuned, classes, rows to read, forgetting, and how good the prediction was.

Evaluations come from the trainer's own functions, so that a key that changes there fails here.
"""

from __future__ import annotations

import html
import re

import numpy as np
import pytest

from app.evaluation.forgetting import TextScore, compare, without_measuring
from app.jobs import lifecycle
from app.kit import ids
from app.kit.humanize import human_count
from app.shapes import Shape, shape_of
from app.strategies import STRATEGIES
from app.views import job_tabs
from app.views import scores as score_view
from tests import lives
from worker.data.batching import Row
from worker.training.objectives.classification import evaluation_of

GENERATION = {
    "rows": 120,
    "answers": 8,
    "base": {"loss": 2.51, "perplexity": 12.3, "bits_per_byte": 1.21, "token_accuracy": 0.48, "exact_match": 0.0, "rouge_l": 0.21, "chrf": 0.3},
    "tuned": {"loss": 1.13, "perplexity": 3.1, "bits_per_byte": 0.61, "token_accuracy": 0.71, "exact_match": 0.125, "rouge_l": 0.47, "chrf": 0.2},
    "worst": [
        {"line": 7, "prompt": "Why <b>?", "reference": "Because.", "base_loss": 1.0, "tuned_loss": 2.0, "base_answer": "So.", "tuned_answer": ""}
    ],
    "best": [
        {"line": 9, "prompt": "When?", "reference": "Today.", "base_loss": 3.0, "tuned_loss": 0.2, "base_answer": None, "tuned_answer": "Now."}
    ],
}  # fmt: skip


def classified(classes: int, rows: int = 400, sure: float = 4.0) -> dict:
    """What a classifier's job leaves behind: mostly right, with class 0 often taken for class 1."""
    draw = np.random.default_rng(3)
    truth = draw.integers(0, classes, rows)
    scores = draw.normal(size=(rows, classes))
    scores[np.arange(rows), truth] += sure
    scores[truth == 0, 1] += sure
    found = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    texts = [Row(n, {"text": f"text {n}", "label": f"kind {truth[n]}"}) for n in range(rows)]
    return evaluation_of(found, truth, truth, texts, [f"kind {n}" for n in range(classes)])


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
ENCODER = shape_of({"model_type": "bert", "max_position_embeddings": 64, "type_vocab_size": 2, **SIZES})


def forgotten(factor: float) -> dict:
    draw = np.random.default_rng(1)
    before = [TextScore(skill, float(nats), 200) for skill in ("facts", "code", "stories") for nats in draw.uniform(80, 120, 20)]
    after = [s._replace(nats=s.nats * (factor if s.skill == "code" else 1.0) + float(draw.normal(0, 0.05))) for s in before]
    return compare(before, after).model_dump(mode="json")


def words(page) -> str:
    text = re.sub(r"<script.*?</script>", "", page.text, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))


def finish(session, user, model, evaluation: dict, forgetting: dict | None = None, **measured) -> str:
    """A finished job with this evaluation; the address of its page."""
    life = lives.Life(session, lives.order(session, user, model)).claim().say(lives.started(), *lives.steps(1, 12))
    said = lives.finished()
    said = said.model_copy(
        update={"evaluation": evaluation, "forgetting": forgetting, "measured": said.measured.model_copy(update=measured)}
    )
    lifecycle.finish(session, life.held, said)
    session.commit()
    return f"/jobs/{ids.public(ids.JOB, life.job_id)}"


def tab(where: str, name: str = "evaluation") -> str:
    return f"{where}?tab={name}"


def test_base_and_tuned_stand_side_by_side_with_rows_to_read(client, session, user, tiny_registered):
    page = client.get(tab(finish(session, user, tiny_registered, GENERATION)))
    said = words(page)
    assert "On 120 validation rows, the same for both. Exact match, ROUGE-L and chrF are of 8 written answers." in said
    assert re.search(r"Bits per byte .*? 1\.2100 0\.6100 better", said) and re.search(r"chrF .*? 0\.3000 0\.2000 worse", said)
    assert "Least improved" in said and "Most improved" in said and "loss 2.00, base 1.00" in said
    assert "Why <b>?" in said and "<b>?" not in page.text, "texts of the data never become markup"
    assert "Confusion" not in said


@pytest.mark.parametrize(("classes", "named"), [(3, True), (14, True), (15, False), (77, False)])
def test_a_classifiers_matrix_is_drawn_whatever_the_number_of_classes(client, session, user, tiny_registered, classes, named):
    evaluation = classified(classes)
    found = score_view.view(evaluation, "classification")
    assert found.matrix.named == named and sum(cell.count for cell in found.matrix.cells) == 400
    assert sum(cell.count for cell in found.matrix.cells if cell.row == cell.column) == round(400 * evaluation["tuned"]["accuracy"])
    assert found.mistakes[0]["truth"] == "kind 0" and found.mistakes[0]["answer"] == "kind 1"
    assert [c["f1"] for c in found.classes] == sorted(c["f1"] for c in found.classes)
    page = client.get(tab(finish(session, user, tiny_registered, evaluation)))
    drawing = re.search(r'<figure class="matrix">.*?</svg>', page.text, re.S).group(0)
    assert drawing.count("<rect") == len(found.matrix.cells) + 1 and (">kind 0</text>" in drawing) == named
    said = words(page)
    assert "kind 0 kind 1" in said and "Calibration" in said and "Every class, the weakest first" in said


def test_many_classes_are_told_by_their_mistakes_alone():
    found = score_view.view(classified(150), "classification")
    assert found.matrix is None and found.mistakes and found.classes and found.reliability


def test_a_classifier_is_held_against_guessing(client, session, user, tiny_registered):
    found = score_view.view(classified(5), "classification")
    titles = [line.title for line in found.lines]
    assert found.base_title == "Prior baseline" and "Loss" not in titles and "Log loss" in titles, "its loss is its log loss, said once"
    assert all(line.better for line in found.lines if line.title in ("Accuracy", "Macro F1", "Log loss"))
    assert found.worst[0].probability is not None and found.worst[0].base is None and not found.base_answered
    losses = [row.tuned_loss for row in found.worst]
    assert losses == sorted(losses, reverse=True)


def test_pairs_have_their_own_scores():
    figures = {"loss": 0.6, "reward_margin": 0.4, "reward_accuracy": 0.7, "chosen_reward": 0.1, "rejected_reward": -0.3}
    base = {"loss": 0.69, "reward_margin": 0.0, "reward_accuracy": 0.5, "chosen_reward": 0.0, "rejected_reward": 0.0}
    found = score_view.view({"rows": 30, "base": base, "tuned": figures}, "preference")
    assert [line.title for line in found.lines][:2] == ["Loss", "Preference accuracy"] and all(line.better for line in found.lines)
    assert found.lines[0].meaning == "nats per pair"


@pytest.mark.parametrize(
    "evaluation",
    [
        {"base": {"loss": 2.51, "token_accuracy": 0.48}, "tuned": {"loss": 1.13, "token_accuracy": 0.71}},
        {"tuned": {"loss": 1.13}},
        {"rows": 3, "base": None, "tuned": {"loss": float("inf"), "new_score": 3}},
        {"tuned": {"accuracy": 0.5, "labels": ["a", "b"], "confusion": [[1]], "per_class": {"a": {}}, "reliability": [{}]}},
        {"tuned": {"accuracy": 0.5, "labels": None, "confusion": None, "per_class": None}, "worst": None, "best": [{}]},
    ],
)
def test_jobs_that_told_less_are_shown_as_far_as_they_go(client, session, user, tiny_registered, evaluation):
    page = client.get(tab(finish(session, user, tiny_registered, evaluation)))
    assert page.status_code == 200 and "Scores on the validation rows" in page.text


@pytest.mark.parametrize("evaluation", [{}, {"base": {"loss": 1.0}}, {"tuned": {}}, {"tuned": "?"}, {"rows": 4}])
def test_without_scores_there_is_no_section(client, session, user, tiny_registered, evaluation):
    page = client.get(tab(finish(session, user, tiny_registered, evaluation)))
    assert page.status_code == 200 and "No scores yet" in page.text and "Scores on the validation rows" not in page.text


def test_forgetting_is_told_by_skill_with_its_interval(client, session, user, tiny_registered):
    measured = forgotten(1.3)
    found = score_view.forgot(measured)
    assert found.skills[0].name == "code" and found.skills[0].certain and len(found.skills) == 3
    said = words(client.get(tab(finish(session, user, tiny_registered, GENERATION, measured))))
    high, low = (f"{-value * 100:+.1f}".replace("-", "−") for value in measured["skills"]["code"]["interval"])
    assert "General ability" in said and measured["sentence"] in said and f"{low}% to {high}%" in said
    old = score_view.forgot({"before": 1.0, "after": 1.1, "verdict": "forgot some"})
    assert old.whole.change == pytest.approx(0.1) and old.whole.interval is None and old.skills == []
    assert score_view.forgot(None) is None and score_view.forgot({}) is None
    for strategy, verdict in (("feature_extraction", "Unchanged by design."), ("lora", "Not applicable.")):
        known = without_measuring(STRATEGIES[strategy](), ENCODER, "classification", 6).model_dump(mode="json")
        said = words(client.get(tab(finish(session, user, tiny_registered, classified(6), known))))
        assert f"{verdict} {known['sentence']}" in said and "Bits per byte of general" not in said
    assert without_measuring(STRATEGIES["lora"](), ENCODER, "generation", 0) is None


def test_predictions_stand_beside_measurements_and_the_newest_jobs_say_how_good_they_are(client, session, user, tiny_registered):
    where = finish(session, user, tiny_registered, {}, peak_memory_bytes=1_360_000_000, seconds=300.0)
    said = words(client.get(tab(where, "metrics")))
    assert "Memory 1.36 GB 1.36 GB 0%" in said and "The last" not in said, "one job is no record"
    finish(session, user, tiny_registered, {}, peak_memory_bytes=1_700_000_000, seconds=400.0)
    finish(session, user, tiny_registered, {}, peak_memory_bytes=1, seconds=1.0, device="another machine")
    said = words(client.get(tab(where, "metrics")))
    assert "The last 2 runs here predicted memory within 20%, time within 25%." in said


def test_how_far_a_prediction_is_off():
    assert job_tabs.off(110, 100) == pytest.approx(0.1) and job_tabs.off(90, 100) == pytest.approx(-0.1)
    assert job_tabs.off(None, 1) is None and job_tabs.off(1, 0) is None


def test_the_number_of_parameters_is_the_bases_on_every_page(client, session, user, tiny_registered):
    """Also once the trainer has counted what the method adds: `tests/lives.py` reports 137 million."""
    where = finish(session, user, tiny_registered, GENERATION)
    told = human_count(Shape.model_validate(tiny_registered.shape).parameters()).replace("\u202f", " ")
    assert f"% of {told} parameters are trainable" in words(client.get(where)) and "137 M" not in words(client.get(where))
    for page in ("/models", f"/models/{ids.public(ids.MODEL, tiny_registered.id)}", "/jobs/new?model=tiny"):
        assert told in words(client.get(page)), page
