"""The queue of the train workers in a real database: what was used, what is next, and where everything stands."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from sqlalchemy import select, text, update

from app import events, leases, limits
from app.db import transaction
from app.evaluation import claims, train_queue
from app.evaluation import service as evaluations
from app.inference import residency
from app.jobs import fair_share, lifecycle, usage
from app.jobs import service as jobs
from app.jobs.spec_builder import estimate_of
from app.kit import ids
from app.machines import heartbeats
from app.machines.placement import Capacity
from app.relay import take_over
from app.spec import JobSpec
from app.tables import Evaluation, Job, MachineUse, Outbox, Project, User
from tests.factories import make_dataset, make_job
from tests.jobs.test_lifecycle import FINISHED
from tests.web.test_people import made

ANYTHING = Capacity("here", memory_bytes=2**60)


@pytest.fixture(autouse=True)
def places_are_computed_anew(monkeypatch):
    """Also where this machine is slow."""
    monkeypatch.setattr(train_queue, "SLOW_SECONDS", float("inf"))


@pytest.fixture
def data(session, user, data_dir, tiny_registered):
    return make_dataset(session, user, data_dir)


@pytest.fixture
def ada(session) -> User:
    return made(session, "Ada", "member")


@pytest.fixture
def new_job(session, user, data, tiny_registered):
    def make(person: User = user, seconds: float = 600.0, **values) -> Job:
        job = make_job(session, person, tiny_registered, data)
        estimate = estimate_of(session, JobSpec.model_validate(job.spec)) | {"seconds": seconds}
        session.execute(update(Job).where(Job.id == job.id).values(estimate=estimate, **values))
        session.commit()
        return job

    return make


def used(session, person: User, hours: float, ago: float = 0.0, gpus: int = 0) -> None:
    """So many hours of the machine, the last of them some hours ago."""
    end = datetime.now(UTC) - timedelta(hours=ago)
    session.add(
        MachineUse(
            user_id=person.id, project_id=person.id, kind="jobs", row_id=uuid.uuid4(), fence=1, gpus=gpus,
            started_at=end - timedelta(hours=hours), ended_at=end,
        )
    )  # fmt: skip
    session.commit()


def next_key(session) -> uuid.UUID | None:
    one = claims.choose(session, ANYTHING, ANYTHING)
    session.commit()
    return None if one is None else one.key


def an_evaluation(session, user, data, rows: int = 500) -> Evaluation:
    asked = {"model": "tiny", "dataset_id": ids.public(ids.DATASET, data.id), "rows": rows}
    found = evaluations.create(session, user, evaluations.read_order(asked))
    session.commit()
    return found


# What was used --------------------------------------------------------------------------------------------------------


def the_use(session) -> MachineUse:
    session.expire_all()
    return session.scalars(select(MachineUse)).one()


@pytest.mark.parametrize("end", ["finished", "stopped", "died", "studio"])
def test_an_attempt_is_recorded_by_whatever_way_it_ends(session, user, new_job, end):
    job = new_job()
    held = lifecycle.claim(session, job.id, "w", gpus=2)
    session.commit()
    use = the_use(session)
    assert (use.user_id, use.project_id, use.kind, use.row_id, use.fence, use.gpus) == (user.id, user.id, "jobs", job.id, 1, 2)
    assert use.ended_at is None
    lifecycle.heartbeat(session, held)
    session.commit()
    assert the_use(session).ended_at is None, "a heartbeat ends nothing"
    if end == "finished":
        lifecycle.finish(session, held, FINISHED)
    elif end == "stopped":
        lifecycle.stopped(session, held, 3)
    elif end == "died":
        lifecycle.lost(session, held, events.Failed(kind="worker_lost", message="It died."))
    else:
        take_over(session)
    session.commit()
    use = the_use(session)
    assert use.ended_at is not None and timedelta(0) <= use.ended_at - use.started_at < timedelta(minutes=1)
    session.refresh(job)
    if job.status == "queued":
        again = lifecycle.claim(session, job.id, "w")
        session.commit()
        assert [use.fence for use in session.scalars(select(MachineUse).order_by(MachineUse.fence))] == [1, again.fence]
        jobs.cancel(session, user, job.id)


def test_evaluations_are_recorded_and_what_runs_beside_training_is_not(session, user, data):
    found = an_evaluation(session, user, data)
    evaluations.claim(session, found.id)
    session.commit()
    assert the_use(session).kind == "evaluations"
    evaluations.cancel(session, user, found.id)
    session.commit()
    assert the_use(session).ended_at is not None
    other = an_evaluation(session, user, data)
    session.execute(update(Evaluation).where(Evaluation.id == other.id).values(kind="predictions"))
    assert evaluations.claim(session, other.id) is not None
    session.commit()
    assert the_use(session).row_id == found.id


def test_recent_use_is_what_the_formula_says(session, user, ada):
    used(session, user, 3, ago=5)
    used(session, user, 1, ago=30, gpus=4)
    used(session, ada, 2)
    used(session, ada, 99, ago=24 * 20)  # long forgotten
    session.get_one(Project, ada.id).weight = 2.0
    session.commit()
    clock = session.scalar(select(leases.now())).timestamp()
    found, day, hour = usage.recent(session, clock), 86_400.0, 3600.0
    expected = fair_share.decayed(clock - 8 * hour, clock - 5 * hour, clock, day)
    expected += 4 * fair_share.decayed(clock - 31 * hour, clock - 30 * hour, clock, day)
    assert found[user.id].seconds == pytest.approx(expected, rel=1e-3)
    assert found[ada.id].seconds == pytest.approx(fair_share.decayed(clock - 2 * hour, clock, clock, day) / 2, rel=1e-3)
    assert found[user.id].ended == pytest.approx(clock - 5 * hour, abs=60)


# What is next ---------------------------------------------------------------------------------------------------------


def test_the_light_user_is_next_and_then_the_turns_change(session, user, ada, new_job):
    heavy = [new_job(user) for _ in range(3)]
    used(session, user, 2)
    light = new_job(ada)
    assert next_key(session) == light.id
    lifecycle.claim(session, light.id, "w")
    session.commit()
    assert next_key(session) == heavy[0].id, "what runs is charged"


def test_evaluations_take_part(session, user, ada, new_job, data):
    used(session, user, 2)
    own = an_evaluation(session, user, data)
    light = new_job(ada)
    assert next_key(session) == light.id, "an evaluation of who has used more waits"
    lifecycle.claim(session, light.id, "w")
    session.commit()
    assert next_key(session) == own.id and train_queue.places(session)[own.id].position == 1


def test_what_is_not_due_is_not_next(session, user, new_job, data):
    job = new_job()
    session.execute(update(Job).values(spec=text("jsonb_set(spec, '{dataset,path}', '\"\"')")))
    session.commit()
    assert next_key(session) is None
    jobs.cancel(session, user, job.id)
    assert next_key(session) is None and train_queue.places(session) == {}


def test_one_that_lost_its_worker_goes_on_first_and_a_resumed_one_waits_its_turn(session, user, ada, new_job):
    used(session, user, 5)
    lost, other = new_job(user), new_job(ada)
    held = lifecycle.claim(session, lost.id, "w")
    lifecycle.stopped(session, held, 1)  # its worker leaves
    session.commit()
    assert next_key(session) == lost.id
    jobs.pause(session, user, lost.id)
    jobs.resume(session, user, lost.id)
    session.commit()
    assert next_key(session) == other.id


def test_two_workers_never_take_the_same(session, user, ada, new_job):
    """Nor does the second wait for the first, whose claim is not committed yet, and may never be."""
    first, second = new_job(user), new_job(ada)
    with transaction() as one, transaction() as two:
        held = [claims.choose(one, ANYTHING, ANYTHING), claims.choose(two, ANYTHING, ANYTHING)]
        assert [chosen.key for chosen in held] == [first.id, second.id]
        assert lifecycle.claim(one, first.id, "w1") is not None
        two.rollback()
        one.commit()
        assert claims.choose(two, ANYTHING, ANYTHING).key == second.id, "a claim that was given up leaves the row to others"
        assert lifecycle.claim(two, second.id, "w2") is not None


# The worker ------------------------------------------------------------------------------------------------------------


def test_a_message_makes_the_worker_take_what_is_next(session, user, ada, new_job, monkeypatch):
    """The message of the heavy user's job trains the light user's, with that one's ids; and the other way round."""
    from worker.evaluation import train_turn

    heavy, light = new_job(user), new_job(ada)
    used(session, user, 2)
    session.execute(update(Outbox).where(Outbox.key == light.id).values(context={"request_id": "r-light"}))
    session.commit()
    seen: list[tuple[uuid.UUID, dict]] = []

    def claim(own, key, going_down):
        return SimpleNamespace(held=lifecycle.claim(own, key, "w"), lease=None)

    def carry_out(attempt):
        import structlog

        seen.append((attempt.held.job_id, structlog.contextvars.get_contextvars()))

    monkeypatch.setitem(train_turn.TRAIN_WORKER, "jobs", train_turn.Takes(claim, carry_out))
    train_turn.take(heavy.id, {"request_id": "r-heavy"}, lambda: False)
    train_turn.take(light.id, {"request_id": "r-light"}, lambda: False)
    train_turn.take(light.id, None, lambda: False)  # a third message, and nothing waits
    assert [key for key, _ in seen] == [light.id, heavy.id]
    assert seen[0][1]["request_id"] == "r-light" and seen[0][1]["job_id"] == ids.public(ids.JOB, light.id)


# What people see ---------------------------------------------------------------------------------------------------------


def test_every_queued_job_has_a_place_and_a_time(session, user, client, api, new_job):
    running = new_job(seconds=120)
    lifecycle.claim(session, running.id, "w")
    first, second = new_job(seconds=600), new_job(seconds=60, priority="low")
    session.commit()
    asked = api.get(f"/v1/fine_tuning/jobs/{ids.public(ids.JOB, first.id)}").json()
    assert asked["position"] == 1 and asked["expected_start"] is None, "no worker is online"
    heartbeats.say_alive("train", 0.0)
    listed = {one["id"]: one for one in api.get("/v1/fine_tuning/jobs").json()["data"]}
    told = [listed[ids.public(ids.JOB, job.id)] for job in (running, first, second)]
    assert [one["position"] for one in told] == [None, 1, 2] and told[0]["expected_start"] is None
    now = datetime.now(UTC).timestamp()
    assert told[1]["expected_start"] == pytest.approx(now + 120, abs=30)
    assert told[2]["expected_start"] == pytest.approx(now + 720, abs=30)
    assert [one["priority"] for one in told] == ["normal", "normal", "low"]
    page = client.get(f"/jobs/{ids.public(ids.JOB, second.id)}").text
    assert "number 2 in the queue" in page and "Its priority is low." in page
    assert "next in the queue" in client.get(f"/jobs/{ids.public(ids.JOB, first.id)}").text
    assert "number 2" in client.get("/jobs").text


def test_a_queued_evaluation_has_a_place_and_a_time(session, user, client, api, new_job, data):
    running = new_job(seconds=300)
    lifecycle.claim(session, running.id, "w")
    session.commit()
    first, second = an_evaluation(session, user, data), an_evaluation(session, user, data, rows=7)
    url = f"/v1/evaluations/{ids.public(ids.EVALUATION, second.id)}"
    asked = api.get(url).json()
    assert (asked["position"], asked["expected_start"], asked["waits_for"]) == (2, None, None), "no worker is online"
    assert "No evaluate worker is online" in client.get(f"/evaluations/{ids.public(ids.EVALUATION, second.id)}").text
    for queue in ("train", "evaluate"):  # a train worker reads both
        heartbeats.say_alive(queue, 0.0)
    listed = api.get("/v1/evaluations").json()["data"]
    now = datetime.now(UTC).timestamp()
    assert [one["position"] for one in listed] == [2, 1], "newest first"
    assert listed[1]["expected_start"] == pytest.approx(now + 300, abs=30)
    assert listed[0]["expected_start"] == pytest.approx(now + 300 + train_queue.EVALUATION_SECONDS, abs=30)
    assert "number 2 in the queue" in client.get(f"/evaluations/{ids.public(ids.EVALUATION, second.id)}").text
    page = client.get("/evaluations").text
    assert "number 1, from about" in page and "number 2, from about" in page
    limits.set_own(user, {"running_jobs": 1})
    session.commit()
    assert "1 running, 1 allowed" in api.get(url).json()["waits_for"]
    assert "1 running, 1 allowed" in client.get(f"/evaluations/{ids.public(ids.EVALUATION, second.id)}").text
    evaluations.cancel(session, user, first.id)
    session.commit()
    assert api.get(url).json()["position"] == 1
    assert api.post(f"{url}/cancel").json()["position"] is None


def test_an_evaluate_worker_takes_an_evaluation_before_the_job_ends_unless_there_is_no_room(session, user, api, client, new_job, data):
    lifecycle.claim(session, new_job(seconds=86_400).id, "w")
    session.commit()
    new_job(seconds=60)
    first, second = (an_evaluation(session, user, data, rows=rows) for rows in (5, 7))
    heartbeats.say_alive("train", 0.0)
    heartbeats.say_alive("evaluate", 0.0, name="another process")

    def told(one: Evaluation) -> tuple[int, float, str | None]:
        said = api.get(f"/v1/evaluations/{ids.public(ids.EVALUATION, one.id)}").json()
        return said["position"], said["expected_start"] - datetime.now(UTC).timestamp(), said["waits_for"]

    soon, later = pytest.approx(0, abs=30), pytest.approx(train_queue.EVALUATION_SECONDS, abs=30)
    assert (told(first), told(second)) == ((1, soon, None), (2, later, None))
    evaluations.claim(session, first.id)
    session.commit()
    assert told(second) == (1, later, None), "the evaluate worker is busy"
    residency.say_no_room(second.id)
    assert told(second) == (2, pytest.approx(86_460, abs=60), train_queue.NO_ROOM), "then it is the turn of the shorter job"
    assert "too little memory" in client.get(f"/evaluations/{ids.public(ids.EVALUATION, second.id)}").text


def test_places_that_are_slow_to_compute_are_shown_for_a_while(session, user, new_job, monkeypatch):
    first = new_job()
    assert set(train_queue.places(session)) == {first.id}
    second = new_job()
    assert set(train_queue.places(session)) == {first.id, second.id}, "those of a short queue are computed anew"
    monkeypatch.setattr(train_queue, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(train_queue, "SHARE", 10_000)
    train_queue.places(session)
    new_job()
    assert set(train_queue.places(session)) == {first.id, second.id}
    monkeypatch.setattr(train_queue, "_last", train_queue._Last("another database", 1e12, {}))
    assert len(train_queue.places(session)) == 3


def test_a_high_priority_is_for_admins_unless_the_setting_says_else(session, user, ada, web, api, data, monkeypatch):
    from app.settings import get_settings
    from tests.web.test_projects import program

    order = {"model": "tiny", "training_file": ids.public(ids.FILE, data.file_id), "priority": "high"}
    assert api.post("/v1/fine_tuning/jobs", json=order).json()["priority"] == "high"
    asker = program(web, session, ada)
    upload = {"files": {"file": ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n')}, "data": {"purpose": "fine-tune"}}
    own = order | {"training_file": asker.post("/v1/files", **upload).json()["id"]}
    refused = asker.post("/v1/fine_tuning/jobs", json=own)
    assert refused.status_code == 403 and refused.json()["error"]["param"] == "priority"
    assert asker.post("/v1/fine_tuning/jobs", json=own | {"priority": "low"}).json()["priority"] == "low"
    assert api.post("/v1/fine_tuning/jobs", json=order | {"priority": "urgent"}).status_code == 400
    monkeypatch.setattr(get_settings(), "high_priority", "members")
    assert asker.post("/v1/fine_tuning/jobs", json=own).json()["priority"] == "high"


def test_the_form_orders_with_a_priority(session, client, data):
    typed = {"model": "tiny", "dataset": ids.public(ids.DATASET, data.id), "strategy": "lora", "priority": "low"}
    assert '<option value="low" selected>' in client.get("/jobs/new", params=typed).text
    assert client.post("/jobs", data=typed, follow_redirects=False).status_code == 303
    assert session.scalars(select(Job.priority)).one() == "low"


def test_an_admin_weighs_a_project(api, session, user):
    path = f"/v1/organization/projects/{ids.public(ids.PROJECT, user.id)}"
    assert api.get(path).json()["weight"] == 1.0
    assert api.post(path, json={"weight": 2.5}).json()["weight"] == 2.5 == api.get(path).json()["weight"]
    for wrong in (0, -1, 1000, "much"):
        assert api.post(path, json={"weight": wrong}).status_code == 400


# A day -------------------------------------------------------------------------------------------------------------------


def test_a_day_of_eight_people_is_fair_and_first_come_is_not(session, user):
    """The short form of `benchmarks/fair_share.py`."""
    from benchmarks import fair_share as benchmark

    found = benchmark.measure(session, people=8, seed=2)
    assert found["worst"] <= benchmark.GOAL, benchmark.as_text(found)
    assert found["worst_fifo"] > benchmark.GOAL, "the goal is one that can be missed"
