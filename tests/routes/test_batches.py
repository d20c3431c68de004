"""`/v1/batches`, called by the unmodified client, and its page: answers come from a real generate worker."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from sqlalchemy import func, select, update

from app.batches import service as batches
from app.db import transaction
from app.kit import ids
from app.storage import files
from app.tables import BatchAnswer, Exchange, File, RequestBatch, TokenUse, User
from app.web.background import wake
from tests.conftest import PROJECT, free_port, wait_until
from tests.generating import _workers, answering_dir, generate_worker, register_long, register_tiny  # noqa: F401

CHAT = "/v1/chat/completions"


@pytest.fixture
def client(openai_client, generate_worker, session):  # noqa: F811
    register_tiny(session)
    return openai_client


def chat(name: str, model: str = "tiny", max_tokens: int = 6, **more) -> dict:
    body = {"model": model, "messages": [{"role": "user", "content": f"Say {name}."}], "max_tokens": max_tokens, "temperature": 0, **more}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body}


def submit(client, lines: list[dict], endpoint: str = CHAT, **more):
    data = "\n".join(json.dumps(line) for line in lines).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def ended(client, batch, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch.id)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
        time.sleep(0.1)
    raise AssertionError(f"it has not ended: {batch}")


def lines_of(client, file_id: str | None) -> list[dict]:
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()] if file_id else []


def test_requests_are_answered_as_the_endpoint_answers_them(client, session):
    alone = client.chat.completions.create(**chat("one")["body"])
    exchanges = session.scalar(select(func.count()).select_from(Exchange))
    wrong = [chat("nobody", model="nobody"), chat("hot", temperature=9)]
    batch = submit(client, [chat("one"), wrong[0], chat("two"), wrong[1], chat("three")], metadata={"for": "the test"})
    assert batch.status == "validating" and batch.endpoint == CHAT and batch.expires_at == batch.created_at + 24 * 3600
    batch = ended(client, batch)
    assert batch.status == "completed" and batch.model is None and batch.metadata == {"for": "the test"}
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (5, 3, 2)
    good = lines_of(client, batch.output_file_id)
    assert [line["custom_id"] for line in good] == ["one", "two", "three"] and len({line["id"] for line in good}) == 3
    said = good[0]["response"]
    assert said["status_code"] == 200 and said["request_id"].startswith("req_") and good[0]["error"] is None
    assert said["body"]["choices"][0]["message"]["content"] == alone.choices[0].message.content
    bad = {line["custom_id"]: line["response"] for line in lines_of(client, batch.error_file_id)}
    assert {name: r["status_code"] for name, r in bad.items()} == {"nobody": 404, "hot": 400}
    assert bad["hot"]["body"]["error"]["param"] == "temperature"
    written = sum(line["response"]["body"]["usage"]["completion_tokens"] for line in good)
    assert batch.usage.output_tokens == written and batch.usage.total_tokens == batch.usage.input_tokens + written
    used = session.scalar(select(func.sum(TokenUse.written)).execution_options(populate_existing=True))
    assert used == written + alone.usage.completion_tokens, "tokens in a batch count as any others"
    assert session.scalar(select(func.count()).select_from(Exchange)) == exchanges and not session.scalars(select(BatchAnswer)).all()
    output = session.get(File, session.scalars(select(RequestBatch.output_file_id)).one())
    assert output.purpose == "batch_output" and output.expires_at is None


def test_texts_are_completed_and_files_expire_as_asked(client, session):
    one = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "The", "max_tokens": 3}}
    batch = ended(
        client, submit(client, [one], "/v1/completions", extra_body={"output_expires_after": {"anchor": "created_at", "seconds": 3600}})
    )
    assert batch.model == "tiny" and lines_of(client, batch.output_file_id)[0]["response"]["body"]["object"] == "text_completion"
    file = client.files.retrieve(batch.output_file_id)
    assert file.purpose == "batch_output" and 3590 <= file.expires_at - file.created_at <= 3610


def test_responses_are_answered_and_refused_as_the_endpoint_does(client, api):
    """Answers, their tokens and the response before are those of `/v1/responses`; what it refuses is refused with its field."""
    path = "/v1/responses"
    first = client.responses.create(model="tiny", input="Say one.", temperature=0, max_output_tokens=6)

    def line(name: str, **more) -> dict:
        body = {"model": "tiny", "input": "Say one.", "temperature": 0, "max_output_tokens": 6, **more}
        return {"custom_id": name, "method": "POST", "url": path, "body": body}

    lines = [
        line("same", store=False), line("next", previous_response_id=first.id, metadata={"a": "b"}),
        line("background", background=True), line("hosted", tools=[{"type": "web_search"}]), line("gone", previous_response_id="resp_" + "0" * 32),
    ]  # fmt: skip
    batch = ended(client, submit(client, lines, path))
    assert (batch.endpoint, batch.model, batch.status) == (path, "tiny", "completed")
    good = {one["custom_id"]: one["response"]["body"] for one in lines_of(client, batch.output_file_id)}
    assert list(good) == ["same", "next"] and good["same"]["object"] == "response"
    assert good["same"]["output"][0]["content"][0]["text"] == first.output_text and good["next"]["previous_response_id"] == first.id
    assert client.responses.retrieve(good["next"]["id"]).metadata == {"a": "b"}, "it was stored, as it is online"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(good["same"]["id"])
    assert good["next"]["usage"]["input_tokens"] > good["same"]["usage"]["input_tokens"], "it reads the response before"
    for side in ("input_tokens", "output_tokens", "total_tokens"):
        assert getattr(batch.usage, side) == sum(one["usage"][side] for one in good.values()) > 0
    bad = {one["custom_id"]: one["response"] for one in lines_of(client, batch.error_file_id)}
    for one in lines[2:]:
        online = api.post(path, json=one["body"])
        assert (bad[one["custom_id"]]["status_code"], bad[one["custom_id"]]["body"]) == (online.status_code, online.json()), one
    assert [response["body"]["error"]["param"] for response in bad.values()] == ["background", "tools.0.type", "previous_response_id"]


def test_a_file_that_cannot_be_run_is_refused_with_its_lines(client):
    batch = ended(client, submit(client, [chat("a"), chat("a"), chat("b") | {"url": "/v1/embeddings"}]))
    assert batch.status == "failed" and batch.failed_at and batch.output_file_id is None
    assert [(e.line, e.code, e.param) for e in batch.errors.data] == [(2, "duplicate_custom_id", "custom_id"), (3, "invalid_url", "url")]


def test_orders_that_are_refused(client):
    tune = client.files.create(file=("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n'), purpose="fine-tune")
    good = client.files.create(file=("in.jsonl", json.dumps(chat("a")).encode()), purpose="batch")
    for order, param in (
        ({"input_file_id": tune.id}, "input_file_id"), ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"), ({"metadata": {"a": "b" * 513}}, "metadata.a"),
        ({"extra_body": {"output_expires_after": {"anchor": "created_at", "seconds": 1}}}, "output_expires_after.seconds"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.create(**{"input_file_id": good.id, "endpoint": CHAT, "completion_window": "24h", **order})
        assert caught.value.param == param, order
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-" + "0" * 32, endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_" + "0" * 32)


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_what_was_answered_before_the_end_is_kept(client, session, how):
    register_long(session, "long")
    batch = submit(client, [chat("one"), *(chat(f"long {i}", model="long", max_tokens=16_000) for i in range(9))])
    wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 1, what="the first answer", seconds=60)
    if how == "cancelled":
        assert client.batches.cancel(batch.id).status == "cancelling"
    else:
        with transaction() as other:
            other.execute(update(RequestBatch).values(expires_at=func.clock_timestamp()))
    batch = ended(client, batch)
    assert batch.status == how and getattr(batch, f"{how}_at") and batch.request_counts.completed == 1
    assert [line["custom_id"] for line in lines_of(client, batch.output_file_id)] == ["one"]
    unsent = lines_of(client, batch.error_file_id)
    assert [line["custom_id"] for line in unsent] == [f"long {i}" for i in range(9)]
    assert all(line["response"] is None and line["error"]["code"] == f"batch_{how}" for line in unsent)
    assert client.batches.cancel(batch.id).status == how, "one that has ended stays as it is"
    from app.queue import PREFIX, get_redis

    stopped = lambda: not get_redis().keys(f"{PREFIX}answer:*[0-9a-f]")  # noqa: E731
    wait_until(stopped, what="the end of the answers that nobody reads", seconds=30)


def test_nothing_is_answered_for_a_person_who_was_disabled(web, session, user, data_dir):
    with transaction() as other:
        person = other.get_one(User, user.id)
        file = files.add_bytes(other, person, json.dumps(chat("a")).encode(), "in.jsonl", "batch")
        order = {"input_file_id": ids.public(ids.FILE, file.id), "endpoint": CHAT, "completion_window": "24h"}
        key = batches.create(other, person, batches.BatchOrder.model_validate(order)).id
        person.disabled_at = func.clock_timestamp()
    wake(web.app)
    wait_until(lambda: found(key).status == "ended", what="the end", seconds=30)
    assert (found(key).completed, found(key).failed) == (0, 1)
    (line,) = read(found(key).error_file_id)
    assert line["response"]["status_code"] == 401


def found(key) -> RequestBatch:
    with transaction() as other:
        return other.get_one(RequestBatch, key)


def read(file_id) -> list[dict]:
    with transaction() as other:
        return [json.loads(line) for line in files.blob_path(other.get_one(File, file_id).sha256).read_text().splitlines()]


def test_batches_are_listed_newest_first(client):
    made = [submit(client, [chat(str(i))]).id for i in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]


def test_a_batch_is_started_and_read_on_its_page(client, session, web, user):
    from starlette.testclient import TestClient

    from app.web import auth
    from tests.conftest import ORIGIN, csrf_token

    link = auth.new_sign_in_link(session, user)
    session.commit()
    browser = TestClient(web.app, base_url=ORIGIN, headers={"origin": ORIGIN})
    token = csrf_token(browser.get(link).text)
    data = "\n".join(json.dumps(line) for line in [chat("<b>one"), chat("nobody", model="nobody")])
    sent = browser.post(
        f"/playground/batches?csrf_token={token}", data={"endpoint": CHAT}, files={"file": ("in & out.jsonl", data.encode())}
    )
    assert sent.status_code == 200 and "in &amp; out.jsonl" in sent.text
    (batch,) = client.batches.list().data
    batch = ended(client, batch)
    shown = browser.get("/playground/batches").text
    assert "Completed" in shown and "1 failed" in shown
    output = browser.get(f"/playground/batches/{batch.id}/output")
    assert json.loads(output.text)["custom_id"] == "<b>one" and 'filename="batch_' in output.headers["content-disposition"]
    assert json.loads(browser.get(f"/playground/batches/{batch.id}/errors").text)["custom_id"] == "nobody"
    refused = browser.post(f"/playground/batches?csrf_token={token}", data={"endpoint": "/v1/x"}, files={"file": ("a.jsonl", b"{}")})
    assert refused.status_code == 400 and "No such endpoint" in refused.text


@pytest.mark.long
@pytest.mark.parametrize(("seed", "blows"), [(1, 3), pytest.param(2, 5, marks=pytest.mark.fault)])
def test_no_request_is_lost_or_answered_twice_when_the_web_process_is_killed(session, user, generate_worker, seed, blows, tmp_path):  # noqa: F811
    """Killed at random moments; each time another process goes on with what has no answer yet."""
    register_tiny(session)
    rng, count, kills = random.Random(seed), 60 * blows, 0
    names = [str(i) for i in range(count)]
    with transaction() as other:
        person = other.get_one(User, user.id)
        file = files.add_bytes(other, person, "\n".join(json.dumps(chat(n)) for n in names).encode(), "in.jsonl", "batch")
        order = {"input_file_id": ids.public(ids.FILE, file.id), "endpoint": CHAT, "completion_window": "24h"}
        key = batches.create(other, person, batches.BatchOrder.model_validate(order)).id
    while found(key).status == "open":
        process = start_web(tmp_path / f"web-{kills}.log")
        before, until = found(key).completed, time.monotonic() + 120
        while found(key).status == "open" and time.monotonic() < until:
            with transaction() as other:
                batches.reap(other)
            if kills < blows and found(key).completed > before:
                time.sleep(rng.uniform(0, 0.3))
                break
            time.sleep(0.05)
        kills += 1
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
    assert kills > blows, "it was killed too seldom for this to say anything"
    assert batches.status_of(found(key)) == "completed" and found(key).completed == count and not found(key).failed
    assert [line["custom_id"] for line in read(found(key).output_file_id)] == names


def start_web(log: Path) -> subprocess.Popen:
    env = dict(os.environ) | {"LUTHIER_LEASE_SECONDS": "2", "LUTHIER_BEAT_SECONDS": "0.5"}
    port = free_port()
    serve = f"uvicorn.run('app.main:create_app', factory=True, host='127.0.0.1', port={port})"
    beats = "app.web.background.BEAT_SECONDS = 0.2"  # what is stored seldom is done too soon to be killed often
    command = [sys.executable, "-c", f"import uvicorn, app.web.background; {beats}; {serve}"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=output, stderr=output, start_new_session=True)
    wait_until(lambda: is_healthy(f"http://127.0.0.1:{port}/healthz"), what="the web process", seconds=60, log=log)
    return process


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1).status_code == 200
    except httpx.HTTPError:
        return False
