"""Evaluations as jobs: ordered, claimed, run in a real child, killed, cancelled, taken over; and what they find."""

from __future__ import annotations

import math
import threading

import psutil
import pytest
from sqlalchemy import select, text, update

from app import leases, queue
from app.db import transaction
from app.errors import BadField, NotFound
from app.evaluation import service as evaluations
from app.kit import ids
from app.models.dependants import dependants
from app.settings import get_settings
from app.tables import Evaluation, Outbox
from tests import warm
from tests.conftest import wait_until
from tests.factories import make_dataset, tune
from tests.routes.test_advice import labelled  # noqa: F401  a fixture
from tests.warm import warm_attempts  # noqa: F401  a fixture
from worker.evaluation import attempt as evaluation_attempt


@pytest.fixture
def data(session, user, data_dir):
    get_settings().lease_seconds, get_settings().beat_seconds = 3.0, 0.2
    return make_dataset(session, user, data_dir)


def order(session, user, model, dataset, **more) -> Evaluation:
    body = {"model": model.name, "dataset_id": ids.public(ids.DATASET, dataset.id), **more}
    made = evaluations.create(session, user, evaluations.read_order(body))
    session.commit()
    return made


def now_of(evaluation: Evaluation) -> Evaluation:
    with transaction() as session:
        return session.get_one(Evaluation, evaluation.id)


def children() -> list[psutil.Process]:
    alive = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    forked = warm.alive("worker.evaluation.process")
    return [*forked, *(p for p in alive if "-m worker.evaluation.process" in " ".join(p.cmdline()))]


def in_thread(evaluation, going_down=lambda: False) -> threading.Thread:
    thread = threading.Thread(target=evaluation_attempt.work, args=(evaluation.id, going_down), daemon=True)
    thread.start()
    wait_until(children, what="the evaluating process")
    return thread


@pytest.mark.long
def test_a_tuned_model_and_its_base_on_the_rows_its_job_held_out(session, user, data_dir, tiny_registered, data):
    job, tuned = tune(session, user, data_dir, tiny_registered, data, forgetting=True)
    made = order(session, user, tuned, data, answers=3, answer_tokens=8)
    assert session.scalars(select(Outbox.task).where(Outbox.key == made.id)).all() == [queue.EVALUATE]
    assert made.spec["part"] == "validation" and made.spec["base"]["name"] == "tiny" and not made.spec["note"]
    cached = sorted((data_dir / "features").glob("probe-*.json"))
    assert len(cached) == 2, "of the base and of what became of it"
    for path in cached:
        path.unlink()  # measured again, they are cached where the job did
    evaluation_attempt.work(made.id)
    assert sorted((data_dir / "features").glob("probe-*.json")) == cached
    done = now_of(made)
    assert done.status == "succeeded", done.error
    found = done.result
    # The job itself scored the same rows when it ended: the two must agree.
    for mine, its in (("base", "base"), ("scores", "tuned")):
        assert found[mine]["loss"] == pytest.approx(job.evaluation[its]["loss"], rel=1e-4), mine
        assert found[mine]["token_accuracy"] == pytest.approx(job.evaluation[its]["token_accuracy"])
    assert found["scores"]["loss"] < found["base"]["loss"]
    assert found["scores"]["perplexity"] == pytest.approx(math.exp(found["scores"]["loss"]))
    assert {"exact_match", "rouge_l", "chrf", "bits_per_byte"} <= found["scores"].keys() and (found["answers"], found["unanswered"]) == (
        3,
        0,
    )
    low, high = found["scores"]["intervals"]["exact_match"]
    assert 0 <= low <= found["scores"]["exact_match"] <= high <= 1 and high - low > 0.4, "three answers say little"
    assert found["forgetting"]["change"] == pytest.approx(job.forgetting["change"], rel=1e-3)
    gains = [row["tuned_loss"] - row["base_loss"] for row in found["best"]]
    assert gains == sorted(gains) and len(found["best"]) == 2 and found["best"][0]["tuned_answer"] is not None
    assert not (data_dir / "evaluations" / str(done.id)).exists()
    evaluation_attempt.work(made.id)  # the same message again
    assert now_of(made).fence == 1 and not children()


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_a_base_is_scored_alone_and_all_rows_of_learnt_data_are_said_to_be_learnt(session, user, data_dir, tiny_registered, data):
    made = order(session, user, tiny_registered, data, answers=0, rows=5)
    evaluation_attempt.work(made.id)
    found = now_of(made).result
    assert found["rows"] == 5 and found["base"] is None and found["forgetting"] is None
    worst, best = found["worst"][0]["tuned_loss"], found["best"][0]["tuned_loss"]
    assert worst > best
    _, tuned = tune(session, user, data_dir, tiny_registered, data, epochs=1)
    assert "trained on some or all of these rows" in order(session, user, tuned, data, part="all").spec["note"]
    assert not order(session, user, tuned, make_dataset(session, user, data_dir, rows=9)).spec["note"]


@pytest.mark.usefixtures("warm_attempts")
def test_a_killed_process_is_tried_again_and_given_up_at_the_third_death(session, user, tiny_registered, data):
    made = order(session, user, tiny_registered, data)
    for deaths in (1, 2, 3):
        thread = in_thread(made)
        [p.kill() for p in children()]
        thread.join(20)
        row = now_of(made)
        assert row.deaths == deaths and row.status == ("queued" if deaths < 3 else "failed")
    assert row.error["code"] == "crashed" and "SIGKILL" in row.error["message"] and row.error["hint"]
    assert len(session.scalars(select(Outbox.id).where(Outbox.key == made.id)).all()) == 3


@pytest.mark.long
def test_cancelling_ends_the_process_and_a_leaving_worker_gives_it_back(session, user, tiny_registered, data):
    made = order(session, user, tiny_registered, data)
    thread = in_thread(made)
    with transaction() as other:
        assert evaluations.cancel(other, user, made.id).status == "cancelled"
    thread.join(20)
    assert not thread.is_alive() and not children() and now_of(made).status == "cancelled"

    second, leaving = order(session, user, tiny_registered, data), []
    assert second.id != made.id
    thread = in_thread(second, lambda: bool(leaving))
    leaving.append(True)
    thread.join(20)
    row = now_of(second)
    assert (row.status, row.deaths) == ("queued", 0) and not children()
    evaluation_attempt.work(second.id)
    assert now_of(second).status == "succeeded"


def test_only_one_holds_it_and_a_silent_one_is_taken_over(session, user, tiny_registered, data):
    made = order(session, user, tiny_registered, data)
    assert order(session, user, tiny_registered, data).id == made.id  # an equal one that waits is not ordered twice
    first = evaluations.claim(session, made.id)
    session.commit()
    assert first is not None and evaluations.claim(session, made.id) is None and evaluations.heartbeat(session, first, 0.5, "reading")
    session.commit()
    assert evaluations.reap(session) == {"lapsed": 0, "announced": 0}
    session.execute(update(Evaluation).values(lease_until=leases.OVER))
    session.execute(text("UPDATE outbox SET sent_at = clock_timestamp() - interval '1 hour'"))
    session.commit()
    second = evaluations.claim(session, made.id)
    session.commit()
    assert second is not None and second.fence == first.fence + 1 and second.deaths == 1
    assert not evaluations.heartbeat(session, first, 0.9, None) and not evaluations.finish(session, first, result={})
    assert evaluations.finish(session, second, result={"scores": {"loss": math.nan}})
    session.commit()
    assert now_of(made).result == {"scores": {"loss": "NaN"}}
    lost = order(session, user, tiny_registered, data)
    session.execute(text("DELETE FROM outbox"))
    assert evaluations.reap(session)["announced"] == 1 and session.scalars(select(Outbox.key)).all() == [lost.id]


@pytest.mark.usefixtures("warm_attempts")
def test_a_try_that_ends_too_late_leaves_the_folder_of_the_next_one_alone(session, user, data_dir, tiny_registered, data):
    get_settings().beat_seconds = 100.0  # it beats at its start, and learns only at its end that it was taken over
    made = order(session, user, tiny_registered, data, rows=5, answers=0)
    thread = in_thread(made)
    wait_until(lambda: now_of(made).fence == 1, what="its claim")
    with transaction() as other:
        other.execute(update(Evaluation).where(Evaluation.id == made.id).values(fence=2))
    next_try = data_dir / "evaluations" / str(made.id) / "a2"
    next_try.mkdir(parents=True)
    thread.join(60)
    assert not thread.is_alive() and now_of(made).status == "running" and now_of(made).result is None
    assert next_try.is_dir() and not next_try.with_name("a1").exists()


@pytest.mark.usefixtures("warm_attempts")
def test_a_fault_of_the_data_is_told_with_its_hint(session, user, data_dir, tiny_registered, data):
    (data_dir / data.rows_path).unlink()
    made = order(session, user, tiny_registered, data)
    evaluation_attempt.work(made.id)
    row = now_of(made)
    assert row.status == "failed" and "are gone" in row.error["message"] and "Read the dataset again" in row.error["hint"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "blend"}, "not fine-tuned here"),
        ({"model": "tiny@0.5"}, "not fine-tuned here"),
        ({"model": "tiny@1.5"}, "between 0"),
        ({"dataset_id": None}, "No data was named"),
        ({"rows": 0}, "rows"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_orders_that_cannot_be(session, user, tiny_registered, data, change, says):
    body = {"model": "tiny", "dataset_id": ids.public(ids.DATASET, data.id)} | change
    with pytest.raises(BadField, match=says):
        evaluations.create(session, user, evaluations.read_order(body))


def test_a_generic_base_has_no_labels_and_another_persons_is_not_there(session, user, tiny_registered, data):
    from app.tables import User

    data.task = "classification"
    session.commit()
    with pytest.raises(BadField, match="not a classifier"):
        order(session, user, tiny_registered, data)
    data.task = "generation"
    made = order(session, user, tiny_registered, data)
    other = User(name="somebody else")
    session.add(other)
    session.commit()
    with pytest.raises(NotFound):
        evaluations.get(session, other, made.id)
    assert dependants(session, tiny_registered).reasons[-1].startswith("An evaluation")


@pytest.mark.usefixtures("warm_attempts")
def test_a_classifier_on_the_rows_its_job_held_out(session, user, data_dir, tiny_registered, labelled):  # noqa: F811
    job, tuned = tune(session, user, data_dir, tiny_registered, labelled, {"name": "feature_extraction"}, validation_fraction=0.3)
    assert tuned.labels == ["a", "b", "c"]
    made = order(session, user, tuned, labelled)
    evaluation_attempt.work(made.id)
    done = now_of(made)
    assert done.status == "succeeded", done.error
    found, told = done.result, job.evaluation
    assert found["rows"] == told["rows"] and sum(map(sum, found["scores"]["confusion"])) == found["rows"]
    for name in ("accuracy", "macro_f1", "log_loss", "calibration_error"):
        assert found["scores"][name] == pytest.approx(told["tuned"][name], abs=1e-4), name
    assert found["base"]["accuracy"] == pytest.approx(told["base"]["accuracy"])
    with pytest.raises(BadField, match="not available for classifiers"):
        order(session, user, tuned, labelled, kind="blend")
    with pytest.raises(BadField, match="generates no text"):
        order(session, user, tuned, make_dataset(session, user, data_dir))
