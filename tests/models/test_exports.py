"""Exports as queued tasks: what is refused before the start, what the child writes, and what happens when something goes away."""

from __future__ import annotations

import json
import shutil
import threading
import time

import pytest
from sqlalchemy import select, update

from app import leases, queue
from app.db import transaction
from app.errors import BadField, Conflict, DiskFull, NotFound, Unsupported
from app.kit.manifest import sha256_of
from app.models import export_json, exports
from app.models import service as models
from app.ownership import owned
from app.tables import Export, Model, Outbox
from tests.models.test_service import finished, job_on, tune_by_hand  # noqa: F401  (a fixture)


def order(session, user, name: str = "tiny", types: tuple[str, ...] = ("F16",), **more) -> Export:
    made = exports.create(session, user, name, "gguf", list(types), **more)
    session.commit()
    return made


def act(do, user, made: Export) -> None:
    """As a request does it: what waits for the commit is done after it."""
    with transaction() as session:
        do(session, user, made.id)


def test_an_export_is_queued_once_and_its_message_with_it(session, user, tiny_registered) -> None:
    made = order(session, user, types=("Q8_0", "F16", "F16"))
    assert made.status == "queued" and made.spec["types"] == ["Q8_0", "F16"], "each once, in the order of the format"
    assert order(session, user, types=("F16", "Q8_0")).id == made.id, "an equal one that waits is given instead"
    assert order(session, user, types=("F16",)).id != made.id
    assert session.scalars(select(Outbox.task).where(Outbox.key == made.id)).all() == [queue.EXPORT]
    assert export_json.to_json(made)["files"] == [] and export_json.to_json(made)["model"] == "tiny"


def test_what_can_be_known_is_refused_before_the_start(session, user, tiny_registered, monkeypatch) -> None:
    with pytest.raises(BadField, match="is not an export format"):
        exports.create(session, user, "tiny", "exe")
    with pytest.raises(BadField, match="has no type “Q99”"):
        exports.create(session, user, "tiny", "gguf", ["Q99"])
    with pytest.raises(NotFound):
        exports.create(session, user, "nobody", "gguf")
    free = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=2**20))
    with pytest.raises(DiskFull, match=r"takes about 0\.3 GB, and 0\.0 GB of the disk are free"):
        exports.create(session, user, "tiny", "gguf")
    monkeypatch.undo()
    tiny_registered.labels = ["a", "b"]
    with pytest.raises(Unsupported, match="output layer of its own"):
        exports.create(session, user, "tiny", "gguf")
    tiny_registered.labels, tiny_registered.shape = None, tiny_registered.shape | {"model_type": "gpt_neox"}
    with pytest.raises(Unsupported, match="gpt_neox, is not one of those"):
        exports.create(session, user, "tiny", "gguf")
    assert session.scalars(select(Export)).all() == []


def test_a_strategy_that_cannot_be_merged_is_refused(session, user, tiny_registered, job_on, data_dir, tiny_model) -> None:  # noqa: F811
    tuned = models.register_tuned(session, job_on(tiny_registered, status="succeeded"), finished())
    tuned.strategy = "prompt_tuning"
    with pytest.raises(Unsupported, match="Prompt tuning, which cannot be merged"):
        exports.create(session, user, tuned.name, "gguf")


def test_another_persons_export_is_not_there(session, user, tiny_registered) -> None:
    from app.tables import User

    other = User(name="other")
    session.add(other)
    session.flush()
    made = order(session, other)
    with pytest.raises(NotFound):
        owned(session, Export, user, made.id)


# The child ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_tuned_model_is_merged_written_and_compared(session, user, tiny_registered, job_on, tiny_model, data_dir) -> None:  # noqa: F811
    tune_by_hand(data_dir / "runs" / "1" / "final", tiny_model)
    tuned = models.register_tuned(session, job_on(tiny_registered, status="succeeded"), finished("runs/1/final", "cd" * 32))
    made = order(session, user, tuned.name, ("F16", "Q8_0"))
    exports.run(made.id)
    session.refresh(made)
    assert (made.status, made.error, made.progress, made.stage, made.lease_until) == ("succeeded", None, 1.0, None, None)
    folder = exports.folder_of(made.id)
    assert sorted(p.name for p in folder.iterdir()) == sorted(f["name"] for f in made.files) and len(made.files) == 3
    for file in made.files:
        assert file["sha256"] == sha256_of(folder / file["name"]) and file["bytes"] == (folder / file["name"]).stat().st_size
    lines = {line["type"]: line for line in made.parity["lines"]}
    assert lines["F16"]["kl"] < 1e-4 and lines["Q8_0"]["kl"] < 0.01 and lines["F16"]["identical"] == lines["F16"]["prompts"] > 0
    assert made.parity["skipped"] is None and made.parity["rows"]
    assert list((data_dir / "tmp").iterdir()) == [], "nothing is left of the work"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "license: apache-2.0" in card and "Settings: `lora`" in card
    assert f"| Q8_0 | {lines['Q8_0']['identical']} of " in card and all(f["sha256"] in card for f in made.files if f["type"])
    assert [word for word in ("llama.cpp", "Ollama", "LM Studio", "KoboldCpp", "Jan", "Python") if f"### {word}" not in card] == []
    act(exports.delete, user, made)
    assert not folder.exists()


@pytest.mark.long
def test_what_the_exporter_refuses_fails_with_its_reason_and_leaves_nothing(session, user, tiny_registered, data_dir, tiny_model) -> None:
    folder = data_dir / tiny_registered.path
    told = json.loads((folder / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, told["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    from app.kit import manifest

    tiny_registered.revision = manifest.write(folder)["revision"]
    made = order(session, user)
    exports.run(made.id)
    session.refresh(made)
    assert made.status == "failed" and "splits a text by Punctuation and ByteLevel" in made.error["message"], made.error
    assert made.files == [] and not exports.folder_of(made.id).exists() and list((data_dir / "tmp").iterdir()) == []
    with pytest.raises(Conflict, match="The export is failed"):
        exports.file_path(made, "a.gguf")


def test_an_export_that_is_cancelled_while_it_runs_leaves_nothing(session, user, tiny_registered, data_dir) -> None:
    made = order(session, user, types=("F32", "F16", "Q8_0"))
    running = threading.Thread(target=exports.run, args=[made.id])
    running.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        session.refresh(made)
        if made.status == "running":
            break
        session.commit()
        time.sleep(0.05)
    assert made.status == "running"
    act(exports.cancel, user, made)
    running.join(60)
    session.refresh(made)
    assert made.status == "cancelled" and not exports.folder_of(made.id).exists() and list((data_dir / "tmp").iterdir()) == []
    assert exports.cancel(session, user, made.id).status == "cancelled", "one that has ended stays"


def test_a_model_that_is_exported_cannot_be_deleted_and_a_deleted_one_is_not_exported(session, user, tiny_registered, data_dir) -> None:
    made = order(session, user)
    with pytest.raises(Conflict, match="An export of it has not ended"):
        models.delete(session, user, tiny_registered)
    session.rollback()
    session.execute(update(Model).where(Model.id == tiny_registered.id).values(deleted_at=leases.now()))  # by a hand that asks nobody
    session.commit()
    exports.run(made.id)
    session.refresh(made)
    assert made.status == "failed" and made.error["message"] == "tiny was deleted."


def test_a_damaged_model_is_not_exported(session, user, tiny_registered, data_dir) -> None:
    made = order(session, user)
    weights = data_dir / tiny_registered.path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    exports.run(made.id)
    session.refresh(made)
    assert made.status == "failed" and "model.safetensors" in made.error["message"]


def test_a_worker_that_dies_is_followed_by_another_and_three_are_enough(session, user, tiny_registered) -> None:
    made = order(session, user)
    for death in (1, 2, 3):
        assert leases.claim(session, exports.WORK, made.id).fence == death
        session.execute(update(Export).where(Export.id == made.id).values(lease_until=leases.OVER))
        leases.expire(session, exports.WORK)
        session.commit()
        session.refresh(made)
        assert made.status == ("queued" if death < 3 else "failed")
    assert made.error["code"] == "worker_lost" and "death 3" in made.error["message"]
    exports.run(made.id)
    session.refresh(made)
    assert made.status == "failed", "one that has ended is not run again"


def test_a_worker_that_leaves_gives_it_back(session, user, tiny_registered, data_dir) -> None:
    made, asked = order(session, user), iter([False, True])
    exports.run(made.id, lambda: next(asked, True))
    session.refresh(made)
    assert (made.status, made.deaths, made.lease_until) == ("queued", 0, None)
    act(exports.cancel, user, made)
    assert list((data_dir / "tmp").iterdir()) == [], "what it left for another worker goes with the export"


@pytest.mark.long
def test_an_interrupted_export_continues_with_the_files_that_were_completed(session, user, tiny_registered, data_dir) -> None:
    made = order(session, user, types=("Q8_0", "F16", "F32"))
    first = lambda: list((data_dir / "tmp").glob("export-*/out/*-Q8_0.gguf"))  # noqa: E731
    exports.run(made.id, lambda: bool(first()))
    session.refresh(made)
    assert made.status == "queued" and len(first()) == 1
    written = (first()[0].stat().st_ino, first()[0].stat().st_mtime_ns)
    (first()[0].parent / "tiny-F16.gguf.part").write_bytes(b"GGUF")
    exports.run(made.id)
    session.refresh(made)
    assert made.status == "succeeded" and made.fence == 2, made.error
    path = exports.file_path(made, "tiny-Q8_0.gguf")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == written, "it was not written again"
    assert [line["type"] for line in made.parity["lines"]] == ["Q8_0", "F16", "F32"] and list((data_dir / "tmp").iterdir()) == []
    assert not any(file["name"].endswith(".part") for file in made.files)


def test_files_that_were_moved_and_never_recorded_go_with_a_cancelled_export(session, user, tiny_registered, data_dir) -> None:
    made = order(session, user)
    folder = exports.folder_of(made.id)
    folder.mkdir(parents=True)
    act(exports.cancel, user, made)
    session.refresh(made)
    assert not folder.exists() and made.files == []


@pytest.mark.long
def test_a_folder_that_an_attempt_left_is_replaced_and_not_mixed(session, user, tiny_registered, data_dir) -> None:
    """A worker can die between moving its files and recording them."""
    made = order(session, user)
    folder = exports.folder_of(made.id)
    folder.mkdir(parents=True)
    (folder / "old.gguf").write_bytes(b"GGUF")
    exports.run(made.id)
    session.refresh(made)
    assert made.status == "succeeded" and sorted(p.name for p in folder.iterdir()) == ["README.md", "tiny-F16.gguf"]


def test_a_worker_that_was_taken_for_dead_replaces_no_files(session, user, tiny_registered, data_dir) -> None:
    made = order(session, user)
    first = leases.claim(session, exports.WORK, made.id).fence
    session.execute(update(Export).where(Export.id == made.id).values(lease_until=leases.OVER))
    second = leases.claim(session, exports.WORK, made.id).fence
    session.commit()
    spec = exports.ExportSpec.model_validate(made.spec)
    for fence, text in ((second, "second"), (first, "first")):
        work = data_dir / "tmp" / text
        (work / "out").mkdir(parents=True)
        (work / "out" / "a.gguf").write_text(text)
        held = exports.Held(made.id, fence, spec, made.model_id, [], None)
        exports._finish(held, work, status="succeeded", files=[{"name": "a.gguf"}], progress=1.0, parity=None)
    session.refresh(made)
    assert made.status == "succeeded" and exports.file_path(made, "a.gguf").read_text() == "second"
