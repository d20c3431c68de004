"""Predictions over a file, and maps of vectors: queued, killed, done by a real child, downloaded like the input."""

from __future__ import annotations

import csv
import io
import json

import pytest
from sqlalchemy import select

from app import limits
from app.db import transaction
from app.errors import NotFound
from app.evaluation import predictions
from app.evaluation import service as evaluations
from app.kit import ids
from app.models.dependants import dependants
from app.settings import get_settings
from app.tables import Evaluation, TokenUse, User
from tests.conftest import wait_until
from tests.evaluation.test_service import children, in_thread, now_of
from tests.factories import tune
from tests.routes.test_advice import labelled  # noqa: F401  a fixture
from tests.warm import warm_attempts  # noqa: F401  # a fixture
from worker.evaluation import attempt as evaluation_attempt
from worker.evaluation.embedding_map import flat

pytestmark = pytest.mark.usefixtures("warm_attempts")


TICKETS = "Nr;customer_message\n1;What wood is the belly made of?\n2;\n3;=1+1 and a long question about glue\n"


@pytest.fixture(autouse=True)
def soon(data_dir):
    get_settings().lease_seconds, get_settings().beat_seconds = 3.0, 0.2


def send(api, name: str, text: str) -> str:
    return api.post("/v1/files", files={"file": (name, text.encode())}, data={"purpose": "user_data"}).json()["id"]


def made_of(session, said: dict) -> Evaluation:
    session.rollback()
    return session.get_one(Evaluation, ids.parse(ids.PREDICTION, said["id"]))


def stored(session, user: User) -> float:
    session.rollback()
    person, project = (limits.used_by(session, by, user.id, "storage_bytes") for by in ("person", "project"))
    assert person == project
    return person


def test_a_file_comes_back_with_answers_though_a_worker_was_killed(api, session, user, tiny_registered):
    file = send(api, "tickets.csv", TICKETS)
    said = api.post("/v1/predictions", json={"model": "tiny", "file": file, "max_tokens": 4}).json()
    url, made = f"/v1/predictions/{said['id']}", made_of(session, said)
    assert said["status"] == "queued" and api.get(f"{url}/content").status_code == 409
    assert api.get("/v1/evaluations").json()["data"] == [] and len(api.get("/v1/predictions").json()["data"]) == 1
    thread = in_thread(made)
    children()[0].kill()
    thread.join(30)
    assert now_of(made).status == "queued" and now_of(made).deaths == 1 and not predictions.path_of(made.id).exists()
    evaluation_attempt.work(made.id)
    done = api.get(url).json()
    assert done["error"] is None
    assert (done["status"], done["rows"], done["column"], done["added"], done["without"]) == (
        "succeeded", 3, "customer_message", ["answer", "note"], 1
    )  # fmt: skip
    used = session.scalars(select(TokenUse)).one()
    assert used.user_id == user.id and 2 <= used.written <= 2 * 4 + 2 * 4, "two answers of at most 4 tokens, and those of the first try"
    assert used.read >= 10, "both prompts"
    size = predictions.path_of(made.id).stat().st_size
    assert size > len(TICKETS) and stored(session, user) == len(TICKETS.encode()) + size, "the file and what came of it"
    table = list(csv.DictReader(io.StringIO(api.get(f"{url}/content").text)))
    assert [row["Nr"] for row in table] == ["1", "2", "3"] and list(table[0]) == ["Nr", "customer_message", "answer", "note"]
    assert table[1]["note"] == "empty" and not table[1]["answer"] and table[2]["customer_message"].startswith("=1+1")
    lines = [json.loads(line) for line in api.get(f"{url}/content?format=jsonl").text.splitlines()]
    assert [line.get("answer", "") for line in lines] == [row["answer"] for row in table]
    stranger = User(name="stranger")
    session.add(stranger)
    session.flush()
    with pytest.raises(NotFound):
        evaluations.get(session, stranger, made.id, predictions.KINDS)
    session.rollback()
    assert api.delete(url).json()["deleted"] and not predictions.path_of(made.id).exists() and api.get(url).status_code == 404
    assert stored(session, user) == len(TICKETS.encode()), "what is deleted is free"
    limits.set_own(session.get_one(User, user.id), {"storage_bytes": len(TICKETS.encode())})
    session.commit()
    refused = api.post("/v1/predictions", json={"model": "tiny", "file": file})
    assert refused.status_code == 429 and "storage" in refused.json()["error"]["message"]


def test_what_a_model_says_is_no_formula_of_a_spreadsheet(session, user, tiny_registered):
    answers = ["=HYPERLINK(1)", "+1", "-1", "@a", "plain"]
    made = Evaluation(owner_id=user.id, project_id=user.id, kind="predictions", model_id=tiny_registered.id, spec={}, status="succeeded")
    made.result = {"columns": ["text", "answer"], "added": ["answer"]}
    session.add(made)
    session.commit()
    get_settings().folder("predictions")
    predictions.path_of(made.id).write_text("".join(json.dumps({"text": "=A1", "answer": one}) + "\n" for one in answers))
    table = list(csv.DictReader(io.StringIO("".join(predictions.content(made, "csv")))))
    assert [row["answer"] for row in table] == ["'=HYPERLINK(1)", "'+1", "'-1", "'@a", "plain"]
    assert {row["text"] for row in table} == {"=A1"}, "what was uploaded comes back as it was"
    assert [json.loads(line)["answer"] for line in predictions.content(made, "jsonl")] == answers


def test_classes_and_probabilities_and_a_run_that_is_cancelled(api, client, session, user, data_dir, tiny_registered, labelled):  # noqa: F811
    _, tuned = tune(session, user, data_dir, tiny_registered, labelled, {"name": "feature_extraction"})
    text = "\n".join(json.dumps({"text": f"text number {n}", "label": "kept"}) for n in range(5))
    said = api.post("/v1/predictions", json={"model": tuned.name, "file": send(api, "more.jsonl", text)}).json()
    evaluation_attempt.work(made_of(session, said).id)
    lines = [json.loads(line) for line in api.get(f"/v1/predictions/{said['id']}/content").text.splitlines()]
    used = session.scalars(select(TokenUse)).one()
    assert used.read == used.encoded > 5 and used.written == 0, "five texts were classified"
    assert len(lines) == 5 and all(line["label"] == "kept" and line["label_2"] in "abc" for line in lines), "no column of the file is lost"
    assert all(abs(sum(line[f"p_{name}"] for name in "abc") - 1) < 1e-4 for line in lines)
    assert all(line["probability"] == max(line[f"p_{name}"] for name in "abc") for line in lines)
    assert "more.jsonl" in client.get("/playground/batch").text

    order = {"model": tuned.name, "column": "text"}
    page = client.post("/playground/batch", data=order, files={"file": ("a.exe", b"x")})
    assert page.status_code == 415 and "Save it as one of" in page.text
    page = client.post("/playground/batch", data=order | {"column": "nowhere"}, files={"file": ("a.csv", b"text\nhello\n")})
    assert page.status_code == 200 and "every 2s" in page.text
    session.rollback()
    waits, done = session.scalars(evaluations.mine(user, predictions.KINDS).order_by(Evaluation.created_at.desc())).all()
    assert (waits.status, done.status) == ("queued", "succeeded")
    with transaction() as other:
        evaluations.cancel(other, user, waits.id, predictions.KINDS)
    evaluation_attempt.work(waits.id)
    assert now_of(waits).status == "cancelled" and not predictions.path_of(waits.id).exists()
    wrong = api.post("/v1/predictions", json={"model": tuned.name, "file": ids.public(ids.FILE, waits.file_id), "column": "nowhere"}).json()
    evaluation_attempt.work(made_of(session, wrong).id)
    error = api.get(f"/v1/predictions/{wrong['id']}").json()["error"]
    assert "no column “nowhere”" in error["message"] and "text" in error["hint"]


def test_a_map_of_vectors_with_the_nearest_rows(client, session, user, tiny_registered, labelled):  # noqa: F811
    order = {"model": "tiny", "dataset": ids.public(ids.DATASET, labelled.id)}
    page = client.post("/playground/vectors", data=order, follow_redirects=False)
    url = page.headers["location"]
    assert client.post("/playground/vectors", data=order, follow_redirects=False).headers["location"] == url, "not computed twice"
    assert "every 2s" in client.get(url).text
    made = session.scalars(evaluations.mine(user, predictions.VECTORS)).one()
    evaluation_attempt.work(made.id)
    session.expire_all()
    points = now_of(made).result["points"]
    assert session.scalars(select(TokenUse)).one().encoded > len(points), "the texts of the rows"
    assert len(points) == 60 and max(abs(p[axis]) for p in points for axis in "xy") == 1.0
    for place, point in enumerate(points):
        shares = [share for _, share in point["near"]]
        assert len(shares) == 6 and shares == sorted(shares, reverse=True) and place not in [other for other, _ in point["near"]]
    page = client.get(f"{url}?row={points[3]['line']}").text
    nearest = points[points[3]["near"][0][0]]
    assert page.count("<circle") == 60 and page.count('class="m') >= 60 and f"?row={nearest['line']}#nearest" in page
    assert 'class="m1 here"' in page or " here" in page
    assert client.get(f"{url}?row=99999").status_code == 200
    assert dependants(session, tiny_registered) == ([], 0)


def test_principal_components_part_what_is_apart():
    import numpy as np

    draw = np.random.default_rng(0)
    centers = np.eye(16)[:3] * 5
    vectors = np.concatenate([center + draw.normal(0, 0.05, (10, 16)) for center in centers])
    places, shares = flat(vectors)
    groups = places.reshape(3, 10, 2)
    within = max(float(np.ptp(group, axis=0).max()) for group in groups)
    between = min(float(np.linalg.norm(groups[a].mean(0) - groups[b].mean(0))) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert between > 10 * within and sum(shares) > 0.95 and flat(vectors[:1])[0].tolist() == [[0, 0]]


def test_it_waits_for_what_is_there(api, tiny_registered):
    wait_until(lambda: api.get("/v1/models/tiny").json()["status"] == "ready", what="the model")
    for change, status in (({"model": "nobody"}, 404), ({"file": "file-" + "0" * 32}, 404), ({"max_tokens": 0}, 400)):
        order = {"model": "tiny", "file": send(api, "a.csv", "text\nhello\n"), **change}
        assert api.post("/v1/predictions", json=order).status_code == status, change
