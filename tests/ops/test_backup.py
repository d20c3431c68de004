"""Backups: taken while a studio works, restored elsewhere, and refused where they are not whole."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from app.errors import BadData, Conflict, NotFound, Unavailable
from app.ops import backup
from app.ops.backup import named
from app.ops.backup.store import Store
from app.storage import files
from app.tables import File
from tests.conftest import PROJECT, start_studio, studio_environment
from tests.jobs.test_survival import SAMPLE, Client, adapter, losses


def hold(session: Session, user, *texts: str) -> list[File]:
    made = [files.add_bytes(session, user, text.encode(), f"{n}.txt", "assistants") for n, text in enumerate(texts)]
    session.commit()
    return made


def restore(folder: Path, data_dir: Path, *more: str) -> subprocess.CompletedProcess:
    """In a process of its own and into a database of its own, as a person does it."""
    command = [sys.executable, "-m", "app.cli", "restore", str(folder), "--data-dir", str(data_dir), *more]
    return subprocess.run(command, cwd=PROJECT, env=studio_environment(data_dir), capture_output=True, text=True, timeout=120)


@pytest.fixture
def fresh():
    """A short path, since a database's socket must fit."""
    made = Path(tempfile.mkdtemp(prefix="luthier-fresh-"))
    made.chmod(0o711)
    yield made / "data"
    shutil.rmtree(made, ignore_errors=True)


def test_equal_bytes_are_stored_once_and_a_second_backup_writes_little(session, user, tiny_registered, tmp_path):
    hold(session, user, "spruce" * 50_000, "maple" * 50_000)
    first = backup.take(tmp_path / "kept")
    assert first.bytes > 500_000 and first.written > 500_000 and not first.missing and not first.damaged
    hold(session, user, "ebony" * 1000)
    second = backup.take(tmp_path / "kept")
    assert second.files == first.files + 1 and second.bytes == first.bytes + 5000
    assert second.written < 20_000, "no more than the new file and the tables that changed"
    told = Store(tmp_path / "kept").manifest()
    assert told["tables"]["files"]["rows"] == 3 and told["tables"]["users"]["rows"] == 1
    assert {path.partition("/")[0] for path in told["files"]} == {"blobs", "models"}


def test_only_live_things_are_copied(session, user, data_dir, tmp_path):
    gone, kept = hold(session, user, "gone", "kept")
    files.delete(session, user, gone.id)
    session.commit()
    for name in ("runs/0a/a1/train.log", "cache/kernel", "secrets/postgres", "exports/.token"):
        (data_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (data_dir / name).write_text("not to be kept")
    (data_dir / "secrets" / "session.key").write_bytes(b"k" * 32)
    report = backup.take(tmp_path / "kept")
    assert list(Store(tmp_path / "kept").manifest()["files"]) == [f"blobs/{kept.sha256[:2]}/{kept.sha256}"]
    (secret,) = (tmp_path / "kept" / "secrets").iterdir()
    assert secret.stat().st_mode & 0o777 == 0o600 and json.loads(secret.read_text()) == {"session.key": (b"k" * 32).hex()}
    assert not any(b"k" * 32 in path.read_bytes() for path in (tmp_path / "kept" / "objects").rglob("*") if path.is_file())
    backup.take(tmp_path / "without", secrets=False)
    assert not (tmp_path / "without" / "secrets").exists() and report.files == 1


def test_what_is_removed_while_it_is_copied_leads_to_another_snapshot(session, user, data_dir, tmp_path, monkeypatch):
    gone, kept = hold(session, user, "gone", "kept")
    plain, moments = named.walk, []

    def walk(found, root):
        moments.append(sorted(found.files))
        if len(moments) == 1:  # somebody deletes a file after its row was read
            session.execute(update(File).where(File.id == gone.id).values(deleted_at=func.clock_timestamp()))
            session.commit()
            files.blob_path(gone.sha256).unlink()
        yield from plain(found, root)

    monkeypatch.setattr("app.ops.backup.taking.walk", walk)
    report = backup.take(tmp_path / "kept")
    assert [len(moment) for moment in moments] == [2, 1] and not report.missing
    assert Store(tmp_path / "kept").manifest()["tables"]["files"]["rows"] == 2
    assert list(Store(tmp_path / "kept").manifest()["files"]) == [f"blobs/{kept.sha256[:2]}/{kept.sha256}"]


def test_a_studio_that_never_stops_removing_is_given_up_on(session, user, tmp_path, monkeypatch):
    many = hold(session, user, *(f"file {n}" for n in range(12)))

    def walk(found, root):
        files.blob_path(many.pop().sha256).unlink()
        yield from found.files

    monkeypatch.setattr("app.ops.backup.taking.walk", walk)
    with pytest.raises(Unavailable, match="faster"):
        backup.take(tmp_path / "kept")
    assert Store(tmp_path / "kept").snapshots() == []


def test_lost_and_damaged_files_of_the_studio_are_named(session, user, tmp_path):
    lost, damaged = hold(session, user, "lost", "damaged")
    files.blob_path(lost.sha256).unlink()
    files.blob_path(damaged.sha256).write_text("damage!")
    report = backup.take(tmp_path / "kept")
    assert [path.rpartition("/")[2] for path in report.missing] == [lost.sha256]
    assert [path.rpartition("/")[2] for path in report.damaged] == [damaged.sha256]


def test_older_backups_go_with_what_only_they_needed(session, user, tmp_path):
    (gone,) = hold(session, user, "x" * 100_000)
    backup.take(tmp_path / "kept", keep=2)
    files.delete(session, user, gone.id)
    session.commit()
    store = Store(tmp_path / "kept")
    backup.take(tmp_path / "kept", keep=2)
    assert store.has(gone.sha256, 100_000) and len(store.snapshots()) == 2
    backup.take(tmp_path / "kept", keep=2)
    assert not store.has(gone.sha256, 100_000) and len(store.snapshots()) == 2
    for name in store.snapshots():
        assert all(store.path_of(entry["object"]).exists() for entry in store.manifest(name)["tables"].values())


def test_folders_that_are_not_for_it_are_refused(session, user, tmp_path, data_dir):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(Conflict, match="holds no backup"):
        backup.take(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    with pytest.raises(NotFound, match="holds no backup"):
        backup.restore(tmp_path / "none")
    backup.take(tmp_path / "kept")
    with Store(tmp_path / "kept").lock(), pytest.raises(Conflict, match="Another backup"):
        backup.take(tmp_path / "kept")
    hold(session, user, "here already")
    with pytest.raises(Conflict, match="holds a studio"):
        backup.restore(tmp_path / "kept")


def test_a_newer_or_damaged_manifest_is_refused(session, user, tmp_path, data_dir, monkeypatch):
    backup.take(tmp_path / "kept")
    monkeypatch.setenv("LUTHIER_DATA_DIR", str(tmp_path / "elsewhere"))
    from app.settings import get_settings

    get_settings.cache_clear()
    monkeypatch.setattr("app.migrate.steps", lambda: ["0001"])
    with pytest.raises(Conflict, match="has the schema"):
        backup.restore(tmp_path / "kept")
    (path,) = (tmp_path / "kept" / "snapshots").iterdir()
    path.write_text(path.read_text().replace('"rows": 1,', '"rows": 2,', 1))
    with pytest.raises(BadData, match="is damaged"):
        backup.restore(tmp_path / "kept")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.long
@pytest.mark.studio
def test_a_restored_backup_has_every_row_and_a_damaged_one_leaves_nothing(session, user, tiny_registered, tmp_path, fresh):
    """Also one with rows that hold what a table of text could trip over."""
    (held,) = hold(session, user, "a violin")
    held.filename = "tab\t newline\n backslash\\ \\. “quotes” é"
    session.commit()
    report = backup.take(tmp_path / "kept")
    done = restore(tmp_path / "kept", fresh)
    assert done.returncode == 0, done.stderr
    assert f"{report.rows} rows in {report.tables} tables are restored and equal" in done.stdout
    assert (fresh / files.blob_path(held.sha256).relative_to(files.get_settings().data_dir)).read_text() == "a violin"
    again = restore(tmp_path / "kept", fresh)
    assert again.returncode == 1 and "holds a studio" in again.stderr
    # A blob with one other bit, and then a table with other rows: each is named, and nothing is left.
    store = Store(tmp_path / "kept")
    blob = store.path_of(held.sha256)
    table = store.path_of(store.manifest()["tables"]["files"]["object"])
    for path, data, name in ((blob, b"a violim", held.sha256), (table, gzip.compress(b"1\t2\n"), "files")):
        kept = path.read_bytes()
        path.write_bytes(data)
        refused = restore(tmp_path / "kept", fresh.with_name("other"))
        path.write_bytes(kept)
        assert refused.returncode == 1 and name in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
        left = [found for found in fresh.with_name("other").rglob("*") if found.is_file() and found.name != "studio.lock"]
        assert left == []


@pytest.mark.long
@pytest.mark.studio
@pytest.mark.timeout(900)
def test_a_studio_under_load_goes_on_elsewhere(tiny_model: Path, record_property):
    """One job done, one paused, one running, and uploads that come and go; the restored studio ends both jobs with the weights of the
    first."""
    above = Path(tempfile.mkdtemp(prefix="luthier-backup-"))
    above.chmod(0o711)
    source, target, kept = (above / name for name in ("source", "target", "kept"))
    studio = start_studio(source)
    try:
        added = studio.luthier("models", "add", "tiny", "--path", str(tiny_model))
        assert added.returncode == 0, added.stderr + added.stdout
        client = Client(studio.url, studio.luthier("keys", "create", "backup").stdout.strip())
        with SAMPLE.open("rb") as file:
            uploaded = client.ask("POST", "/files", data={"purpose": "fine-tune"}, files={"file": file})["id"]
        calm = client.follow(client.submit(uploaded, "calm"), lambda told: told["status"] == "succeeded")
        half = calm["measured"]["steps"] // 2

        paused = client.submit(uploaded, "paused")
        client.follow(paused, lambda told: told["status"] == "running" and told["progress"]["step"] >= half)
        client.ask("POST", f"/fine_tuning/jobs/{paused}/pause")
        client.follow(paused, lambda told: told["status"] == "paused")

        running = client.submit(uploaded, "running")
        client.follow(running, lambda told: told["status"] == "running" and told["progress"]["step"] >= 2)
        with coming_and_going(studio.url, client.key) as count:
            began = time.monotonic()
            done = studio.luthier("backup", str(kept))
            assert done.returncode == 0, done.stderr + done.stdout
            assert client.ask("GET", f"/fine_tuning/jobs/{running}")["status"] == "running", "the backup is of a running job"
            assert count() > 3, "there was no load"
            name = Store(kept).snapshots()[-1]
            began = time.monotonic()
            again = studio.luthier("backup", str(kept), "--check")
            checked = time.monotonic() - began
            assert again.returncode == 0, again.stderr + again.stdout
            assert "are restored and equal" in again.stdout
        record_property("main job (backup)", f"{done.stdout}{again.stdout}{checked:.1f} s with its check")
    finally:
        studio.stop()

    done = restore(kept, target, "--snapshot", name)
    assert done.returncode == 0, done.stderr + done.stdout
    shutil.rmtree(source)
    studio = start_studio(target)
    try:
        client = Client(studio.url, client.key)
        assert client.ask("GET", f"/fine_tuning/jobs/{paused}")["status"] == "paused"
        client.ask("POST", f"/fine_tuning/jobs/{paused}/resume")
        for job in (running, paused):
            ended = client.follow(job, lambda told: told["status"] == "succeeded")
            assert ended["progress"]["attempt"] == 2
            assert losses(client, job) == losses(client, calm["id"])
            assert adapter(client, ended) == adapter(client, calm)
    finally:
        studio.stop()
        shutil.rmtree(above, ignore_errors=True)


class coming_and_going:
    """Files that are uploaded and deleted all the time, as long as this is open; yields how many so far."""

    def __init__(self, url: str, key: str) -> None:
        self.client, self.count, self.ended = Client(url, key), 0, threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        before = ""
        while not self.ended.wait(0.05):
            text = f"{self.count} of spruce\n" * 5000
            made = self.client.ask("POST", "/files", data={"purpose": "assistants"}, files={"file": ("load.txt", text)})["id"]
            if before:
                self.client.ask("DELETE", f"/files/{before}")
            before, self.count = made, self.count + 1

    def __enter__(self):
        self.thread.start()
        return lambda: self.count

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join(30)
