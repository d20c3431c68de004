"""Jobs sent to trackers from their stored events. Lives of jobs are recorded through the services; TensorBoard reads its files back. MLflow,
Trackio and Weights & Biases are in `test_servers.py`."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import delete, func, select, update

from app import events, leases, trackers
from app.db import transaction
from app.errors import BadField
from app.jobs import service as jobs
from app.kit import ids
from app.tables import Event, Job, Outbox, TrackedRun
from app.tracking import sending
from app.tracking import service as tracking
from tests.conftest import forget_settings, free_port
from tests.factories import make_dataset, make_job
from tests.lives import Life, order, started, steps


def settings(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"LUTHIER_{name.upper()}", value)
    forget_settings()


def send_all(*, now: bool = True) -> int:
    """Send what is due as data workers do, until nothing is; with `now` pauses are over."""
    count = 0
    while True:
        with transaction() as session:
            if now:
                session.execute(update(TrackedRun).values(next_at=leases.now()))
            due = session.scalars(select(TrackedRun.id).where(tracking.WORK.free())).all()
            before = session.scalars(select(TrackedRun.last_event_id).where(TrackedRun.id.in_(due)).order_by(TrackedRun.id)).all()
        for key in due:
            sending.send(key)
        count += len(due)
        with transaction() as session:
            after = session.scalars(select(TrackedRun.last_event_id).where(TrackedRun.id.in_(due)).order_by(TrackedRun.id)).all()
        if before == after:
            return count


def tracked(session, job: Job, *chosen: trackers.Tracker) -> Life:
    tracking.begin(session, job.id, chosen)
    session.commit()
    return Life(session, job)


def row_of(job_id: uuid.UUID) -> TrackedRun:
    with transaction() as session:
        return session.scalars(select(TrackedRun).where(TrackedRun.job_id == job_id)).one()


def files_of(data_dir: Path, job_id: uuid.UUID) -> list[tuple[str, int]]:
    """(tag, step) of each figure in a job's event file."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (data_dir / "runs" / str(job_id) / "tensorboard").iterdir()
    return [(value.tag, event.step) for event in EventFileLoader(str(file)).Load() for value in event.summary.value]


TENSORBOARD = trackers.TRACKERS["tensorboard"]()


def test_every_step_is_there_once_over_attempts_and_sendings(session, user, tiny_registered, data_dir):
    job = order(session, user, tiny_registered)
    life = tracked(session, job, TENSORBOARD)
    assert send_all() > 0 and row_of(job.id).state == {}, "a job that has not begun was sent"
    life.claim().say(started(), *steps(1, 20))
    send_all()
    assert Counter(files_of(data_dir, job.id))["train/loss", 19] == 1
    assert ("train/loss", 20) not in files_of(data_dir, job.id), "more may be said of the newest step"
    life.say(*steps(21, 44)).lose()
    send_all()
    life.claim().say(started(resumed_from=36), *steps(37, 120)).finish()
    send_all()
    found = Counter(files_of(data_dir, job.id))
    assert set(found.values()) == {1}
    assert [step for tag, step in sorted(found) if tag == "train/loss"] == list(range(1, 121))
    assert [step for tag, step in sorted(found) if tag == "validation/loss"] == list(range(12, 121, 12))
    assert found["final/tuned/loss", 120] == 1 == found["final/base/token_accuracy", 120] == found["_hparams_/session_end_info", 0]
    folder = data_dir / "runs" / str(job.id) / "tensorboard"
    tags = read_scalars(folder)
    losses = session.scalars(
        select(Event.data["loss"].as_float()).where(Event.type == "step", Event.data["step"].as_integer() == 120, Event.job_id == job.id)
    ).all()
    assert tags["train/loss"][-1] == pytest.approx(losses[0], rel=1e-6)
    assert send_all() == 0, "a job that was sent to its end is sent again"


def read_scalars(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[float]] = {}
    for file in folder.iterdir():
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    found.setdefault(value.tag, []).append(value.tensor.float_val[0])
    return found


def test_settings_are_in_the_file(session, user, tiny_registered, data_dir):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams import metadata

    job = order(session, user, tiny_registered, epochs=7)
    tracked(session, job, TENSORBOARD).claim().say(started(), *steps(1, 3))
    send_all()
    (file,) = (data_dir / "runs" / str(job.id) / "tensorboard").iterdir()
    values = [value for event in EventFileLoader(str(file)).Load() for value in event.summary.value]
    content = next(value.metadata.plugin_data.content for value in values if value.tag == metadata.SESSION_START_INFO_TAG)
    told = metadata.parse_session_start_info_plugin_data(content).hparams
    assert told["run.epochs"].number_value == 7 and told["strategy.name"].string_value == "lora" and told["model"].string_value == "tiny"
    assert told["luthier_url"].string_value.endswith(f"/jobs/{ids.public(ids.JOB, job.id)}")


def test_what_a_death_left_in_the_file_is_cut_off(session, user, tiny_registered, data_dir, monkeypatch):
    job = order(session, user, tiny_registered)
    life = tracked(session, job, TENSORBOARD).claim().say(started(), *steps(1, 20))
    send_all()
    life.say(*steps(21, 30))
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "sent", lambda *_: (_ for _ in ()).throw(SystemExit))  # dies after the file, before the database
        with transaction() as opened:
            opened.execute(update(TrackedRun).values(next_at=leases.now()))
        with pytest.raises(SystemExit):
            sending.send(row_of(job.id).id)
    assert ("train/loss", 29) in files_of(data_dir, job.id) and row_of(job.id).status == "running"
    with transaction() as opened:
        opened.execute(update(TrackedRun).values(lease_until=leases.OVER))
    life.say(*steps(31, 120)).finish()
    with transaction() as opened:
        assert leases.expire(opened, tracking.WORK) == 1
    send_all()
    assert set(Counter(files_of(data_dir, job.id)).values()) == {1} and row_of(job.id).deaths == 0


def test_a_server_that_is_away_is_tried_again_later_and_says_no_secret(session, user, tiny_registered, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    settings(monkeypatch, mlflow=f"http://:s3cret@127.0.0.1:{free_port()}")
    job = order(session, user, tiny_registered)
    tracked(session, job, trackers.TRACKERS["mlflow"]()).claim().say(started(), *steps(1, 5))
    pauses = []
    for _ in range(7):
        with transaction() as opened:
            opened.execute(update(TrackedRun).values(next_at=leases.now()))
        sending.send(row_of(job.id).id)
        row = row_of(job.id)
        with transaction() as opened:
            pauses.append((row.next_at - opened.scalar(select(leases.now()))).total_seconds())
    assert "cannot be reached" in row.error and row.tries == 7 and row.status == "queued" and row.last_event_id == 0
    assert [round(pause, -1) for pause in pauses[1:]] == [20, 80, 320, 1280, 3600, 3600]
    assert "s3cret" not in row.error + str(tracking.to_json(row)) + caplog.text and row.wish == {}
    assert send_all(now=False) == 0


def test_link_local_addresses_are_never_called(session, user, tiny_registered, monkeypatch):
    settings(monkeypatch, mlflow="http://169.254.169.254")
    job = order(session, user, tiny_registered)
    tracked(session, job, trackers.TRACKERS["mlflow"]()).claim().say(started(), *steps(1, 5))
    sending.send(row_of(job.id).id)
    assert "cannot be reached" in row_of(job.id).error


@pytest.mark.parametrize(
    ("integration", "says"),
    [
        ({"type": "wandb", "wandb": {"project": "p"}}, "LUTHIER_WANDB"),
        ({"type": "mlflow", "mlflow": {"tracking_uri": "http://evil.example"}}, "sends nothing to 'http://evil.example'"),
        ({"type": "trackio"}, "LUTHIER_TRACKIO"),
        ({"type": "comet"}, "There is no integration 'comet'"),
        ({"type": "mlflow", "wandb": {}}, "no field 'wandb'"),
        ({"type": "tensorboard", "tensorboard": {"folder": "/etc"}}, "integrations.0.tensorboard.folder"),
        ({"type": "tensorboard", "tensorboard": []}, "no JSON object"),
    ],
)
def test_an_order_that_cannot_be_followed_is_refused(api, session, user, tiny_registered, data_dir, monkeypatch, integration, says):
    settings(monkeypatch, mlflow="http://mlflow.example:5000")
    body = {"model": "tiny", "dataset_id": str(make_dataset(session, user, data_dir).id), "integrations": [integration]}
    refused = api.post("/v1/fine_tuning/jobs", json=body)
    assert refused.status_code == 400 and says in refused.json()["error"]["message"], refused.text
    assert refused.json()["error"]["param"].startswith("integrations")
    assert session.scalar(select(func.count()).select_from(Job)) == 0


def test_an_order_names_trackers_and_the_job_says_how_it_goes(api, session, user, tiny_registered, data_dir, monkeypatch):
    settings(monkeypatch, mlflow="http://:KEY@mlflow.example:5000", trackers="tensorboard")
    wish = [{"type": "mlflow", "mlflow": {"experiment": "support", "tracking_uri": "http://mlflow.example:5000/"}}]
    body = {"model": "tiny", "dataset_id": str(make_dataset(session, user, data_dir).id), "integrations": wish}
    made = api.post("/v1/fine_tuning/jobs", json=body).json()
    assert made["integrations"] == wish
    told = api.get(f"/v1/fine_tuning/jobs/{made['id']}/trackers").json()["data"]
    assert [(one["type"], one["status"], one["url"]) for one in told] == [("mlflow", "following", None), ("tensorboard", "following", None)]
    assert told[0]["mlflow"] == wish[0]["mlflow"] and told[1]["tensorboard"] == {}
    changed = api.post(f"/v1/fine_tuning/jobs/{made['id']}/trackers", json={"integrations": [{"type": "mlflow"}]})
    assert changed.status_code == 409 and "other settings" in changed.json()["error"]["message"]
    twice = api.post(f"/v1/fine_tuning/jobs/{made['id']}/trackers", json={"integrations": [wish[0], wish[0]]})
    assert twice.status_code == 400 and "twice" in twice.json()["error"]["message"]


def test_an_ended_run_is_sent_whole_from_its_page(client, session, user, tiny_registered, data_dir):
    job = order(session, user, tiny_registered)
    Life(session, job).claim().say(started(), *steps(1, 120)).finish()
    page = client.get(f"/jobs/{ids.public(ids.JOB, job.id)}?tab=config").text
    assert "Send to TensorBoard" in page and "Send to MLflow" not in page, "MLflow is not set up"
    assert "is sent to TensorBoard" in client.post(f"/jobs/{ids.public(ids.JOB, job.id)}/trackers", data={"kind": "tensorboard"}).text
    send_all()
    assert Counter(tag for tag, _ in files_of(data_dir, job.id))["train/loss"] == 120
    page = client.get(f"/jobs/{ids.public(ids.JOB, job.id)}?tab=config").text
    assert "Send to TensorBoard" not in page and str(data_dir / "runs" / str(job.id) / "tensorboard") in page
    with transaction() as opened:
        opened.execute(update(TrackedRun).values(status="failed", error="Its worker died.", deaths=3))
    assert "Its worker died." in client.get(f"/jobs/{ids.public(ids.JOB, job.id)}?tab=config").text
    client.post(f"/jobs/{ids.public(ids.JOB, job.id)}/trackers", data={"kind": "tensorboard"})
    assert row_of(job.id).error is None and row_of(job.id).status == "queued"


def test_trackers_that_are_chosen_later_get_the_jobs_that_go_on(session, user, tiny_registered, data_dir, monkeypatch):
    dataset = make_dataset(session, user, data_dir)
    waiting, cancelled = (make_job(session, user, tiny_registered, dataset) for _ in range(2))
    jobs.cancel(session, user, cancelled.id)
    session.commit()
    with transaction() as opened:
        assert tracking.reap(opened)["followed"] == 0
    settings(monkeypatch, trackers="tensorboard")
    with transaction() as opened:
        assert tracking.reap(opened)["followed"] == 1
        assert tracking.reap(opened)["followed"] == 0
    assert row_of(waiting.id).kind == "tensorboard"
    settings(monkeypatch, trackers="tensorbored")
    with transaction() as opened:
        assert tracking.reap(opened)["followed"] == 0, "the reaper goes on"
    with pytest.raises(BadField, match="LUTHIER_TRACKERS names 'tensorbored'"):
        tracking.begin(session, cancelled.id, [])


def test_the_reaper_has_news_sent_and_nothing_else(session, user, tiny_registered):
    job = order(session, user, tiny_registered)
    life = tracked(session, job, TENSORBOARD).claim().say(started(), *steps(1, 5))
    with transaction() as opened:
        opened.execute(delete(Outbox))  # its first message
    with transaction() as opened:
        tracking.reap(opened)
    with transaction() as opened:
        assert opened.scalars(select(Outbox.task).where(Outbox.task == "luthier.track")).all() == ["luthier.track"]
    send_all()
    life.fail(events.Failed(kind="crashed", message="It crashed."))
    send_all()
    with transaction() as opened:
        opened.execute(update(TrackedRun).values(next_at=leases.now()))
        opened.execute(update(Outbox).values(sent_at=leases.now() - func.make_interval(0, 0, 0, 1)))
        assert leases.redeliver(opened, tracking.WORK) == 0
    assert row_of(job.id).state["status"] == "failed"


def test_a_step_that_a_later_attempt_repeats_keeps_its_first_word():
    """Whether both are in one sending or in two: else one whose record was lost would come again with other values."""
    rows = [
        Event(id=10 + n, type="step", data=one.model_dump(exclude={"type"}), created_at=_now())
        for n, one in enumerate(steps(1, 6, every=99))
    ]
    rows += [
        Event(id=20 + n, type="step", data=one.model_dump(exclude={"type"}) | {"loss": 9.0}, created_at=_now())
        for n, one in enumerate(steps(4, 6, every=99))
    ]
    points, last = sending.new_points(rows, {"step": 2}, 0, hold=True)
    assert [(point.step, point.values["train/loss"] == 9.0) for point in points] == [(3, False), (4, False), (5, False)] and last == 14
    points, last = sending.new_points(rows, {"step": 5}, 14, hold=False)
    assert [point.step for point in points] == [6] and last == 22


def _now():
    from datetime import UTC, datetime

    return datetime.now(UTC)


def test_the_end_of_the_file_is_recorded(session, user, tiny_registered, data_dir):
    job = order(session, user, tiny_registered)
    tracked(session, job, TENSORBOARD).claim().say(started(), *steps(1, 13))
    send_all()
    (folder,) = (data_dir / "runs" / str(job.id)).glob("tensorboard")
    assert len(next(folder.iterdir()).read_bytes()) == row_of(job.id).state["bytes"]
