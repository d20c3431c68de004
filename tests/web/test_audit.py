"""The audit log: every deed in its own transaction, downloads and refused sign-ins, and nothing that changes a row of it."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app.db import transaction
from app.kit import ids
from app.tables import ApiKey, AuditLog, File, Job, User
from app.web import audit, auth
from app.web.navigation import each_route
from tests import lives
from tests.conftest import ORIGIN


def rows(session: Session, *types: str) -> list[AuditLog]:
    session.expire_all()
    query = select(AuditLog).order_by(AuditLog.id)
    return list(session.scalars(query.where(AuditLog.type.in_(types)) if types else query))


@pytest.fixture
def job(session, user, tiny_registered) -> Job:
    made = lives.order(session, user, tiny_registered)
    made.estimate = None
    session.commit()
    return made


def test_a_deed_by_key_and_one_in_the_browser(api, client, session, user, job):
    begun = len(rows(session))
    assert (
        api.post(f"/v1/fine_tuning/jobs/{ids.public(ids.JOB, job.id)}/cancel", headers={"x-request-id": "my-request-1"}).status_code == 200
    )
    assert client.post("/settings/keys", data={"name": "laptop"}).status_code == 200
    cancelled, created = rows(session)[begun:]
    key = session.scalars(select(ApiKey).where(ApiKey.name == "tests")).one()
    assert (cancelled.type, cancelled.object_id, cancelled.actor) == ("job.cancelled", ids.public(ids.JOB, job.id), "api_key")
    assert (cancelled.user_id, cancelled.user_name, cancelled.key_id) == (user.id, "owner", key.id)
    assert (cancelled.request_id, cancelled.address) == ("my-request-1", "testclient")
    assert cancelled.details == {"method": "POST", "route": "/v1/fine_tuning/jobs/{job_id}/cancel"}
    made = session.scalars(select(ApiKey).where(ApiKey.name == "laptop")).one()
    assert (created.type, created.object_id, created.actor, created.key_id) == ("api_key.created", f"key-{made.id.hex}", "session", None)


def test_what_is_rolled_back_is_not_in_it_and_what_cannot_be_written_down_is_not_done(api, session, job, monkeypatch):
    begun = len(rows(session))
    path = f"/v1/fine_tuning/jobs/{ids.public(ids.JOB, job.id)}"
    refused = api.post("/v1/fine_tuning/jobs", json={"model": "none", "training_file": "file-" + "0" * 32})
    assert refused.status_code in (400, 404) and len(rows(session)) == begun
    session.execute(text("ALTER TABLE audit_logs ADD CONSTRAINT full_disk CHECK (type <> 'job.cancelled')"))
    session.commit()
    try:
        assert api.post(f"{path}/cancel").status_code == 500
        session.refresh(job)
        assert job.status == "queued" and len(rows(session)) == begun, "the deed was undone with its row"
    finally:
        session.rollback()
        session.execute(text("ALTER TABLE audit_logs DROP CONSTRAINT full_disk"))
        session.commit()
    assert api.post(f"{path}/cancel").status_code == 200
    assert [row.type for row in rows(session)[begun:]] == ["job.cancelled"]


def test_an_upload_its_download_and_its_deletion(api, session):
    begun = len(rows(session))
    made = api.post("/v1/files", files={"file": ("a.txt", b"spruce")}, data={"purpose": "user_data"}).json()["id"]
    assert api.get(f"/v1/files/{made}/content").content == b"spruce"
    assert api.get(f"/v1/files/{made}").status_code == 200, "to look at it is no deed"
    assert api.delete(f"/v1/files/{made}").status_code == 200
    assert [(row.type, row.object_id) for row in rows(session)[begun:]] == [
        ("file.created", made),
        ("file.downloaded", made),
        ("file.deleted", made),
    ]


def test_what_a_statement_makes_is_created_too(api, session, job):
    """Jobs and comparisons are no objects of the session: of two concurrent requests with one key only one makes a row."""
    order = {"model": "tiny", "dataset_id": ids.public(ids.DATASET, job.dataset_id)}
    begun = len(rows(session))
    made = api.post("/v1/fine_tuning/jobs", json=order, headers={"idempotency-key": "k"}).json()["id"]
    assert api.post("/v1/fine_tuning/jobs", json=order, headers={"idempotency-key": "k"}).json()["id"] == made, "the second makes nothing"
    both = api.post("/v1/comparisons", json={**order, "strategies": ["lora", "ia3"]}).json()["id"]
    assert [(row.type, row.object_id) for row in rows(session)[begun:]] == [("job.created", made), ("comparison.created", both)]


def test_sign_ins_and_those_that_were_refused(web, session, user, monkeypatch):
    monkeypatch.setattr(audit, "_refusals", audit._Refusals())
    link = auth.new_sign_in_link(session, user)
    session.commit()
    browser = TestClient(web.app, base_url=ORIGIN, headers={"origin": ORIGIN})
    page = browser.get(link)
    assert page.status_code == 200
    assert browser.get("/sign-in/unknown-token-here", follow_redirects=False).status_code == 303, "who is in already is not refused"
    token = page.text.partition('name="csrf-token" content="')[2].partition('"')[0]
    assert browser.post("/sign-out", data={"csrf_token": token}, follow_redirects=False).status_code == 303
    browser.get("/sign-in/unknown-token-here")
    browser.post("/sign-in", data={"name": "owner", "password": "guess"})
    assert browser.get("/v1/models", headers={"authorization": "Bearer sk-luthier-x"}).status_code == 401
    assert browser.get("/v1/models").status_code == 401, "without any key nothing was tried"
    found = rows(session)
    assert [row.type for row in found] == ["login.succeeded", "logout.succeeded", "login.failed", "login.failed", "login.failed"]
    assert found[0].user_id == user.id and found[1].user_id == user.id and {row.actor for row in found[2:]} == {"nobody"}
    everything = json.dumps([[row.object_id, row.details] for row in found])
    assert link.rpartition("/")[2] not in everything and "unknown-token" not in everything, "a link is never written down"


def test_a_flood_of_refusals_does_not_fill_the_disk(web, session, monkeypatch):
    monkeypatch.setattr(audit, "_refusals", refusals := audit._Refusals())
    monkeypatch.setattr(audit, "MAX_REFUSALS", 3)
    program = TestClient(web.app, base_url=ORIGIN, headers={"authorization": "Bearer sk-luthier-x"})
    for _ in range(8):
        program.get("/v1/models")
    assert len(rows(session, "login.failed")) == 3
    refusals.times.clear()
    program.get("/v1/models")
    assert rows(session, "login.failed")[-1].details["not_written"] == 5


def test_nothing_changes_or_removes_a_row(api, session, user):
    auth.create_key(session, user, "a")
    session.commit()
    api.post("/v1/files", files={"file": ("a.txt", b"spruce")}, data={"purpose": "user_data"})
    count = len(rows(session))
    for statement in ("UPDATE audit_logs SET type = 'x'", "DELETE FROM audit_logs", "TRUNCATE audit_logs"):
        with pytest.raises(DBAPIError, match="append-only"):
            session.execute(text(statement))
        session.rollback()
    assert len(rows(session)) == count > 0


def test_work_of_every_day_is_no_deed(api, client, session):
    begun = len(rows(session))
    assert api.get("/v1/models").status_code == 200 and client.get("/jobs").status_code == 200
    assert client.post("/theme", data={"theme": "dark"}, follow_redirects=False).status_code == 303
    assert api.post("/v1/estimates", json={"model": "none"}).status_code in (400, 404)
    assert rows(session)[begun:] == []


def test_each_unsafe_route_has_a_type(web):
    """A new route needs no line in the log's code, but its type must say what it does."""
    import re

    found = {}
    for path, route in each_route(web.app.router):
        for method in set(getattr(route, "methods", None) or ()) - auth.SAFE:
            found[method, path] = audit.type_of(method, path, "jobs" if path.startswith("/{place}") else "")
    assert len(found) > 90 and all(re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name) for name in found.values()), found
    assert found["POST", "/v1/fine_tuning/jobs/{job_id}/pause"] == found["POST", "/jobs/{job_id}/pause"] == "job.paused"
    assert found["POST", "/{place}/{key}/name"] == "job.renamed" and found["POST", "/{place}/bulk"] == "job.changed"
    assert found["DELETE", "/v1/models/{model:path}"] == found["POST", "/models/{key}/delete"] == "model.deleted"
    assert found["POST", "/settings/keys/{key}/revoke"] == "api_key.deleted"


def test_the_openai_client_reads_it(api, client, session, user, job):
    import openai

    client.post("/settings/keys", data={"name": "laptop"})
    api.post(f"/v1/fine_tuning/jobs/{ids.public(ids.JOB, job.id)}/cancel")
    admin = openai.OpenAI(base_url=f"{ORIGIN}/v1", api_key=api.key, admin_api_key=api.key, http_client=api).admin.organization.audit_logs
    both = list(admin.list(limit=1))
    assert [row.type for row in both][:2] == ["job.cancelled", "api_key.created"] and len({row.id for row in both}) == len(both) >= 3
    assert both[0].actor.type == "api_key" and both[0].actor.api_key.user.email == "owner"
    assert both[1].actor.session.user.id == user.id.hex and both[1].api_key_created.id.startswith("key-")
    only = admin.list(event_types=["api_key.created"], actor_ids=[user.id.hex], effective_at={"gte": int(user.created_at.timestamp())})
    assert [row.type for row in only] == ["api_key.created"]
    assert [row.type for row in admin.list(resource_ids=[ids.public(ids.JOB, job.id)])] == ["job.cancelled"]
    assert list(admin.list(effective_at={"lt": 1000})) == [] and list(admin.list(actor_emails=["anna"])) == []
    newer = api.get("/v1/organization/audit_logs", params={"before": both[1].id}).json()
    assert [row["type"] for row in newer["data"]] == ["job.cancelled"] and newer["has_more"] is False
    assert api.get("/v1/organization/audit_logs", params={"after": "audit_log-x"}).status_code == 404
    assert api.get("/v1/organization/audit_logs", params={"after": both[0].id, "before": both[0].id}).status_code == 400


def test_the_page_filters_and_exports(client, api, session, job):
    api.post(f"/v1/fine_tuning/jobs/{ids.public(ids.JOB, job.id)}/cancel")
    page = client.get("/admin/audit")
    assert "job.cancelled" in page.text and "login.succeeded" in page.text
    only = client.get("/admin/audit", params={"type": "login.succeeded", "person": "", "object": "", "days": ""})
    assert "<b>job.cancelled</b>" not in only.text and "<b>login.succeeded</b>" in only.text
    assert "<b>job.cancelled</b>" in client.get("/admin/audit", params={"days": "1", "type": ""}).text
    assert client.get("/admin/audit", params={"days": "x"}).status_code == 400
    assert "No entries match" in client.get("/admin/audit", params={"person": "nobody"}).text
    lines = [json.loads(line) for line in client.get("/admin/audit/export", params={"type": "job.cancelled"}).text.splitlines()]
    assert [line["type"] for line in lines] == ["job.cancelled"]
    assert rows(session)[-1].type == "audit.downloaded", "who takes it away is in it"


def test_it_is_for_admins_alone(client, api, session, user):
    session.get_one(User, user.id).role = "member"
    session.commit()
    assert api.get("/v1/organization/audit_logs").json()["error"]["code"] == "insufficient_permissions"
    for path in ("/admin/audit", "/admin/audit/export", "/admin"):
        assert client.get(path).status_code == 403, path
    assert session.scalar(select(func.count()).select_from(File)) == 0


def test_commands_are_in_it(session, user):
    with audit.at_the_console("keys create"), transaction() as other:
        key = auth.create_key(other, user, "laptop")[0]
    with transaction() as other:
        auth.create_key(other, user, "nobody asked at the console")
    (row,) = rows(session)
    assert (row.type, row.actor, row.object_id, row.details) == (
        "api_key.created",
        "console",
        f"key-{key.id.hex}",
        {"command": "keys create"},
    )


def test_a_savepoint_is_not_the_end(client, session, monkeypatch):
    """A deed in two parts is one entry, made with its transaction."""
    plain = auth.create_key

    def create(other, *given):
        with other.begin_nested():
            made = plain(other, *given)
        other.add(File(owner_id=made[0].user_id, sha256="0" * 64, bytes=1, filename="a", purpose="user_data"))
        return made

    monkeypatch.setattr(auth, "create_key", create)
    begun = len(rows(session))
    assert client.post("/settings/keys", data={"name": "laptop"}).status_code == 200
    assert [row.type for row in rows(session)[begun:]] == ["api_key.created"]
