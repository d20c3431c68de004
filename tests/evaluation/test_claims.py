"""The claim by matching, on a real database: it says what the plain functions say, passes over what does not fit, and starves nobody."""

from __future__ import annotations

import random
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from app import leases, limits, queue
from app.evaluation import claims, train_queue
from app.evaluation import service as evaluations
from app.jobs import fair_share, lifecycle
from app.kit import ids
from app.machines import heartbeats
from app.machines.gpus import GpuCard
from app.machines.hardware import Machine
from app.machines.placement import Capacity, GpuKind
from app.settings import get_settings
from app.tables import Evaluation, Job, Project
from tests.evaluation.test_train_queue import ANYTHING, ada, an_evaluation, data, new_job, places_are_computed_anew, used  # noqa: F401  # fixtures
from tests.web.test_people import made

GB = 10**9
SMALL, LARGE = GpuKind(24 * GB, "RTX 4090"), GpuKind(80 * GB, "H100")


def machine(*cards: GpuKind, host: str = "far", **more) -> Capacity:
    return Capacity(host, cards, 64 * GB, cuda=True, **more)


def claim(session, free: Capacity, whole: Capacity | None = None, tried=()) -> uuid.UUID | None:
    """What a worker takes now, claimed and committed; None where there is nothing, or where GPUs are kept for it."""
    chosen = claims.choose(session, free, whole or free, tried)
    if chosen is not None and chosen.fits:
        held = lifecycle.claim(session, chosen.key, "w") if chosen.kind == "jobs" else evaluations.claim(session, chosen.key)
        assert held is not None
    session.commit()
    return chosen.key if chosen is not None and chosen.fits else None


def needs(session, job: Job, **columns) -> Job:
    session.execute(update(Job).where(Job.id == job.id).values(**columns))
    session.commit()
    return job


# The same as the plain functions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_claim_says_what_the_plain_functions_say(session, user, new_job, data, monkeypatch, seed):  # noqa: F811
    """Jobs and evaluations of four people in two projects, on four kinds of machine, until nothing is left that any of them takes."""
    monkeypatch.setattr(get_settings(), "reserve_after_seconds", 1e9)
    chance, now = random.Random(seed), datetime.now(UTC)
    people = [user, *(made(session, name, "member") for name in ("Ada", "Bo", "Cy"))]
    session.get_one(Project, people[1].id).weight = 2.0
    limits.set_own(people[2], {"running_jobs": 3})
    for person in people:
        used(session, person, chance.uniform(0, 3), ago=chance.uniform(0, 30), gpus=chance.choice([0, 1, 2]))
    for _ in range(36):
        own, person = new_job(chance.choice(people)), chance.choice(people)
        needs(
            session, own, project_id=person.id, created_at=now - timedelta(hours=chance.uniform(0, 40)), priority=chance.choice(["low", "normal", "high"]),
            estimate={"seconds": chance.uniform(60, 9000)}, gpu_bytes=chance.choice([0, 10 * GB, 40 * GB, None]),
            cpu_bytes=chance.choice([0, GB, 90 * GB, None]), num_gpus=chance.choice([None, None, 1, 2]),
            gpu_type=chance.choice([None, None, "h100"]), labels=chance.choice([[], [], ["a"], ["a", "b"]]),
        )  # fmt: skip
    for person in people[:2]:
        own = an_evaluation(session, user, data)
        session.execute(update(Evaluation).where(Evaluation.id == own.id).values(owner_id=person.id, project_id=person.id))
    lost = [lifecycle.claim(session, key, "w") for key in random.Random(seed).sample([job.id for job in session.query(Job)], 2)]
    for held in lost:
        lifecycle.stopped(session, held, 1)  # their workers leave
    session.commit()
    there = [machine(SMALL), machine(LARGE, SMALL, LARGE), machine(LARGE, labels=("b", "a")), Capacity("near", (), 32 * GB, ("a",))]
    taken, idle = 0, 0
    while idle < len(there):
        one = there[chance.randrange(len(there))] if not idle else there[idle - 1]
        clock = session.scalar(leases.select(leases.now())).timestamp()
        plain = fair_share.next_one(train_queue.situation(session, clock), lambda waiting, one=one: one.fits(waiting.needs))
        chosen = claims.choose(session, one, one, at=clock)
        assert (chosen and chosen.key) == (plain and plain.key)
        if chosen is None:
            idle += 1
            continue
        taken, idle = taken + 1, 0
        assert chosen.needs == plain.needs and leases.claim(session, train_queue.WORK[chosen.kind], chosen.key) is not None
        session.commit()
    assert taken > 10, "a comparison of nothing"


def test_rows_that_others_hold_count_as_taken(session, user, ada, new_job):  # noqa: F811
    """Three workers ask at once, none has committed: the second turn of one person comes after the first of another."""
    from app.db import transaction

    first, second, other = new_job(user), new_job(user), new_job(ada)
    with transaction() as one, transaction() as two, transaction() as three:
        taken = [claims.choose(own, ANYTHING, ANYTHING).key for own in (one, two, three)]
        assert taken == [first.id, other.id, second.id]
        assert claims.choose(session, ANYTHING, ANYTHING) is None, "and nobody waits for them"
    session.commit()


# What does not fit waits, and is not starved ------------------------------------------------------------------------------


def test_small_jobs_pass_one_that_waits_for_a_large_card(session, new_job):  # noqa: F811
    large = needs(session, new_job(), gpu_bytes=40 * GB)
    small = [needs(session, new_job(), gpu_bytes=10 * GB) for _ in range(2)]
    whole = machine(SMALL, LARGE)
    assert claim(session, machine(SMALL), whole) == small[0].id, "the large card is in use"
    assert claim(session, whole, whole) == large.id, "it is first as soon as that is free"
    assert claim(session, machine(SMALL), whole) == small[1].id


def test_a_machine_keeps_cards_for_a_job_that_has_waited(session, user, ada, new_job, monkeypatch):  # noqa: F811
    """Small jobs of somebody who used less take each GPU as it gets free, until the job of two has waited long enough and is next."""
    two = needs(session, new_job(user, seconds=600), gpu_bytes=40 * GB, num_gpus=2)
    whole, one_free = machine(SMALL, LARGE, LARGE), machine(SMALL, LARGE)
    session.execute(update(Job).where(Job.id == two.id).values(created_at=datetime.now(UTC) - timedelta(seconds=500)))
    small = [needs(session, new_job(ada), gpu_bytes=30 * GB, created_at=datetime.now(UTC)) for _ in range(3)]
    assert claim(session, one_free, whole) == small[0].id, "it has not waited long enough"
    monkeypatch.setattr(get_settings(), "reserve_after_seconds", 400.0)
    chosen = claims.choose(session, one_free, whole)
    session.commit()
    assert (chosen.key, chosen.fits) == (two.id, False)
    session.refresh(two)
    assert two.reserved_by == "far" and two.reserved_until > datetime.now(UTC)
    left = one_free.without_cards_for(chosen.needs)
    assert claim(session, left, whole, {two.id}) is None, "the large card is kept for it"
    tiny = needs(session, new_job(ada), gpu_bytes=GB)
    assert claim(session, left, whole, {two.id}) == tiny.id, "and the small one is not"
    elsewhere = machine(SMALL, LARGE, LARGE, host="else")
    assert claim(session, machine(LARGE, host="else"), elsewhere) == small[1].id, "another machine keeps none for it too"
    fresh = needs(session, new_job(made(session, "Eve", "member"), seconds=1), gpu_bytes=30 * GB)
    assert claims.choose(session, one_free, whole).key == two.id, "nothing new comes before it"
    session.commit()
    assert claim(session, whole, whole) == two.id, "it starts when both are free"
    session.refresh(two)
    assert (two.status, two.reserved_by) == ("running", None)
    assert claim(session, one_free, whole) == fresh.id


def test_a_machine_that_died_keeps_nothing(session, new_job, monkeypatch):  # noqa: F811
    monkeypatch.setattr(get_settings(), "reserve_after_seconds", 0.0)
    two = needs(session, new_job(), gpu_bytes=GB, num_gpus=2)
    assert claim(session, machine(SMALL), machine(SMALL, SMALL)) is None
    other, both = machine(SMALL, host="else"), machine(SMALL, SMALL, host="else")
    assert claims.choose(session, other, both) is None
    session.execute(update(Job).values(reserved_until=datetime.now(UTC) - timedelta(seconds=1)))
    chosen = claims.choose(session, other, both)
    session.commit()
    session.refresh(two)
    assert (chosen.key, chosen.fits, two.reserved_by) == (two.id, False, "else")
    held = lifecycle.claim(session, two.id, "w")
    session.commit()
    session.refresh(two)
    assert held.processes == 2 and (two.reserved_by, two.reserved_until) == (None, None)


# The workers' messages ---------------------------------------------------------------------------------------------------


def test_a_worker_that_can_do_nothing_tells_the_others_once(session, new_job):  # noqa: F811
    """A message goes to one worker; where that has not what the job needs, those that may have it would hear of it much later."""
    wire, job = queue.get_redis(), new_job()
    waiting = f"{queue.PREFIX}train"
    wire.delete(waiting, claims.TOLD)
    for number in range(3):
        heartbeats.say_alive("train", 0.0, name=f"worker {number}")
    claims.tell_train_workers(job.id)
    assert wire.llen(waiting) == 2, "one for each of the others"
    wire.delete(waiting)
    claims.tell_train_workers(job.id)
    assert wire.llen(waiting) == 0, "not again within a few seconds"
    wire.delete(claims.TOLD)
    lifecycle.claim(session, job.id, "w")
    session.commit()
    claims.tell_train_workers(job.id)
    assert wire.llen(waiting) == 0, "nothing waits"


# What is asked, and what people see ---------------------------------------------------------------------------------------


@pytest.fixture
def fleet(session):
    """Workers of two machines: one with four GPUs and a label, one without any."""
    heartbeats.get_redis().delete(heartbeats.MACHINES)
    cards = tuple(GpuCard(f"GPU-{n}", 9.0, 24 * GB, "RTX 4090") for n in range(4))
    heartbeats.say_machine(
        Machine(
            cores=8, memory_bytes=64 * GB, gpu_name="RTX 4090", gpu_memory_bytes=24 * GB, gpu_capability=8.9, cards=cards, labels=("lab",)
        ),
        name="gpus",
    )
    heartbeats.say_machine(Machine(cores=8, memory_bytes=16 * GB), name="cpus")
    for name in ("gpus:1", "cpus:1"):
        heartbeats.say_alive("train", 0.0, name=name)
    yield
    heartbeats.get_redis().delete(heartbeats.MACHINES)


def test_a_job_asks_for_a_machine(session, api, client, data, fleet):  # noqa: F811
    order = {"model": "tiny", "training_file": ids.public(ids.FILE, data.file_id)}
    plain = api.post("/v1/fine_tuning/jobs", json=order).json()
    assert plain["resources"]["gpus"] is None and plain["resources"]["labels"] == [] and plain["waits_for"] is None
    assert plain["resources"]["gpu_memory_bytes"] > 2**28 < plain["resources"]["memory_bytes"], "what its estimates say"
    asked = order | {"resources": {"gpus": 2, "gpu": "4090", "labels": ["lab"]}}
    made_ = api.post("/v1/fine_tuning/jobs", json=asked).json()
    told = made_["resources"]
    assert (told["gpus"], told["gpu"], told["labels"], told["memory_bytes"]) == (2, "4090", ["lab"], None)
    assert made_["estimate"]["device"] == "cuda" and plain["estimate"]["device"] == "cpu", "it is planned for what it asks for"
    assert made_["waits_for"] is None
    impossible = api.post("/v1/fine_tuning/jobs", json=order | {"resources": {"gpus": 8}}).json()
    assert impossible["waits_for"].startswith("No train worker can take it: it needs 8 GPUs of one machine")
    assert "4 × RTX 4090 (24 GB)" in impossible["waits_for"] and impossible["expected_start"] is None
    page = client.get(f"/jobs/{impossible['id']}").text
    assert "No train worker can take it" in page and "cpus: CPU, 16 GB" in page
    for wrong, param in (({"gpus": 0}, "resources.gpus"), ({"cards": 1}, "resources.cards"), ({"labels": ["a b"]}, "resources.labels.0")):
        refused = api.post("/v1/fine_tuning/jobs", json=order | {"resources": wrong})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param
    on_gpu = api.post("/v1/fine_tuning/jobs", json=order | {"run": {"device": "cuda"}}).json()
    assert on_gpu["resources"]["memory_bytes"] is None, "one that trains on the CPU is no reason to refuse it"


def test_the_form_asks_for_a_machine(session, client, data, fleet):  # noqa: F811
    typed = {
        "model": "tiny",
        "dataset": ids.public(ids.DATASET, data.id),
        "strategy": "lora",
        "resources.gpus": "2",
        "resources.labels": "lab",
    }
    typed |= {"resources.gpu_memory_bytes": "20.5"}
    page = client.get("/jobs/new", params=typed).text
    assert 'id="resources.gpus"' in page and 'value="20.5"' in page and "There are RTX 4090." in page
    assert client.post("/jobs", data=typed, follow_redirects=False).status_code == 303
    job = session.query(Job).one()
    assert (job.num_gpus, job.labels, job.gpu_bytes, job.cpu_bytes) == (2, ["lab"], 20_500_000_000, None)
    again = client.get("/jobs/new", params={"clone": ids.public(ids.JOB, job.id)}).text
    assert 'value="20.5"' in again and 'value="lab"' in again
    assert "resources.gpus cannot be" in client.get("/jobs/new", params=typed | {"resources.gpus": "many"}).text


def test_without_a_choice_the_form_does_not_offer_one(client, data):  # noqa: F811
    heartbeats.get_redis().delete(heartbeats.MACHINES)
    heartbeats.say_machine(Machine(cores=8, memory_bytes=16 * GB), name="cpus")
    assert 'id="resources.gpus"' not in client.get("/jobs/new", params={"dataset": ids.public(ids.DATASET, data.id)}).text


def test_a_job_that_waits_for_kept_cards_says_so(session, api, new_job, fleet):  # noqa: F811
    job = needs(session, new_job(), reserved_by="gpus", reserved_until=datetime.now(UTC) + timedelta(minutes=1))
    assert "gpus keeps every suitable GPU" in api.get(f"/v1/fine_tuning/jobs/{ids.public(ids.JOB, job.id)}").json()["waits_for"]
