"""Limits of people and projects: what is used, what is refused and how, and who sets them."""

from __future__ import annotations

import threading
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select

from app import limits
from app.db import transaction
from app.errors import BadField
from app.evaluation import claims
from app.jobs import lifecycle
from app.jobs import service as jobs
from app.jobs.request import read_order
from app.kit import ids
from app.kit.token_meter import TokenMeter
from app.limits import LIMITS, LimitReached
from app.machines import heartbeats
from app.settings import get_settings
from app.storage import files
from app.tables import Checkpoint, Evaluation, Export, Job, MachineUse, Model, Project, TokenUse, User
from app.web import projects
from tests.evaluation.test_train_queue import ANYTHING
from tests.factories import make_dataset, make_job
from tests.web.test_people import made, signed_in
from tests.web.test_projects import program, within


@pytest.fixture
def data(session, user, data_dir, tiny_registered):
    return make_dataset(session, user, data_dir)


@pytest.fixture
def order(data):
    return {"model": "tiny", "training_file": ids.public(ids.FILE, data.file_id)}


def limited(session, of: User | Project, **values: float | None) -> None:
    limits.set_own(of, values)
    session.commit()


def refused(answer, *words: str) -> dict:
    """The error of a refusal, which says so in OpenAI's shape and tells clients not to ask again."""
    error = answer.json()["error"]
    assert answer.status_code == 429 and (error["code"], error["type"]) == ("limit_reached", "rate_limit_error"), answer.text
    assert answer.headers["x-should-retry"] == "false" and int(answer.headers["retry-after"]) >= 1
    for word in words:
        assert word in error["message"], error["message"]
    return error


# Orders ------------------------------------------------------------------------------------------------------------------


def test_queued_jobs(session, user, api, order):
    limited(session, user, queued_jobs=2)
    first = api.post("/v1/fine_tuning/jobs", json=order).json()["id"]
    assert api.post("/v1/fine_tuning/jobs", json=order).status_code == 200
    refused(api.post("/v1/fine_tuning/jobs", json=order), "Your limit", "queued runs", "2 used of 2")
    assert api.post(f"/v1/fine_tuning/jobs/{first}/pause").status_code == 200
    assert api.post("/v1/fine_tuning/jobs", json=order).status_code == 200
    refused(api.post(f"/v1/fine_tuning/jobs/{first}/resume"), "queued runs")


def test_a_repeated_request_is_no_further_job(session, user, api, order):
    limited(session, user, queued_jobs=1)
    keyed = {"idempotency-key": "k"}
    first = api.post("/v1/fine_tuning/jobs", json=order, headers=keyed).json()["id"]
    assert api.post("/v1/fine_tuning/jobs", json=order, headers=keyed).json()["id"] == first


def test_two_at_once_do_not_both_pass(session, user, data):
    limited(session, user, queued_jobs=1)
    asked = read_order({"model": "tiny", "training_file": ids.public(ids.FILE, data.file_id)})
    ready, came = threading.Barrier(4), []

    def one() -> None:
        ready.wait()
        try:
            with transaction() as own:
                came.append(jobs.create(own, own.get_one(User, user.id), asked).id)
        except LimitReached:
            came.append(None)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(key is None for key in came) == [False, True, True, True]


def test_gpu_hours_of_this_month(session, user, api, order, data):
    now = datetime.now(UTC)
    month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)

    def use(began: datetime, hours: float, gpus: int) -> None:
        end = began + timedelta(hours=hours)
        mine = {"user_id": user.id, "project_id": user.id, "kind": "jobs", "row_id": uuid.uuid4(), "fence": 1}
        session.add(MachineUse(**mine, gpus=gpus, started_at=began, ended_at=end))

    use(month - timedelta(hours=10), 11, 2)  # one hour of it in this month, with two GPUs
    use(month + timedelta(seconds=1), 0.5, 0)  # without a GPU
    use(month - timedelta(days=9), 5, 8)
    limited(session, user, gpu_hours_per_month=3)
    assert limits.used_by(session, "person", user.id, "gpu_hours_per_month") == pytest.approx(2.5)
    assert api.post("/v1/fine_tuning/jobs", json=order).status_code == 200
    limited(session, user, gpu_hours_per_month=2.5)
    error = refused(api.post("/v1/fine_tuning/jobs", json=order), "gpu-hours this month", "2.5", "next month")
    free = limits.frees_at("month")
    assert f"{free:%Y-%m}" in error["message"] and free.day == 1 and timedelta(0) < free - now <= timedelta(days=31)
    asked = {"model": "tiny", "dataset_id": ids.public(ids.DATASET, data.id)}
    refused(api.post("/v1/evaluations", json=asked), "gpu-hours")


def test_storage(session, user, api, data, order):
    job = make_job(session, user, _model(session), data)
    session.add(Checkpoint(job_id=job.id, step=1, path="x", manifest_sha256="0", bytes=5000, metrics={}))
    session.commit()
    before = limits.used_by(session, "person", user.id, "storage_bytes")
    assert before >= 5000
    limited(session, user, storage_bytes=int(before) + 1000)
    upload = lambda size: api.post("/v1/files", files={"file": ("a.txt", b"x" * size)}, data={"purpose": "user_data"})  # noqa: E731
    kept = upload(600)
    assert kept.status_code == 200
    refused(upload(600), "storage", "Delete")
    begun = api.post("/v1/tus", headers={"tus-resumable": "1.0.0", "upload-length": "600", "upload-metadata": "filename YS5jc3Y="})
    refused(begun, "storage")
    assert api.delete(f"/v1/files/{kept.json()['id']}").status_code == 200
    assert upload(600).status_code == 200, "what is deleted is free"
    limited(session, user, storage_bytes=10)
    refused(api.post("/v1/fine_tuning/jobs", json=order), "storage")
    assert files.add_bytes(session, user, b"loss", "r.csv", files.RESULTS), "what a job writes at its end is never lost to a limit"


def test_uploads_that_are_open_are_storage(session, user, api):
    before = limits.used_by(session, "person", user.id, "storage_bytes")
    limited(session, user, storage_bytes=int(before) + 1000)
    order = {"purpose": "user_data", "filename": "a.txt", "mime_type": "text/plain"}
    begun = api.post("/v1/uploads", json=order | {"bytes": 600}).json()["id"]
    refused(api.post("/v1/uploads", json=order | {"bytes": 600}), "storage")
    other = api.post("/v1/uploads", json=order | {"bytes": 400}).json()["id"]
    part = api.post(f"/v1/uploads/{begun}/parts", files={"data": ("a", b"x" * 600)}).json()["id"]
    done = api.post(f"/v1/uploads/{begun}/complete", json={"part_ids": [part]})
    assert done.status_code == 200, "it is counted once, and fits: " + done.text
    for by in ("person", "project"):
        assert limits.used_by(session, by, user.id, "storage_bytes") == before + 1000
    assert api.post(f"/v1/uploads/{other}/cancel").status_code == 200
    assert limits.used_by(session, "person", user.id, "storage_bytes") == before + 600


def test_files_of_exports_are_storage(session, user, api, data, tiny_registered):
    before = limits.used_by(session, "person", user.id, "storage_bytes")
    made = api.post("/v1/models/tiny/exports", json={"format": "safetensors"}).json()["id"]
    export = session.scalars(select(Export)).one()
    export.files = [{"name": "a", "bytes": 4000}, {"name": "b", "bytes": 3_000_000_000}]
    session.commit()
    for by in ("person", "project"):
        assert limits.used_by(session, by, user.id, "storage_bytes") == before + 3_000_004_000
    export.status = "succeeded"
    limited(session, user, storage_bytes=int(before) + 3_000_004_000 + 1000)
    refused(api.post("/v1/models/tiny/exports", json={"format": "safetensors"}), "storage")
    assert api.delete(f"/v1/exports/{made}").status_code == 200
    assert limits.used_by(session, "person", user.id, "storage_bytes") == before
    assert api.post("/v1/models/tiny/exports", json={"format": "safetensors"}).status_code == 200


def test_once_the_tokens_of_a_day_are_used_nothing_that_writes_begins(session, user, api, data, tiny_registered):
    limits.count_tokens(session, user.id, user.id, read=0, written=10)
    limited(session, user, tokens_per_day=10)
    file = api.post("/v1/files", files={"file": ("a.csv", b"text\nx\n")}, data={"purpose": "user_data"}).json()["id"]
    prompt = api.post("/v1/prompts", json={"name": "p", "template": "{{input}}"}).json()["id"]
    dataset = ids.public(ids.DATASET, data.id)
    judge = {"type": "score_model", "name": "j", "model": "tiny", "input": [{"role": "user", "content": "{{sample.output_text}}"}]}
    for path, body in (
        ("/v1/predictions", {"model": "tiny", "file": file}),
        ("/v1/evaluations", {"model": "tiny", "dataset_id": dataset}),
        ("/v1/evaluations", {"model": "tiny", "dataset_id": dataset, "kind": "advice"}),
        (f"/v1/prompts/{prompt}/runs", {"model": "tiny", "dataset_id": dataset}),
        ("/v1/fine_tuning/alpha/graders/run", {"grader": judge, "model_sample": "a"}),
    ):
        refused(api.post(path, json=body), "tokens today")
    assert api.post("/v1/evaluations", json={"model": "tiny", "dataset_id": dataset, "answers": 0}).status_code == 200, "it writes nothing"


def test_a_meter_is_counted_once_and_kept_where_that_is_not_committed(session, user, data, tiny_registered):
    made = Evaluation(owner_id=user.id, project_id=user.id, kind="scores", model_id=tiny_registered.id, dataset_id=data.id, spec={})
    session.add(made)
    session.commit()
    meter = TokenMeter()
    meter.add(3, 4, 2)
    with pytest.raises(ZeroDivisionError), transaction() as own:
        limits.count_meter(own, Evaluation, made.id, meter)
        raise ZeroDivisionError
    assert (meter.read, meter.written, meter.encoded) == (3, 4, 2) and not limits.used_by(session, "person", user.id, "tokens_per_day")
    for _ in range(2):
        with transaction() as own:
            limits.count_meter(own, Evaluation, made.id, meter)
    session.rollback()
    assert (meter.read, meter.written, meter.encoded) == (0, 0, 0) and limits.used_by(session, "project", user.id, "tokens_per_day") == 6
    meter.add(1, 1)
    with transaction() as own:
        limits.count_meter(own, Evaluation, uuid.uuid4(), meter)  # its row was deleted
    assert session.scalars(select(TokenUse)).one().written == 4


def _model(session):
    return session.scalars(select(Model).where(Model.name == "tiny")).one()


def test_running_jobs_wait_and_say_so(session, user, api, client, data, tiny_registered):
    first, second = (make_job(session, user, tiny_registered, data) for _ in range(2))
    ada = made(session, "Ada", "member")
    limited(session, user, running_jobs=1)
    assert lifecycle.claim(session, first.id, "w") is not None
    session.commit()
    assert claims.choose(session, ANYTHING, ANYTHING) is None, "a free worker takes nothing of who has reached the limit"
    shown = api.get(f"/v1/fine_tuning/jobs/{ids.public(ids.JOB, second.id)}").json()
    assert "1 running, 1 allowed" in shown["waits_for"] and shown["status"] == "queued"
    heartbeats.say_alive("train", 0.0)
    assert "1 running, 1 allowed" in client.get(f"/jobs/{ids.public(ids.JOB, second.id)}").text
    other = make_job(session, ada, tiny_registered, data)
    assert claims.choose(session, ANYTHING, ANYTHING).key == other.id
    limited(session, user, running_jobs=None)
    assert claims.choose(session, ANYTHING, ANYTHING) is not None


# Projects, settings, and who sets them -------------------------------------------------------------------------------------


def test_a_project_has_limits_of_its_own(web, session, user, data, order):
    ada = made(session, "Ada", "member")
    team = projects.create(session, user, "Violins")
    projects.set_member(session, team, ada, "member")
    limited(session, team, queued_jobs=1)
    make_job(session, user, _model(session), data)
    asker = program(web, session, user)
    upload = {"files": {"file": ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 9)}, "data": {"purpose": "fine-tune"}}
    own = {"model": "tiny", "training_file": asker.post("/v1/files", headers=within(team), **upload).json()["id"]}
    assert asker.post("/v1/fine_tuning/jobs", json=own, headers=within(team)).status_code == 200
    other = program(web, session, ada)
    refused(other.post("/v1/fine_tuning/jobs", json=own, headers=within(team)), "The limit of this project")
    assert asker.post("/v1/fine_tuning/jobs", json=order).status_code == 200, "the person's own project is another one"


def test_the_settings_are_for_everybody_without_an_own_one(session, user, api, order, monkeypatch):
    monkeypatch.setattr(get_settings(), "limit_queued_jobs", 0)
    refused(api.post("/v1/fine_tuning/jobs", json=order), "0 used of 0")
    limited(session, user, queued_jobs=5)
    assert api.post("/v1/fine_tuning/jobs", json=order).status_code == 200
    assert limits.allowed(None, "project") == {}, "a project has none by the settings"


def test_an_admin_sets_them_by_the_api(session, user, api):
    ada = made(session, "Ada", "member")
    path = f"/v1/organization/users/{ids.public(ids.USER, ada.id)}"
    told = api.post(path, json={"limits": {"running_jobs": 2, "tokens_per_day": 1000}}).json()
    assert told["limits"] == dict.fromkeys(LIMITS) | {"running_jobs": 2, "tokens_per_day": 1000}
    told = api.post(path, json={"limits": {"running_jobs": None}}).json()
    assert told["limits"]["running_jobs"] is None and told["limits"]["tokens_per_day"] == 1000
    assert api.get(path).json()["usage"] == dict.fromkeys(LIMITS, 0)
    path = f"/v1/organization/projects/{ids.public(ids.PROJECT, ada.id)}"
    assert api.post(path, json={"limits": {"storage_bytes": 10}}).json()["limits"]["storage_bytes"] == 10
    assert api.get(path).json()["usage"]["storage_bytes"] == 0
    for wrong in ({"running_jobs": -1}, {"beauty": 3}, {"tokens_per_day": "many"}, {"running_jobs": 1.5}):
        assert api.post(path, json={"limits": wrong}).status_code == 400, wrong
    with pytest.raises(BadField):
        limits.set_own(ada, {"beauty": 1})


def test_an_admin_sets_them_on_the_page_and_everybody_sees_their_own(web, session, client, user):
    ada = made(session, "Ada", "member")
    form = {"running_jobs": "1", "queued_jobs": "", "gpu_hours_per_month": "2.5", "storage_bytes": "0.5", "tokens_per_day": "1000"}
    assert client.post(f"/admin/limits/people/{ids.public(ids.USER, ada.id)}", data=form).status_code == 200
    session.refresh(ada)
    assert ada.limits == {"running_jobs": 1, "gpu_hours_per_month": 2.5, "storage_bytes": 500_000_000, "tokens_per_day": 1000}
    project = f"/admin/limits/projects/{ids.public(ids.PROJECT, ada.id)}"
    assert client.post(project, data={"weight": "2", "queued_jobs": "7"}).status_code == 200
    found = session.get_one(Project, ada.id, populate_existing=True)
    assert found.weight == 2.0 and found.limits == {"queued_jobs": 7}
    for wrong in ({"queued_jobs": "many"}, {"queued_jobs": "-1"}, {"weight": "0"}, {"tokens_per_day": "nan"}):
        assert client.post(project, data=wrong).status_code == 400, wrong
    page = client.get("/admin/limits").text
    assert 'value="0.5"' in page and 'value="2.5"' in page and "Ada" in client.get("/admin").text
    own = signed_in(web, session, ada)
    assert "500 MB" in own.get("/settings/account").text
    for path in ("/admin/limits", project):
        assert own.request("GET" if path.endswith("limits") else "POST", path).status_code == 403
    limited(session, ada, **dict.fromkeys(LIMITS))
    assert session.scalar(select(User.limits).where(User.id == ada.id)) is None


def test_what_all_use_is_what_each_uses(session, user, data, tiny_registered):
    make_job(session, user, tiny_registered, data)
    lifecycle.claim(session, make_job(session, user, tiny_registered, data).id, "w")
    limits.count_tokens(session, user.id, user.id, read=5, written=6)
    limits.count_tokens(session, user.id, user.id, read=1, written=1)
    session.commit()
    for by in ("person", "project"):
        every = limits.used(session)[by][user.id]
        assert every.keys() == LIMITS.keys() - {"requests_per_minute"}  # nobody's are limited, so they are not counted
        for name, value in every.items():
            if name != "gpu_hours_per_month":  # it goes on
                assert value == limits.used_by(session, by, user.id, name), name
        assert (every["running_jobs"], every["queued_jobs"], every["tokens_per_day"]) == (1, 1, 7)
    assert session.scalar(select(func.count()).select_from(Job)) == 2
