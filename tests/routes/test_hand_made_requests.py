"""Requests made by hand that no form and no client sends: each has a clear answer."""

from __future__ import annotations

import pytest

from app.kit import ids
from tests.factories import make_dataset

BIG = 9223372036854775808


@pytest.fixture
def order(session, user, data_dir, tiny_registered):
    dataset = make_dataset(session, user, data_dir)
    return {"model": "tiny", "dataset_id": ids.public(ids.DATASET, dataset.id)}


@pytest.mark.parametrize("path", ["/v1/estimates", "/v1/fine_tuning/jobs"])
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"strategy": {"name": ["a"]}}, "strategy.name"),
        ({"strategy": {"name": {}}}, "strategy.name"),
        ({"hyperparameters": {"batch_size": 10**400}}, "hyperparameters.batch_size"),
        ({"model": "\ud800"}, "model"),
        ({"training_file": "\ud800"}, "training_file"),
        ({"validation_file": "a\udfff"}, "validation_file"),
    ],
)
def test_orders(api, order, path, change, param):
    import json

    answer = api.post(path, content=json.dumps(order | change), headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_a_batch_larger_than_every_step_is_cut_to_the_largest(api, order):
    for size in (10**18, 1e308):
        answer = api.post("/v1/fine_tuning/jobs", json=order | {"hyperparameters": {"batch_size": size}})
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 200:
            assert answer.json()["run"]["max_tokens_per_step"] == 1_048_576


def test_numbers_in_addresses_are_bounded(api, client, order):
    key = order["dataset_id"]
    paths = [f"/v1/datasets/{key}/report?after={BIG}", f"/v1/datasets/{key}/rows?page={BIG}", f"/v1/datasets/{key}/lines/{BIG}"]
    pages = [f"/datasets/{key}?page={BIG}", f"/datasets/{key}/rows?line={BIG}", f"/datasets/{key}/split?page={BIG}"]
    for asker, addresses in ((api, paths), (client, pages)):
        for path in addresses:
            assert asker.get(path).status_code == 400, path
    assert client.post(f"/datasets/{key}/drop", data={"line": str(BIG)}).status_code == 400
    assert api.get("/v1/fine_tuning/jobs?limit=1" + "0" * 30).status_code == 200, "a larger limit is cut to the largest page"


def test_a_folder_that_cannot_be_followed(api, data_dir):
    (data_dir / "import").mkdir(exist_ok=True)
    (data_dir / "import" / "loop").symlink_to("loop")
    for folder in ("a" * 5000, "loop", "loop/model", "\u202e", "/" * 5000):
        answer = api.post("/v1/models", json={"folder": folder})
        assert answer.status_code in (400, 403) and answer.json()["error"]["message"], (folder[:20], answer.text)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("chat/completions", {"functions": [{"name": "f"}]}),
        ("chat/completions", {"service_tier": "flex"}),
        ("chat/completions", {"modalities": ["text", "audio"]}),
        ("completions", {"best_of": 3}),
        ("completions", {"best_of": 2, "n": 4}),
        ("completions", {"suffix": "the end"}),
    ],
)
def test_what_cannot_be_honored_is_refused(api, tiny_registered, path, change):
    order = {"model": "tiny", **({"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"})}
    answer = api.post(f"/v1/{path}", json=order | change)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == next(iter(change)) and error["code"] == "unsupported_parameter", answer.text


@pytest.mark.parametrize(
    "form",
    [
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_object", "json_schema": {"name": "a", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["x" * 70_000]}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "wide": True}},
    ],
)
def test_a_form_of_answer_that_says_too_much_or_too_little(api, tiny_registered, form):
    answer = api.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "x"}], "response_format": form}
    )
    assert answer.status_code in (400, 422) and "response_format" in str(answer.json()["error"]["param"]), answer.text


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (
            "chat/completions",
            {"response_format": {"type": "text"}, "tool_choice": "auto", "modalities": ["text"], "functions": None, "verbosity": "medium"},
        ),
        (
            "chat/completions",
            {
                "response_format": None,
                "tool_choice": "none",
                "user": "a",
                "store": False,
                "parallel_tool_calls": True,
                "service_tier": "auto",
            },
        ),
        ("completions", {"best_of": 1, "suffix": None}),
        ("completions", {"best_of": 4, "n": 4, "suffix": ""}),
    ],
)
def test_what_asks_for_nothing_passes(api, path, change):
    """No model of this name is there, which is found out only after the body was taken."""
    order = {"model": "none", **({"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"})}
    answer = api.post(f"/v1/{path}", json=order | change)
    assert answer.status_code == 404, answer.text


def test_answers_of_the_api_say_how_long_they_took(api, client):
    assert int(api.get("/v1/models").headers["openai-processing-ms"]) >= 0
    assert int(api.get("/v1/nothing").headers["openai-processing-ms"]) >= 0
    assert "openai-processing-ms" not in client.get("/guide").headers


def test_the_epochs_of_a_job_are_told_once_it_runs(api, session, user, tiny_registered, data_dir, order):
    from app.tables import Job
    from tests.lives import Life

    made = api.post("/v1/fine_tuning/jobs", json=order | {"run": {"epochs": 2}}).json()
    assert made["hyperparameters"]["n_epochs"] == "auto" == made["method"]["supervised"]["hyperparameters"]["n_epochs"]
    Life(session, session.get_one(Job, ids.parse(ids.JOB, made["id"]))).claim()
    told = api.get(f"/v1/fine_tuning/jobs/{made['id']}").json()
    assert told["hyperparameters"]["n_epochs"] == 2 == told["method"]["supervised"]["hyperparameters"]["n_epochs"]
    assert told["hyperparameters"]["batch_size"] >= 1 and told["hyperparameters"]["learning_rate_multiplier"] == 1
