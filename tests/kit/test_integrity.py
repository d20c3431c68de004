"""Damaged weights: found before anything is made from them, named, and mended by bringing the model in again."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from app.db import transaction
from app.errors import BadData, Conflict
from app.evaluation import service as evaluations
from app.jobs import service as jobs
from app.kit import ids, manifest
from app.models import imports as model_imports
from app.models import integrity, merging
from app.models import service as models
from app.models.integrity import BadModel, Damaged
from app.tables import Model
from tests.factories import make_dataset, make_job
from tests.routes.test_models import tuned  # noqa: F401  a fixture
from tests.warm import warm_attempts  # noqa: F401  # a fixture
from worker.evaluation import attempt as evaluation_attempt
from worker.supervision import job_turn

pytestmark = pytest.mark.usefixtures("warm_attempts")


QUICK = {"max_steps": 2, "samples": 0, "forgetting": False, "evaluations_per_epoch": 0}


def flip(path: Path) -> None:
    """Another byte where the last one was, as a bad disk leaves it."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def now_of(row):
    with transaction() as session:
        return session.get_one(type(row), row.id)


# One folder -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "model" / "weights").write_bytes(b"w" * 1000)
    (tmp_path / "model" / "inner" / "more").write_bytes(b"m")
    manifest.write(tmp_path / "model")
    manifest._seen.clear()
    return tmp_path / "model"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the files that were read in full since the list was last emptied."""
    names, inner = [], manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path, *rest: [inner(path, *rest), names.append(path.name)][0])
    return names


def test_what_was_read_in_full_is_not_read_again_until_it_is_touched(folder, read):
    first = manifest.check(folder)
    assert sorted(read) == ["more", "weights"] and first["revision"] == manifest.revision_of(manifest.files_of(folder))
    read.clear()
    assert manifest.check(folder) == first and not read
    manifest._seen.clear()  # another process knows by the file
    assert manifest.check(folder) == first and not read

    os.utime(folder / "weights")
    assert manifest.check(folder) == first and sorted(read) == ["more", "weights"]
    read.clear()
    assert manifest.check(folder) == first and not read


def test_a_change_is_seen_though_size_and_time_are_as_before(folder):
    manifest.check(folder)
    at = (folder / "weights").stat()
    flip(folder / "weights")
    os.utime(folder / "weights", ns=(at.st_atime_ns, at.st_mtime_ns))
    with pytest.raises(BadData, match="The file weights"):
        manifest.check(folder)
    (folder / "weights").write_bytes(b"w" * 1000)
    manifest.check(folder)
    (folder / "other").write_bytes(b"x" * 1000)
    os.replace(folder / "other", folder / "weights")
    with pytest.raises(BadData, match="The file weights"):
        manifest.check(folder)


def test_a_disk_that_changes_bytes_in_silence_is_found_after_a_day(folder, read, monkeypatch):
    manifest.check(folder)
    read.clear()
    day = time.time() + manifest.READ_AGAIN_SECONDS
    monkeypatch.setattr(manifest.time, "time", lambda: day)
    manifest.check(folder)
    assert "weights" in read


def test_the_record_is_no_part_of_the_model_and_a_torn_one_is_none(folder, read):
    manifest.check(folder)
    assert manifest.SEEN not in manifest.files_of(folder)
    (folder / manifest.SEEN).write_text('{"lies": {')
    manifest._seen.clear()
    read.clear()
    manifest.check(folder)
    assert "weights" in read


def test_where_nothing_can_be_written_the_process_remembers(folder, read):
    (folder / manifest.SEEN).mkdir()  # root could write into a folder that is closed to others
    manifest.check(folder)
    read.clear()
    manifest.check(folder)
    assert not read


def test_a_list_that_was_exchanged_with_the_files_is_another_revision(session, tiny_registered, data_dir):
    place = data_dir / tiny_registered.path
    integrity.check(tiny_registered.path, "tiny", tiny_registered.revision)
    flip(place / "model.safetensors")
    written = manifest.write(place)
    (place / manifest.NAME).write_text((place / manifest.NAME).read_text().replace(written["revision"], tiny_registered.revision))
    with pytest.raises(Damaged, match="not those of revision"):
        integrity.check(tiny_registered.path, "tiny", tiny_registered.revision)
    (place / manifest.NAME).unlink()
    with pytest.raises(Damaged, match="no manifest"):
        integrity.check(tiny_registered.path, "tiny")


# What is made from a model --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_job_on_damaged_weights_ends_in_words_and_goes_on_once_they_are_back(session, user, client, tiny_registered, data_dir):
    job = make_job(session, user, tiny_registered, make_dataset(session, user, data_dir), **QUICK)
    flip(data_dir / tiny_registered.path / "model.safetensors")
    job_turn.work(job.id)
    row = now_of(job)
    assert (row.status, row.error["code"], row.error["param"]) == ("failed", "bad_model", "model")
    assert "model.safetensors" in row.error["message"] and "page Models" in row.error["hint"]
    assert not (data_dir / "runs" / str(job.id)).exists(), "a trainer was started"

    model = now_of(tiny_registered)
    assert (model.status, model.error["code"]) == ("error", "bad_model")
    page = client.get(f"/models/{ids.public(ids.MODEL, model.id)}").text
    assert "model.safetensors is missing or differs" in page and "Try again" in page
    with transaction() as other, pytest.raises(Conflict, match=r"model\.safetensors"):
        models.reference(other, other.get_one(Model, model.id))

    flip(data_dir / tiny_registered.path / "model.safetensors")  # as from a copy
    assert tried_again(model).status == "ready"
    with transaction() as other:
        jobs.resume(other, user, job.id)
    job_turn.work(job.id)
    assert now_of(job).status == "succeeded", now_of(job).error


def tried_again(model: Model) -> Model:
    """As by the button on its page, and the data worker after it."""
    with transaction() as session:
        model_imports.try_again(session, session.get_one(Model, model.id))
    model_imports.fetch(model.id)
    return now_of(model)


@pytest.mark.long
def test_a_damaged_model_is_brought_in_again_from_where_it_came(tiny_registered, data_dir):
    place = data_dir / tiny_registered.path
    flip(place / "model.safetensors")
    with pytest.raises(Damaged) as damaged:
        integrity.check(tiny_registered.path, "tiny")
    integrity.tell(damaged.value)
    model = tried_again(tiny_registered)
    assert (model.status, model.error) == ("ready", None)
    assert manifest.verify(place)["revision"] == model.revision


def test_an_evaluation_of_damaged_weights_ends_in_words(session, user, tiny_registered, data_dir):
    dataset = make_dataset(session, user, data_dir)
    body = {"model": "tiny", "dataset_id": ids.public(ids.DATASET, dataset.id)}
    made = evaluations.create(session, user, evaluations.read_order(body))
    session.commit()
    flip(data_dir / tiny_registered.path / "tokenizer.json")
    evaluation_attempt.work(made.id)
    row = now_of(made)
    assert (row.status, row.error["code"]) == ("failed", "bad_model") and "tokenizer.json" in row.error["message"]
    assert now_of(tiny_registered).status == "error"


def test_a_damaged_adapter_is_not_downloaded_merged_or_tuned_on(session, user, client, tuned, tiny_registered, data_dir):  # noqa: F811
    weights = data_dir / tuned.path / "adapter_model.safetensors"
    address = f"/models/{ids.public(ids.MODEL, tuned.id)}/download"
    assert manifest.SEEN not in client.get(address).text and client.get(address).status_code == 200
    ref = models.reference(session, tuned)
    merged = merging.merge(session, user, tuned)
    session.commit()
    flip(weights)
    with pytest.raises(Damaged, match=r"adapter_model\.safetensors"):
        integrity.check_model(ref)
    answer = client.get(address)
    assert answer.status_code == 400 and "adapter_model.safetensors" in answer.text
    row = now_of(tuned)
    assert row.status == "error" and "Put its folder back" in row.error["hint"]
    assert client.get(address).status_code == 409 and now_of(tiny_registered).status == "ready"
    model_imports.fetch(merged.id)
    row = now_of(merged)
    assert (row.status, row.error["code"]) == ("error", "bad_model") and not (data_dir / "models" / str(merged.id)).exists()

    for whole, status in ((False, "error"), (True, "ready")):
        if whole:
            flip(weights)  # as from a copy
        row = tried_again(tuned)
        assert (row.status, row.path) == (status, tuned.path), row.error
    assert client.get(address).status_code == 200


def test_whatever_loads_a_folder_looks_at_it(session, tiny_registered, data_dir):
    from worker.modeling.loading import load_base, load_tokenizer

    ref = models.reference(session, tiny_registered)
    load_base(ref)
    flip(data_dir / ref.path / "model.safetensors")
    for load in (load_base, load_tokenizer):
        with pytest.raises(BadModel, match=r"model\.safetensors"):
            load(ref)


def test_a_database_that_refuses_the_word_is_no_second_fault(session, tiny_registered, caplog):
    session.execute(text("ALTER TABLE models RENAME TO away"))
    session.commit()
    integrity.tell(Damaged(tiny_registered.path, "It is damaged."))
    assert "could not be recorded" in caplog.text
