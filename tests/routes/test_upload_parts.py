"""Files in parts, sent by the unmodified client."""

from __future__ import annotations

import hashlib
import json

import openai
import pytest
from sqlalchemy import select

from app.datasets import resumable_upload, upload_parts
from app.kit import ids
from app.settings import get_settings
from app.storage import files
from app.tables import Upload

ROWS = "".join(json.dumps({"prompt": f"What is {n} + {n}?", "completion": str(2 * n)}) + "\n" for n in range(300)).encode()


@pytest.fixture
def client(openai_client):
    return openai_client


def begun(client, size=len(ROWS), **more):
    return client.uploads.create(**{"bytes": size, "filename": "sums.jsonl", "purpose": "fine-tune", "mime_type": "text/jsonl"} | more)


def added(client, upload, *parts):
    return [client.uploads.parts.create(upload.id, data=part).id for part in parts]


def left():
    return sorted(path.name for path in (get_settings().data_dir / "tmp").glob("tus-*"))


def test_the_client_sends_a_file_in_chunks(client, tmp_path, session):
    path = tmp_path / "sums.jsonl"
    path.write_bytes(ROWS)
    upload = client.uploads.upload_file_chunked(file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=1000)
    assert upload.status == "completed" and upload.object == "upload" and upload.bytes == len(ROWS)
    assert client.files.content(upload.file.id).read() == ROWS
    assert upload.file.filename == "sums.jsonl" and upload.file.purpose == "fine-tune"
    assert session.scalars(select(Upload)).one().dataset_id is not None, "it is no dataset"
    assert not any("." in name for name in left()), "parts were left behind"


def test_parts_are_joined_in_the_order_that_is_named(client):
    upload = begun(client, purpose="user_data", expires_after={"anchor": "created_at", "seconds": 7200})
    last, first = added(client, upload, ROWS[500:], ROWS[:500])
    whole = {"part_ids": [first, last], "md5": hashlib.md5(ROWS).hexdigest()}
    done = client.uploads.complete(upload.id, **whole)
    assert client.files.content(done.file.id).read() == ROWS
    assert done.file.expires_at - done.file.created_at == 7200
    assert client.uploads.complete(upload.id, **whole).file.id == done.file.id, "asked again, it makes another file"
    with pytest.raises(openai.ConflictError, match="is complete"):
        added(client, upload, b"more")
    with pytest.raises(openai.ConflictError, match="is complete"):
        client.uploads.cancel(upload.id)


def test_two_ends_at_once_make_one_file_and_leave_its_bytes(client, session, user):
    """The second has looked before the first ended, and the parts are still there: the file shares its bytes with the upload."""
    upload = begun(client, purpose="user_data")
    (part,) = added(client, upload, ROWS)
    held = resumable_upload.ticket(session.scalars(select(Upload)).one())
    done = client.uploads.complete(upload.id, part_ids=[part])
    key = ids.parse(ids.PART, part)
    held.path.touch()
    held.path.with_name(f"{held.path.name}.{key.hex}").write_bytes(ROWS[::-1])
    upload_parts.complete(user, held, [key], None)
    assert client.files.content(done.file.id).read() == ROWS and len(client.files.list().data) == 1
    with resumable_upload.locked(held.path), pytest.raises(resumable_upload.Locked):
        upload_parts.complete(user, held, [key], None)


def test_what_does_not_fit_is_refused_and_the_upload_goes_on(client):
    upload = begun(client)
    (first,) = added(client, upload, ROWS[:500])
    with pytest.raises(openai.BadRequestError, match="announced"):
        client.uploads.complete(upload.id, part_ids=[first])
    with pytest.raises(openai.APIStatusError, match="more bytes than") as large:
        added(client, upload, ROWS)
    assert large.value.status_code == 413
    (last,) = added(client, upload, ROWS[500:])
    with pytest.raises(openai.BadRequestError, match="MD5"):
        client.uploads.complete(upload.id, part_ids=[first, last], md5="0" * 32)
    other = begun(client)
    (strange,) = added(client, other, ROWS[500:])
    with pytest.raises(openai.NotFoundError, match="not of this upload"):
        client.uploads.complete(upload.id, part_ids=[first, strange])
    assert client.uploads.complete(upload.id, part_ids=[first, last]).status == "completed"


def test_a_cancelled_upload_leaves_nothing(client, session):
    upload = begun(client)
    added(client, upload, ROWS[:500])
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert left() == [] and session.scalars(select(Upload)).all() == []
    assert list((get_settings().data_dir / "blobs").rglob("*" * 1)) == [] or not any(
        path.is_file() for path in (get_settings().data_dir / "blobs").rglob("*")
    )
    for call in (lambda: client.uploads.cancel(upload.id), lambda: added(client, upload, b"x")):
        with pytest.raises(openai.NotFoundError):
            call()


def test_an_expired_upload_is_swept_with_its_parts(client, session):
    upload = begun(client)
    added(client, upload, ROWS[:500])
    row = session.scalars(select(Upload)).one()
    row.expires_at = row.created_at
    session.commit()
    with pytest.raises(openai.APIStatusError) as gone:
        added(client, upload, b"x")
    assert gone.value.status_code == 410
    assert resumable_upload.sweep(session) == 1
    assert left() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bytes": 0}, "bytes"),
        ({"purpose": "batch_output"}, "purpose"),
        ({"purpose": "x"}, "purpose"),
        ({"filename": "a.exe"}, "exe"),
        ({"size": 10**15}, "larger"),
    ],
)
def test_a_wrong_beginning_is_refused(client, change, words):
    with pytest.raises(openai.APIStatusError, match=words):
        begun(client, **change)


def test_the_parts_of_somebody_else_are_not_found(client, session, data_dir):
    upload = begun(client)
    with pytest.raises(openai.NotFoundError):
        client.uploads.parts.create("upload_" + "0" * 32, data=b"x")
    with pytest.raises(openai.NotFoundError):
        client.uploads.complete(upload.id, part_ids=["part_../../etc/passwd"])


def test_too_many_parts_and_one_that_is_too_large(client, monkeypatch):
    monkeypatch.setattr(upload_parts, "MAX_PARTS", 2)
    monkeypatch.setattr(upload_parts, "MAX_PART_BYTES", 100)
    upload = begun(client)
    added(client, upload, b"a", b"b")
    with pytest.raises(openai.ConflictError, match="2 parts"):
        added(client, upload, b"c")
    with pytest.raises(openai.APIStatusError, match="100 bytes"):
        added(client, upload, b"c" * 101)
    assert files.blob_path(hashlib.sha256(b"a").hexdigest()).exists() is False
