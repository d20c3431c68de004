"""A studio on machines without a common folder, and what it says when its storage is away."""

import uuid

import pytest
from sqlalchemy import func

from app.errors import Unavailable
from app.models import hub_upload
from app.ops import backup, doctor
from app.retention import RULES
from app.storage import objects, places
from app.tables import Job, WebhookDelivery
from app.webhooks import delivery
from app.webhooks import service as webhooks
from tests.conftest import forget_settings
from tests.factories import make_job, upload
from tests.routes.test_upload_parts import ROWS


@pytest.fixture
def store(tmp_path, monkeypatch, session):
    monkeypatch.setenv("LUTHIER_STORAGE_URL", f"file://{tmp_path / 'store'}")
    forget_settings()
    yield tmp_path / "store"


@pytest.fixture
def elsewhere(store, tmp_path, monkeypatch):
    """Go to another machine of the studio; gives its data folder."""

    def go(name="elsewhere"):
        monkeypatch.setenv("LUTHIER_DATA_DIR", str(tmp_path / name))
        forget_settings()
        return tmp_path / name

    return go


def test_what_one_web_process_took_another_gives(store, elsewhere, api, session):
    form = {"files": {"file": ("sums.jsonl", ROWS)}, "data": {"purpose": "fine-tune"}}
    plain = api.post("/v1/files", **form).json()
    begun = {"bytes": 3000, "filename": "sums.jsonl", "purpose": "user_data", "mime_type": "text/jsonl"}
    parted = api.post("/v1/uploads", json=begun).json()["id"]
    parts = [api.post(f"/v1/uploads/{parted}/parts", files={"data": piece}).json()["id"] for piece in (ROWS[:1000], ROWS[1000:3000])]
    whole = api.post(f"/v1/uploads/{parted}/complete", json={"part_ids": parts}).json()["file"]
    assert len(places.stored("uploads", "*/*")) == 2, "another web process may be asked to join them"
    there = elsewhere()
    assert api.get(f"/v1/files/{plain['id']}/content").content == ROWS
    assert api.get(f"/v1/files/{whole['id']}/content").content == ROWS[:3000]
    assert len(list(there.glob("blobs/*/*"))) == 2
    api.delete(f"/v1/files/{whole['id']}")
    assert api.get(f"/v1/files/{whole['id']}/content").status_code == 404


def test_a_storage_that_is_away_is_said_wherever_it_matters(store, api, monkeypatch, tmp_path):
    assert api.get("/readyz").json()["checks"]["storage"]["good"]
    assert [finding.verdict for finding in doctor.storage()] == ["good"]
    monkeypatch.setenv("LUTHIER_STORAGE_URL", "s3://luthier/x")
    for name, value in (("ENDPOINT_URL", "http://127.0.0.1:9"), ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("REGION", "x")):
        monkeypatch.setenv(f"AWS_{name}", value)
    forget_settings()
    monkeypatch.setattr(objects, "RETRY_SECONDS", 0.2)
    answer = api.post("/v1/files", files={"file": ("a.txt", b"x")}, data={"purpose": "user_data"})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "storage_unavailable", answer.text
    assert "Is it running" in answer.text
    ready = api.get("/readyz")
    assert ready.status_code == 503 and "cannot be used" in ready.json()["checks"]["storage"]["hint"]
    assert [finding.verdict for finding in doctor.storage()] == ["bad"]
    objects.check()  # a program starts all the same: it comes back by itself
    monkeypatch.setenv("LUTHIER_STORAGE_URL", "gs://bucket")
    forget_settings()
    with pytest.raises(objects.StorageRefuses, match="needs a package"):
        objects.check()


@pytest.mark.parametrize("url", ["ftp://a/b", "s3://", "file://relative", "/srv/store", "s3://a b"])
def test_a_url_that_cannot_be_meant_is_refused(url, data_dir, monkeypatch):
    from app.settings import Settings

    monkeypatch.setenv("LUTHIER_STORAGE_URL", url)
    with pytest.raises(ValueError, match="storage_url"):
        Settings()


def test_a_dataset_that_was_read_elsewhere_is_used_here(store, elsewhere, session, user, api):
    dataset = upload(session, user, [{"prompt": f"{n}?", "completion": "yes"} for n in range(9)])
    session.commit()
    there = elsewhere()
    answer = api.get(f"/v1/datasets/ds-{dataset.id.hex}/rows")
    assert answer.status_code in (200, 202), answer.text
    twin = upload(session, user, [{"prompt": f"{n}?", "completion": "yes"} for n in range(9)])
    assert twin.rows_path == dataset.rows_path and not (there / dataset.rows_path).exists(), "nothing is brought for that"
    assert places.path(dataset.rows_path).is_file()


def test_a_backup_holds_the_rows_and_says_where_the_files_are(store, session, user, tmp_path):
    upload(session, user, [{"prompt": f"{n}?", "completion": "yes"} for n in range(9)])
    session.commit()
    said = []
    report = backup.take(tmp_path / "kept", say=said.append)
    assert report.files == 0 and report.rows > 0 and not report.missing
    assert f"The files are in file://{store} and are not copied" in said[0]


def test_logs_are_removed_from_the_storage_too(store, elsewhere, session, user, data_dir, tiny_registered, monkeypatch):
    monkeypatch.setenv("LUTHIER_KEEP_LOG_DAYS", "0")
    forget_settings()
    job = make_job(session, user, tiny_registered, upload(session, user, [{"prompt": "?", "completion": "yes"}] * 9))
    session.get_one(Job, job.id).status, session.get_one(Job, job.id).finished_at = "failed", func.now()
    (attempt := data_dir / "runs" / str(job.id) / "a1").mkdir(parents=True)
    (attempt / "trainer.log").write_text("said")
    places.push_inside(attempt.relative_to(data_dir).as_posix())
    session.commit()
    elsewhere()
    rule = next(rule for rule in RULES if rule.name == "logs")
    due = rule.due(session, func.now(), 10)
    assert len(due) == 1
    rule.remove(session, due)
    for action in session.info.pop("luthier_after_commit"):
        action()
    assert places.stored("runs", "*/a1/*") == []


def test_what_another_machine_cannot_know_is_refused(store, elsewhere, session, user, monkeypatch):
    with pytest.raises(Unavailable, match="does not reach the export worker") as refused:
        hub_upload.check_token("hf_abcdefghijk")
    assert "HF_TOKEN" in refused.value.hint
    monkeypatch.setenv("LUTHIER_WEBHOOK_HOSTS", "127.0.0.1:9")
    forget_settings()
    endpoint = webhooks.create(session, user, "ci", "http://127.0.0.1:9/hook", ["batch.completed"])
    assert webhooks.signing_secret(endpoint)
    first, second = (webhooks.deliver_to(session, endpoint, "batch.completed", "batch_1", uuid.uuid4()) for _ in range(2))
    session.commit()
    delivery.send(first)
    elsewhere()
    delivery.send(second)
    said = [session.get_one(WebhookDelivery, key, populate_existing=True).error for key in (first, second)]
    assert said[0].startswith("It could not be reached") and said[1] == delivery.NO_KEY, (
        "an event is signed with the studio's key or not sent"
    )
