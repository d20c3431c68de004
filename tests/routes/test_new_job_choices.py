"""The form of a new job and the API's list of strategies, where the data has a say: what is advised, and rows to check with."""

from __future__ import annotations

import html
import json
import re

import pytest

from app import advice, datasets, files, ids, jobs
from app.machine import this_machine
from app.strategies import STRATEGIES


def make(session, user, rows: list[dict], name: str):
    file = files.add_bytes(session, user, "\n".join(map(json.dumps, rows)).encode(), name, "fine-tune")
    session.flush()
    found = datasets.create(session, user, file)
    session.commit()
    datasets.read(found.id)
    session.refresh(found)
    assert found.status == "ready", found.error
    return found


def public(dataset) -> str:
    return ids.public(ids.DATASET, dataset.id)


@pytest.fixture
def kinds(session, user, data_dir):
    return make(session, user, [{"text": f"text number {n} about things", "label": "abc"[n % 3]} for n in range(60)], "kinds.jsonl")


@pytest.fixture
def more_kinds(session, user, data_dir):
    return make(session, user, [{"text": f"another text {n}", "label": "abc"[n % 3]} for n in range(12)], "more-kinds.jsonl")


@pytest.fixture
def chats(session, user, data_dir):
    return make(session, user, [{"prompt": f"{n}?", "completion": "Yes. " * 9} for n in range(60)], "chats.jsonl")


def test_the_advised_strategy_is_marked_and_chosen_where_none_was_named(client, session, user, tiny_registered, kinds, chats):
    for data in (kinds, chats):
        first = next(a.strategy for a in advice.advise(session, user, "tiny", data).ranking if a.advised)
        page = client.get("/jobs/new", params={"model": "tiny", "dataset": public(data)}).text
        card = re.search(rf'value="{first}" checked.*?</label>', page, re.S)
        assert card and 'class="pill ok">advised' in card.group(0) and page.count('class="pill ok">advised') == 1


def test_rows_to_check_with_can_come_from_another_dataset(client, session, user, tiny_registered, kinds, more_kinds, chats):
    asked = {"model": "tiny", "dataset": public(kinds), "strategy": "dense_head"}
    page = client.get("/jobs/new", params=asked)
    choices = re.search(r'<select id="validation".*?</select>', page.text, re.S).group(0)
    assert public(more_kinds) in choices and public(chats) not in choices and public(kinds) not in choices
    assert 'name="split.method"' in page.text
    chosen = client.get("/jobs/new", params={**asked, "validation": public(more_kinds)})
    assert 'name="split.method"' not in chosen.text and f"/datasets/{public(kinds)}/split" in chosen.text
    assert f"validation_dataset_id: {public(more_kinds)}" in html.unescape(chosen.text)
    answer = client.post("/jobs", data={**asked, "validation": public(more_kinds), "split.method": "stratified"}, follow_redirects=False)
    assert answer.status_code == 303, answer.text
    (job,) = jobs.list_(session, user)
    assert job.validation_dataset_id == more_kinds.id and job.spec["validation"]["rows"] == 12 and "split" not in job.spec
    clone = client.get(f"/jobs/new?clone={ids.public(ids.JOB, job.id)}")
    assert re.search(rf'value="{public(more_kinds)}" selected', clone.text)


def test_labels_that_cannot_be_checked_stand_beside_the_choice(client, session, user, tiny_registered, kinds):
    odd = make(session, user, [{"text": f"text {n}", "label": "ax"[n % 2]} for n in range(8)], "odd.jsonl")
    asked = {"model": "tiny", "dataset": public(kinds), "strategy": "dense_head", "validation": public(odd)}
    page = client.post("/jobs", data=asked)
    assert page.status_code == 400 and jobs.list_(session, user) == []
    place = re.search(r'<p id="validation-help">(.*?)</p>', page.text, re.S).group(1)
    assert "1 label of the validation dataset odd stands in no training row: “x”." in html.unescape(place)


def test_a_choice_of_another_kind_is_forgotten_and_one_that_is_gone_is_told(client, tiny_registered, kinds, chats):
    asked = {"model": "tiny", "dataset": public(kinds), "strategy": "dense_head"}
    assert client.get("/jobs/new", params={**asked, "validation": public(chats)}).text.count("fault") == 0
    gone = client.get("/jobs/new", params={**asked, "validation": "ds-" + "0" * 32})
    assert "There is no dataset ds-0000" in gone.text and "disabled>Start" in gone.text


def test_strategies_say_what_this_data_means_for_them(api, session, user, tiny_registered, kinds, chats):
    found = {s["name"]: s for s in api.get("/v1/strategies", params={"model": "tiny", "dataset": public(kinds)}).json()["data"]}
    assert set(found) == set(STRATEGIES) and [s["advised"] for s in found.values()].count(True) == 1
    for name, strategy in found.items():
        able = "classification" in STRATEGIES[name].tasks
        assert able or (not strategy["available"] and "classification" in strategy["reason"])
        assert not strategy["available"] or strategy["cost"]["memory_bytes"] > 0
    other = {s["name"]: s for s in api.get("/v1/strategies", params={"model": "tiny", "dataset": public(chats)}).json()["data"]}
    assert not other["feature_extraction"]["available"] and found["feature_extraction"]["available"]
    plain = api.get("/v1/strategies").json()["data"]
    assert all("advised" not in s for s in plain)
    assert api.get("/v1/strategies", params={"model": "tiny", "dataset": "ds-" + "0" * 32}).status_code == 404


def test_a_strategy_too_large_for_the_machine_says_so(api, session, user, tiny_registered, chats, monkeypatch):
    from app import workers

    small = this_machine().model_copy(update={"memory_bytes": 200 * 2**20})
    monkeypatch.setattr(workers, "training_machine", lambda: small)
    found = api.get("/v1/strategies", params={"model": "tiny", "dataset": public(chats)}).json()["data"]
    full = next(s for s in found if s["name"] == "full")
    assert not full["available"] and "this machine has 0.2 GB" in full["reason"]
