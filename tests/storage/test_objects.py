"""The object storage against a real S3 server, and a plain folder: whole or not at all, sent once, and never believed unseen."""

import hashlib
import os
import random
import shutil
import threading
import time

import pytest

from app.storage import objects
from app.storage.objects import ObjectDamaged, ObjectStorage, StorageAway, StorageRefuses
from tests.s3 import own_storage, running_server  # noqa: F401  # fixtures

PART = 64 * 1024


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(objects, "PART_BYTES", PART)


@pytest.fixture(params=["s3", "file"])
def url(request, tmp_path):
    return request.getfixturevalue("s3")[1] if request.param == "s3" else f"file://{tmp_path / 'store'}"


def model(folder, megabytes=1):
    """A folder as a model's: weights of several parts, a small file in a folder, an empty one."""
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(random.randbytes(megabytes * 2**20 + 17))
    (folder / "sub" / "config.json").write_text("{}")
    (folder / "manifest.json").write_text('{"files": {}}')
    (folder / "empty").touch()
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def writes(storage, monkeypatch):
    """The names that are written from now on."""
    written, write = [], storage.write
    monkeypatch.setattr(storage, "write", lambda name, data: (written.append(name), write(name, data)))
    return written


def test_a_folder_and_a_file_come_back_as_they_were(url, tmp_path, monkeypatch):
    storage, source = ObjectStorage(url), model(tmp_path / "here")
    (source / "link").symlink_to("/etc/passwd")
    assert storage.find("models/1") is None
    stored = storage.put(source, "models/1")
    (source / "link").unlink()
    assert storage.find("models/1") == stored and stored.bytes == sum(map(len, contents(source).values()))
    assert stored.files["model.safetensors"].sha256 == hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert len(stored.files["model.safetensors"].parts) == 17 and "link" not in stored.files
    storage.get(stored, tmp_path / "there")
    assert contents(tmp_path / "there") == contents(source)
    written = writes(storage, monkeypatch)
    storage.put(source / "sub" / "config.json", "rows/2/f1.json")
    assert written == ["manifests/rows/2/f1.json.json"], "its bytes are there already"
    storage.get(storage.find("rows/2/f1.json"), tmp_path / "one.json")
    assert (tmp_path / "one.json").read_text() == "{}"
    assert {found.name for found in storage.places()} == {"models/1", "rows/2/f1.json"}
    assert [found.name for found in storage.places("rows/2")] == ["rows/2/f1.json"]
    assert {found.name for found in storage.objects()} == stored.parts and all(found.age_seconds < 60 for found in storage.objects())
    storage.forget("models/1")
    storage.forget("models/1")
    assert storage.find("models/1") is None


def test_what_is_old_is_written_again_under_a_name_of_its_own(url, tmp_path, monkeypatch):
    """Since a sweep may be about to remove it."""
    storage, source = ObjectStorage(url), tmp_path / "a"
    source.write_bytes(b"spruce")
    (first,) = storage.put(source, "blobs/1").parts
    monkeypatch.setattr(objects, "TRUSTED_SECONDS", -1.0)
    (second,) = storage.put(source, "blobs/2").parts
    assert second.startswith(f"{first}-")
    storage.remove(f"objects/{first}")
    storage.get(storage.find("blobs/2"), tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"spruce"


def test_a_download_that_broke_off_goes_on(url, tmp_path, monkeypatch):
    storage, source = ObjectStorage(url), model(tmp_path / "here")
    stored, there = storage.put(source, "models/1"), tmp_path / "there"
    storage.get(stored, there, wanted=lambda name: name != "model.safetensors")
    assert not (there / "model.safetensors").exists()
    data = bytearray((source / "model.safetensors").read_bytes())
    data[3 * PART : 5 * PART] = bytes(2 * PART)  # two parts are missing, and one is damaged
    data[9 * PART] ^= 1
    (there / ".model.safetensors.partial").write_bytes(data)
    read, cat = [], storage.read
    monkeypatch.setattr(storage, "read", lambda name: (read.append(name), cat(name))[1])
    storage.get(stored, there)
    parts = stored.files["model.safetensors"].parts
    assert sorted(read) == sorted(f"objects/{parts[at]}" for at in (3, 4, 9))
    assert contents(there) == contents(source)


def test_a_damaged_or_missing_object_is_never_handed_on(s3, tmp_path):
    storage, source = ObjectStorage(s3[1]), tmp_path / "a"
    source.write_bytes(b"spruce")
    stored = storage.put(source, "blobs/1")
    (part,) = stored.parts
    storage.write(f"objects/{part}", b"spruc3")
    with pytest.raises(ObjectDamaged, match="holds other bytes than were stored") as damaged:
        storage.get(stored, tmp_path / "b")
    assert "Restore it" in damaged.value.hint and not (tmp_path / "b").exists()
    storage.remove(f"objects/{part}")
    with pytest.raises(ObjectDamaged, match="is missing"):
        storage.get(stored, tmp_path / "b")
    storage.write(f"objects/{part}", b"spr")  # of an upload that the server did not finish
    storage.get(storage.put(source, "blobs/1"), tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"spruce"


@pytest.mark.long
def test_what_is_wrong_is_said_at_once_and_what_passes_is_waited_for(s3, tmp_path, monkeypatch):
    server, url = s3
    (tmp_path / "a").write_bytes(b"spruce")
    with pytest.raises(StorageRefuses, match="no known scheme"):
        ObjectStorage("ftp://x/y")
    with pytest.raises(StorageRefuses, match="needs a package") as missing:
        ObjectStorage("gs://bucket/x")
    assert 'pip install "luthier[gcs]"' in missing.value.hint
    with pytest.raises(StorageRefuses) as absent:
        ObjectStorage("s3://no-such-bucket").put(tmp_path / "a", "blobs/1")
    assert "Make the bucket first" in absent.value.hint
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    began = time.monotonic()
    with pytest.raises(StorageRefuses, match="cannot be used"):
        ObjectStorage(url).check()
    assert time.monotonic() - began < 5
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.environment["AWS_SECRET_ACCESS_KEY"])
    ObjectStorage(url).check()
    server.kill()
    with pytest.raises(StorageAway, match="cannot be used") as away:
        ObjectStorage(url, retry_seconds=0.3).find("blobs/1")
    assert "Is it running" in away.value.hint
    beats = []
    threading.Timer(1.5, server.start).start()
    ObjectStorage(url).put(tmp_path / "a", "blobs/1", beat=lambda: beats.append(time.monotonic()))
    assert len(beats) >= 2, "whoever waits for the storage keeps its lease"


def survive(server, url, tmp_path, kills):
    """Upload and download while the server is killed again and again; every place that was said to be stored comes back."""
    storage, source, stored = ObjectStorage(url), tmp_path / "here", []
    random.seed(kills)
    over = threading.Event()

    def killer() -> None:
        for _ in range(kills):
            time.sleep(random.uniform(0.1, 1.0))
            server.kill()
            time.sleep(random.uniform(0.0, 0.3))
            server.start()
        over.set()

    thread = threading.Thread(target=killer)
    thread.start()
    while not over.is_set() or len(stored) < 2:
        number = len(stored)
        storage.put(model(source / str(number)), f"models/{number}")
        stored.append(number)
        back = tmp_path / f"back-{number}"
        storage.get(storage.find(f"models/{random.choice(stored)}"), back)
        shutil.rmtree(back)
    thread.join()
    for number in stored:
        storage.get(storage.find(f"models/{number}"), tmp_path / "there" / str(number))
    assert contents(tmp_path / "there") == contents(source)
    return len(stored)


@pytest.mark.long
def test_a_server_that_is_killed_loses_and_damages_nothing(s3, tmp_path):
    survive(*s3, tmp_path, kills=3)


@pytest.mark.fault
def test_a_server_that_is_killed_25_times_loses_and_damages_nothing(s3, tmp_path, capsys):
    places = survive(*s3, tmp_path, kills=25)
    with capsys.disabled():
        print(f"\n25 kills of the S3 server in {places} uploads and as many downloads: nothing lost, nothing damaged")


def test_a_fork_opens_a_connection_of_its_own(s3, tmp_path, monkeypatch, data_dir):
    """Celery's workers are forked from a process that has tried the storage."""
    from app.settings import get_settings

    monkeypatch.setenv("LUTHIER_STORAGE_URL", s3[1])
    get_settings.cache_clear()
    objects.check()
    (tmp_path / "a").write_bytes(b"spruce")
    child = os.fork()
    if child == 0:
        try:
            objects.storage().put(tmp_path / "a", "blobs/1")
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0 and objects.storage().find("blobs/1") is not None
