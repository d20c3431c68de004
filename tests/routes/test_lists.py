"""Order among many: which models are offered, names and tags, searching, filtering and bulk, and runs beside each other."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import event, insert

from app.datasets import service as datasets_service
from app.datasets import versions
from app.db import get_engine
from app.evaluation import comparisons
from app.kit import ids
from app.models import service as models_service
from app.tables import Comparison, Dataset, Job, Model
from tests.routes.test_comparisons import body, chats, create, end, kinds, words

__all__ = ["chats", "kinds"]


def options(page) -> dict[str, str]:
    """Value → text of every option of a page."""
    found = re.findall(r'<option value="([^"]*)"[^>]*>([^<]*)', page.text)
    return {value: text.strip() for value, text in found}


def test_results_of_a_comparison_are_offered_once_they_are_kept(api, client, session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", "ia3"))
    first, second = comparisons.jobs_of(session, found)
    end(session, first, loss=1.2, memory=1, seconds=1)
    end(session, second, loss=1.6, memory=2, seconds=2)
    page, pages = f"/compare/{ids.public(ids.COMPARISON, found.id)}", ("/jobs/new", "/compare/new", "/jobs/advice", "/evaluations")
    pages += ("/playground", "/playground/arena", "/playground/batch", "/playground/vectors", "/playground/next-tokens")
    for path in pages:
        offered = options(client.get(path))
        assert "tiny" in offered and not [name for name in offered if name.startswith("ft:")], path
    listed = {model["id"]: model for model in api.get("/v1/models").json()["data"]}
    row = next(r for r in api.get(f"/v1/comparisons/{page.split('/')[-1]}").json()["data"] if r["job"] == ids.public(ids.JOB, first.id))
    assert listed[row["model"]]["kept"] is row["kept"] is False and listed["tiny"]["kept"], "the API lists all, and says which"
    assert "2 from comparisons" in words(client.get("/models"))
    chosen = options(client.get("/jobs/new", params={"model": row["model"]}))
    assert [name for name in chosen if name.startswith("ft:")] == [row["model"]], "one that was named is offered"
    answer = client.post(f"{page}/keep", data={"job": row["job"]})
    assert "is kept" in words(answer) and "1 from comparisons" in words(client.get("/models"))
    model = session.query(Model).filter_by(name=row["model"]).populate_existing().one()
    tiny = session.get_one(Model, model.base_id)
    for path in pages:
        text = options(client.get(path))[model.name]
        assert text.startswith(f"{model.title} · {tiny.title} · {model.created_at:%Y-%m-%d}"), path
    assert client.post(f"{page}/keep", data={"job": ids.public(ids.JOB, found.id)}).status_code == 404, "of another comparison"


SLOWER = 3
"""A list of 300 takes less than 100 ms; a machine under tests is slower."""


def rows_of(page) -> list[str]:
    """The names on a list, in its order."""
    return [name for name in re.findall(r'aria-label="Select ([^"]+)"', page.text)]


def test_a_list_is_searched_filtered_and_sorted_by_its_address(client, session, user, tiny_registered, chats, kinds):
    found = create(session, user, body(chats, "lora", "ia3"))
    first, second = comparisons.jobs_of(session, found)
    end(session, first, loss=1.2, memory=1, seconds=9)
    for job, name in ((first, "Zebra 100%"), (second, "apple")):
        key = ids.public(ids.JOB, job.id)
        client.post(f"/jobs/{key}/name", data={"name": name, "tags": "nightly, support" if job is first else ""})
    assert rows_of(client.get("/jobs")) == ["apple", "Zebra 100%"], "newest first"
    for query, names in (
        ("sort=name", ["apple", "Zebra 100%"]),
        ("sort=-time", ["Zebra 100%", "apple"]),
        ("q=0%25", ["Zebra 100%"]),
        ("q=ZEB&status=succeeded", ["Zebra 100%"]),
        ("status=queued", ["apple"]),
        ("method=ia3", ["apple"]),
        ("model=tiny&dataset=chats&shown=1", ["apple"]),
        ("tag=nightly", ["Zebra 100%"]),
        ("tag=gone", []),
    ):
        page = client.get(f"/jobs?{query}")
        assert rows_of(page) == names, query
    assert "No runs match" in words(page) and 'value="gone" selected' in page.text, "what narrows the list is seen"
    assert "Show more" in words(client.get("/jobs?shown=1&status=")) and client.get("/jobs?sort=color").status_code == 400
    assert rows_of(client.get("/datasets?sort=name")) == ["chats", "kinds"] and rows_of(client.get("/datasets?q=kin")) == ["kinds"]
    assert rows_of(client.get("/datasets?format=classification")) == ["kinds"] and rows_of(client.get("/datasets?tag=x")) == []
    assert rows_of(client.get("/compare?status=running")) == [found.name] and rows_of(client.get("/compare?q=nothing")) == []
    models = rows_of(client.get("/models"))
    assert (
        rows_of(client.get("/models?kept=yes")) == [tiny_registered.title] != models
        and len(rows_of(client.get("/models?kept=no&method=lora"))) == 2
    ), "under its base"


def test_names_and_tags_are_given_by_page_and_api_and_follow_new_versions(api, client, session, user, tiny_registered, chats):
    key = ids.public(ids.DATASET, chats.id)
    assert api.patch(f"/v1/datasets/{key}", json={"name": " Support \n chats ", "tags": ["b", "A", "b"]}).json()["tags"] == ["A", "b"]
    session.refresh(chats)
    newer = versions.drop_rows(session, user, chats, [1])
    session.commit()
    assert (newer.name, newer.tags) == ("Support chats", ["A", "b"])
    client.post(f"/datasets/{ids.public(ids.DATASET, newer.id)}/name", data={"name": "chats v2", "tags": "one"})
    told = [api.get(f"/v1/datasets/{ids.public(ids.DATASET, one.id)}").json() for one in (chats, newer)]
    assert [(one["name"], one["tags"]) for one in told] == [("chats v2", ["one"])] * 2, "all versions have one name"
    model = api.patch("/v1/models/tiny", json={"title": "Small one", "tags": ["base"]})
    assert model.json()["id"] == "tiny" and model.json()["title"] == "Small one" and "Small one" in words(client.get("/models?tag=base"))
    found = create(session, user, body(chats, "lora", "ia3"))
    renamed = api.patch(f"/v1/comparisons/{ids.public(ids.COMPARISON, found.id)}", json={"name": "Two"}).json()
    job = api.patch(f"/v1/fine_tuning/jobs/{renamed['data'][0]['job']}", json={"name": "One", "tags": ["x"]}).json()
    assert (renamed["name"], job["name"], job["tags"]) == ("Two", "One", ["x"])
    for wrong, param in (
        ({"name": " "}, "name"),
        ({"name": "a" * 201}, "name"),
        ({"name": "a\u202eb"}, "name"),
        ({"tags": ["a,b"]}, "tags"),
        ({"tags": [f"{n}" for n in range(11)]}, "tags"),
        ({"title": "x"}, "title"),
    ):
        refused = api.patch(f"/v1/datasets/{key}", json=wrong)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param, wrong
    assert api.patch("/v1/models/none", json={"title": "x"}).status_code == 404


@pytest.mark.long
def test_ticked_rows_are_done_and_a_refused_one_says_why(client, session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", "ia3", "layer_norm"))
    ended, open_, other = comparisons.jobs_of(session, found)
    for job in (ended, other):
        end(session, job, loss=1.0, memory=1, seconds=1)
    keys = [ids.public(ids.JOB, job.id) for job in (ended, open_, other)]
    assert "No row is selected" in words(client.post("/jobs/bulk", data={"do": "delete"}))
    for data, said in (
        ({"do": "compare"}, "1 run selected. Select 2 to 8 to compare."),
        ({"do": "tag", "tag": " , "}, "No tag was written."),
    ):
        answer = client.post("/jobs/bulk", data={**data, "pick": keys[:1], "query": "q=a"})
        assert said in words(answer) and str(answer.url).endswith("/jobs?q=a"), "what is missing is said above the list"
    page = client.post("/jobs/bulk", data={"do": "tag", "tag": "a, b", "pick": keys[:2], "query": "status=queued"})
    assert page.url.query == b"status=queued" and "2 runs tagged a, b" in words(page)
    page = words(client.post("/jobs/bulk", data={"do": "delete", "pick": [*keys[:2], "ftjob-x"]}))
    assert (
        "1 run deleted." in page
        and f"2 runs refused. {open_.name}: The job is queued, so it cannot be deleted" in page
        and "ftjob-x" in page
    )
    assert rows_of(client.get("/jobs")) == [other.name, open_.name]
    page = words(client.post("/datasets/bulk", data={"do": "delete", "pick": ids.public(ids.DATASET, chats.id)}))
    assert "still needs the dataset" in page and rows_of(client.get("/datasets")) == ["chats"]
    assert client.post("/compare/bulk", data={"do": "tag", "tag": "a", "pick": ids.public(ids.COMPARISON, found.id)}).status_code == 400
    assert "1 comparison refused" in words(
        client.post("/compare/bulk", data={"do": "delete", "pick": ids.public(ids.COMPARISON, found.id)})
    )


@pytest.mark.long
def test_a_list_asks_the_database_as_often_for_many_rows_as_for_few(client, session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", "ia3"))
    first = comparisons.jobs_of(session, found)[0]
    end(session, first, loss=1.0, memory=1, seconds=1)
    asked: list[str] = []
    event.listen(get_engine(), "before_cursor_execute", lambda *told: asked.append(str(told[2])))

    def once(path: str) -> int:
        asked.clear()
        assert client.get(path).status_code == 200
        return len(asked)

    def count(path: str) -> int:
        """Of several times the fewest: the studio's own sweeps ask too, now and then."""
        return min(once(path) for _ in range(4))

    def seconds(path: str) -> float:
        start = time.process_time()
        client.get(path)
        return time.process_time() - start

    paths = ("/jobs?shown=500", "/models", "/datasets?shown=500", "/compare?shown=500")
    few = [count(path) for path in paths]
    model = session.query(Model).filter_by(job_id=first.id).one()
    for row, table, fresh in ((first, Job, {}), (model, Model, {"job_id": None}), (chats, Dataset, {}), (found, Comparison, {})):
        values = {c.key: getattr(row, c.key) for c in table.__table__.columns if c.computed is None} | fresh
        names = {"idempotency_key": None, "id": None, "name": None}
        many = [values | {k: v for k, v in names.items() if k in values} | {"id": uuid.uuid4(), "name": f"row {n}"} for n in range(300)]
        session.execute(insert(table), many)
    session.commit()
    assert [count(path) for path in paths] == few
    for path in ("/jobs", "/models", "/datasets", "/compare"):
        assert min(seconds(path) for _ in range(3)) < 0.1 * SLOWER, path


def test_runs_are_compared_whichever_they_are(client, session, user, tiny_registered, chats, kinds):
    found = create(session, user, body(chats, "lora", {"name": "lora", "rank": 2}, run={"epochs": 4}))
    first, second = comparisons.jobs_of(session, found)
    end(session, first, loss=1.2, memory=300, seconds=30, noise=0.05)
    end(session, second, loss=1.5, memory=200, seconds=30, noise=0.05)
    other = comparisons.jobs_of(session, create(session, user, body(kinds, "feature_extraction", "dense_head")))[0]
    keys = [ids.public(ids.JOB, job.id) for job in (first, second, other)]
    picked = client.post("/jobs/bulk", data={"do": "compare", "pick": keys[:2]})
    assert picked.url.path == "/jobs/compare" and picked.url.params.get_list("job") == keys[:2]
    differing, same = words(picked).split("Settings that differ")[1].split("Show all")
    assert "Rank 8 2" in differing and "Epochs" not in differing and "Epochs 4" in same and "Base model tiny" in same
    assert "1.200 best 95%: 0.800 to 1.600" in words(picked), "the interval of the score, and a mark by the pair"
    drawn = json.loads(re.search(r'id="points">(.+?)</script>', picked.text)[1])
    assert set(drawn["charts"]["validation"]) == {"validation1", "validation2"} and drawn["total"] == 10
    page = client.get("/jobs/compare", params={"job": keys})
    assert (
        "Accuracy" not in words(page) and "Training data chats chats kinds" in words(page) and " best " not in words(page).split("Peak")[0]
    )
    linked = client.get(f"/compare/{ids.public(ids.COMPARISON, found.id)}").text
    assert f'href="/jobs/compare?job={keys[0]}&amp;job={keys[1]}"' in linked
    for wrong, status in (([], 400), (keys[:1], 400), ([keys[0]] * 3, 400), ([keys[0], "ftjob-x"], 404), ([f"{n}" for n in range(9)], 400)):
        assert client.get("/jobs/compare", params={"job": wrong}).status_code == status, wrong


def many(session, first: Dataset, base: Model, count: int) -> tuple[list[dict], list[dict]]:
    """So many copies of a dataset, and models fine-tuned from a base, each a minute older than the one before; what was inserted."""
    kept = [c.key for c in Dataset.__table__.columns if c.computed is None and c.key not in ("id", "name", "created_at", "file_id")]
    taken = {key: getattr(first, key) for key in kept}
    at = [first.created_at - timedelta(minutes=n) for n in range(1, count + 1)]
    sets = [{**taken, "id": uuid.uuid4(), "name": f"set {n}", "created_at": when} for n, when in enumerate(at, 1)]
    own = {
        "owner_id": first.owner_id,
        "project_id": first.project_id,
        "base_id": base.id,
        "kind": base.kind,
        "shape": base.shape,
        "adapter": True,
    }
    tuned = [{**own, "id": uuid.uuid4(), "name": f"ft:{n}", "title": f"tuned {n}", "created_at": when} for n, when in enumerate(at, 1)]
    session.execute(insert(Dataset), sets)
    session.execute(insert(Model), tuned)
    session.commit()
    return sets, tuned


def test_forms_offer_the_newest_and_what_a_link_names(client, session, user, tiny_registered, chats, monkeypatch):
    monkeypatch.setattr(models_service, "OFFERED", 20)
    monkeypatch.setattr(datasets_service, "OFFERED", 20)
    sets, tuned = many(session, chats, tiny_registered, 60)
    oldest, name = tuned[-1]["name"], ids.public(ids.DATASET, sets[-1]["id"])
    for path in ("/evaluations", "/jobs/new", "/jobs/advice", "/compare/new", "/playground/vectors"):
        offered = options(client.get(path))
        assert {"tiny", "ft:1", "ft:20"} <= set(offered) and "ft:21" not in offered and oldest not in offered, path
        assert ids.public(ids.DATASET, sets[18]["id"]) in offered and name not in offered, path
        named = options(client.get(path, params={"model": oldest, "dataset": name}))
        assert oldest in named and name in named, path
    for path in ("/playground", "/playground/next-tokens", "/playground/arena"):
        assert oldest not in options(client.get(path)) and oldest in options(client.get(path, params={"models": oldest})), path


def test_lists_read_what_they_show(client, session, user, tiny_registered, chats):
    """However many there are, a page of a list loads no more rows than it shows and a few that go with them."""
    many(session, chats, tiny_registered, 400)
    loaded: Counter[str] = Counter()
    count = lambda target, _: loaded.update([type(target).__name__])  # noqa: E731
    for table in (Dataset, Model):
        event.listen(table, "load", count)
    try:
        for path, most in (
            ("/datasets", 60),
            ("/datasets?sort=name&q=set", 60),
            ("/models", 60),
            ("/models?sort=lineage", 60),
            ("/models?model=tiny", 60),
        ):
            loaded.clear()
            assert client.get(path).status_code == 200
            assert 50 <= loaded.total() <= most, (path, loaded)
    finally:
        for table in (Dataset, Model):
            event.remove(table, "load", count)


def test_models_by_lineage_come_after_what_they_were_made_of(client, session, user, tiny_registered, chats):
    _, tuned = many(session, chats, tiny_registered, 3)
    session.execute(insert(Model), [{**tuned[2], "id": uuid.uuid4(), "base_id": tuned[0]["id"], "name": "ft:child", "title": "child of 1"}])
    session.commit()
    names = re.findall(r"<b>(tuned \d|child of 1)</b>", client.get("/models?sort=lineage").text)
    assert names == ["tuned 3", "tuned 2", "tuned 1", "child of 1"]
    assert "child of 1" in client.get("/models?model=tiny").text and "child of 1" not in client.get("/models?model=ft:2").text
