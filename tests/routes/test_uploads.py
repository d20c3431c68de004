"""Resumable uploads: whatever breaks, the bytes that came stay, and what comes of them is the file that was sent."""

import asyncio
import base64
import hashlib
import random
import uuid

import pytest
from sqlalchemy import func, select, text, update
from starlette.requests import ClientDisconnect

from app.datasets import ingest_task, resumable_upload
from app.kit import ids
from app.storage import files
from app.tables import Dataset, File, Upload, User

TUS = {"Tus-Resumable": "1.0.0"}
ROW = b'{"messages": [{"role": "user", "content": "a %07d"}, {"role": "assistant", "content": "b"}]}\n'
DATA = b"".join(ROW % n for n in range(30_000))


def said(**values):
    return ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in values.items())


def begin(api, length=len(DATA), **values):
    values = {"filename": "chats.jsonl", **values}
    return api.post("/v1/tus", headers={**TUS, "Upload-Length": str(length), "Upload-Metadata": said(**values)})


def patch(api, url, offset, data, **headers):
    headers = {**TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream", **headers}
    return api.patch(url, headers=headers, content=data)


def at(api, url):
    return int(api.head(url, headers=TUS).headers["upload-offset"])


def test_a_nul_is_refused_at_the_edge(api, client, session):
    refused = [
        begin(api, name="a\0b"),
        api.get("/v1/files?purpose=%00"),
        client.get("/datasets?search=%00"),
        api.post("/v1/files", files={"file": ("x.jsonl", ROW % 1)}, data={"purpose": "fine-tune\0"}),
        api.get("/v1/models/a%00b"),
    ]
    assert [answer.status_code for answer in refused] == [400] * len(refused)
    key = begin(api, filename="a\0b.jsonl")
    assert key.status_code == 400 and session.scalar(select(func.count()).select_from(Upload)) == 0


@pytest.mark.long
def test_a_whole_upload_becomes_a_dataset(api, session):
    answer = begin(api, name="Chats", format="chat")
    assert answer.status_code == 201 and answer.headers["upload-expires"].endswith("GMT")
    done = patch(api, answer.headers["location"], 0, DATA)
    assert done.status_code == 204 and done.headers["upload-offset"] == str(len(DATA))
    dataset = session.get(Dataset, ids.parse(ids.DATASET, done.headers["luthier-dataset"]))
    assert (dataset.name, dataset.format, dataset.status) == ("Chats", "chat", "reading")
    assert session.get(File, dataset.file_id).sha256 == hashlib.sha256(DATA).hexdigest()
    assert files.blob_path(hashlib.sha256(DATA).hexdigest()).read_bytes() == DATA
    ingest_task.read(dataset.id)
    session.expire_all()
    assert dataset.good_rows == 30_000
    again = patch(api, answer.headers["location"], len(DATA), b"")
    assert again.headers["luthier-dataset"] == done.headers["luthier-dataset"]
    assert session.scalar(select(func.count(File.id))) == 1


def test_resumed_many_times_at_random_places_the_bytes_are_the_same(api, session):
    draw = random.Random(11)
    url = begin(api).headers["location"]
    held = resumable_upload.ticket(session.scalars(select(Upload)).one())
    for _ in range(20):
        start = at(api, url)
        cut = draw.randrange(0, 90_000)

        async def torn(start=start, cut=cut):
            for place in range(start, start + cut, 7_001):
                yield DATA[place : min(place + 7_001, start + cut)]
            raise ClientDisconnect

        with pytest.raises(ClientDisconnect):
            asyncio.run(resumable_upload.append(held, start, torn()))
        assert at(api, url) == start + cut
    last = patch(api, url, at(api, url), DATA[at(api, url) :])
    assert last.status_code == 204
    assert session.scalars(select(File.sha256)).one() == hashlib.sha256(DATA).hexdigest()


def test_a_wrong_offset_version_type_or_length_is_refused_and_harms_nothing(api):
    url = begin(api).headers["location"]
    assert patch(api, url, 0, DATA[:1000]).status_code == 204
    assert patch(api, url, 0, DATA[:1000]).status_code == 409
    assert patch(api, url, 1000, b"x", **{"Content-Type": "text/plain"}).status_code == 415
    assert patch(api, url, 1000, b"x", **{"Tus-Resumable": "0.2.2"}).status_code == 412
    assert patch(api, url, "-1", b"x").status_code == 400
    assert patch(api, url, 1000, DATA).status_code == 413
    assert 1000 <= at(api, url) <= len(DATA)
    assert begin(api, 0).status_code == 400 and begin(api, 10**17).status_code == 413
    assert begin(api, 10, filename="x.exe").status_code == 415
    assert begin(api, 10, purpose="nothing").status_code == 400
    assert begin(api, 10, format="excel").status_code == 400
    assert api.post("/v1/tus", headers={**TUS, "Upload-Length": "3", "Upload-Metadata": "filename %%%"}).status_code == 400
    assert api.head(f"/v1/tus/{uuid.uuid4()}", headers=TUS).status_code == 404


def test_every_answer_speaks_the_protocol_and_is_kept_by_nobody(api):
    url = begin(api).headers["location"]
    for answer, status in ((api.head(url, headers=TUS), 200), (api.head(f"/v1/tus/{uuid.uuid4()}", headers=TUS), 404)):
        assert (answer.status_code, answer.headers["tus-resumable"], answer.headers["cache-control"]) == (status, "1.0.0", "no-store")
    refused = [api.head(url), api.delete(url), api.post("/v1/tus", headers={"Upload-Length": "3"}), api.patch(url, content=b"x")]
    assert [(answer.status_code, answer.headers["tus-version"]) for answer in refused] == [(412, "1.0.0")] * 4
    assert at(api, url) == 0


def test_abilities_and_stopping(api, data_dir):
    answer = api.options("/v1/tus")
    assert answer.headers["tus-version"] == "1.0.0" and "expiration" in answer.headers["tus-extension"]
    url = begin(api).headers["location"]
    assert patch(api, url, 0, DATA[:10]).status_code == 204
    assert api.delete(url, headers=TUS).status_code == 204
    assert api.head(url, headers=TUS).status_code == 404 and not list((data_dir / "tmp").glob("tus-*"))


def test_an_upload_expires_and_is_swept(api, session, data_dir):
    url = begin(api).headers["location"]
    session.execute(update(Upload).values(expires_at=func.clock_timestamp() - text("interval '1 second'")))
    session.commit()
    assert api.head(url, headers=TUS).status_code == 410
    assert resumable_upload.sweep(session) == 1
    session.commit()
    assert not list((data_dir / "tmp").glob("tus-*")) and session.scalars(select(Upload)).all() == []


def test_two_senders_at_once_cannot_mix_their_bytes(api, session):
    url = begin(api).headers["location"]
    held = resumable_upload.ticket(session.scalars(select(Upload)).one())
    with resumable_upload.locked(held.path):
        assert patch(api, url, 0, b"abc").status_code == 423
    assert at(api, url) == 0


def test_a_crash_before_the_row_is_in_loses_nothing(api, session, user, monkeypatch):
    url = begin(api).headers["location"]

    def power_cut(*rest, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files, "create", power_cut)
        with pytest.raises(BaseException):  # noqa: B017
            patch(api, url, 0, DATA)
    assert at(api, url) == len(DATA)
    assert patch(api, url, len(DATA), b"").headers["luthier-dataset"]
    assert session.scalars(select(File.sha256)).one() == hashlib.sha256(DATA).hexdigest()


def test_another_persons_upload_is_not_there(api, session):
    other = User(name="other")
    session.add(other)
    session.flush()
    upload = resumable_upload.begin(session, other, 10, "x.jsonl")
    session.commit()
    for method in ("HEAD", "DELETE"):
        assert api.request(method, f"/v1/tus/{upload.id}", headers=TUS).status_code == 404
    assert patch(api, f"/v1/tus/{upload.id}", 0, b"x").status_code == 404
