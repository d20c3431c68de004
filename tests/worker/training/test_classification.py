"""Whole classification jobs in this process: every strategy on an encoder and on a decoder, and the frozen features."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from app import events
from app.errors import BadData
from app.models.model_card import Provenance, load_code
from app.settings import get_settings
from app.shapes import shape_of
from app.spec import Adapter, JobSpec, ModelRef, Split
from app.strategies import STRATEGIES
from tests.card_code import run_card
from tests.worker.orders import order, put_dataset, put_model
from worker.conversion.merge import merge
from worker.data.batching import BadRow, Row
from worker.modeling.classifier import load_backbone, load_classifier
from worker.modeling.loading import load_tokenizer
from worker.modeling.packed_attention import NAME as PACKED
from worker.runtime import progress
from worker.runtime.device import choose
from worker.train import StopSignals, train
from worker.training import checkpoint, feature_cache
from worker.training.objectives.classification import probabilities, read_labelled, tokenise_texts

WORDS = {"wood": "spruce maple ebony willow", "sound": "bright warm dark loud", "part": "neck scroll bridge peg"}


def texts(count: int = 60) -> list[dict[str, str]]:
    """Each text holds one word of its class among others."""
    rows = []
    for i in range(count):
        label = list(WORDS)[i % 3]
        word = WORDS[label].split()[i // 3 % 4]
        rows.append({"text": f"The {word} of number {i} is told of.", "label": label})
    return rows


def put_encoder(folder: Path) -> ModelRef:
    """A small BERT in the data folder, with the small model's tokenizer."""
    from transformers import BertConfig, BertModel

    target = get_settings().data_dir / "models" / "encoder"
    if not target.exists():
        shutil.copytree(
            folder, target, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json", "manifest.json")
        )
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        BertModel(BertConfig(vocab_size=512, max_position_embeddings=128, **sizes), add_pooling_layer=False).save_pretrained(target)
    shape = shape_of(json.loads((target / "config.json").read_text()))
    return ModelRef(id=uuid.uuid4(), name="encoder", kind="encoder", path="models/encoder", revision="0" * 64, shape=shape)


def sorting(model: ModelRef, rows: list[dict[str, str]], strategy: str = "lora", settings: dict | None = None, **run) -> JobSpec:
    run = {"validation_fraction": 0.2, "learning_rate": 1e-2, "epochs": 8} | run
    return order(model, put_dataset(rows, "classification"), strategy, settings, **run).model_copy(update={"task": "classification"})


def run(spec: JobSpec, data_dir: Path, job: str = "job") -> list:
    return list(train(spec, data_dir / "runs" / job / "a1"))


def of(said: list, kind: type) -> list:
    return [event for event in said if isinstance(event, kind)]


def tuned_ref(spec: JobSpec, finished: events.Finished) -> ModelRef:
    made = Adapter(strategy=spec.strategy.name, path=finished.path, sha256=finished.adapter_sha256 or "0" * 64)
    changed = {"adapters": (made,)} if type(spec.strategy).adapter else {"path": finished.path}
    return spec.model.model_copy(update={**changed, "labels": tuple(finished.labels)})


CLASSIFIERS = [name for name, strategy in STRATEGIES.items() if "classification" in strategy.tasks]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_strategy_learns_and_its_result_says_the_same(data_dir: Path, tiny_model: Path, name: str, kind: str) -> None:
    model = put_encoder(tiny_model) if kind == "encoder" else put_model(tiny_model)
    why = STRATEGIES[name]().unavailable(model.shape, task="classification")
    if why:
        pytest.skip(why)
    spec = sorting(model, texts(), name, forgetting=True, evaluations_per_epoch=0.5)
    said = run(spec, data_dir)
    (started,), finished = of(said, events.Started), said[-1]
    assert isinstance(finished, events.Finished) and finished.kind == "classifier" and finished.labels == ["part", "sound", "wood"]
    assert started.trainable_parameters == spec.strategy.trainable_parameters(model.shape, task="classification", labels=3)
    losses = [step.loss for step in of(said, events.Step)]
    sixth = max(1, len(losses) // 6)  # packs of texts are small, so single steps are noisy
    assert of(said, events.Evaluated)[0].step == 0
    assert np.mean(losses[-sixth:]) < (np.mean(losses[:sixth]) if len(losses) > 1 else np.log(3))
    assert len(finished.evaluation["tuned"]["confusion"]) == 3 and finished.evaluation["worst"][0]["reference"] in WORDS
    frozen = started.trainable_parameters == spec.strategy.head_parameters(model.shape, 3)
    verdict, change = finished.forgetting["verdict"], finished.forgetting["change"]
    assert (verdict == "nothing, by construction") == frozen == (change == 0 and finished.forgetting["before"] is None)
    assert (verdict == "not applicable") == (kind == "encoder" and not frozen) == (change is None)

    classifier, labels = load_classifier(tuned_ref(spec, finished), attention=PACKED)
    assert labels == finished.labels
    data, tokenizer = read_labelled(spec), load_tokenizer(spec.model)
    lead = [tokenizer.pad_token_id or 0] * spec.strategy.virtual_tokens()
    found = probabilities(classifier, tokenise_texts(tokenizer, data.held_out, 128, lead), 400, choose(spec.run, spec.strategy, {}))
    truth = data.truth(data.held_out)
    assert float(-np.log(found[np.arange(len(truth)), truth]).mean()) == pytest.approx(finished.evaluation["tuned"]["log_loss"], abs=1e-4)

    folder = data_dir / finished.path
    elsewhere = run_card((folder / "README.md").read_text(), folder, **{model.name: data_dir / model.path})
    asked = tokenise_texts(tokenizer, [Row(1, {"text": "A text to sort."})], 128, lead)
    said = probabilities(classifier, asked, 400, choose(spec.run, spec.strategy, {}))[0]
    assert elsewhere["probabilities"] == pytest.approx(said, abs=1e-5)

    if type(spec.strategy).merges:
        facts = merge(tuned_ref(spec, finished), data_dir / "merged")
        code = load_code("classifier", Provenance(None, (), model.shape.hidden, len(labels), spec.strategy))
        alone = run_card(f"```python\n{code}```", data_dir / "merged")
        assert facts["labels"] == labels and "peft" not in code
        assert alone["probabilities"] == pytest.approx(said, abs=0.02)  # stored in 16 bits, and loaded in them elsewhere
        whole = load_classifier(model.model_copy(update={"path": "merged", "labels": tuple(labels)}), attention=PACKED)[0]
        assert probabilities(whole, asked, 400, choose(spec.run, spec.strategy, {}))[0] == pytest.approx(said, abs=2e-3)


@pytest.mark.long
def test_a_resumed_job_is_the_same_job(data_dir: Path, tiny_model: Path) -> None:
    spec = sorting(put_encoder(tiny_model), texts(), "lora", epochs=4)
    whole = run(spec, data_dir, "whole")
    control, said = StopSignals(), []
    for event in train(spec, data_dir / "runs/cut/a1", control=control):
        said.append(event)
        control.stop |= isinstance(event, events.Step) and event.step == 3
    assert not of(said, events.Finished) and checkpoint.newest(data_dir / "runs/cut").name == "checkpoint-3"
    again = list(train(spec, data_dir / "runs/cut/a2"))
    assert of(again, events.Started)[0].resumed_from == 3 and of(again, events.Started)[0].exact
    assert [e.loss for e in of(whole, events.Step)] == [e.loss for e in of(said, events.Step)[:3] + of(again, events.Step)]
    ours, theirs = again[-1], whole[-1]
    assert (ours.adapter_sha256, ours.evaluation) == (theirs.adapter_sha256, theirs.evaluation)


@pytest.mark.long
def test_what_a_row_loses_is_kept(data_dir: Path, tiny_model: Path) -> None:
    rows = [{"text": row["text"].split()[1], "label": row["label"]} for row in texts()]
    rows[7]["label"] = "wood"  # “bright”, which is a sound in all other rows
    run(sorting(put_encoder(tiny_model), rows, "full", epochs=20, validation_fraction=0, learning_rate=3e-3), data_dir)
    ledger = json.loads((data_dir / "runs/job/a1/ledger.json").read_text())
    assert ledger["line"] == list(range(1, 61))
    assert max(zip(ledger["after"], ledger["line"], strict=True))[1] == 8
    assert ledger["before"][0] == pytest.approx(-np.log(21 / 60), abs=1e-4)  # the share of its label


# Frozen features ------------------------------------------------------------------------------------------------------


def test_frozen_features_equal_plain_scikit_learn(data_dir: Path, tiny_model: Path) -> None:
    spec = sorting(put_encoder(tiny_model), texts(), "feature_extraction", {"regularisation": 3.0})
    said = run(spec, data_dir)
    data, tokenizer = read_labelled(spec), load_tokenizer(spec.model)
    model = load_backbone(spec.model)
    vectors = []
    with torch.inference_mode():
        for row in [*data.train, *data.held_out]:
            vector = model(**tokenizer(row.row["text"], return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0].mean(0)
            vectors.append((vector / vector.norm()).numpy())
    inside, outside = np.stack(vectors[: len(data.train)]), np.stack(vectors[len(data.train) :])
    theirs = LogisticRegression(C=3.0, max_iter=2000).fit(inside, data.truth(data.train))
    scores = said[-1].evaluation["tuned"]
    assert scores["accuracy"] == pytest.approx(theirs.score(outside, data.truth(data.held_out)), abs=0.005)
    picked = theirs.predict_proba(outside)[np.arange(len(outside)), data.truth(data.held_out)]
    assert scores["log_loss"] == pytest.approx(float(-np.log(picked).mean()), abs=1e-3)
    assert [step.step for step in of(said, events.Step)] == [1]


def test_few_held_out_rows_are_cross_validated_beside_the_commonest_label_and_examples(data_dir: Path, tiny_model: Path) -> None:
    """The whole of what the verdict reads, out of a whole job: each side is judged on every row, and the three are not the same."""
    found = run(sorting(put_encoder(tiny_model), texts(), "feature_extraction"), data_dir)[-1].evaluation["contest"]
    assert found["cross_validated"] and found["base"]["rows"] == found["few_shot"]["rows"] == 60
    assert found["base"]["score"] == pytest.approx(1 / 3, abs=0.01)
    assert found["base"]["tuned"] == found["few_shot"]["tuned"] > found["few_shot"]["score"] > found["base"]["score"]


def test_only_rows_that_may_change_sides_are_folded(data_dir: Path, tiny_model: Path) -> None:
    """Fifteen rows are enough for it; whole groups, and the rows of another dataset, stay where they were put."""
    model, rows = put_encoder(tiny_model), texts(15)
    assert run(sorting(model, rows, "feature_extraction"), data_dir, "few")[-1].evaluation["contest"]["base"]["rows"] == 15
    grouped = [row | {"metadata": {"day": str(n // 3)}} for n, row in enumerate(rows)]
    by_day = sorting(model, grouped, "feature_extraction").model_copy(update={"split": Split(method="grouped", column="day")})
    apart = sorting(model, rows, "feature_extraction").model_copy(update={"validation": put_dataset(texts(18)[15:], "classification")})
    for name, spec in (("grouped", by_day), ("apart", apart)):
        contest = run(spec, data_dir, name)[-1].evaluation["contest"]
        assert "cross_validated" not in contest and contest["base"]["rows"] == 3


def test_vectors_are_made_once_and_a_dense_classifier_learns_on_them(data_dir: Path, tiny_model: Path, monkeypatch) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    model = put_encoder(tiny_model)
    assert of(run(sorting(model, texts(), "feature_extraction"), data_dir, "first"), events.TaskProgress)
    spec = sorting(model, texts(), "feature_extraction", {"classifier": "dense", "width": 16}, early_stopping_patience=0)
    said = run(spec, data_dir, "second")
    assert any("were kept" in e.message for e in of(said, events.Log)) and not of(said, events.TaskProgress)
    steps = of(said, events.Step)
    assert len(steps) == 60 and steps[-1].loss < steps[0].loss - 0.05

    made, embed = [], feature_cache.embed
    monkeypatch.setattr(
        feature_cache,
        "embed",
        lambda stack, tokenizer, new, *more, **named: made.extend(new) or embed(stack, tokenizer, new, *more, **named),
    )
    more = [{"text": "Glue holds the neck.", "label": "part"}, *texts()[::-1]]
    again = run(sorting(model, more, "feature_extraction"), data_dir, "third")
    assert made == ["Glue holds the neck."] and any("60 of 61 texts were kept" in e.message for e in of(again, events.Log))
    other = sorting(model, texts(), "feature_extraction", {"pooling": "first"})
    assert isinstance(run(other, data_dir, "fourth")[-1], events.Finished) and len(made) == 61


def test_a_stop_before_the_vectors_are_made_leaves_nothing_half(data_dir: Path, tiny_model: Path) -> None:
    spec = sorting(put_encoder(tiny_model), texts(), "feature_extraction")
    said = list(train(spec, data_dir / "runs/job/a1", control=StopSignals(stop=True)))
    assert not of(said, events.Finished) and not list((data_dir / "features").glob("*.safetensors"))
    assert isinstance(list(train(spec, data_dir / "runs/job/a2"))[-1], events.Finished)


# Bad data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["lora", "feature_extraction"])
def test_one_class_only(data_dir: Path, tiny_model: Path, strategy: str) -> None:
    rows = [{**row, "label": "wood"} for row in texts(12)]
    with pytest.raises(BadData, match="nothing to tell apart"):
        run(sorting(put_encoder(tiny_model), rows, strategy), data_dir)


def test_a_label_that_only_validation_has(data_dir: Path, tiny_model: Path) -> None:
    other = put_dataset([{"text": "x", "label": "glue"}], "classification")
    spec = sorting(put_encoder(tiny_model), texts(12)).model_copy(update={"validation": other})
    with pytest.raises(BadRow, match="glue"):
        run(spec, data_dir)


def test_a_class_with_one_row_is_said(data_dir: Path, tiny_model: Path) -> None:
    rows = [*texts(30), {"text": "Glue holds.", "label": "glue"}]
    said = run(sorting(put_encoder(tiny_model), rows, epochs=1), data_dir)
    assert any("1 class has only one training row: “glue”" in e.message for e in of(said, events.Log))
    assert said[-1].labels == ["glue", "part", "sound", "wood"]
