"""/v1/files through HTTP: the OpenAI client, odd forms, other people's files, and large uploads in constant memory."""

import json
import os
import re

import openai
import pytest
from sqlalchemy import select

from app.datasets import ingest_task
from app.datasets import service as datasets
from app.kit import ids
from app.queue import READ
from app.storage import files
from app.tables import Dataset, File, Outbox, User

CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def multipart(*parts, boundary=b"XX"):
    """A body from (headers, bytes) pairs."""
    body = b"".join(b"--" + boundary + b"\r\n" + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts)
    return body + b"--" + boundary + b"--\r\n"


def field(name, value):
    return f'Content-Disposition: form-data; name="{name}"'.encode(), value.encode()


def upload(name="x.jsonl", data=CHAT):
    return f'Content-Disposition: form-data; name="file"; filename="{name}"\r\nContent-Type: application/octet-stream'.encode(), data


def post(api, body, boundary="XX"):
    return api.post("/v1/files", content=body, headers={"content-type": f"multipart/form-data; boundary={boundary}"})


def blobs(data_dir):
    return [path.name for path in (data_dir / "blobs").glob("*/*")] + [path.name for path in (data_dir / "tmp").glob("upload-*")]


def test_the_openai_client_creates_lists_reads_and_deletes(openai_client, session):
    made = openai_client.files.create(
        file=("train.jsonl", CHAT), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.id.startswith("file-") and made.status == "uploaded" and made.bytes == len(CHAT)
    assert made.expires_at - made.created_at == 3600
    notes = openai_client.files.create(file=("notes.pdf", b"%PDF"), purpose="user_data")
    assert notes.status == "processed"
    assert [file.id for file in openai_client.files.list()] == [notes.id, made.id]
    assert [file.id for file in openai_client.files.list(order="asc", limit=1)] == [made.id, notes.id]
    assert [file.id for file in openai_client.files.list(purpose="fine-tune")] == [made.id]
    assert openai_client.files.retrieve(made.id).filename == "train.jsonl"
    assert openai_client.files.content(made.id).read() == CHAT
    assert openai_client.files.delete(notes.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.files.retrieve(notes.id)
    assert caught.value.param == "file_id"


def test_an_upload_becomes_a_dataset_that_is_read_and_reported(openai_client, api, session):
    made = openai_client.files.create(file=("train.jsonl", CHAT * 2 + b"{}\n"), purpose="fine-tune")
    dataset = session.scalars(select(Dataset)).one()
    assert session.scalars(select(Outbox.key).where(Outbox.task == READ)).one() == dataset.id
    assert api.get(f"/v1/files/{made.id}/report").json()["status"] == "reading"
    ingest_task.read(dataset.id)
    assert openai_client.files.wait_for_processing(made.id).status == "processed"
    report = api.get(f"/v1/files/{made.id}/report").json()
    assert (report["format"], report["task"], report["rows"], report["good_rows"]) == ("chat", "generation", 3, 2)
    assert [(item["line"], item["rule"]) for item in report["findings"] if item["severity"] == "error"] == [(3, "missing_field")]
    page = api.get(f"/v1/files/{made.id}/report?limit=1&after=1").json()
    assert len(page["findings"]) == 1 and page["findings"][0] == report["findings"][1]


@pytest.mark.parametrize("last", ["file", "purpose"])
def test_parts_may_come_in_any_order(api, last):
    parts = [field("purpose", "fine-tune"), upload()]
    answer = post(api, multipart(*(parts if last == "file" else parts[::-1])))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (multipart(field("purpose", "fine-tune")), 400, "file"),
        (multipart(upload()), 400, "purpose"),
        (multipart(upload(), field("purpose", "magic")), 400, "purpose"),
        (multipart(upload(), field("purpose", "fine-tune-results")), 400, "purpose"),
        (multipart(field("purpose", "fine-tune"), upload("x.exe")), 415, "file"),
        (multipart(field("purpose", "fine-tune"), upload(data=b"")), 400, "file"),
        (multipart(field("purpose", "fine-tune"), upload(), upload()), 400, "file"),
        (multipart(field("purpose", "user_data"), field("expires_after[seconds]", "soon"), upload()), 400, "expires_after[seconds]"),
        (multipart(field("purpose", "user_data"), field("expires_after[seconds]", "9"), upload()), 400, "expires_after[seconds]"),
        (multipart(field("purpose", "user_data"), field("expires_after[anchor]", "x"), upload()), 400, "expires_after[anchor]"),
        (multipart(field("purpose", "fine-tune"), upload())[:-30], 400, None),
        (b"", 400, None),
        (b"nothing like a form", 400, None),
        (multipart(*[field(f"f{i}", "x") for i in range(70)], upload()), 400, None),
        (multipart(field("purpose", "x" * 70_000), upload()), 413, "purpose"),
        (multipart((b"X-Long: " + b"y" * 20_000, b"1"), upload()), 400, None),
    ],
)
def test_a_bad_form_is_refused_and_leaves_nothing(api, session, data_dir, body, status, param):
    answer = post(api, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["param"] == param
    assert session.scalars(select(File)).all() == []
    assert blobs(data_dir) == []


def test_a_form_without_its_boundary_or_type(api):
    for headers in ({"content-type": "multipart/form-data"}, {"content-type": "application/json"}, {}):
        assert api.post("/v1/files", content=b"x", headers=headers).status_code == 400


def test_too_large_is_refused_while_it_comes_in(api, session, data_dir, monkeypatch):
    from app.settings import get_settings

    monkeypatch.setattr(get_settings(), "upload_limit_bytes", 1000)
    answer = post(api, multipart(field("purpose", "user_data"), upload(data=b"x" * 5000)))
    assert answer.status_code == 413 and answer.json()["error"]["param"] == "file"
    assert blobs(data_dir) == []


def test_a_refused_upload_does_not_take_the_bytes_of_another_file(api, data_dir):
    assert post(api, multipart(field("purpose", "fine-tune"), upload())).status_code == 200
    assert post(api, multipart(field("purpose", "fine-tune"), upload("x.exe"))).status_code == 415
    assert len(blobs(data_dir)) == 1


@pytest.mark.parametrize("name", ["../../etc/passwd.jsonl", "..\\..\\x.jsonl", "/etc/x.jsonl", "a\u202ecod.jsonl", "x" * 300 + ".jsonl"])
def test_a_name_never_becomes_a_path(api, data_dir, name):
    before = {path for path in data_dir.parent.rglob("*") if "blobs" not in path.parts and "tmp" not in path.parts}
    answer = api.post("/v1/files", data={"purpose": "user_data"}, files={"file": (name, CHAT)})
    assert answer.status_code == 200
    assert not re.search(r"[/\\\x00\u202e]", answer.json()["filename"])
    after = {path for path in data_dir.parent.rglob("*") if "blobs" not in path.parts and "tmp" not in path.parts}
    assert {path.name for path in after - before} <= {"secrets", "session.key"}


def test_another_persons_file_is_not_there(api, session):
    other = User(name="other")
    session.add(other)
    session.flush()
    file = files.add_bytes(session, other, CHAT, "x.jsonl", "fine-tune")
    dataset = datasets.create(session, other, file)
    session.commit()
    key = ids.public(ids.FILE, file.id)
    for path in ("", "/content", "/report"):
        assert api.get(f"/v1/files/{key}{path}").status_code == 404
    assert api.delete(f"/v1/files/{key}").status_code == 404
    assert api.get("/v1/files").json()["data"] == []
    assert api.get(f"/datasets/{ids.public(ids.DATASET, dataset.id)}").status_code == 404


def test_a_file_needs_an_account(web):
    from starlette.testclient import TestClient

    for method, path in (("GET", "/v1/files"), ("POST", "/v1/files"), ("DELETE", "/v1/files/file-" + "0" * 32)):
        assert TestClient(web.app, base_url="http://127.0.0.1:8000").request(method, path).status_code == 401


def test_a_large_upload_does_not_grow_the_process(api, data_dir):
    """200 MB in pieces; the process may grow by 8 MB, which is far below any part of it being held."""
    size, piece = 200 << 20, os.urandom(1 << 20)
    head, tail = multipart(field("purpose", "user_data"), upload("big.bin", b"@")).split(b"@")

    def body():
        yield head
        for _ in range(size // len(piece)):
            yield piece
        yield tail

    post(api, multipart(field("purpose", "user_data"), upload("small.bin", piece)))  # whatever is loaded once is loaded now
    before = resident_bytes()
    peak = 0

    def watched():
        nonlocal peak
        for part in body():
            peak = max(peak, resident_bytes())
            yield part

    answer = streamed(api, watched())
    assert answer["bytes"] == size
    assert peak - before < 8 << 20


def streamed(api, parts):
    """POST the parts one by one into the app itself: the test client would join them first."""
    import anyio

    async def go():
        feed = iter(parts)
        sent = []

        async def receive():
            part = next(feed, None)
            return {"type": "http.request", "body": part or b"", "more_body": part is not None}

        async def send(message):
            sent.append(message)

        headers = {"host": "127.0.0.1:8000", "authorization": f"Bearer {api.key}", "content-type": "multipart/form-data; boundary=XX"}
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/files",
            "raw_path": b"/v1/files", "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()], "state": {},
        }  # fmt: skip
        await api.app(scope, receive, send)
        assert sent[0]["status"] == 200, sent
        return json.loads(b"".join(message.get("body", b"") for message in sent[1:]))

    return anyio.run(go)


def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_csrf_a_cookie_alone_cannot_upload(client):
    body = multipart(field("purpose", "fine-tune"), upload())
    headers = {"content-type": "multipart/form-data; boundary=XX", "x-csrf-token": ""}
    assert client.post("/v1/files", content=body, headers=headers).status_code == 403
