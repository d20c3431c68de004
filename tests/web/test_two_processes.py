"""Two web processes of one studio on machines without a common folder: what one began, the other goes on with."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from sqlalchemy import func, select

from app import events
from app.datasets import resumable_upload, upload_pieces
from app.db import transaction
from app.errors import Conflict, Unavailable
from app.jobs import lifecycle
from app.kit import ids, secret
from app.models import hub_token
from app.ops.embedded.up import commands
from app.settings import PROJECT, get_settings
from app.storage import objects, places, sweeping
from app.tables import UploadPiece, User
from app.web import auth
from tests.conftest import csrf_token, forget_settings, free_port, wait_until
from tests.factories import make_dataset, make_job
from tests.routes.test_upload_parts import ROWS
from tests.routes.test_uploads import at, begin, patch

PASSWORD = "ebony and ivory"
MIB = 2**20


@pytest.fixture
def keys(tmp_path) -> Path:
    """The secrets of a studio, given from outside."""
    folder = tmp_path / "keys"
    folder.mkdir()
    for name in secret.NAMES:
        (folder / f"{name}.key").write_text(secrets.token_hex(32))
    return folder


@pytest.fixture
def processes(session, data_dir, keys, tmp_path, monkeypatch) -> Iterator[SimpleNamespace]:
    """`first` and `second`, each with a data folder of its own; `store` is what both reach. This process is a third machine."""
    monkeypatch.setenv("LUTHIER_STORAGE_URL", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("LUTHIER_SECRETS_DIR", str(keys))
    monkeypatch.setenv("LUTHIER_ADMIN_PASSWORD", PASSWORD)
    forget_settings()
    running = []
    for name in ("first", "second"):
        port = free_port()
        command = commands(get_settings().model_copy(update={"port": port}))["web"]
        log = tmp_path / f"{name}.log"
        with log.open("wb") as out:
            environment = dict(os.environ) | {"LUTHIER_DATA_DIR": str(tmp_path / name)}
            process = subprocess.Popen([sys.executable, "-m", *command], cwd=PROJECT, env=environment, stdout=out, stderr=out)
        running.append(SimpleNamespace(url=f"http://127.0.0.1:{port}", process=process, log=log))
    try:
        for one in running:
            wait_until(lambda one=one: _ready(one.url), what="a web process", seconds=60, log=one.log)
        yield SimpleNamespace(first=running[0], second=running[1])
    finally:
        for one in running:
            one.process.kill()
            one.process.wait(10)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def program(session, where) -> httpx.Client:
    _, key = auth.create_key(session, session.scalars(select(User)).one(), "a program")
    session.commit()
    return httpx.Client(base_url=where.url, headers={"authorization": f"Bearer {key}"}, timeout=30)


def same(there: httpx.Client, where) -> httpx.Client:
    """The same client at another process."""
    return httpx.Client(base_url=where.url, headers=there.headers, cookies=there.cookies, timeout=30)


@pytest.mark.long
def test_two_processes_are_one_studio(processes, session, data_dir, tiny_registered):
    first, second = processes.first, processes.second
    a_browser_is_signed_in_at_both(first, second)
    one = program(session, first)
    other = same(one, second)
    an_upload_is_resumed_through_the_other(one, other)
    parts_come_through_both(one, other)
    a_watcher_hears_and_is_ended(session, data_dir, tiny_registered, first, second)
    a_limit_holds_at_both(session, one, other)
    what_was_begun_survives_its_process(session, processes)


def a_browser_is_signed_in_at_both(first, second) -> None:
    form = {"name": get_settings().admin_name, "password": PASSWORD}
    for n in range(5):
        assert httpx.post(f"{(first, second)[n % 2].url}/sign-in", data=form | {"password": "wrong"}).status_code == 401
    for where in (first, second):
        refused = httpx.post(f"{where.url}/sign-in", data=form)
        assert refused.status_code == 429 and 0 < int(refused.headers["retry-after"]) <= 30
    with httpx.Client(base_url=first.url) as browser:
        from app.queue import get_redis

        get_redis().flushall()
        assert browser.post("/sign-in", data=form).status_code == 303
        page = same(browser, second).get("/settings/account")
        assert page.status_code == 200, "a cookie of one process is unknown to the other"
        token = {"x-csrf-token": csrf_token(page.text)}
        assert browser.post("/theme", data={"theme": "dark"}, headers=token).status_code < 400, "a form of one is refused by the other"
        assert browser.post("/theme", data={"theme": "dark"}).status_code == 403
        assert same(browser, second).post("/sign-out", headers=token).status_code == 303
        assert browser.get("/settings/account").status_code != 200, "it is still signed in at the process that did not sign it out"


def an_upload_is_resumed_through_the_other(one, other) -> None:
    url = begin(one, length=len(ROWS)).headers["location"]
    assert patch(one, url, 0, ROWS[:1000]).headers["upload-offset"] == "1000"
    assert at(other, url) == 1000
    assert patch(other, url, 0, ROWS[:1000]).status_code == 409, "bytes that are there are taken twice"
    assert patch(other, url, 1000, ROWS[1000:5000]).headers["upload-offset"] == "5000"
    done = patch(one, url, 5000, ROWS[5000:])
    assert done.status_code == 204, done.text
    dataset = done.headers["luthier-dataset"]
    assert other.head(url, headers={"Tus-Resumable": "1.0.0"}).headers["luthier-dataset"] == dataset
    file = other.get(f"/v1/datasets/{dataset}").json()["file_id"]
    assert other.get(f"/v1/files/{file}/content").content == ROWS
    assert patch(other, url, len(ROWS), b"").headers["luthier-dataset"] == dataset


def parts_come_through_both(one, other) -> None:
    begun = {"bytes": 3000, "filename": "sums.jsonl", "purpose": "user_data", "mime_type": "text/jsonl"}
    key = one.post("/v1/uploads", json=begun).json()["id"]
    pieces = ((other, ROWS[1000:3000]), (one, ROWS[:1000]))
    last, head = (asker.post(f"/v1/uploads/{key}/parts", files={"data": piece}).json()["id"] for asker, piece in pieces)
    assert one.post(f"/v1/uploads/{key}/parts", files={"data": b"x"}).status_code == 413, "the parts of the other are not counted"
    whole = other.post(f"/v1/uploads/{key}/complete", json={"part_ids": [head, last]}).json()
    assert one.get(f"/v1/files/{whole['file']['id']}/content").content == ROWS[:3000]


def a_watcher_hears_and_is_ended(session, data_dir, model, first, second) -> None:
    user = session.scalars(select(User)).one()
    job = make_job(session, user, model, make_dataset(session, user, data_dir))
    key, text = auth.create_key(session, user, "a watcher")
    session.commit()
    heard: dict[str, bytes] = {first.url: b"", second.url: b""}
    headers = {"authorization": f"Bearer {text}"}

    def watch(url: str) -> None:
        path = f"{url}/v1/fine_tuning/jobs/{ids.public(ids.JOB, job.id)}/stream"
        with httpx.stream("GET", path, headers=headers, timeout=60) as answer:
            for piece in answer.iter_raw():
                heard[url] += piece

    watchers = [threading.Thread(target=watch, args=[url], daemon=True) for url in heard]
    for watcher in watchers:
        watcher.start()
    wait_until(lambda: all(b"retry:" in text for text in heard.values()), what="both streams")
    time.sleep(0.5)  # what was there before is read
    began = time.monotonic()
    with transaction() as own:  # which wakes watchers once it is committed
        lifecycle.record_event(own, job.id, 0, events.Log(level="warn", message="a word to both"))
    wait_until(lambda: all(b"a word to both" in text for text in heard.values()), what="what happened later")
    assert time.monotonic() - began < 2.5, "they were not woken: a feed polls every three seconds"
    auth.revoke_key(session, user, key.id)
    session.commit()
    for watcher in watchers:
        watcher.join(10)
        assert not watcher.is_alive(), "a key that was revoked still watches"


def a_limit_holds_at_both(session, one, other) -> None:
    user = session.scalars(select(User)).one()
    user.limits = {"requests_per_minute": 4}
    session.commit()
    time.sleep(5.1)  # a limit is in force within five seconds
    if time.time() % 60 > 50:
        time.sleep(60 - time.time() % 60)
    from app.queue import get_redis

    get_redis().flushall()
    answers = [asker.get("/v1/models") for asker in (one, other, one, other, one, other)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 429, 429]
    assert all(0 < int(answer.headers["retry-after"]) <= 60 for answer in answers[4:])
    user.limits = {}
    session.commit()
    time.sleep(5.1)


def what_was_begun_survives_its_process(session, processes) -> None:
    """A process is killed while it takes bytes: what was stored of them is where the other goes on."""
    one = program(session, processes.first)
    other = same(one, processes.second)
    data = os.urandom(20 * MIB)
    url = begin(one, length=len(data), purpose="user_data", filename="noise.bin").headers["location"]
    sent, killed = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        for start in range(0, 18 * MIB, MIB):
            yield data[start : start + MIB]
        sent.set()
        killed.wait(60)
        yield data[18 * MIB :]

    def send() -> None:
        headers = {"Tus-Resumable": "1.0.0", "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
        with pytest.raises(httpx.HTTPError):
            one.patch(url, headers=headers, content=slowly())

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert sent.wait(60)
    wait_until(lambda: at(other, url) == upload_pieces.PIECE_BYTES, what="the first piece", seconds=30)
    processes.first.process.send_signal(signal.SIGKILL)
    processes.first.process.wait(10)
    killed.set()
    sender.join(30)
    start = at(other, url)
    assert start == upload_pieces.PIECE_BYTES
    assert patch(other, url, start, data[start:]).status_code == 204
    file = next(one_ for one_ in other.get("/v1/files").json()["data"] if one_["filename"] == "noise.bin")
    assert other.get(f"/v1/files/{file['id']}/content").content == data
    session.expire_all()
    assert session.scalar(select(func.count()).select_from(UploadPiece)) == 0


# One process, two machines: the same without a network -----------------------------------------------------------------


@pytest.fixture
def machines(session, user, tmp_path, monkeypatch):
    """Go to a machine of the studio; the rest of it is the same everywhere."""

    def go(name: str) -> Path:
        monkeypatch.setenv("LUTHIER_STORAGE_URL", f"file://{tmp_path / 'store'}")
        monkeypatch.setenv("LUTHIER_DATA_DIR", str(tmp_path / name))
        forget_settings()
        return get_settings().folder("tmp")

    return go


def test_of_two_that_send_the_same_bytes_one_is_taken(machines, session, user, tmp_path):
    machines("a")
    upload = resumable_upload.begin(session, user, 10, "x.jsonl", "user_data")
    session.commit()
    (tmp_path / "sent").write_bytes(b"01234")
    upload_pieces.keep(upload.id, tmp_path / "sent", 5, start=0)
    machines("b")
    with pytest.raises(upload_pieces.Locked):
        upload_pieces.keep(upload.id, tmp_path / "sent", 5, start=0)
    assert upload_pieces.received(session, upload.id) == 5
    resumable_upload.stop(session, upload)
    session.commit()
    with pytest.raises(upload_pieces.Gone):
        upload_pieces.keep(upload.id, tmp_path / "sent", 5, start=5)


def test_bytes_that_were_not_stored_are_not_believed(machines, session, user, tmp_path):
    """A machine took bytes, was cut off before it stored them, and hears of the upload again when another one has gone on."""
    tmp = machines("a")
    upload = resumable_upload.begin(session, user, 10, "x.jsonl", "user_data")
    session.commit()
    (tmp_path / "sent").write_bytes(b"01234567")
    upload_pieces.keep(upload.id, tmp_path / "sent", 8, start=0)
    held = resumable_upload.ticket(upload)
    held.path.write_bytes(b"xyz")
    with resumable_upload.locked(held.path) as handle:
        upload_pieces.catch_up(upload.id, handle)
    assert held.path.read_bytes() == b"01234567" and held.offset == 8
    held.path.write_bytes(b"01234567xyz")
    with resumable_upload.locked(held.path) as handle:
        upload_pieces.catch_up(upload.id, handle)
    assert held.path.read_bytes() == b"01234567"
    os.utime(old := tmp / "tus-of-long-ago", (0, 0)) if (tmp / "tus-of-long-ago").touch() is None else None
    resumable_upload.begin(session, user, 10, "y.jsonl", "user_data")
    assert not old.exists() and held.path.exists(), "the file of an upload that has expired stays, or that of another goes"


def test_a_file_is_not_touched_by_a_late_request(machines, session, user, tmp_path):
    """The upload's file and the blob that it became are one file: emptying the one would empty the other."""
    machines("a")
    upload = resumable_upload.begin(session, user, 3, "x.bin", "user_data")
    session.commit()
    held = resumable_upload.ticket(upload)
    held.path.write_bytes(b"abc")
    upload_pieces.keep(upload.id, held.path, 3, start=0)
    with resumable_upload.locked(held.path) as late:
        resumable_upload.finish(user, held)
        with pytest.raises(upload_pieces.Locked):
            upload_pieces.catch_up(upload.id, late)
    session.expire_all()
    blob = resumable_upload.files.get(session, user, upload.file_id)
    assert resumable_upload.files.brought(blob.sha256).read_bytes() == b"abc"


def test_pieces_are_swept_once_their_upload_is_over(machines, session, user, tmp_path, monkeypatch):
    machines("a")
    upload = resumable_upload.begin(session, user, 10, "x.jsonl", "user_data")
    session.commit()
    (tmp_path / "sent").write_bytes(b"01234")
    upload_pieces.keep(upload.id, tmp_path / "sent", 5, start=0)
    monkeypatch.setattr(sweeping, "UNOWNED_SECONDS", -1.0)
    monkeypatch.setattr(objects, "KEPT_SECONDS", -1.0)
    assert sweeping.sweep().places == 0 and len(places.stored("uploads", "*/*")) == 1
    resumable_upload.stop(session, upload)
    session.commit()
    swept = sweeping.sweep()
    assert swept.places == 1 and swept.objects == 1 and places.stored("uploads", "*/*") == []


# Secrets that are given ------------------------------------------------------------------------------------------------


def test_given_secrets_are_read_and_never_made(keys, data_dir, monkeypatch):
    monkeypatch.setenv("LUTHIER_SECRETS_DIR", str(keys))
    forget_settings()
    secret.check()
    assert secret.secret() == (keys / "session.key").read_bytes() and not (data_dir / "secrets").exists()
    (keys / "hub.token").write_text("hf_abcdefghijkl\n")
    assert hub_token.read() == "hf_abcdefghijkl"
    for change in (lambda: hub_token.keep("hf_mnopqrstuvwx"), hub_token.forget):
        with pytest.raises(Conflict, match="given from outside"):
            change()
    (keys / "two_step.key").write_text("short")
    secret.secret.cache_clear()
    with pytest.raises(Unavailable, match="has 5 bytes"):
        secret.check()
    (keys / "two_step.key").unlink()
    secret.secret.cache_clear()
    with pytest.raises(Unavailable, match=r"two_step\.key cannot be read") as missing:
        secret.check()
    assert "session.key, two_step.key, webhooks.key" in missing.value.hint
