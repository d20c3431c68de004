"""Searches: ordered, led on by what their trials say, ended, through the service, `/v1/searches` and the pages."""

from __future__ import annotations

import math

import pytest
from sqlalchemy import func, select, update

from app import relay
from app.events import Evaluated, Failed
from app.jobs import service as jobs
from app.jobs.lifecycle import stopped
from app.kit import ids
from app.models import service as models
from app.searches import service as searches
from app.tables import AuditLog, Comparison, Job, MachineUse, Model, Outbox, User
from tests import lives
from tests.routes.test_comparisons import chats, kinds, words

__all__ = ["chats", "kinds"]


def body(dataset, **more) -> dict:
    return {"model": "tiny", "dataset_id": ids.public(ids.DATASET, dataset.id), "trials": 9, "epochs": [6], **more}


def create(session, user, order: dict) -> Comparison:
    found = searches.create(session, user, searches.read_order(order))
    session.commit()
    return found


def loss_of(job: Job, step: int) -> float:
    """Falls with the steps, to a bottom that is lowest at the learning rate 3e-4."""
    rate = job.trial["params"]["learning_rate"]
    return 1 + abs(math.log10(rate / 3e-4)) + 1 / (1 + step)


def train(session, job: Job, loss=loss_of) -> None:
    """A claim of a trial by a worker, as its supervisor would record it: to where it pauses by itself, or to its end."""
    life = lives.Life(session, job).claim()
    total, begin = job.estimate["steps"], job.step
    life.say(lives.started(total, resumed_from=begin or None))
    to = job.pause_at or total
    every = job.spec["run"].get("eval_steps") or total
    for step in range(begin + 1, to + 1):
        if step % every == 0 or step == total:
            life.say(next(lives.steps(step, step, total, every=10**6)), Evaluated(step=step, loss=loss(job, step), best=True))
    if job.pause_at:
        stopped(session, life.held, to)
        session.commit()
    else:
        life.finish(to)
    session.refresh(job)


def play(session, search: Comparison, loss=loss_of, most: int = 40) -> list[Job]:
    """Train whatever is queued and take the next decisions, until the search ends. Gives its jobs."""
    for _ in range(most):
        waiting = session.scalars(select(Job).where(Job.comparison_id == search.id, Job.status == "queued").order_by(Job.created_at)).all()
        for job in waiting:
            train(session, job, loss)
        searches.advance(session, search.id)
        session.commit()
        session.expire_all()
        if searches.state_of(search)["status"] != "running":
            return session.scalars(select(Job).where(Job.comparison_id == search.id).order_by(Job.created_at)).all()
    raise AssertionError("the search does not end")


# From the order to the winner -----------------------------------------------------------------------------------------


def test_a_search_halves_its_trials_and_repeats_the_best_with_another_seed(api, session, user, tiny_registered, chats):
    found = create(session, user, body(chats, learning_rate=[1e-5, 1e-2], seed=5))
    made = play(session, found)
    public = ids.public(ids.SEARCH, found.id)
    said = api.get(f"/v1/searches/{public}").json()
    assert (said["status"], said["score"]["key"], len(said["data"])) == ("succeeded", "loss", 10)
    firsts, again = said["data"][:9], said["data"][9]
    assert sorted(entry["rung"] for entry in firsts) == [1] * 6 + [2] * 2 + [3], "of nine three go on, then one"
    best = min(firsts, key=lambda entry: abs(math.log(entry["params"]["learning_rate"] / 3e-4)))
    assert (said["winner"], said["best"], again["repeats"]) == (best["number"],) * 3 and best["status"] == "succeeded"
    assert "with another seed it was run again" in said["says"] and again["seed"] != best["seed"] == 5
    trial, repetition = made[best["number"] - 1], made[9]
    same = {name: value for name, value in trial.spec["run"].items() if name != "seed"}
    assert same == {name: value for name, value in repetition.spec["run"].items() if name != "seed"}
    assert repetition.spec["split"] == {"method": "random", "column": None, "seed": 5}, "its validation rows are those of the others"
    pruned = [entry for entry in firsts if entry["status"] == "pruned"]
    assert [entry["rung"] for entry in pruned].count(1) == 6 and [entry["rung"] for entry in pruned].count(2) == 2
    early = next(entry["reason"] for entry in pruned if entry["rung"] == 1)
    assert early.startswith("Place ") and "of 9 after step 6: validation loss" in early and "the best 3 went on, with" in early
    assert {job.attempt for job in made} == {1, 2, 3}, "a trial that goes on is the same job, claimed again"
    kept = {model.name for model in session.scalars(select(Model).where(Model.kept, Model.job_id.is_not(None)))}
    assert kept <= {best["model"], again["model"]} and len(kept) == 1, "the better of the winner's two models"
    assert jobs.tuned_model(session, trial) is not None
    assert {row for (row,) in session.execute(select(Outbox.task).where(Outbox.key == found.id))} == {"luthier.search"}


def test_a_search_that_died_at_any_point_goes_on_as_if_nothing_had_happened(session, user, tiny_registered, chats):
    """All that it knows is in Postgres: a decision that is taken twice changes nothing, and the reaper finds one whose message was lost."""
    found = create(session, user, body(chats, trials=4, seed=2))
    calm = create(session, user, body(chats, trials=4, seed=2))
    told = [job.order for job in play(session, calm)]
    for _ in range(40):
        for job in session.scalars(select(Job).where(Job.comparison_id == found.id, Job.status == "queued")).all():
            train(session, job)
        session.query(Outbox).delete()
        session.commit()
        relay._reap(session)
        before = session.scalar(select(func.count()).select_from(Job))
        assert not searches.advance(session, found.id), "the reaper took every decision"
        assert session.scalar(select(func.count()).select_from(Job)) == before
        session.commit()
        session.expire_all()
        if searches.state_of(found)["status"] != "running":
            break
    mine = [job.order for job in session.scalars(select(Job).where(Job.comparison_id == found.id).order_by(Job.created_at))]
    assert searches.state_of(found)["winner"] is not None
    assert [(one["strategy"], one["run"]) for one in mine] == [(one["strategy"], one["run"]) for one in told]


def test_trials_differ_in_what_is_searched_alone(session, user, tiny_registered, chats):
    found = create(session, user, body(chats, trials=6, strategies=["lora", "ia3"], rank=[2, 4], epochs=[12, 24], run={"max_length": 64}))
    made = play(session, found)[:6]
    searched = ("learning_rate", "epochs", "eval_steps")
    assert len({str({k: v for k, v in sorted(job.spec["run"].items()) if k not in searched}) for job in made}) == 1
    assert {job.spec["strategy"]["name"] for job in made[:2]} == {"lora", "ia3"}, "each method's own settings first"
    assert {job.spec["run"]["epochs"] for job in made} <= {12.0, 24.0} and made[0].spec["run"]["max_length"] == 64
    assert {job.spec["strategy"].get("rank") for job in made} <= {2, 4, None}
    for job in made:
        first, second = job.trial["rungs"]
        assert second == 3 * first and job.spec["run"]["eval_steps"] == first, "rungs are evaluations"
        assert job.spec["run"]["early_stopping_patience"] == 0


def test_the_time_is_machine_time_and_ends_the_search(api, session, user, tiny_registered, chats):
    found = create(session, user, body(chats, minutes=600))
    for job in session.scalars(select(Job).where(Job.comparison_id == found.id)).all():
        train(session, job)
    session.execute(update(MachineUse).values(started_at=MachineUse.started_at - func.make_interval(0, 0, 0, 0, 11)))
    session.commit()
    searches.advance(session, found.id)
    session.commit()
    said = api.get(f"/v1/searches/{ids.public(ids.SEARCH, found.id)}").json()
    assert said["status"] == "succeeded" and said["winner"] is None and said["seconds"] > 600 * 60
    assert "The time was over before a trial had ended" in said["says"]
    assert said["data"][0]["status"] == "stopped" and said["data"][0]["reason"] == "The time of the search was over."


def test_a_diverged_trial_is_left_out_and_three_end_the_search(session, user, tiny_registered, chats):
    found = create(session, user, body(chats, trials=5))
    for _ in range(3):
        job = session.scalars(select(Job).where(Job.comparison_id == found.id, Job.status == "queued")).one()
        lives.Life(session, job).claim().say(lives.started(9)).fail(Failed(kind="diverged", message="The loss is NaN."))
        searches.advance(session, found.id)
        session.commit()
        session.expire_all()
    state = searches.state_of(found)
    assert state["status"] == "failed" and state["why"].startswith("No trial reached its end.") and "The loss is NaN." in state["why"]
    assert session.scalar(select(func.count()).select_from(Job)) == 3


def test_a_trial_that_a_person_resumes_at_its_rung_goes_on_to_the_end(session, user, tiny_registered, chats):
    create(session, user, body(chats))
    job = session.scalars(select(Job)).one()
    train(session, job)
    assert (job.status, job.step) == ("paused", job.pause_at)
    jobs.resume(session, user, job.id)
    session.commit()
    assert job.pause_at is None
    train(session, job)
    assert job.status == "succeeded"


def test_a_limit_of_the_person_makes_it_wait(session, user, tiny_registered, chats, monkeypatch):
    from app import limits

    found = create(session, user, body(chats))
    train(session, session.scalars(select(Job)).one())
    real = limits.check

    def full(*_, **__):
        raise limits.LimitReached("You may have no more queued runs.", hint="Wait.", retry_after_seconds=1)

    monkeypatch.setattr(limits, "check", full)
    assert searches.advance(session, found.id) and not searches.advance(session, found.id), "said once"
    assert searches.state_of(found)["waits"].startswith("You may have no more") and searches.state_of(found)["status"] == "running"
    monkeypatch.setattr(limits, "check", real)
    searches.advance(session, found.id)
    assert "waits" not in searches.state_of(found) and session.scalar(select(func.count()).select_from(Job)) == 2


# What is refused, and whose it is --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"strategies": ["magic"]}, "strategies.0.name", "magic"),
        ({"strategies": ["bitfit"]}, "strategies", "No method of this search fits"),
        ({"trials": 1}, "trials", "at least 2"),
        ({"minutes": 0}, "minutes", "greater than 0"),
        ({"learning_rate": [1e-3, 1e-4]}, "learning_rate", "is empty"),
        ({"rank": [4, 4]}, "rank", "named twice"),
        ({"rank": [2000]}, "strategy.rank", "1024"),
        ({"run": {"learning_rate": 1e-3}}, "run.learning_rate", "one value or the ends of a range"),
        ({"run": {"eval_steps": 5}}, "run.eval_steps", "decides eval_steps itself"),
        ({"run": {"validation_fraction": 0}}, "run.validation_fraction", "Without validation rows"),
        ({"run": {"max_steps": 50}}, "epochs", "Omit one of the two"),
        ({"run": {"colour": "red"}}, "run.colour", "no setting"),
        ({"colour": "red"}, "colour", "no setting"),
        ({"model": None}, "model", "missing"),
        ({"model": "gone"}, "model", "gone"),
        ({"dataset_id": None}, "training_file", "No data was named"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_queued(api, session, user, tiny_registered, chats, change, param, says):
    answer = api.post("/v1/searches", json={**body(chats), **change})
    error = answer.json()["error"]
    assert answer.status_code in (400, 404) and error["param"] == param and says in error["message"], answer.text
    assert jobs.list_(session, user) == [] and session.scalars(select(Comparison)).all() == []


def test_a_method_without_steps_is_skipped_with_the_reason(api, session, tiny_registered, kinds):
    said = api.post("/v1/searches", json={**body(kinds), "strategies": ["lora", "feature_extraction"], "epochs": None}).json()
    assert [one["strategy"] for one in said["refused"]] == ["feature_extraction"] and "no steps to pause at" in said["refused"][0]["reason"]
    assert said["score"] == {"key": "accuracy", "title": "Accuracy", "less": False}
    only = api.post("/v1/searches", json={**body(kinds), "strategies": ["feature_extraction"]}).json()["error"]
    assert only["code"] == "no_strategy_fits"


def test_a_plan_queues_nothing_and_fits_the_minutes(api, session, user, tiny_registered, chats):
    whole = api.post("/v1/searches/plan", json=body(chats, trials=30)).json()
    assert (whole["trials"], whole["rungs"], whole["epochs"]) == (30, [30, 10, 4], [6.0])
    short = api.post("/v1/searches/plan", json=body(chats, trials=30, minutes=whole["seconds"] / 120)).json()
    assert short["trials"] < 30 and short["seconds"] <= whole["seconds"] / 2
    assert jobs.list_(session, user) == []


def test_the_same_key_orders_once_and_a_search_is_no_comparison(api, session, user, tiny_registered, chats):
    headers = {"idempotency-key": "k"}
    first, again = (api.post("/v1/searches", json=body(chats), headers=headers).json() for _ in range(2))
    assert first["id"] == again["id"] and len(jobs.list_(session, user)) == 1
    assert [one["id"] for one in api.get("/v1/searches").json()["data"]] == [first["id"]]
    assert api.get("/v1/comparisons").json()["data"] == []
    assert session.execute(select(AuditLog.type, AuditLog.object_id)).all() == [("search.created", first["id"])]
    key = ids.parse(ids.SEARCH, first["id"])
    assert api.get(f"/v1/comparisons/{ids.public(ids.COMPARISON, key)}").status_code == 404
    assert api.patch(f"/v1/searches/{first['id']}", json={"name": "Another"}).json()["name"] == "Another"


def test_cancelling_stops_its_runs_and_only_then_it_can_be_deleted(api, session, user, tiny_registered, chats):
    public = api.post("/v1/searches", json=body(chats)).json()["id"]
    assert api.delete(f"/v1/searches/{public}").json()["error"]["code"] == "wrong_state"
    train(session, session.scalars(select(Job)).one())
    said = api.post(f"/v1/searches/{public}/cancel").json()
    assert said["status"] == "cancelled" and said["data"][0]["status"] == "cancelled" and said["ended_at"]
    assert api.post(f"/v1/searches/{public}/cancel").json() == said, "a second cancel changes nothing"
    assert not searches.advance(session, ids.parse(ids.SEARCH, public))
    session.commit()
    assert api.delete(f"/v1/searches/{public}").json()["deleted"] and api.get(f"/v1/searches/{public}").status_code == 404
    assert len(jobs.list_(session, user)) == 1, "runs stay"


def test_another_persons_search_is_not_there(api, client, session, user, tiny_registered, chats):
    public = ids.public(ids.SEARCH, create(session, user, body(chats)).id)
    other = User(name="somebody else")
    session.add(other)
    session.flush()
    session.execute(update(Comparison).values(owner_id=other.id, project_id=other.id))
    session.commit()
    assert api.get("/v1/searches").json()["data"] == []
    for method, path in (("get", ""), ("post", "/cancel"), ("delete", "")):
        assert getattr(api, method)(f"/v1/searches/{public}{path}").status_code == 404
    for method, path in (("get", ""), ("post", "/cancel"), ("post", "/delete")):
        assert getattr(client, method)(f"/searches/{public}{path}").status_code == 404


# Pages ----------------------------------------------------------------------------------------------------------------


def test_the_form_estimates_orders_and_the_page_shows_the_trials(client, session, user, tiny_registered, chats):
    key = ids.public(ids.DATASET, chats.id)
    first = client.get("/searches/new", params={"dataset": key})
    assert "Start the search" in words(first) and 'id="start">' in first.text and first.text.count("Recommended") == 1
    wrong = client.get("/searches/new", params={"dataset": key, "rank": "4, x", "strategy": "lora", "shown": "yes"})
    assert "4, x is no list of numbers" in words(wrong) and 'id="start" disabled' in wrong.text
    none = client.get("/searches/new", params={"dataset": key, "shown": "yes"})
    assert "Choose at least one method" in words(none)
    sent = {
        "dataset": key,
        "model": "tiny",
        "strategy": "lora",
        "trials": "3",
        "epochs": "6",
        "learning_rate": "0.00001, 0.01",
        "key": "k",
        "shown": "yes",
    }
    follows = client.get("/searches/new", params=sent, headers={"hx-request": "true"})
    assert "trials=3" in follows.headers["hx-replace-url"]
    ordered = client.post("/searches", data=sent, follow_redirects=False)
    again = client.post("/searches", data=sent, follow_redirects=False)
    assert ordered.status_code == 303 and again.headers["location"] == ordered.headers["location"], "a double click begins one"
    search = searches.newest(session, user, 1)[0]
    play(session, search)
    page = client.get(ordered.headers["location"])
    assert "is the winner" in words(page) and "repeats trial" in words(page) and "Place" in words(page)
    clone = page.text.split('href="/jobs/new?clone=')[1].split('"')[0]
    form = client.get(f"/jobs/new?clone={clone}")
    best = next(job for job in session.scalars(select(Job)) if ids.public(ids.JOB, job.id) == clone)
    assert f'value="{best.trial["params"]["rank"]}"' in form.text, "its settings are carried into a new run"
    assert "is the winner" in words(client.get("/searches"))
    assert "Part of the search" in words(client.get(f"/jobs/{clone}"))
    assert models.offered(session, user)[0].name
