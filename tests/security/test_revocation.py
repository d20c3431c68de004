"""An open stream ends with the key or the session it was opened with, and a request is what it is to every wall."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from fastapi import APIRouter

from app.kit import ids
from app.main import create_app
from app.web import auth, revocation
from app.web.streaming import Stream
from tests.conftest import csrf_token, free_port, wait_until
from tests.factories import make_dataset, make_job


@pytest.fixture
def served(session, user, data_dir, tiny_registered, monkeypatch) -> Iterator[tuple[str, str]]:
    """The web application on a port of its own, with a stream of words that never ends; and the address of a job's stream."""
    monkeypatch.setattr(revocation, "LOOK_SECONDS", 0.3)
    app, router = create_app(), APIRouter(prefix="/v1")

    async def words():
        yield b"data: hello\n\n"
        await asyncio.sleep(60)

    @router.get("/words")
    async def stream() -> Stream:
        return Stream(words())

    app.include_router(router)
    job = make_job(session, user, tiny_registered, make_dataset(session, user, data_dir))
    session.commit()
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, what="the web process", seconds=60)
    yield f"http://127.0.0.1:{port}", f"/v1/fine_tuning/jobs/{ids.public(ids.JOB, job.id)}/stream"
    server.should_exit = True
    thread.join(10)


def heard(asker: httpx.Client, path: str, begun: threading.Event) -> bytes:
    with asker.stream("GET", path, timeout=60) as answer:
        text = b""
        assert answer.status_code == 200
        for piece in answer.iter_raw():
            text += piece
            begun.set()
    return text


def listen(url: str, path: str, revoke, **client) -> tuple[bytes, float]:
    """What is heard of a stream of which the pass is revoked once it speaks, and how long after that it ended."""
    begun, said = threading.Event(), []
    with httpx.Client(base_url=url, **client) as asker:
        thread = threading.Thread(target=lambda: said.append(heard(asker, path, begun)), daemon=True)
        thread.start()
        assert begun.wait(60)
        time.sleep(0.7)
        assert thread.is_alive(), "it ends while its pass is good"
        revoke()
        since = time.monotonic()
        thread.join(60)
    assert said, "the stream went on"
    return said[0], time.monotonic() - since


@pytest.mark.parametrize("kind", ["job", "words"])
def test_a_revoked_key_ends_its_open_streams(served, session, user, kind):
    url, path = served
    key, text = auth.create_key(session, user, "tests")
    session.commit()

    def revoke() -> None:
        auth.revoke_key(session, user, key.id)
        session.commit()

    said, seconds = listen(url, path if kind == "job" else "/v1/words", revoke, headers={"authorization": f"Bearer {text}"})
    assert seconds < 10
    if kind == "words":
        assert json.loads(said.splitlines()[-2].removeprefix(b"data: "))["error"]["code"] == "invalid_api_key"


def test_signing_out_ends_the_open_streams_of_this_browser_alone(served, session, user):
    url, path = served
    links = [auth.new_sign_in_link(session, user) for _ in range(2)]
    session.commit()
    cookies = []
    for link in links:
        cookies.append(dict(httpx.get(f"{url}{link}", timeout=60).cookies))
    kept = threading.Event()
    with httpx.Client(base_url=url, cookies=cookies[1]) as asker:

        def hear() -> None:
            with contextlib.suppress(httpx.ReadError):  # the test closes it
                heard(asker, path, kept)

        thread = threading.Thread(target=hear, daemon=True)
        thread.start()
        assert kept.wait(60)

        def sign_out() -> None:
            page = httpx.get(f"{url}/settings", cookies=cookies[0], timeout=60).text
            left = httpx.post(f"{url}/sign-out", cookies=cookies[0], headers={"origin": url, "x-csrf-token": csrf_token(page)}, timeout=60)
            assert left.status_code == 303

        _, seconds = listen(url, path, sign_out, cookies=cookies[0])
        assert seconds < 10 and thread.is_alive()


@pytest.mark.parametrize("header", [b"\tjunk", b"  junk", b" \t", b"Bearer", b"\tBearer x"])
def test_no_spelling_of_a_key_is_one_to_the_door_and_none_to_the_token(client, header):
    """A cookie that lets in must bring its token; a header that is a key makes the cookie count for nothing."""
    del client.headers["x-csrf-token"]
    answer = client.post("/theme", data={"theme": "dark"}, headers={"authorization": header}, follow_redirects=False)
    signed_out = answer.status_code == 303 and answer.headers["location"].startswith("/sign-in")
    assert signed_out or answer.status_code == 403, answer.headers


def test_a_token_that_is_not_ascii_is_refused(client):
    token = client.headers.pop("x-csrf-token")
    for odd in ("é", f"{token}é", f"é.{token}", "\ud800", "٠" * 64):
        sent = odd.encode("utf-8", "surrogatepass")
        assert client.post("/theme", headers={"x-csrf-token": sent}, follow_redirects=False).status_code == 403
        assert client.post("/theme", params={"csrf_token": sent}, follow_redirects=False).status_code == 403
        form = {"csrf_token": sent, "theme": "dark"}
        assert client.post("/theme", data=form, follow_redirects=False).status_code == 403


def test_nothing_private_is_stored_on_the_way(api, client):
    made = api.post("/v1/files", files={"file": ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n')}, data={"purpose": "fine-tune"}).json()
    for path in ("/v1/models", "/v1/files", "/v1/studio", f"/v1/files/{made['id']}", "/v1/nothing"):
        assert api.get(path).headers["cache-control"] == "no-store", path
    content = api.get(f"/v1/files/{made['id']}/content")
    assert content.headers["cache-control"] == "no-store"
    etag = content.headers["etag"]
    part = api.get(f"/v1/files/{made['id']}/content", headers={"range": "bytes=0-3", "if-range": etag})
    assert part.status_code == 206 and part.content == content.content[:4]
    assert client.get("/settings").headers["cache-control"] == "no-store"
