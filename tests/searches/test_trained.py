"""A search with real trainers: a trial that pauses at its rungs ends with the weights of a run that never paused."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import select, update

from app.db import transaction
from app.kit import ids
from app.searches import service as searches
from app.searches import table
from app.settings import get_settings
from app.tables import Event, Job, Model
from tests.factories import make_dataset
from tests.warm import warm_attempts  # noqa: F401  # a fixture
from worker import tasks
from worker.supervision import job_turn


def queued(search: uuid.UUID) -> list[uuid.UUID]:
    with transaction() as session:
        return list(session.scalars(select(Job.id).where(Job.comparison_id == search, Job.status == "queued").order_by(Job.created_at)))


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_trials_pause_where_they_are_compared_and_go_on_exactly(session, user, data_dir, tiny_registered):
    get_settings().beat_seconds = 0.2
    dataset = make_dataset(session, user, data_dir)
    run = {"max_tokens_per_step": 128, "forgetting": False, "row_losses": False, "precision": "fp32"}
    order = {
        "model": "tiny", "dataset_id": ids.public(ids.DATASET, dataset.id), "trials": 3, "epochs": [24], "run": run, "seed": 3,
        "learning_rate": [1e-4, 3e-2],
    }  # fmt: skip
    search = searches.create(session, user, searches.read_order(order))
    session.commit()
    first = session.scalars(select(Job)).one()
    job_turn.work(first.id)
    session.execute(update(Job).values(status="queued"))  # as if the attempt had died before its end was recorded
    session.commit()
    job_turn.work(first.id)
    session.refresh(first)
    assert (first.status, first.step, first.attempt) == ("paused", first.trial["rungs"][0], 2), "it pauses there again, without a step"
    for _ in range(12):
        for job in queued(search.id):
            job_turn.work(job)
        tasks.search.run(str(search.id))  # the message that a data worker takes
        session.expire_all()
        if searches.state_of(search)["status"] != "running":
            break
    said = table.to_json(session, search)
    assert said["status"] == "succeeded" and said["winner"] is not None, said
    best = next(entry for entry in said["data"] if entry["number"] == said["winner"])
    winner = session.get_one(Job, ids.parse(ids.JOB, best["job"]))
    steps = {e.data["step"] for e in session.scalars(select(Event).where(Event.job_id == winner.id, Event.type == "stopped"))}
    assert winner.attempt - (winner.id == first.id) == 3 and steps - {None} == set(winner.trial["rungs"]), (
        "it paused at its rungs, and nowhere else"
    )
    taken = [
        e.data["step"] for e in session.scalars(select(Event).where(Event.job_id == winner.id, Event.type == "step").order_by(Event.id))
    ]
    assert taken == [*range(1, winner.total_steps + 1)], "no step was taken twice"
    assert all(e.data["exact"] for e in session.scalars(select(Event).where(Event.job_id == winner.id, Event.type == "started")))

    calm = Job(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, name="calm", spec=winner.spec, model_id=winner.model_id,
        dataset_id=winner.dataset_id, order=winner.order,
    )  # fmt: skip
    session.add(calm)
    session.commit()
    job_turn.work(calm.id)
    with transaction() as fresh:
        first, second = (fresh.scalars(select(Model).where(Model.job_id == job.id)).one() for job in (winner, calm))
    assert first.adapter_sha256 == second.adapter_sha256
