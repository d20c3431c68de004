"""Searching the Hugging Face hub, against a server on the loopback that answers as the hub does."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from app.machines import heartbeats
from app.machines.hardware import this_machine
from app.models import hub_token
from app.settings import get_settings
from tests.conftest import csrf_token

ROWS = [
    {
        "id": "lab/small-llama", "downloads": 1200, "likes": 3, "gated": False, "lastModified": "2026-11-02T10:00:00.000Z",
        "safetensors": {"parameters": {"BF16": 135_000_000}, "total": 135_000_000},
        "cardData": {"license": "apache-2.0"}, "config": {"model_type": "llama"},
    },
    {
        "id": "lab/giant", "downloads": 900, "likes": 9, "gated": "manual", "safetensors": {"total": 900_000_000_000},
        "cardData": {"license": ["a", "b"]}, "config": {"model_type": "mixtral"},
    },
    {"id": "lab/<script>alert(1)</script>", "downloads": None, "config": None},
]  # fmt: skip


class Hub:
    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, list[str]], str | None]] = []
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                where = urlsplit(self.path)
                assert where.path == "/api/models"
                hub.asked.append((parse_qs(where.query), self.headers.get("authorization")))
                body = json.dumps(ROWS if hub.status == 200 else {"error": "no"}).encode()
                self.send_response(hub.status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(monkeypatch, data_dir):
    made = Hub()
    monkeypatch.setattr(get_settings(), "offline", False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(heartbeats, "training_machines", lambda *_: [this_machine()])
    yield made
    made.server.shutdown()


def test_what_is_found_says_whether_it_can_be_used_here(api, hub):
    found = api.get("/v1/hub/models", params={"search": "lab", "limit": 7}).json()["data"]
    small, giant, odd = found
    assert (small["repo"], small["parameters"], small["license"], small["tier"], small["fits"]) == (
        "lab/small-llama", 135_000_000, "apache-2.0", "A", True
    )  # fmt: skip
    assert (giant["gated"], giant["fits"], giant["tier"], giant["license"]) == (True, False, None, None)
    assert (odd["parameters"], odd["fits"], odd["downloads"]) == (None, None, 0)
    query, key = hub.asked[0]
    assert (query["search"], query["limit"], query["filter"], key) == (["lab"], ["7"], ["safetensors"], None)


def test_the_page_offers_to_add_what_has_safetensors(client, hub):
    page = client.get("/models/hub", params={"search": "lab"}).text
    assert 'value="lab/small-llama"' in page and 'value="lab/giant"' in page and "terms to accept" in page and "too large" in page
    assert "<script>alert" not in page and "135\u202fM" in page
    assert page.count('name="hub"') == 2, "one without safetensors cannot be added"


def test_the_token_is_in_a_file_of_its_own_and_is_sent_to_the_hub_alone(client, hub):
    page = client.get("/models/hub").text
    kept = client.post("/models/hub/token", data={"token": "hf_abcdefgh1234", "csrf_token": csrf_token(page)}, follow_redirects=False)
    assert kept.status_code == 303 and hub_token.path().stat().st_mode & 0o777 == 0o600
    client.get("/models/hub", params={"search": "x"})
    assert hub.asked[-1][1] == "Bearer hf_abcdefgh1234"
    assert "hf_abcdefgh1234" not in client.get("/models/hub").text
    wrong = client.post("/models/hub/token", data={"token": "sk-1234", "csrf_token": csrf_token(page)})
    assert wrong.status_code == 400 and "begins with hf_" in wrong.text and hub_token.read() == "hf_abcdefgh1234"
    client.post("/models/hub/token", data={"token": "", "csrf_token": csrf_token(page)})
    assert hub_token.read() is None


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [(401, 503, "does not accept the token"), (429, 429, "asks to wait"), (500, 503, "cannot be reached")],
)
def test_what_the_hub_says_is_told(api, hub, status: int, code: int, says: str):
    hub.status = status
    answer = api.get("/v1/hub/models", params={"search": "x"})
    assert answer.status_code == code and says in answer.json()["error"]["message"]


def test_an_offline_studio_asks_nobody(api, client, hub, monkeypatch):
    monkeypatch.setattr(get_settings(), "offline", True)
    assert api.get("/v1/hub/models", params={"search": "x"}).json()["error"]["code"] == "offline"
    assert "set to stay offline" in client.get("/models/hub", params={"search": "x"}).text
    assert hub.asked == []
