"""Classifiers on encoders and decoders: packed like padded, saved like loaded, frozen features like plain scikit-learn."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from app.shapes import shape_of
from app.spec import ModelRef
from app.strategies import STRATEGIES
from worker.modeling.classifier import Classifier, load_backbone, load_classifier, pool, save_classifier
from worker.modeling.packed_attention import NAME as PACKED
from worker.modeling.packed_attention import packed_arguments
from worker.scoring.metrics import answer_scores, calibration, classification_scores, prior_scores
from worker.training.feature_cache import fit_logistic, logistic_head

SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 120}


@pytest.fixture(params=["encoder", "decoder"])
def stack(request, data_dir: Path) -> ModelRef:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, max_position_embeddings=64) if request.param == "encoder" else LlamaConfig(**SIZES, num_key_value_heads=2)
    model = BertModel(config, add_pooling_layer=False) if request.param == "encoder" else LlamaModel(config)
    folder = data_dir / "models" / "stack"
    model.save_pretrained(folder)
    return ModelRef(id=uuid.uuid4(), name="stack", kind="encoder", path="models/stack", revision="0" * 64, shape=shape_of(config.to_dict()))


def packed(texts: list[list[int]]) -> tuple[dict, list[int]]:
    lengths = [len(t) for t in texts]
    ids = torch.tensor([[token for text in texts for token in text]])
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": places, **packed_arguments(lengths, torch.device("cpu"))}, lengths


TEXTS = [[5, 9, 11, 40], [7, 3], [30, 31, 32, 33, 34, 35, 36]]


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_packed_vectors_equal_those_of_each_text_alone(stack, pooling):
    classifier = Classifier(load_backbone(stack, attention=PACKED), torch.nn.Linear(48, 3), pooling)
    inputs, lengths = packed(TEXTS)
    together = classifier.pooled(**inputs, lengths=lengths)
    plain = load_backbone(stack)
    for text, vector in zip(TEXTS, together, strict=True):
        states = plain(input_ids=torch.tensor([text])).last_hidden_state[0]
        alone = {"mean": states.mean(0), "last": states[-1], "first": states[0]}[pooling]
        assert torch.allclose(vector, alone, atol=1e-5)


def test_a_mean_leaves_the_placeholders_of_a_soft_prompt_out():
    states = torch.arange(10.0)[:, None]
    assert pool(states, [4, 6], "mean", skip=2).flatten().tolist() == [2.5, 7.5]
    assert pool(states, [4, 6], "first", skip=2).flatten().tolist() == [2.0, 6.0]


@pytest.mark.parametrize("name", [n for n, s in STRATEGIES.items() if "classification" in s.tasks])
def test_every_strategy_that_classifies_saves_and_loads(stack, name, tmp_path, data_dir):
    from app.spec import Adapter
    from worker.modeling.loading import STRATEGY_FILE

    strategy = STRATEGIES[name]()
    if strategy.unavailable(stack.shape, task="classification"):
        pytest.skip(strategy.unavailable(stack.shape, task="classification"))
    body = strategy.attach(load_backbone(stack, attention=PACKED), task="classification", labels=3)
    body.eval()
    head = strategy.head(48, 3)
    learning = sum(p.numel() for p in [*body.parameters(), *head.parameters()] if p.requires_grad)
    assert learning == strategy.trainable_parameters(stack.shape, task="classification", labels=3)
    k = strategy.virtual_tokens()
    classifier = Classifier(body, head, "mean", skip=k).eval()
    inputs, lengths = packed([[0] * k + text for text in TEXTS])
    before = classifier(**inputs, lengths=lengths)

    folder = data_dir / "runs" / "final"
    folder.mkdir(parents=True)
    strategy.save(body, folder)
    (folder / STRATEGY_FILE).write_text(strategy.model_dump_json())
    save_classifier(classifier, folder, ["a", "b", "c"])
    if strategy.adapter:
        tuned = stack.model_copy(update={"adapters": (Adapter(strategy=name, path="runs/final", sha256="0" * 64),)})
    else:
        tuned = stack.model_copy(update={"path": "runs/final"})
    again, labels = load_classifier(tuned)
    assert labels == ["a", "b", "c"]
    again.backbone.config._attn_implementation = PACKED
    inputs, lengths = packed([[0] * k + text for text in TEXTS])
    assert torch.allclose(again(**inputs, lengths=lengths), before, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_linear_layer_says_what_the_regression_says(classes):
    draw = np.random.default_rng(0)
    truth = np.arange(120) % classes
    vectors = draw.normal(size=(120, 6)).astype(np.float32) + truth[:, None].astype(np.float32).astype(np.float32)
    model, tried = fit_logistic(vectors, truth, strength=None, seed=0)
    assert len(tried) == 6
    head = logistic_head(model, classes)
    found = head(torch.from_numpy(vectors)).softmax(1).detach().numpy()
    assert np.allclose(found, model.predict_proba(vectors), atol=1e-5)


def test_a_class_without_rows_is_never_answered():
    truth = np.array([0, 2] * 20)
    vectors = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32) + truth[:, None].astype(np.float32).astype(np.float32)
    head = logistic_head(fit_logistic(vectors, truth, strength=1.0, seed=0)[0], 3)
    assert head(torch.from_numpy(vectors)).softmax(1)[:, 1].max() < 1e-6


def test_scores_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    found = classification_scores(probabilities, [0, 0, 1, 1], ["no", "yes"])
    assert found["accuracy"] == 0.75
    assert found["confusion"] == [[2, 0], [1, 1]]
    assert found["per_class"]["yes"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "rows": 2}
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.8, 0.7, 0.4]).mean())


def test_calibration_is_nought_when_confidence_is_earned():
    confidence = np.full(100, 0.8)
    assert calibration(confidence, np.arange(100) < 80)[0] == pytest.approx(0)
    assert calibration(confidence, np.arange(100) < 30)[0] == pytest.approx(0.5)


def test_the_prior_is_the_floor():
    found = prior_scores([0, 0, 0, 1], [0, 1, 0, 0], ["no", "yes"])
    assert found["accuracy"] == 0.75


# Answers --------------------------------------------------------------------------------------------------------------


def test_rows_that_a_model_did_not_answer_count_for_none() -> None:
    references = {n: f"answer {n}" for n in range(6)}
    base, tuned = {n: "wrong" for n in range(6)}, {n: f"answer {n}" for n in range(1, 6)}  # no time was left for the first
    found = answer_scores((base, tuned), references)
    assert found.rows == 5 and [scores["exact_match"] for scores in found.scores] == [0, 1]
    assert found.difference["exact_match"] == (1, 1) and found.difference["chrf"][0] > 0
    assert found.scores[0]["intervals"]["exact_match"] == pytest.approx((0, 0.434), abs=1e-3), "Wilson: 0 of 5 may be 43 %"
    same = answer_scores((base | {0: "answer 0"}, base | {1: "answer 1"}), references)
    low, high = same.difference["exact_match"]
    assert same.rows == 6 and low < 0 < high
    assert answer_scores(({}, {}), references) == ([{}, {}], {}, 0)
