"""`/v1/evaluations` and its pages; blends by name wherever a model is named."""

from __future__ import annotations

import html
import json
import re

import pytest
from sqlalchemy import func

from app.evaluation import service as evaluations
from app.kit import ids
from app.tables import Evaluation
from tests.factories import make_dataset, tune, upload
from tests.warm import warm_attempts  # noqa: F401  # a fixture
from worker.evaluation import attempt as evaluation_attempt

pytestmark = pytest.mark.usefixtures("warm_attempts")


@pytest.fixture
def data(session, user, data_dir):
    return make_dataset(session, user, data_dir)


def dataset_id(data) -> str:
    return ids.public(ids.DATASET, data.id)


def test_ordered_looked_at_cancelled_and_deleted(api, tiny_registered, data):
    made = api.post("/v1/evaluations", json={"model": "tiny", "dataset_id": dataset_id(data), "rows": 7}).json()
    assert made["object"] == "evaluation" and made["status"] == "queued" and made["rows"] == 7 and made["id"].startswith("eval-")
    assert api.get("/v1/evaluations").json()["data"] == [made]
    assert api.get(f"/v1/evaluations/{made['id']}").json() == made
    assert api.post(f"/v1/evaluations/{made['id']}/cancel").json()["status"] == "cancelled"
    assert api.delete(f"/v1/evaluations/{made['id']}").json()["deleted"] is True
    assert api.get(f"/v1/evaluations/{made['id']}").status_code == 404


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gone"}, 404, "model"),
        ({"dataset_id": "ds-" + "0" * 32}, 404, None),
        ({"kind": "guess"}, 400, "kind"),
        ({"rows": 0}, 400, "rows"),
        ({"kind": "blend"}, 400, "model"),
        ({"points": [0.5]}, 400, "points"),
        ({"kind": "blend", "points": [1.0]}, 400, "points.0"),
    ],
)
def test_wrong_orders_say_what_is_wrong(api, tiny_registered, data, change, status, param):
    answer = api.post("/v1/evaluations", json={"model": "tiny", "dataset_id": dataset_id(data)} | change)
    assert answer.status_code == status, answer.text
    assert param is None or answer.json()["error"]["param"] == param


def test_the_form_orders_and_the_page_shows_the_scores(client, session, tiny_registered, data):
    said = client.post("/evaluations", data={"model": "tiny", "dataset": dataset_id(data), "rows": "9"}, follow_redirects=False)
    assert said.status_code == 303
    page = client.get(said.headers["location"])
    assert "No evaluate worker is online" in page.text and 'hx-trigger="every 2s"' in page.text
    evaluation_attempt.work(session.query(Evaluation).one().id)
    page = html.unescape(client.get(said.headers["location"]).text)
    assert "Scores on 9 rows" in page and "Perplexity" in page and "Highest loss" in page and "hx-trigger" not in page
    assert "loss" in client.get("/evaluations").text
    wrong = client.post("/evaluations", data={"model": "tiny", "dataset": dataset_id(data), "rows": "0"})
    assert wrong.status_code == 400 and "rows" in wrong.text and 'value="0"' in wrong.text
    tiny_registered.deleted_at = func.now()
    session.commit()
    gone = client.post("/evaluations", data={"model": "tiny", "dataset": dataset_id(data), "part": "-1"})
    assert gone.status_code == 400 and "part" in gone.text, "the form is not shown without a model; what was wrong is"


@pytest.mark.long
def test_a_tuned_model_is_scored_at_five_blends_and_drawn(client, api, session, user, data_dir, tiny_registered, data):
    job, tuned = tune(session, user, data_dir, tiny_registered, data, epochs=4)
    page = f"/models/{ids.public(ids.MODEL, tuned.id)}?tab=evaluations"
    assert ">Measure<" in client.get(page).text
    form = {"model": tuned.name, "dataset": dataset_id(data), "kind": "blend", "next": page}
    said = client.post("/evaluations", data=form, follow_redirects=False)
    assert said.headers["location"] == page and "Queued" in client.get(page).text
    evil = client.post("/evaluations", data=form | {"next": "//elsewhere.example/x"}, follow_redirects=False)
    assert evil.headers["location"].startswith("/evaluations/eval-")
    (made,) = session.query(Evaluation).all()
    evaluation_attempt.work(made.id)
    session.refresh(made)
    assert made.status == "succeeded", made.error
    points = made.result["points"]
    assert [p["blend"] for p in points] == [0, 0.25, 0.5, 0.75, 1] and points[0]["forgetting"] == 0
    assert points[0]["score"] == pytest.approx(job.evaluation["base"]["loss"], rel=1e-4)
    assert points[4]["score"] == pytest.approx(job.evaluation["tuned"]["loss"], rel=1e-4)
    assert points[4]["score"] < points[2]["score"] < points[0]["score"]
    for where in (page, f"/jobs/{ids.public(ids.JOB, job.id)}?tab=evaluation", f"/evaluations/{ids.public(ids.EVALUATION, made.id)}"):
        shown = client.get(where)
        assert shown.status_code == 200 and len(re.findall(r"<polyline", shown.text)) == 2 and "General ability" in shown.text, where

    fewer = {"model": tuned.name, "dataset_id": dataset_id(data), "kind": "blend", "points": [0.5], "forgetting": False}
    asked = ids.parse(ids.EVALUATION, api.post("/v1/evaluations", json=fewer).json()["id"])
    evaluation_attempt.work(asked)
    scored = api.get(f"/v1/evaluations/{ids.public(ids.EVALUATION, asked)}").json()["result"]["points"]
    assert [(p["blend"], p["score"]) for p in scored] == [(p["blend"], p["score"]) for p in points[::2]]

    # A blend is a model wherever one is named.
    half = api.post("/v1/evaluations", json={"model": f"{tuned.name}@0.5", "dataset_id": dataset_id(data), "answers": 0}).json()
    assert half["model"] == f"{tuned.name}@0.5" and half["part"] == "validation"
    evaluation_attempt.work(evaluations.get(session, user, ids.parse(ids.EVALUATION, half["id"])).id)
    session.expire_all()
    found = api.get(f"/v1/evaluations/{half['id']}").json()["result"]
    assert found["scores"]["loss"] == pytest.approx(points[2]["score"], rel=1e-4)
    assert json.dumps(found)
    again = api.post("/v1/evaluations", json={"model": f"{tuned.name}@0.5", "dataset_id": dataset_id(data), "kind": "blend"})
    assert again.status_code == 400 and "blend already" in again.json()["error"]["message"]
    job_on_blend = {"model": f"{tuned.name}@0.5", "training_file": ids.public(ids.FILE, data.file_id)}
    refused = api.post("/v1/fine_tuning/jobs", json=job_on_blend)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "model" and "blend" in refused.json()["error"]["message"]


def test_soft_prompts_say_why_they_have_no_halfway(client, api, session, user, data_dir, tiny_registered, data):
    _, tuned = tune(session, user, data_dir, tiny_registered, data, {"name": "prompt_tuning", "tokens": 4}, epochs=1)
    page = client.get(f"/models/{ids.public(ids.MODEL, tuned.id)}?tab=evaluations")
    assert "Not available:" in page.text and ">Measure<" not in page.text
    said = api.post("/v1/evaluations", json={"model": f"{tuned.name}@0.5", "dataset_id": dataset_id(data)})
    assert said.status_code == 400 and "trained vectors" in said.json()["error"]["message"]


def chosen(page: str, field: str) -> list[str]:
    return re.findall(r'<option value="([^"]*)" selected', re.search(rf'<select id="{field}".*?</select>', page, re.S).group(0))


def test_the_form_begins_with_the_last_pair_that_can_be_scored(client, session, user, data_dir, tiny_registered, data):
    kinds = upload(session, user, [{"text": f"text number {n}", "label": "abc"[n % 3]} for n in range(30)], "kinds.jsonl")
    others = upload(session, user, [{"text": f"text number {n}", "label": "xy"[n % 2]} for n in range(30)], "others.jsonl")
    page = client.get("/evaluations").text
    assert chosen(page, "model") == ["tiny"] and chosen(page, "dataset") == [dataset_id(data)], "the newest data has labels"
    assert 'class="fault"' not in page

    only = html.unescape(client.get("/evaluations", params={"model": "tiny", "dataset": dataset_id(kinds)}).text)
    assert only.count("tiny is not a classifier, so it cannot be scored on labels.") == 1 and 'id="model-error"' in only
    wrong = client.post("/evaluations", data={"model": "tiny", "dataset": dataset_id(kinds), "rows": "9"})
    assert wrong.status_code == 400 and chosen(wrong.text, "dataset") == [dataset_id(kinds)] and 'value="9"' in wrong.text
    assert html.unescape(wrong.text).count("tiny is not a classifier, so it cannot be scored on labels.") == 1
    assert 'aria-describedby="model-help model-error" aria-invalid="true"' in wrong.text

    strategy = {"name": "feature_extraction"}
    _, sorter = tune(session, user, data_dir, tiny_registered, kinds, strategy)
    page = client.get("/evaluations").text
    assert chosen(page, "model") == [sorter.name] and chosen(page, "dataset") == [dataset_id(kinds)], "what was trained last"
    assert chosen(client.get("/evaluations", params={"model": sorter.name}).text, "dataset") == [dataset_id(kinds)]
    unlike = client.post("/evaluations", data={"model": sorter.name, "dataset": dataset_id(others)})
    assert unlike.status_code == 400 and "assigns other labels than those of others: a, b, c." in html.unescape(unlike.text)
    assert 'id="dataset-error"' in unlike.text
    made = client.post("/evaluations", data={"model": "tiny", "dataset": dataset_id(data)}, follow_redirects=False)
    assert made.status_code == 303
    page = client.get("/evaluations").text
    assert chosen(page, "model") == ["tiny"] and chosen(page, "dataset") == [dataset_id(data)], "what was scored last"
