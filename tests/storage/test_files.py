"""Blobs: stored once, whole or not at all, and swept when nothing needs them."""

import errno
import hashlib
import os
import time

import anyio
import pytest

from app.errors import BadField, DiskFull, NotFound, TooLarge, Unavailable
from app.storage import atomic, files
from app.tables import User


def left(data_dir):
    return [path for folder in ("tmp", "blobs") for path in (data_dir / folder).rglob("*") if path.is_file()]


async def pieces(*parts):
    for part in parts:
        yield part


def store(*parts, limit=None):
    return anyio.run(lambda: files.store(pieces(*parts), limit))


def test_bytes_are_named_by_their_hash_and_stored_once(data_dir):
    blob = store(b"ab", b"", b"c")
    assert blob == files.store_bytes(b"abc") == (hashlib.sha256(b"abc").hexdigest(), 3)
    assert files.blob_path(blob.sha256).read_bytes() == b"abc"
    assert len(left(data_dir)) == 1


def test_beyond_the_limit_or_on_a_full_disk_nothing_is_left(data_dir, monkeypatch):
    with pytest.raises(TooLarge):
        store(b"x" * 10, b"y" * 10, limit=15)
    assert left(data_dir) == []

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull) as caught:
        store(b"abc")
    assert "Make room" in caught.value.hint
    with pytest.raises(DiskFull):
        atomic.write_atomically(data_dir / "x.json", "{}")
    assert left(data_dir) == [] and not (data_dir / "x.json").exists()


def test_a_sender_that_breaks_off_leaves_nothing(data_dir):
    async def broken():
        yield b"half"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        anyio.run(lambda: files.store(broken()))
    assert left(data_dir) == []


@pytest.mark.parametrize("name", ["../x", "ab/../../x", "A" * 64, "", "g" * 64])
def test_only_a_hash_becomes_a_path(name):
    with pytest.raises(ValueError, match="not a SHA-256"):
        files.blob_path(name)


def test_a_failed_write_keeps_the_old_file(data_dir, monkeypatch):
    path = data_dir / "state.json"
    atomic.write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        atomic.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in data_dir.iterdir()] == ["state.json"]


def test_sweeping_takes_expired_and_unused_blobs_only(session, user, data_dir):
    kept = files.add_bytes(session, user, b"kept", "a", "user_data")
    twin = files.add_bytes(session, user, b"shared", "b", "user_data")
    gone = files.add_bytes(session, user, b"shared", "c", "user_data")
    alone = files.add_bytes(session, user, b"alone", "d", "user_data")
    orphan = files.store_bytes(b"orphan")
    for file in (gone, alone):
        files.delete(session, user, file.id)
    session.commit()
    assert files.sweep(session) == 0  # too young: their rows might be on the way
    assert files.sweep(session, older_than_seconds=-1) == 2
    session.commit()
    assert files.content(session, user, kept.id).read_bytes() == b"kept"
    assert files.content(session, user, twin.id).exists()
    with pytest.raises(Unavailable):
        files.create(session, user, orphan, "late", "user_data")
    with pytest.raises(NotFound):
        files.get(session, user, gone.id)


def test_expiry_hides_a_file_at_once(session, user):
    from datetime import timedelta

    file = files.create(session, user, files.store_bytes(b"x"), "x", "user_data", 3600)
    assert abs((file.expires_at - file.created_at).total_seconds() - 3600) < 5
    file.expires_at -= timedelta(hours=2)
    session.flush()
    with pytest.raises(NotFound):
        files.get(session, user, file.id)
    assert files.list_(session, user) == []
    with pytest.raises(BadField):
        files.create(session, user, files.store_bytes(b"x"), "x", "user_data", 10)


def test_another_persons_file_is_not_found(session, user):
    other = User(name="other")
    session.add(other)
    session.flush()
    file = files.add_bytes(session, other, b"x", "x", "user_data")
    for call in (files.get, files.content, files.delete):
        with pytest.raises(NotFound):
            call(session, user, file.id)


def test_old_leftovers_of_uploads_go(session, data_dir):
    old = data_dir / "tmp" / "upload-old"
    old.parent.mkdir(exist_ok=True)
    old.write_bytes(b"x")
    os.utime(old, (time.time() - 200_000,) * 2)
    files.sweep(session)
    assert not old.exists()


def test_sweeping_takes_what_a_killed_reader_left_a_day_ago(session, user, data_dir):
    import os

    old, new = data_dir / "tmp" / "child-old", data_dir / "tmp" / "bring-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text("{}")
    still = data_dir / "tmp" / "bring-long"
    still.mkdir()
    (still / "part").write_text("{}")
    os.utime(old / "rows.jsonl", (1, 1))
    for folder in (old, still):
        os.utime(folder, (1, 1))
    files.sweep(session)
    assert not old.exists() and new.exists() and still.exists(), "what is still written to is no leftover"
