"""Exports are pushed to a stand-in of the hub by the hub's own client: private, resumable, and with words for what it refuses."""

from __future__ import annotations

import stat

import pytest
from sqlalchemy import update

from app import leases
from app.db import transaction
from app.errors import BadField, Conflict, Unavailable
from app.kit import ids
from app.models import export_json, exports, hub_upload
from app.settings import get_settings
from app.tables import Export, User
from tests.hub_stand_in import Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(get_settings(), "offline", False)
    yield server
    server.close()


@pytest.fixture
def made(session, user, tiny_registered, data_dir) -> Export:
    """An export with two large files and a small one, as a worker leaves it."""
    found = exports.create(session, user, "tiny", "gguf", ["F16", "Q8_0"])
    folder = exports.folder_of(found.id)
    folder.mkdir(parents=True)
    for name in ("README.md", "a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"# Tiny\n" if name == "README.md" else name.encode() * 50_000)
    files = [{"name": p.name, "type": "", "bytes": p.stat().st_size, "sha256": "0" * 64, "notes": []} for p in sorted(folder.iterdir())]
    session.execute(update(Export).where(Export.id == found.id).values(status="succeeded", files=files, progress=1.0))
    session.commit()
    return found


def push(session, user, made: Export, repo: str = "lab/tiny", private: bool = True, token: str | None = "hf_right") -> Export:
    exports.push(session, user, made.id, repo, private, token)
    session.commit()
    return made


def test_a_push_creates_a_private_repository_with_every_file(session, user, made, hub, data_dir) -> None:
    push(session, user, made)
    token = hub_upload.token_file(made.id)
    assert token.read_text() == "hf_right" and stat.S_IMODE(token.stat().st_mode) == 0o600
    said = export_json.to_json(made)
    assert said["status"] == "succeeded" and said["hub"]["status"] == "queued" and len(said["files"]) == 3, "its files stay"
    assert "hf_right" not in str(made.hub) + str(made.spec)
    exports.run(made.id)
    session.refresh(made)
    found = export_json.to_json(made)["hub"]
    assert found["status"] == "succeeded" and found["url"] == f"{hub.url}/lab/tiny" and found["commit"] == "a" * 40, found
    assert hub.repos == {"lab/tiny": {"private": True}}
    assert hub.commits == [{p.name: p.read_bytes() for p in exports.folder_of(made.id).iterdir()}]
    assert not token.exists() and list((data_dir / "tmp").iterdir()) == [] and made.status == "succeeded" and made.lease_until is None


@pytest.mark.long
def test_a_push_that_was_interrupted_continues(session, user, made, hub) -> None:
    push(session, user, made)
    hub.hold_after = 1
    exports.run(made.id, hub.held.is_set)  # the worker is asked to leave while the second file is on its way
    session.refresh(made)
    assert (made.status, made.lease_until) == ("queued", None) and hub.commits == [] and len(hub.objects) == 1
    hub.hold_after = None
    exports.run(made.id)
    session.refresh(made)
    assert made.hub["status"] == "succeeded" and len(hub.commits) == 1
    assert sorted(hub.puts.values()) == [1, 1], "what had been uploaded was not sent again"


@pytest.mark.long
@pytest.mark.parametrize(
    "where, status, code, words",
    [
        ("/api/repos/create", 401, "hub_unauthorized", "does not accept the token"),
        ("/api/repos/create", 403, "hub_forbidden", "may not write to lab/tiny"),
        ("/lfs/", 413, "hub_too_large", "larger than the hub takes"),
        ("/commit/", 409, "hub_refused", "status 409"),
    ],
)
def test_what_the_hub_refuses_is_said(session, user, made, hub, where: str, status: int, code: str, words: str) -> None:
    push(session, user, made)
    hub.refuse = {where: status}
    exports.run(made.id)
    session.refresh(made)
    error = export_json.to_json(made)["hub"]["error"]
    assert error["code"] == code and words in error["message"] and error["hint"] == error["way_out"], error
    assert made.status == "succeeded" and made.error is None and not hub_upload.token_file(made.id).exists()
    hub.refuse = {}
    push(session, user, made)
    exports.run(made.id)
    session.refresh(made)
    assert made.hub["status"] == "succeeded" and made.hub["error"] is None


@pytest.mark.long
def test_a_wrong_token_is_refused_by_the_hub_and_a_public_repository_by_us(session, user, made, hub) -> None:
    push(session, user, made, token="hf_wrong")
    exports.run(made.id)
    session.refresh(made)
    assert made.hub["error"]["code"] == "hub_unauthorized"
    hub.repos["lab/tiny"] = {"private": False}
    push(session, user, made)
    exports.run(made.id)
    session.refresh(made)
    assert made.hub["error"]["code"] == "hub_public" and hub.objects == {}
    push(session, user, made, private=False)
    exports.run(made.id)
    session.refresh(made)
    assert made.hub["status"] == "succeeded"


def test_what_can_be_known_is_refused_before_the_start(session, user, made, hub, monkeypatch) -> None:
    for repo, token, param in (("tiny", "hf_right", "repo"), ("../x", "hf_right", "repo"), ("lab/tiny", "two words", "token")):
        with pytest.raises(BadField) as error:
            exports.push(session, user, made.id, repo, True, token)
        assert error.value.param == param
    with pytest.raises(BadField, match="A token of the hub is needed"):
        other = User(name="other", role="member")
        session.add(other)
        session.flush()
        exports.push(session, other, made.id, "lab/tiny")
    monkeypatch.setattr(get_settings(), "offline", True)
    with pytest.raises(Unavailable, match="offline"):
        exports.push(session, user, made.id, "lab/tiny", True, "hf_right")
    monkeypatch.setattr(get_settings(), "offline", False)
    push(session, user, made)
    with pytest.raises(Conflict, match="being pushed"):
        exports.push(session, user, made.id, "lab/tiny", True, "hf_right")
    session.rollback()


def test_a_push_is_cancelled_and_its_files_stay(session, user, made, hub) -> None:
    push(session, user, made)
    with transaction() as request:
        exports.cancel(request, user, made.id)
    session.refresh(made)
    assert export_json.to_json(made)["hub"]["status"] == "cancelled" and not hub_upload.token_file(made.id).exists()
    assert exports.file_path(made, "a.gguf").is_file()
    exports.run(made.id)
    assert hub.repos == {}, "a message that comes late finds nothing to do"


def test_three_deaths_end_a_push_and_not_the_export(session, user, made, hub) -> None:
    push(session, user, made)
    for _ in range(3):
        assert leases.claim(session, exports.WORK, made.id) is not None
        session.execute(update(Export).where(Export.id == made.id).values(lease_until=leases.OVER))
        session.commit()
        with transaction() as reaper:
            leases.expire(reaper, exports.WORK)
    session.refresh(made)
    assert made.status == "succeeded" and made.hub["status"] == "failed" and made.hub["error"]["code"] == "worker_lost"
    assert exports.file_path(made, "a.gguf").is_file() and not hub_upload.token_file(made.id).exists()


def test_the_api_and_the_page_push(api, client, session, user, made, hub, tiny_registered) -> None:
    key = ids.public(ids.EXPORT, made.id)
    answer = api.post(f"/v1/exports/{key}/push", json={"repo": "lab/tiny", "token": "hf_right"})
    assert answer.status_code == 200 and answer.json()["hub"]["private"] is True and "hf_right" not in answer.text
    page = f"/models/{ids.public(ids.MODEL, tiny_registered.id)}?tab=export"
    assert "every 2s" in client.get(page).text
    exports.run(made.id)
    assert api.get(f"/v1/exports/{key}").json()["hub"]["status"] == "succeeded"
    text = client.get(page).text
    assert f'href="{hub.url}/lab/tiny"' in text and 'type="password"' in text
    sent = client.post(f"/exports/{key}/push", data={"repo": "lab/other", "token": "hf_right", "public": "1"}, follow_redirects=False)
    session.refresh(made)
    assert sent.status_code == 303 and made.hub["repo"] == "lab/other" and made.hub["private"] is False
    wrong = client.post(f"/exports/{key}/push", data={"repo": "other", "token": "hf_right"})
    assert wrong.status_code == 400 and "names no owner" in wrong.text
