"""Places: what tables name, wherever it lies. Each "machine" is a data folder of its own beside one storage."""

import json
import os
import time

import pytest

from app.errors import BadData
from app.kit import manifest
from app.models import integrity
from app.settings import get_settings
from app.storage import objects, places
from tests.conftest import forget_settings

MODEL = "models/8d0b"


@pytest.fixture
def machine(tmp_path, monkeypatch, data_dir):
    """Become the machine of this name; gives its data folder."""
    monkeypatch.setenv("LUTHIER_STORAGE_URL", f"file://{tmp_path / 'store'}")

    def become(name, **settings):
        monkeypatch.setenv("LUTHIER_DATA_DIR", str(tmp_path / name))
        for key, value in settings.items():
            monkeypatch.setenv(f"LUTHIER_{key.upper()}", str(value))
        forget_settings()
        return tmp_path / name

    return become


def make_model(root, path=MODEL, weights=b"w" * 1000):
    folder = root / path
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    return manifest.write(folder)


def age(place, seconds):
    note = get_settings().data_dir.joinpath(*places.NOTES, f"{place}.json")
    os.utime(note, (time.time() - seconds,) * 2)


def test_a_path_is_in_the_place_that_its_first_folder_says():
    assert places.place_of("models/1/config.json") == "models/1" and places.place_of("models/1") == "models/1"
    assert places.place_of("runs/j/a1/checkpoint-5/weights") == "runs/j/a1/checkpoint-5"
    assert places.place_of("exports/e/sub/model.gguf") == "exports/e/sub"
    assert [places.place_of(path) for path in ("models", "runs/j/a1", "cache/x/y/z", "/models/1/2/3", "")] == [None] * 5


def test_without_a_storage_the_data_folder_is_all_there_is(data_dir, monkeypatch):
    monkeypatch.setattr(objects, "ObjectStorage", None)  # it is never made
    make_model(data_dir)
    places.push(MODEL)
    with places.held([MODEL, None]):
        assert places.path(f"{MODEL}/config.json") == data_dir / MODEL / "config.json"
    assert places.exists(MODEL) and not places.exists("models/2") and not places.bring_again(MODEL)
    assert places.verified(MODEL) == data_dir / MODEL
    assert [path.name for path in places.below("models", "*")] == ["8d0b"]
    places.forget(MODEL)
    places.make_room(10**15)
    assert (data_dir / MODEL).is_dir() and not (data_dir / "cache").exists()


def test_what_one_machine_stored_another_brings(machine):
    one = machine("one")
    make_model(one)
    places.push(MODEL)
    two = machine("two")
    assert places.exists(MODEL) and not (two / MODEL).exists(), "asked for, and not brought"
    assert not places.exists(f"{MODEL}/none.json") and places.exists(f"{MODEL}/model.safetensors")
    light = places.path(MODEL, weights=False)
    assert sorted(path.name for path in light.iterdir()) == ["config.json", "manifest.json"]
    assert places.verified(MODEL) == light, "its weights are in the storage as its manifest says"
    manifest.verify(places.path(f"{MODEL}/config.json").parent)
    assert integrity.check(MODEL, "it") is None
    assert places.path("models/2") == two / "models/2" and not (two / "models/2").exists()
    assert not [path for path in two.rglob("*.partial")]


def test_what_is_damaged_here_is_brought_again(machine):
    one = machine("one")
    make_model(one)
    places.push(MODEL)
    (one / MODEL / "model.safetensors").write_bytes(b"x" * 1000)
    integrity.check(MODEL, "it")
    assert (one / MODEL / "model.safetensors").read_bytes() == b"w" * 1000
    told = json.loads((one / MODEL / manifest.NAME).read_text())
    told["files"]["model.safetensors"]["sha256"] = "0" * 64
    (one / MODEL / manifest.NAME).write_text(json.dumps(told))
    places.push(MODEL)
    machine("two")
    with pytest.raises(BadData, match=r"model\.safetensors is missing in the object storage, or differs"):
        places.verified(MODEL)
    with pytest.raises(integrity.Damaged):
        integrity.check(MODEL, "it")


def test_the_cache_keeps_to_its_size_and_what_is_held(machine):
    one = machine("one", storage_cache_bytes=4000)
    names = [f"models/{number}" for number in range(3)]
    for name in names:
        make_model(one, name)
        places.push(name)
        age(name, 7200 + int(name[-1]))
    with places.held([names[2]]):
        age(names[2], 9000)
        make_model(one, "models/3", b"y" * 2500)
        places.push("models/3")  # what was used longest ago is held, so the next goes
        there = {note.place for note in places.notes()}
        assert names[2] in there and "models/3" in there and len(there) < 4
        assert names[1] not in there and not (one / names[1]).exists()
    age("models/3", 10)
    assert places.make_room(10**9) == len(there) - 1, "all but what was used lately"
    assert (one / "models/3").exists()
    assert places.path(names[1]).is_dir(), "it is brought again"


def test_what_was_deleted_elsewhere_leaves_every_machine(machine):
    one = machine("one")
    make_model(one)
    places.push(MODEL)
    two = machine("two")
    places.path(MODEL)
    machine("one")
    places.forget(MODEL)
    assert not (one / MODEL).exists()
    machine("two")
    assert places.drop_deleted() == 0, "it was used a moment ago"
    age(MODEL, 7200)
    assert places.drop_deleted() == 1 and not (two / MODEL).exists()


def test_only_what_belongs_to_an_attempt_is_stored_with_it(machine, tmp_path):
    one = machine("one")
    folder = one / "runs" / "j" / "a1"
    for name in ("checkpoint-5", "tensorboard", "tmp", ".final.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)
    (folder / "trainer.log").write_text("said")
    (folder / "secret").symlink_to("/etc/passwd")
    places.push_inside("runs/j/a1", leave_out=("checkpoint-", "tmp"))
    assert sorted(places.stored("runs/j", "a*/*")) == ["runs/j/a1/tensorboard", "runs/j/a1/trainer.log"]
    machine("two")
    assert [path.read_text() for path in places.below("runs/j", "a*/trainer.log")] == ["said"]
