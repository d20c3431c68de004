"""The API's document: complete, true, and of use to a program that makes a client of it."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from jsonschema import Draft202012Validator
from starlette.testclient import TestClient

from app.errors import BadField, problem_json
from app.jobs.request import read_strategy
from app.kit import ids
from app.main import create_app
from app.schemas import api_reference, openapi
from app.settings import get_settings
from app.tables import Dataset
from app.web.navigation import each_route
from tests import documented
from tests.conftest import ORIGIN, PROJECT
from tests.documented import Answer

NAME = re.compile(r"([a-z]+)(_[a-z0-9]+)+")
VERBS = set(
    [
        "append",
        "cancel",
        "check",
        "classify",
        "complete",
        "create",
        "delete",
        "edit",
        "fix",
        "import",
        "keep",
        "list",
        "pause",
        "plan",
        "predict",
        "push",
        "preview",
        "register",
        "remove",
        "reparse",
        "resume",
        "retrieve",
        "retry",
        "revise",
        "rotate",
        "run",
        "set",
        "stream",
        "test",
        "update",
        "validate",
    ]
)
"""What an operation's name begins with: a client made from the document calls it so."""


@pytest.fixture
def contract(data_dir):
    return documented.contract()


@pytest.fixture
def document(contract):
    return contract.document


def each(document):
    for path, found in document["paths"].items():
        for method, operation in found.items():
            yield method, path, operation


def content(answer):
    return answer.get("content", {})


def model_of(document, schema):
    """The model that a schema names; nothing where it names none."""
    return document["components"]["schemas"].get(schema.get("$ref", "").rpartition("/")[2], {})


def test_every_route_says_what_it_takes_and_answers(document):
    known = {(method, path) for method, path, _ in each(document)}
    routes = {(method, path) for method, path, _ in openapi.operations(create_app())}
    assert routes == known and len(known) >= 79
    for method, path, operation in each(document):
        where = f"{method} {path}"
        good = {status: answer for status, answer in operation["responses"].items() if status < "400"}
        assert good, where
        for status, answer in good.items():
            if method == "head" or status == "204" or path.startswith("/v1/tus"):
                assert not content(answer) and answer["headers"]["Tus-Resumable"], f"{where}: tus answers by headers alone"
                continue
            for media, said in content(answer).items():
                if said["schema"] == openapi.BYTES:
                    assert media == "application/octet-stream", f"{where}: the answer {status} has no model"
                    continue
                models = [model_of(document, one) for one in said["schema"].get("anyOf", [said["schema"]])]
                assert all(one.get("properties") or one.get("oneOf") for one in models), f"{where}: the answer {status} has no model"
                assert (media == openapi.EVENTS) == (len(models) == 2), f"{where}: an event is its model or the error that ends the stream"
            assert content(answer), f"{where}: the answer {status} has no body"
        assert {"400", "401", "500", "503", "507"} <= set(operation["responses"]), where
        assert ("404" in operation["responses"]) or "{" not in path, where
        if method in ("post", "put", "patch", "delete"):
            assert {"403", "413"} <= set(operation["responses"]), where
        for said in content(operation.get("requestBody", {})).values():
            assert "$ref" in said["schema"] or said["schema"] == openapi.BYTES, f"{where}: the body has no model"


BODYLESS = re.compile(
    r"/(cancel|pause|retry|again|keep|check)$|^/v1/tus$|^/v1/evals/\{eval_id\}/runs/\{run_id\}$|^/v1/distillations/\{distillation_id\}/resume$"
)


def test_whatever_takes_a_body_says_so(document):
    for method, path, operation in each(document):
        if method in ("post", "put", "patch") and not BODYLESS.search(path):
            assert content(operation["requestBody"]), f"{method} {path}"
    assert list(content(document["paths"]["/v1/files"]["post"]["requestBody"])) == ["multipart/form-data"]
    assert content(document["paths"]["/v1/tus/{key}"]["patch"]["requestBody"]) == {
        "application/offset+octet-stream": {"schema": openapi.BYTES}
    }


def test_every_operation_has_a_name_of_its_own_and_is_told_in_words(document):
    names = Counter(operation["operationId"] for _, _, operation in each(document))
    assert max(names.values()) == 1
    assert {"create_dataset", "list_jobs", "retrieve_job", "create_job", "create_chat_completion", "create_file"} <= set(names)
    for method, path, operation in each(document):
        name = NAME.fullmatch(operation["operationId"])
        assert name and name[1] in VERBS and not name[0].endswith("_json"), operation["operationId"]
        assert operation["summary"] and " ".join(operation["description"].split()).startswith(operation["summary"]), (
            f"{method} {path} has no docstring"
        )
        assert set(operation["tags"]) <= {tag["name"] for tag in document["tags"]}, f"{path}: name its tag in app/schemas/openapi.py"


def test_a_key_is_needed_everywhere_and_refusals_have_one_shape(document):
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert not [path for _, path, operation in each(document) if "security" in operation]
    for status, refusal in document["components"]["responses"].items():
        assert refusal["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}, status
    assert "HTTPValidationError" not in json.dumps(document), "a wrong field is a 400 of our own shape"


def test_every_reference_leads_somewhere(document):
    for reference in set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document))):
        place = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
    for name, schema in document["components"]["schemas"].items():
        assert re.fullmatch(r"[A-Za-z0-9]+", name), name
        Draft202012Validator.check_schema(schema)


def test_the_page_to_read_is_the_document_of_today(document):
    told = api_reference.markdown(document)
    assert (PROJECT / "docs" / "api.md").read_text() == told, "write it anew: .venv/bin/luthier openapi --markdown > docs/api.md"
    links = set(re.findall(r"\(#([a-z0-9]+)\)", told))
    assert links <= set(re.findall(r'<a id="([a-z0-9]+)">', told)), "a link leads nowhere"
    assert "docs/api.md" in (PROJECT / "README.md").read_text()


@pytest.mark.long
def test_the_command_prints_both(data_dir, document):
    from typer.testing import CliRunner

    from app.cli import app

    said = CliRunner().invoke(app, ["openapi"])
    assert said.exit_code == 0 and json.loads(said.stdout) == json.loads(json.dumps(document))
    assert CliRunner().invoke(app, ["openapi", "--markdown"]).stdout == api_reference.markdown(document)


def test_it_is_served_with_the_public_address_where_there_is_one(api, document, monkeypatch):
    assert openapi.document(create_app())["servers"][0]["url"] == "/"
    monkeypatch.setattr(get_settings(), "public_url", "https://studio.example")
    monkeypatch.setattr(api.app, "openapi_schema", None)  # the application may have been asked for it before
    served = api.get("/v1/openapi.json").json()
    assert served["servers"][0]["url"] == "https://studio.example"
    assert {**served, "servers": document["servers"]} == json.loads(json.dumps(document))


# The check itself -----------------------------------------------------------------------------------------------------


def answer(value, status=200, kind="application/json"):
    return Answer(status, kind, (value if isinstance(value, str) else json.dumps(value)).encode())


FILE = {
    "id": "file-1", "object": "file", "bytes": 1, "created_at": 1, "filename": "a", "purpose": "fine-tune", "status": "processed",
    "status_details": None, "expires_at": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "known"),
    [
        ({}, True), ({"rank": 4}, True), ({"name": "lora", "rank": 4}, True), ({"name": "dora", "rank": 4}, True),
        ({"name": "dense_head", "width": 3}, True), ({"width": 3}, False), ({"name": "dense_head", "rank": 4}, False), ({"name": "none"}, False),
    ],
)  # fmt: skip
def test_a_strategy_is_of_one_kind_and_without_a_name_it_is_lora(contract, strategy, known):
    for path, body in (("fine_tuning/jobs", {"strategy": strategy}), ("comparisons", {"dataset_id": "ds-1", "strategies": [strategy]})):
        given = {"model": "tiny", **body}
        if known:
            contract.check_request("POST", f"/v1/{path}", given)
        else:
            with pytest.raises(AssertionError, match="wrong by the document"):
                contract.check_request("POST", f"/v1/{path}", given)
    if known:
        assert read_strategy(strategy).name == strategy.get("name", "lora")
    else:
        with pytest.raises(BadField):
            read_strategy(strategy)


@pytest.mark.parametrize(
    "wrong",
    [
        answer({**FILE, "secret": 1}),
        answer({name: value for name, value in FILE.items() if name != "bytes"}),
        answer({**FILE, "bytes": "1"}),
        answer({**FILE, "status": "eaten"}),
        answer({"error": {"message": "No."}}, 404),
        answer({"detail": []}, 422),
        answer({"error": {"message": "", "type": "server_error", "param": None, "code": "x"}}, 418),
        answer("<p>no</p>", 200, "text/html"),
    ],
)
def test_an_answer_that_is_not_as_documented_is_seen(contract, wrong):
    contract.check("GET", "/v1/files/file-1", answer(FILE))
    with pytest.raises(AssertionError):
        contract.check("GET", "/v1/files/file-1", wrong)


def test_the_events_of_a_stream_are_seen(contract):
    good = {"type": "log", "level": "info", "message": "x", "id": 1, "attempt": 1, "at": 1.0}
    path = "/v1/fine_tuning/jobs/ftjob-1/stream"
    contract.check("GET", path, answer(f"id: 1\ndata: {json.dumps(good)}\n\n", kind="text/event-stream"))
    for bad in ({**good, "type": "yawn"}, {**good, "at": "now"}, {**good, "more": 1}):
        with pytest.raises(AssertionError):
            contract.check("GET", path, answer(f"data: {json.dumps(bad)}\n\n", kind="text/event-stream"))


def test_the_hint_of_a_stored_error_is_also_sent_by_its_old_name(contract, document, api, session, user):
    """For this version; the document says that the name is deprecated, and the check of all answers holds it."""
    told = {
        name for name, one in document["components"]["schemas"].items() if one.get("properties", {}).get("way_out", {}).get("deprecated")
    }
    assert told == {"HealthCheck", "FailedEvent", "Problem", "ReadingProblem"}
    error = {"code": "bad_data", "message": "Line 3 is broken.", "hint": "Mend line 3."}
    dataset = Dataset(owner_id=user.id, name="a", status="error", mapping={}, error=error)
    session.add(dataset)
    session.commit()
    path = f"/v1/datasets/{ids.public(ids.DATASET, dataset.id)}"
    sent = api.get(path).json()
    assert sent["error"] == {**error, "way_out": error["hint"]} and api.get(f"{path}/report").json()["error"] == sent["error"]
    with pytest.raises(AssertionError, match="way_out"):
        contract.check("GET", path, answer({**sent, "error": error}))
    assert problem_json(None) is None and dataset.error == error, "it is stored by its name alone"
    assert all(check["way_out"] == check["hint"] for check in api.get("/v1/studio").json()["checks"])


def test_what_the_tests_ask_is_checked(api, monkeypatch):
    before = documented.checked["list_files 200"]
    assert api.get("/v1/files").status_code == 200
    assert documented.checked["list_files 200"] == before + 1 and not documented.violations
    monkeypatch.setattr("app.routes.files.to_json", lambda file: {"id": "file-1", "object": "file"})
    api.post("/v1/files", files={"file": ("a.txt", b"x")}, data={"purpose": "user_data"})
    assert len(documented.violations) == 1 and "create_file" in documented.violations.pop()


def test_a_body_that_was_accepted_is_checked(contract):
    contract.check_request("POST", "/v1/datasets/ds-1/fixes", {"finding": 3, "rule": None})
    with pytest.raises(AssertionError, match="fix_dataset"):
        contract.check_request("POST", "/v1/datasets/ds-1/fixes", {"finding": 3, "mood": "good"})
    with pytest.raises(AssertionError, match="cancel_job"):
        contract.check_request("POST", "/v1/fine_tuning/jobs/ftjob-1/cancel", {"reason": "dear"})


def test_a_body_that_no_call_reads_is_refused(api):
    path = "/v1/fine_tuning/jobs/ftjob-" + "0" * 32 + "/cancel"
    refused = api.post(path, json={"reason": "dear"})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "unread_body"
    assert api.post(path, json={}).status_code == api.post(path).status_code == 404


# Methods --------------------------------------------------------------------------------------------------------------


def address(path):
    return re.sub(r"{[^}]+}", "0" * 32, path)


@pytest.mark.long
def test_a_method_that_is_not_taken_is_told_all_that_are(api, client):
    """Several routes share a path, and the router asks one of them."""
    routes = [(path, route) for path, route in each_route(api.app.router) if hasattr(route, "methods")]
    for path in sorted({path for path, _ in routes}):
        asker = api if path.startswith("/v1/") else client
        here = address(path)
        taken = set().union(*(route.methods for _, route in routes if route.path_regex.match(here)))
        for method in {"PUT", "TRACE"} - taken:
            said = asker.request(method, here)
            assert said.status_code == 405, f"{method} {here}: {said.status_code}"
            assert set(said.headers["allow"].split(", ")) == taken, f"{here} says {said.headers['allow']}"
    assert api.put("/v1/comparisons").headers["allow"] == "GET, HEAD, POST"
    assert client.put("/static/luthier.css").headers["allow"] == "GET, HEAD"


def test_head_says_what_get_would(api):
    made = api.post("/v1/files", files={"file": ("a.txt", b"x" * 1000)}, data={"purpose": "user_data"}).json()
    for path in ("/v1/files", f"/v1/files/{made['id']}", f"/v1/files/{made['id']}/content", "/v1/models", "/v1/strategies"):
        head, get = api.head(path), api.get(path)
        assert head.status_code == get.status_code == 200
        assert head.headers.get("content-length") == get.headers.get("content-length"), path
        assert head.headers["content-type"] == get.headers["content-type"]
    assert api.head(f"/v1/files/{made['id']}x").status_code == 404
    assert TestClient(api.app, base_url=ORIGIN).head("/v1/files").status_code == 401
    stream = "/v1/fine_tuning/jobs/ftjob-1/stream"
    assert api.head(stream).status_code == 405 and api.head(stream).headers["allow"] == "GET"
