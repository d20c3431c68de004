"""The application as a whole: errors, streams, limits, messages, static files, and how light it is."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import subprocess
import sys
import threading

import pytest
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.testclient import TestClient

from app.errors import Conflict, TooMany
from app.kit import logs
from app.main import create_app
from app.web import templates as web_templates
from app.web.navigation import each_route
from tests.conftest import ORIGIN, PROJECT


class Order(BaseModel):
    rank: int
    name: str


@pytest.fixture
def probe(api):
    """The application with a few routes that fail in every way there is."""
    router = APIRouter(prefix="/v1/probe")

    @router.post("/order")
    def order(order: Order) -> dict[str, int]:
        return {"rank": order.rank}

    @router.get("/conflict")
    def conflict() -> None:
        raise Conflict("It runs already.", hint="Stop it first.")

    @router.get("/busy")
    def busy() -> None:
        raise TooMany("Too fast.", retry_after_seconds=7)

    @router.get("/bug")
    def bug() -> None:
        raise RuntimeError("the password is hunter2")

    @router.get("/full")
    def full() -> None:
        raise OSError(28, "No space left on device")

    @router.get("/stream")
    def stream() -> StreamingResponse:
        return StreamingResponse((f"data: {turn}\n\n" * 200 for turn in range(3)), media_type="text/event-stream")

    api.app.include_router(router)
    return api


def test_wrong_fields_are_a_400_that_names_them(probe):
    answer = probe.post("/v1/probe/order", json={"rank": "x", "name": "a"})
    error = answer.json()["error"]
    assert (
        answer.status_code == 400 and error["param"] == "rank" and error["type"] == "invalid_request_error" and "rank" in error["message"]
    )
    missing = probe.post("/v1/probe/order", json={"rank": 1}).json()["error"]
    assert missing["param"] == "name" and missing["code"] == "missing_required_parameter"
    assert probe.post("/v1/probe/order", json={"rank": 1, "name": "a", "unknown": 1}).status_code == 200


def test_broken_json_says_so(probe):
    answer = probe.post("/v1/probe/order", content=b'{"rank": ', headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


def test_conflicts_are_not_repeated_and_waits_are_told(probe):
    conflict = probe.get("/v1/probe/conflict")
    assert conflict.status_code == 409 and conflict.headers["x-should-retry"] == "false"
    assert conflict.json()["error"]["message"] == "It runs already. Stop it first."
    busy = probe.get("/v1/probe/busy")
    assert busy.status_code == 429 and busy.headers["retry-after"] == "7"


def test_a_bug_tells_nothing_private(probe):
    answer = probe.get("/v1/probe/bug")
    assert answer.status_code == 500 and "hunter2" not in answer.text and answer.json()["error"]["type"] == "server_error"
    assert answer.headers["x-request-id"] and answer.headers["content-security-policy"]


def test_a_full_disk_is_a_507(probe):
    assert probe.get("/v1/probe/full").json()["error"]["code"] == "disk_full"


def test_unknown_addresses_and_methods(api, client):
    assert api.get("/v1/nothing").json()["error"]["code"] == "resource_missing"
    assert api.put("/v1/studio").status_code == 405 and api.put("/v1/studio").json()["error"]["param"] is None
    page = client.get("/nothing", headers={"accept": "text/html"})
    assert page.status_code == 404 and page.headers["x-request-id"] in page.text and 'href="/settings"' in page.text, "the menu stays"


def test_the_request_id_of_a_proxy_is_kept_only_when_it_is_one(client):
    assert client.get("/healthz", headers={"x-request-id": "abc-12345678"}).headers["x-request-id"] == "abc-12345678"
    for odd in ("x", "a b c d e f g h", "<script>alert(1)</script>", "é" * 9):
        assert client.get("/healthz", headers={"x-request-id": odd.encode()}).headers["x-request-id"].startswith("req_")


def test_pages_are_compressed_and_streams_are_not(probe, client):
    page = client.get("/settings", headers={"accept-encoding": "gzip"})
    assert page.headers["content-encoding"] == "gzip"
    stream = probe.get("/v1/probe/stream", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in stream.headers and stream.text.startswith("data: 0")


def test_each_part_of_a_stream_leaves_at_once(data_dir):
    """Driven as bare ASGI: the second part is only made after the first one arrived."""
    import asyncio

    app, arrived = create_app(), threading.Event()

    async def parts():
        yield b"data: one\n\n"
        assert await asyncio.to_thread(arrived.wait, 5), "the first part is held back"
        yield b"data: two\n\n"

    router = APIRouter()
    router.add_api_route("/healthz/stream", lambda: StreamingResponse(parts(), media_type="text/event-stream"))
    app.include_router(router, dependencies=[])
    app.dependency_overrides = {}
    from app.web import auth

    seen: list[bytes] = []

    async def send(message):
        if message["type"] == "http.response.body" and message.get("body"):
            seen.append(message["body"])
            arrived.set()

    async def receive():
        await asyncio.sleep(10)
        return {"type": "http.disconnect"}

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "GET", "scheme": "http", "path": "/healthz/stream",
        "raw_path": b"/healthz/stream", "query_string": b"", "root_path": "", "headers": [(b"host", b"127.0.0.1"), (b"accept-encoding", b"gzip")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "state": {},
    }  # fmt: skip
    before, auth.PUBLIC = auth.PUBLIC, auth.PUBLIC | {"/healthz/stream"}
    try:
        asyncio.run(app(scope, receive, send))
    finally:
        auth.PUBLIC = before
    assert seen == [b"data: one\n\n", b"data: two\n\n"]


def test_bodies_have_a_limit(api, monkeypatch):
    from app.web import middleware

    monkeypatch.setattr(middleware, "MAX_JSON_BYTES", 1000)
    for size, status in ((500, 405), (2000, 413)):
        assert api.post("/v1/studio", content=b"x" * size).status_code == status

    def endless():
        for _ in range(30):
            yield b"x" * 100

    assert api.post("/v1/studio", content=endless()).status_code in (405, 413)
    assert api.post("/v1/studio", content=b"x", headers={"content-length": "-5"}).status_code == 400


def test_messages_outlive_one_redirect_and_no_more(client, session, user):
    from app.web import auth

    key, _ = auth.create_key(session, user, "<b>old</b>")
    session.commit()
    page = client.post(f"/settings/keys/{key.id}/revoke")
    assert "&lt;b&gt;old&lt;/b&gt;” is revoked" in page.text
    assert "is revoked. Programs" not in client.get("/settings").text


def test_a_forged_message_is_not_shown(client):
    client.cookies.set(web_templates.messages_cookie(), "W1siZ29vZCIsImZvcmdlZCJdXQ.x")
    assert "forged" not in client.get("/").text


def test_a_database_away_is_a_calm_503(client, api, monkeypatch):
    from app.db import get_engine
    from app.settings import get_settings

    get_engine().dispose()
    monkeypatch.setattr(get_settings(), "database_url", "postgresql+psycopg://nobody@/none?host=/nowhere")
    get_engine.cache_clear()
    page = client.get("/settings", headers={"accept": "text/html"})
    assert page.status_code == 503 and "database" in page.text and page.headers["retry-after"]
    answer = api.get("/v1/studio")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "database_away" and "nobody" not in answer.text
    assert api.get("/healthz").status_code == 200


def test_ready_says_what_is_missing(web, monkeypatch):
    from app.queue import get_redis
    from app.settings import get_settings

    assert web.get("/readyz").json()["status"] == "ready"
    monkeypatch.setattr(get_settings(), "redis_url", "unix:///nowhere.sock")
    get_redis.cache_clear()
    answer = web.get("/readyz")
    get_redis.cache_clear()
    assert answer.status_code == 503 and answer.json()["checks"]["redis"]["hint"]


def test_workers_are_counted_while_they_say_so(api):
    from app.machines import heartbeats

    heartbeats.say_alive("train", up_seconds=0.0)
    found = {duty["queue"]: duty["alive"] for duty in api.get("/v1/studio").json()["workers"]}
    assert found["train"] == 1 and found["data"] == 0


def test_figures_are_for_this_machine_and_the_signed_in(web, client, api):
    from app.web.templates import static

    stranger = TestClient(web.app, base_url=ORIGIN, client=("203.0.113.9", 4000))
    assert stranger.get("/metrics", follow_redirects=False).status_code == 303
    local = TestClient(web.app, base_url=ORIGIN, client=("127.0.0.1", 4000))
    assert local.get("/metrics").status_code == 200
    assert local.get("/metrics", headers={"x-forwarded-for": "203.0.113.9"}, follow_redirects=False).status_code == 303
    assert api.get(static("luthier.css")).status_code == 200
    text = api.get("/metrics").text
    assert 'luthier_requests_total{method="GET",route="/static",status="200"}' in text
    assert "luthier_requests_total" in text and 'route="/sign-in/{token}"' in text and "luthier_outbox_unsent" in text


def test_another_address_needs_a_password(data_dir, monkeypatch):
    from app.errors import Forbidden
    from app.settings import get_settings

    monkeypatch.setenv("LUTHIER_HOST", "0.0.0.0")
    get_settings.cache_clear()
    with pytest.raises(Forbidden, match="LUTHIER_ADMIN_PASSWORD"):
        create_app()
    monkeypatch.setenv("LUTHIER_ADMIN_PASSWORD", "spruce")
    get_settings.cache_clear()
    assert create_app()


def test_static_files_are_kept_by_their_version(web):
    fresh = web.get(f"/static/{web_version()}/luthier.css")
    assert fresh.status_code == 200 and "immutable" in fresh.headers["cache-control"]
    for stale in ("/static/0000000000000000/luthier.css", "/static/luthier.css"):
        assert web.get(stale).headers["cache-control"] == "no-cache"
    for outside in (
        "/static/../pyproject.toml",
        "/static/%2e%2e/pyproject.toml",
        "/static/0000000000000000/../../pyproject.toml",
        "/static//etc/passwd",
    ):
        assert web.get(outside).status_code == 404
    assert web.get("/static/luthier.css", headers={"accept-encoding": "gzip"}).headers["content-encoding"] == "gzip"


def web_version() -> str:
    return web_templates.static_version()


def test_vendored_files_are_the_locked_ones():
    folder = PROJECT / "static" / "vendor"
    locked = {item["file"]: item["integrity"] for item in json.loads((folder / "lock.json").read_text())}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".js", ".mjs", ".css")}
    assert set(locked) == found, "every vendored script and sheet stands in the lock"
    for file, integrity in locked.items():
        assert integrity == "sha384-" + base64.b64encode(hashlib.sha384((folder / file).read_bytes()).digest()).decode(), file
        assert (folder / file).parent.joinpath("LICENSE").exists(), f"{file} needs its licence beside it"


def test_logs_carry_no_secret():
    line = "POST /sign-in/AbCdEfGhIjKl GET /invitation/InViTeDtOkEn /shared/ShArEdToKeN?csrf_token=aa11.bb22 key sk-luthier-0123456789abcdef0123456789abcdef-SECRETSECRET postgresql://luthier:hunter2@db/x"
    hidden = logs.hide(line)
    for secret in ("AbCdEfGhIjKl", "InViTeDtOkEn", "ShArEdToKeN", "aa11.bb22", "SECRETSECRET", "hunter2"):
        assert secret not in hidden
    assert "sk-luthier-01234567…" in hidden


@pytest.mark.long
def test_the_web_process_is_light(data_dir):
    """No torch, no pyarrow, no Celery before somebody needs them; under 150 MB."""
    code = (
        "import sys, re, json; from pathlib import Path; from app.main import create_app; create_app();"
        "kb = re.search(r'VmRSS:\\s+(\\d+)', Path('/proc/self/status').read_text())[1];"
        "heavy = [m for m in ('torch','transformers','peft','pyarrow','numpy','celery.app','alembic') if m in sys.modules];"
        "print(json.dumps({'heavy': heavy, 'mb': int(kb) / 1024}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, timeout=60)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["heavy"] == [] and said["mb"] < 150, said


def test_compression_is_really_gzip(client):
    with client.stream("GET", "/", headers={"accept-encoding": "gzip"}) as answer:
        assert gzip.decompress(b"".join(answer.iter_raw())).startswith(b"<!doctype html>")


def test_a_page_needs_no_second_connection(client, monkeypatch):
    """Else enough pages at once hold one connection each and wait for each other."""
    from app import db

    db.get_engine().dispose()
    db.get_engine.cache_clear()
    real = db.create_engine
    monkeypatch.setattr(db, "create_engine", lambda url, **rest: real(url, pool_size=1, max_overflow=0, pool_timeout=1))
    for path in ("/", "/settings", "/nothing", "/datasets", "/models", "/jobs", "/jobs/new", "/playground"):
        if path == "/nothing" or path in {found for found, _ in each_route(client.app.router)}:
            assert client.get(path, headers={"accept": "text/html"}).status_code in (200, 404), path
    made = client.post("/settings/keys", data={"name": "laptop"})
    assert made.status_code == 200 and "sk-luthier-" in made.text
