"""Input files of batches."""

from __future__ import annotations

import json

import pytest

from app.batches import requests

CHAT = "/v1/chat/completions"


def line(name: str = "a", **more) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": {"model": "tiny", "messages": []}} | more)


def find(tmp_path, text: str):
    path = tmp_path / "in.jsonl"
    path.write_bytes(text.encode())
    return path, requests.find(path, CHAT)


def test_every_request_is_found_where_it_is(tmp_path):
    text = "\n".join([line("ä"), "", line("b", body={"model": "tiny", "seed": 2}), line("c")])  # the last line without an end
    path, found = find(tmp_path, text)
    assert [(p.line, p.custom_id) for p in found.places] == [(1, "ä"), (3, "b"), (4, "c")] and not found.errors and found.model == "tiny"
    assert requests.body_of(path, found.places[1]) == {"model": "tiny", "seed": 2}
    assert requests.body_of(path, found.places[2]) == {"model": "tiny", "messages": []}


def test_a_file_that_names_two_models_has_none_of_its_own(tmp_path):
    assert find(tmp_path, line("a") + "\n" + line("b", body={"model": "other"}))[1].model is None


@pytest.mark.parametrize(
    ("wrong", "code", "param"),
    [
        ("{", "invalid_json_line", None),
        ("[" * 100_000, "invalid_json_line", None),
        ("[1]", "invalid_request", None),
        (line("a"), "duplicate_custom_id", "custom_id"),
        (line(""), "invalid_custom_id", "custom_id"),
        (line("x" * 513), "invalid_custom_id", "custom_id"),
        (line("b", method="GET"), "invalid_method", "method"),
        (line("b", url="/v1/embeddings"), "invalid_url", "url"),
        (line("b", body=[]), "invalid_request", "body"),
        (line("b", body={"stream": True}), "invalid_request", "body.stream"),
    ],
)
def test_a_wrong_line_is_told_with_its_number(tmp_path, wrong, code, param):
    _, found = find(tmp_path, f"{line('a')}\n{wrong}\n{line('z')}\n")
    assert [(e["code"], e["line"], e["param"]) for e in found.errors] == [(code, 2, param)] and found.errors[0]["message"]


def test_a_file_of_nothing_and_one_of_too_much(tmp_path, monkeypatch):
    assert [e["code"] for e in find(tmp_path, "\n \n")[1].errors] == ["empty_file"]
    monkeypatch.setattr(requests, "MAX_REQUESTS", 2)
    assert [e["code"] for e in find(tmp_path, "\n".join(line(str(i)) for i in range(4)))[1].errors] == ["too_many_requests"]
    _, found = find(tmp_path, "\n".join("{" for _ in range(200)))
    assert len(found.errors) == requests.MAX_ERRORS
