"""`/v1/classify` and its page through a real worker: the probabilities are those the trainer measured."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
from sqlalchemy import select

from app import events, limits
from app.spec import ModelRef
from app.tables import Model, TokenUse
from tests.conftest import forget_settings
from tests.factories import make_dataset, make_job
from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401
from tests.worker.training.test_classification import put_encoder, sorting, texts
from worker.train import train

_trained: dict[str, tuple[ModelRef, events.Finished]] = {}
"""By strategy: the base and the end of the one job that trained a classifier for all tests here."""


@pytest.fixture(params=["feature_extraction", "lora"])
def classifier(request, session, user, answering_dir: Path, tiny_model, monkeypatch):  # noqa: F811
    """A classifier trained in the worker's folder, and the rows of it and its base; also what the job said at its end."""
    if request.param not in _trained:
        with monkeypatch.context() as there:
            there.setenv("LUTHIER_DATA_DIR", str(answering_dir))
            forget_settings()
            encoder = put_encoder(tiny_model)
            spec = sorting(encoder, texts(), request.param)
            finished = list(train(spec, answering_dir / "runs" / uuid.uuid4().hex / "a1"))[-1]
        forget_settings()
        assert isinstance(finished, events.Finished)
        _trained[request.param] = encoder, finished
    encoder, finished = _trained[request.param]
    base = register_tiny(session, "encoder", kind="encoder", path=encoder.path)
    base.shape = json.loads(encoder.shape.model_dump_json())
    session.add(
        Model(
            owner_id=user.id, name="sorter", title="Sorter", kind="classifier", base_id=base.id, strategy=request.param, adapter=True,
            path=finished.path, revision=finished.revision, adapter_sha256=finished.adapter_sha256, source={"from": "job"},
            shape=base.shape, labels=finished.labels, bytes=finished.bytes,
        )
    )  # fmt: skip
    session.commit()
    return finished


def test_the_probabilities_are_those_the_trainer_measured(api, classifier, generate_worker):  # noqa: F811
    listed = classifier.evaluation["worst"] + classifier.evaluation["best"]
    said = api.post("/v1/classify", json={"model": "sorter", "input": [row["prompt"] for row in listed]}).json()
    assert said["object"] == "list" and said["model"] == "sorter" and said["usage"]["prompt_tokens"] > 10
    for row, one in zip(listed, said["data"], strict=True):
        assert one["label"] == row["tuned_answer"] and not one["truncated"]
        assert one["probabilities"][one["label"]] == pytest.approx(row["probability"], abs=1e-4)
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5) and set(one["probabilities"]) == set(classifier.labels)
    assert api.put("/v1/model_aliases/triage", json={"model": "sorter"}).status_code == 200
    named = api.post("/v1/classify", json={"model": "triage", "input": [row["prompt"] for row in listed]}).json()
    assert named == said | {"model": "triage"}
    long = api.post("/v1/classify", json={"model": "sorter", "input": "The maple of the neck is told of. " * 60}).json()
    assert long["data"][0]["truncated"]


@pytest.mark.parametrize("classifier", ["lora"], indirect=True)
def test_its_tokens_count_against_the_day_and_are_refused_once_it_is_used(api, client, session, user, classifier, generate_worker):  # noqa: F811
    said = api.post("/v1/classify", json={"model": "sorter", "input": ["the maple", "the glue of the neck"]}).json()
    used = session.scalars(select(TokenUse)).one()
    assert used.read == used.encoded == said["usage"]["prompt_tokens"] > 2 and used.written == 0
    assert client.get("/playground/classify", params={"models": "sorter", "text": "the maple"}).status_code == 200
    session.refresh(used)
    assert used.encoded > said["usage"]["prompt_tokens"], "those of the page too"
    limits.set_own(user, {"tokens_per_day": used.encoded})
    session.commit()
    refused = api.post("/v1/classify", json={"model": "sorter", "input": "the maple"})
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "limit_reached"
    assert client.get("/playground/classify", params={"models": "sorter", "text": "the maple"}).status_code == 429


@pytest.mark.parametrize(
    ("change", "param"),
    [({"input": []}, "input"), ({"input": ["a", " "]}, "input"), ({"model": "encoder"}, "model"), ({"input": ["a"] * 5000}, "input")],
)
@pytest.mark.parametrize("classifier", ["lora"], indirect=True)
def test_bad_requests(api, classifier, change, param):
    said = api.post("/v1/classify", json={"model": "sorter", "input": "a"} | change)
    assert said.status_code == 400 and said.json()["error"]["param"] == param and said.json()["error"]["message"]


@pytest.mark.long
@pytest.mark.parametrize("classifier", ["lora"], indirect=True)
def test_the_page_shows_bars(browser_page, served, session, user, classifier, generate_worker, data_dir, tmp_path):  # noqa: F811
    from tests.looks import look_at, sign_in

    model = session.scalars(select(Model).where(Model.name == "sorter")).one()
    job = make_job(session, user, session.get_one(Model, model.base_id), make_dataset(session, user, data_dir))
    job.evaluation, model.job_id = classifier.evaluation, job.id
    session.commit()
    page = sign_in(browser_page, served, session, user)
    page.goto(f"{served}/playground/classify")
    held = [row["prompt"] for row in classifier.evaluation["best"] + classifier.evaluation["worst"]]
    offered = page.get_by_label("Texts").input_value().splitlines()
    assert len(offered) == 3 and set(offered) <= set(held), "validation texts are there to begin with"
    page.get_by_role("link", name=offered[1]).click()
    assert page.get_by_label("Texts").input_value() == offered[1] and page.locator("ol.next").count() == 1
    page.get_by_label("Texts").fill("The spruce of number 3 is told of.\nThe scroll of number 5 is told of.")
    page.get_by_role("button", name="Classify").click()
    pane = page.get_by_role("region", name="sorter")
    assert pane.locator("ol.next li").count() == 6 and pane.locator("ol.next").count() == 2
    shares = [float(bar.get_attribute("value")) for bar in pane.locator("progress").all()]
    assert sum(shares) == pytest.approx(2, abs=1e-3)
    look_at(page, "classify", tmp_path)
