"""What is swept from the object storage, by whom, and what a studio that gets one puts into it."""

import json
import os
import time
import uuid

import pytest
from sqlalchemy import func

from app.datasets import service as datasets
from app.models import service as models
from app.storage import files, objects, places, sweeping
from app.tables import Checkpoint, Evaluation, Export, Job
from tests.conftest import forget_settings
from tests.factories import make_job, upload


@pytest.fixture
def stored(tmp_path, monkeypatch, session, user):
    """A studio with an object storage."""
    monkeypatch.setenv("LUTHIER_STORAGE_URL", f"file://{tmp_path / 'store'}")
    forget_settings()
    return objects.storage()


@pytest.fixture
def sweep(monkeypatch):
    """A round to which everything is so old already."""

    def round_(unowned=-1.0, kept=-1.0):
        with monkeypatch.context() as patched:
            patched.setattr(sweeping, "UNOWNED_SECONDS", unowned)
            patched.setattr(objects, "KEPT_SECONDS", kept)
            return sweeping.sweep()

    return round_


def put(storage, tmp_path, *names):
    for name in names:
        (tmp_path / "bytes").write_text(name)
        storage.put(tmp_path / "bytes", name)


def test_a_place_stays_while_a_row_names_it(stored, sweep, session, user, data_dir, tmp_path, tiny_registered):
    dataset = upload(session, user, [{"prompt": f"{n}?", "completion": "yes"} for n in range(9)])
    twin = datasets.create(session, user, session.get(type(dataset), dataset.id) and files.get(session, user, dataset.file_id))
    assert twin.rows_path == dataset.rows_path, "it has the rows of the other"
    job = make_job(session, user, tiny_registered, dataset)
    session.get_one(Job, job.id).status = "succeeded"
    run = f"runs/{job.id}/a1"
    kept, swept = (
        Checkpoint(id=uuid.uuid4(), job_id=job.id, step=n, path=f"{run}/checkpoint-{n}", manifest_sha256="", bytes=1, metrics={})
        for n in (1, 2)
    )
    swept.deleted_at = func.clock_timestamp()
    about = {"owner_id": user.id, "project_id": user.project_id, "model_id": tiny_registered.id, "status": "succeeded"}
    export = Export(id=uuid.uuid4(), format="gguf", spec={}, files=[], **about)
    prediction = Evaluation(id=uuid.uuid4(), kind="predictions", spec={}, **about)
    session.add_all([kept, swept, export, prediction])
    session.commit()
    theirs = [
        f"exports/{export.id}/m.gguf",
        f"predictions/{prediction.id.hex}.jsonl",
        f"{run}/trainer.log",
        kept.path,
        tiny_registered.path,
    ]
    nobodys = [f"exports/{uuid.uuid4()}/m.gguf", f"predictions/{uuid.uuid4().hex}.jsonl", f"{run}/final", swept.path, "models/nobody",
               f"blobs/00/{'0' * 64}", f"runs/{uuid.uuid4()}/a1/trainer.log", "rows/x/f1.parquet", "exports/not-an-id/x"]  # fmt: skip
    put(stored, tmp_path, *theirs, *nobodys)
    own = {found.name for found in stored.places()} - {*theirs, *nobodys}
    assert len(own) == 3, "the file, its rows, and what was found in them"
    done = sweep()
    assert {found.name for found in stored.places()} == {*theirs, *own} and done.places == len(nobodys) == done.objects
    datasets.delete(session, user, dataset)
    session.commit()
    assert sweep().places == 0, "another dataset has its rows"
    datasets.delete_file(session, user, dataset.file_id)
    session.get_one(Job, job.id).deleted_at = func.clock_timestamp()
    session.commit()
    sweep()
    assert {found.name for found in stored.places()} == {theirs[0], theirs[1], kept.path, tiny_registered.path}
    assert places.path(theirs[1]).read_text() == theirs[1], "what is left is whole"


def test_what_is_young_stays(stored, sweep, session, user, tmp_path):
    put(stored, tmp_path, "models/being-fetched")
    stored.write("objects/ab/of-an-upload", b"x")
    assert sweep(unowned=60.0, kept=60.0) == (0, 0, 0)
    assert sweep(unowned=60.0) == (0, 1, 1)


def test_another_studio_removes_nothing(stored, sweep, session, user, tmp_path, caplog):
    put(stored, tmp_path, "models/nobody")
    stored.write(sweeping.STUDIO, json.dumps({"studio": "of somebody else"}).encode())
    assert sweep() is None and "begun by another studio (of somebody else)" in caplog.text
    assert stored.find("models/nobody") is not None
    stored.remove(sweeping.STUDIO)
    assert sweep().places == 1 and sweep().places == 0


def test_a_studio_that_gets_a_storage_puts_everything_into_it(session, user, data_dir, tmp_path, monkeypatch, tiny_registered):
    dataset = upload(session, user, [{"prompt": f"{n}?", "completion": "yes"} for n in range(9)])
    gone = files.add_bytes(session, user, b"gone", "a.txt", "user_data")
    files.delete(session, user, gone.id)
    job = make_job(session, user, tiny_registered, dataset)
    attempt = data_dir / "runs" / str(job.id) / "a1"
    (attempt / "tmp").mkdir(parents=True)
    (attempt / "trainer.log").write_text("said")
    session.commit()
    monkeypatch.setenv("LUTHIER_STORAGE_URL", f"file://{tmp_path / 'store'}")
    forget_settings()
    assert sweeping.store_what_is_here() == 0, "what is young may still be stored by whoever made it"
    for path in [*data_dir.rglob("*"), data_dir]:
        os.utime(path, (time.time() - 9000,) * 2)
    assert sweeping.store_what_is_here() == 5 and sweeping.store_what_is_here() == 0
    monkeypatch.setenv("LUTHIER_DATA_DIR", str(tmp_path / "another"))
    forget_settings()
    assert places.path(dataset.rows_path).is_file() and files.content(session, user, dataset.file_id).is_file()
    assert models.hashes(tiny_registered) and places.below(f"runs/{job.id}", "a*/trainer.log")
    assert not files.is_kept(gone.sha256)
