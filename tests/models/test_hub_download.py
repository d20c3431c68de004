"""Models from a stand-in of the hub: a download that breaks off continues, in the same attempt and in the next."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest

from app import db
from app.errors import NotFound, Unavailable
from app.models import hub, hub_files, imports
from app.models import service as models
from app.settings import get_settings
from app.storage import files as storage
from app.tables import Model
from tests.hub_stand_in import Hub

REPO = "lab/tiny"


@pytest.fixture
def stand_in(tiny_model: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch):
    server = Hub()
    server.files[REPO] = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    monkeypatch.setattr(get_settings(), "offline", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_files, "MAX_WAIT_SECONDS", 0.01)
    yield server
    server.close()


def weights(stand_in: Hub) -> list[tuple[int, int]]:
    """(first byte, bytes) of each download of the weights."""
    return [(start, size) for name, start, size in stand_in.downloads if name == "model.safetensors"]


def test_a_break_continues_where_it_was(stand_in: Hub, data_dir: Path) -> None:
    whole = stand_in.files[REPO]["model.safetensors"]
    stand_in.cuts = [50_000, 0, 20_000]
    told: list[float] = []
    into = hub.downloads(uuid.uuid4())
    assert hub.download(REPO, None, into, told.append) == {"revision": stand_in.sha, "license": "apache-2.0"}
    assert (into / "model.safetensors").read_bytes() == whole and not list(into.glob("*.part"))
    assert weights(stand_in) == [(0, 50_000), (50_000, 0), (50_000, 20_000), (70_000, len(whole) - 70_000)]
    assert told == sorted(told) and told[-1] <= 0.85
    stand_in.downloads.clear()
    hub.download(REPO, None, into, told.append)
    assert stand_in.downloads == [], "what is whole is not asked for again"


def test_a_hub_that_ignores_ranges_begins_again(stand_in: Hub, data_dir: Path) -> None:
    stand_in.cuts, stand_in.deaf = [50_000], True
    into = hub.downloads(uuid.uuid4())
    hub.download(REPO, None, into, lambda share: None)
    assert (into / "model.safetensors").read_bytes() == stand_in.files[REPO]["model.safetensors"]


@pytest.mark.long
def test_a_download_is_given_up_and_tried_again_from_where_it_was(session, user, stand_in: Hub) -> None:
    stand_in.cuts = [60_000] + [0] * hub_files.TRIES
    model = imports.add_hub(session, user, REPO)
    session.commit()
    imports.fetch(model.id)
    session.refresh(model)
    assert model.status == "error" and "broke off 6 times at 60,000 of" in model.error["message"] and "is kept" in model.error["hint"]
    imports.try_again(session, model)
    session.commit()
    stand_in.downloads.clear()
    imports.fetch(model.id)
    session.refresh(model)
    assert model.status == "ready", model.error
    whole = len(stand_in.files[REPO]["model.safetensors"])
    assert weights(stand_in) == [(60_000, whole - 60_000)]
    assert not hub.downloads(model.id).exists() and model.source["revision"] == stand_in.sha


def test_a_newer_commit_begins_again_and_wrong_bytes_are_refused(stand_in: Hub, data_dir: Path) -> None:
    stand_in.cuts = [60_000] + [0] * hub_files.TRIES
    into = hub.downloads(uuid.uuid4())
    with pytest.raises(Unavailable, match="broke off"):
        hub.download(REPO, None, into, lambda share: None)
    stand_in.sha = "d" * 40
    stand_in.downloads.clear()
    hub.download(REPO, None, into, lambda share: None)
    sizes = {name: len(data) for name, data in stand_in.files[REPO].items()}
    assert weights(stand_in)[0][0] == 0 and {name for name, *_ in stand_in.downloads} == set(hub.choose(sizes, REPO))

    other = hub.downloads(uuid.uuid4())
    stand_in.cuts = [60_000] + [0] * hub_files.TRIES
    with pytest.raises(Unavailable, match="broke off"):
        hub.download(REPO, None, other, lambda share: None)
    part = other / "model.safetensors.part"
    part.write_bytes(b"x" * part.stat().st_size)
    with pytest.raises(Unavailable, match="other bytes") as caught:
        hub.download(REPO, None, other, lambda share: None)
    assert caught.value.code == "wrong_hash" and not part.exists()
    hub.download(REPO, None, other, lambda share: None)
    assert (other / "model.safetensors").read_bytes() == stand_in.files[REPO]["model.safetensors"]


def test_the_lease_is_renewed_while_one_file_comes_and_between_its_breaks(stand_in: Hub, data_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub, "BEAT_SECONDS", 0.0)
    stand_in.files[REPO] = {"model.safetensors": bytes(2_000_000), "config.json": b"{}"}
    stand_in.cuts = [1_000_000, 0]
    told: list[float] = []
    hub.download(REPO, None, hub.downloads(uuid.uuid4()), told.append)
    within = [share for share in told if 0.05 < share < 0.8]
    assert len(set(within)) > 2 and within.count(max(share for share in within if share <= 0.43)) > 1


def test_whoever_lost_the_lease_stops_and_leaves_what_has_come(stand_in: Hub, data_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub, "BEAT_SECONDS", 0.0)
    into = hub.downloads(uuid.uuid4())

    def lost(share: float) -> None:
        if share > 0.2:
            raise imports.FetchLost

    with pytest.raises(imports.FetchLost):
        hub.download(REPO, None, into, lost)
    come = sum(path.stat().st_size for path in into.glob("*.part")) + sum(path.stat().st_size for path in into.glob("*.safetensors"))
    assert come > 0
    hub.download(REPO, None, into, lambda share: None)
    assert (into / "model.safetensors").read_bytes() == stand_in.files[REPO]["model.safetensors"]


def test_what_the_hub_refuses_is_not_asked_again(stand_in: Hub, data_dir: Path) -> None:
    stand_in.refuse = {"/api/models/lab/none": 404}
    with pytest.raises((NotFound, Unavailable)):
        hub.download("lab/none", None, hub.downloads(uuid.uuid4()), lambda share: None)


def test_a_deleted_model_and_old_downloads_leave_nothing(session, user, stand_in: Hub) -> None:
    stand_in.cuts = [60_000] + [0] * hub_files.TRIES
    model = imports.add_hub(session, user, REPO)
    session.commit()
    imports.fetch(model.id)
    session.refresh(model)
    kept = hub.downloads(model.id)
    assert kept.exists()
    storage.sweep(session)
    assert kept.exists()
    with db.transaction() as own:
        models.delete(own, user, own.get_one(Model, model.id))
    assert not kept.exists()
    (kept / "lab").mkdir(parents=True)
    for path in (kept / "lab", kept):
        os.utime(path, (time.time() - 8 * 86_400,) * 2)
    storage.sweep(session)
    assert not kept.exists()
