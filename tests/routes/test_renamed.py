"""Addresses that were renamed: the old one works for this version, and says what it is called now."""

from __future__ import annotations

import importlib.util
import re

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import select

from app import events
from app.jobs import service as jobs
from app.kit import ids
from app.main import create_app
from app.schemas import openapi
from app.tables import Event
from tests import documented
from tests.conftest import PROJECT
from tests.datasets.test_compose import make  # noqa: F401
from tests.lives import Life, order

PAGES = {
    "/playground/ab?models=tiny": "/playground/arena?models=tiny",
    "/playground/lab": "/playground/prompts",
    "/playground/lab/new?builder=few_shot": "/playground/prompts/new?builder=few_shot",
    "/playground/kinds": "/playground/tutorial",
    "/playground/tokens?top_k=5&a=a%20b": "/playground/next-tokens?top_k=5&a=a%20b",
    "/datasets/join?first=": "/datasets/combine?first=",
    "/standby?chip=true": "/models/loaded?chip=true",
}
CALLS = {
    "post /v1/datasets/{key}/again": "/v1/datasets/{key}/retry",
    "post /v1/datasets/{key}/readings": "/v1/datasets/{key}/reparse",
    "get /v1/standby": "/v1/models/loaded",
}


@pytest.mark.parametrize(("old", "new"), PAGES.items())
def test_an_old_page_leads_to_the_new_one(client, old, new):
    moved = client.get(old, follow_redirects=False)
    assert (moved.status_code, moved.headers["location"]) == (308, new)
    assert client.get(new, follow_redirects=False).status_code == 200


def test_an_old_page_of_one_object_leads_to_the_same_object(client):
    for kind, old in (("prompts", "prompts/prompt-1"), ("prompts", "runs/run-1")):
        said = client.get(f"/playground/lab/{old}?version=2", follow_redirects=False)
        assert said.headers["location"] == f"/playground/{kind}/{old.removeprefix('prompts/')}?version=2"
    assert client.get("/playground/ab/vote-1", follow_redirects=False).headers["location"] == "/playground/arena/vote-1"
    strange = client.get("/playground/lab///evil.example/a:b", follow_redirects=False).headers["location"]
    assert strange.startswith("/playground/prompts/")
    assert client.get("/playground/lab/a%0d%0ab:c", follow_redirects=False).status_code == 404, "no header of its own"


def test_the_document_marks_old_calls_as_deprecated():
    document = documented.contract().document
    marked = {f"{method} {path}" for path, found in document["paths"].items() for method, one in found.items() if one.get("deprecated")}
    assert marked == set(CALLS)
    for call, successor in CALLS.items():
        method, path = call.split()
        old, new = document["paths"][path][method], document["paths"][successor][method]
        assert old["operationId"] == f"{new['operationId']}_deprecated" and old["tags"] == new["tags"]
        assert old["summary"] == f"Deprecated: use `{method.upper()} {successor}`"
        assert {"Deprecation", "Link"} == set(old["responses"]["200"]["headers"]) and "headers" not in new["responses"]["200"]
        assert old["responses"]["200"]["content"] == new["responses"]["200"]["content"] and old.get("requestBody") == new.get("requestBody")


def successor_of(answer) -> str:
    assert re.fullmatch(r"@\d{10}", answer.headers["deprecation"])
    return re.fullmatch(r'<(.+)>; rel="successor-version"', answer.headers["link"])[1]


def test_old_calls_answer_as_the_new_ones_do(api, session, user, tmp_path, make):  # noqa: F811
    dataset = make([{"text": f"Line {n}."} for n in range(12)], "plain.jsonl")
    path = f"/v1/datasets/{ids.public(ids.DATASET, dataset.id)}"
    body = {"format": "plain_text", "mapping": {"text": "text"}}
    old, new = api.post(f"{path}/readings", json=body), api.post(f"{path}/reparse", json=body)
    assert (old.status_code, new.status_code) == (200, 200) and (old.json()["version"], new.json()["version"]) == (2, 3)
    assert successor_of(old) == f"{path}/reparse" and "deprecation" not in new.headers
    old, new = api.post(f"{path}/again"), api.post(f"{path}/retry")
    assert old.status_code == new.status_code == 409 and old.json() == new.json()
    assert successor_of(old) == f"{path}/retry", "a refusal names the successor too"
    old, new = api.get("/v1/standby"), api.get("/v1/models/loaded")
    assert old.json().keys() == new.json().keys() and new.json()["object"] == "list" and successor_of(old) == "/v1/models/loaded"
    assert api.head("/v1/standby").headers["link"] == old.headers["link"]
    wrong = api.post(f"/v1/datasets/{'%0d%0ax:y'}/again")
    assert wrong.status_code in (400, 404) and successor_of(wrong) == "/v1/datasets/%0D%0Ax%3Ay/retry"


def test_no_model_takes_the_address_of_the_loaded_ones(api, tiny_registered):
    first = next(
        path for method, path, route in openapi.operations(create_app()) if method == "get" and route.path_regex.match("/v1/models/loaded")
    )
    assert first == "/v1/models/loaded"
    refused = api.put("/v1/model_aliases/loaded", json={"model": "tiny"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "alias"
    assert api.patch("/v1/models/loaded", json={"title": "x"}).status_code == 404, "other methods go to a model"


def test_stored_events_take_the_new_name(session, user, tiny_registered):
    life = Life(session, order(session, user, tiny_registered)).claim()
    life.say(events.TaskProgress(what="Comparing base and result", share=0.4))
    kinds = select(Event.type).where(Event.job_id == life.job_id, Event.data.has_key("share"))
    path = PROJECT / "migrations/versions/0014_progress_events.py"
    found = importlib.util.spec_from_file_location("progress_events", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    with Operations.context(MigrationContext.configure(session.connection())):
        assert session.scalars(kinds).all() == ["progress"]
        module.downgrade()
        assert session.scalars(kinds).all() == ["doing"]
        module.upgrade()
        assert session.scalars(kinds).all() == ["progress"]
    assert jobs.get(session, user, life.job_id).status == "running"
