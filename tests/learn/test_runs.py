"""Stops that start jobs and evaluations, carried out here with small models: the page shows what they measured."""

from __future__ import annotations

import html
import re
import uuid

import pytest
from sqlalchemy import select

from app.kit import manifest
from app.learn import _text, forgetting, more, reward
from app.models.from_nothing import BlankSize
from app.settings import get_settings
from app.tables import Evaluation, Job, Model, PromptResult, PromptRun, StopVisit
from tests.factories import carry_out, read
from tests.generating import register_tiny
from tests.learn.test_stops import press, shown, visit_of, with_sample
from tests.warm import warm_attempts  # noqa: F401  # a fixture
from tests.worker.training.test_classification import put_encoder

pytestmark = pytest.mark.long


@pytest.fixture
def encoder(session, data_dir, tiny_model) -> Model:
    """A small BERT as a base of everyone's."""
    ref = put_encoder(tiny_model)
    revision = manifest.write(data_dir / ref.path)["revision"]
    model = register_tiny(session, "encoder", "encoder", path=ref.path)
    model.shape, model.revision = ref.shape.model_dump(mode="json"), revision
    session.commit()
    return model


def queued(session) -> list[Job]:
    session.rollback()
    return list(session.scalars(select(Job).where(Job.status == "queued").order_by(Job.created_at)))


def test_three_ways_answer_the_same_rows(client, session, user, data_dir, tiny_registered, encoder):
    from worker.evaluation import prompt_runs as worker_runs

    with_sample(session, user, "bat-or-stick")
    assert press(client, "bat-or-stick").status_code == 303
    (job,), run = queued(session), session.scalars(select(PromptRun)).one()
    worker_runs.work(run.id)
    assert "The three are scored" in shown(client, "bat-or-stick")
    carry_out(session, data_dir, job)
    page, visit = shown(client, "bat-or-stick"), visit_of(session, "bat-or-stick")
    rows = session.scalars(select(PromptResult)).all()
    assert len(rows) == job.evaluation["rows"] == 36, "half of the rows, for both"
    assert page.count('<rect class="between"') == 3 and visit.done_at is not None
    accuracy = job.evaluation["tuned"]["accuracy"]
    assert f"frozen features {accuracy:.0%}" in visit.headline and "3 rules by a person" in page


def test_forgetting_is_measured_and_blended(client, session, user, data_dir, tiny_registered, warm_attempts, monkeypatch):  # noqa: F811
    from worker.evaluation import attempt

    monkeypatch.setattr(forgetting, "RUN", forgetting.RUN | {"max_steps": 8, "eval_steps": 8, "learning_rate": 1e-2, "sample_tokens": 4})
    get_settings().lease_seconds, get_settings().beat_seconds = 3.0, 0.2
    with_sample(session, user, "clinical-notes")
    assert press(client, "forgetting", do="blend").status_code == 409
    press(client, "forgetting")
    (job,) = queued(session)
    carry_out(session, data_dir, job)
    page = shown(client, "forgetting")
    assert "Now blend it" in page and "General text, bits per byte" in page and visit_of(session, "forgetting").done_at is None
    assert press(client, "forgetting", do="blend").status_code == 303
    found = session.scalars(select(Evaluation)).one()
    assert found.spec["rows"] == forgetting.BLEND["rows"] and found.spec["points"] == [0.0, 0.5, 1.0]
    attempt.work(found.id)
    page, visit = shown(client, "forgetting"), visit_of(session, "forgetting")
    assert "Strength as a table" in page and visit.done_at is not None
    before, after = (job.evaluation[side]["loss"] for side in ("base", "tuned"))
    assert f"loss {before:.2f} → {after:.2f}" in visit.headline and after < before


def test_each_step_to_a_reward_has_its_pass_rate(client, session, user, data_dir, tiny_registered, monkeypatch):
    """The tiny model cannot add; that it is trained until it writes the commonest answer gives both steps a rate above zero."""
    some = {"max_steps": 30, "max_tokens_per_step": 512, "learning_rate": 1e-2}
    monkeypatch.setattr(reward, "EXAMPLES", reward.EXAMPLES | some)
    monkeypatch.setattr(reward, "REINFORCED", reward.REINFORCED | {"max_steps": 2, "learning_rate": 1e-4})
    monkeypatch.setattr(reward, "DRAWN", reward.DRAWN | {"check_prompts": 24, "despite_check": True})
    with_sample(session, user, "small-sums")
    assert press(client, "reward", do="reward").status_code == 409
    assert press(client, "reward").status_code == 303
    (job,) = queued(session)
    carry_out(session, data_dir, job, live=True)
    page = shown(client, "reward")
    assert "Now the second button" in page and page.count('<rect class="between"') == 2 and visit_of(session, "reward").done_at is None
    assert press(client, "reward", do="reward").status_code == 303
    (second,) = queued(session)
    assert second.spec["task"] == "reinforcement" and second.spec["model"]["adapters"], "it goes on from the model of the examples"
    carry_out(session, data_dir, second, live=True)
    page, visit = shown(client, "reward"), visit_of(session, "reward")
    base, examples = reward.pass_rates(session, job)[0], reward.pass_rates(session, job)[-1]
    before, after = reward.pass_rates(session, second)[0], reward.pass_rates(session, second)[-1]
    assert examples == before and examples.rows == 24, "the same rows, greedily, by the same model"
    assert page.count('<rect class="between"') == 3 and visit.done_at is not None
    assert "The check before the run: 576 answers" in page, "to 24 prompts all six answers agree, so four times as many are asked"
    assert visit.headline == (f"as it is {base.share:.0%}, after worked examples {examples.share:.0%}, after the reward {after.share:.0%}")


def test_two_curves_are_drawn_from_runs(client, session, user, data_dir, encoder, monkeypatch):
    monkeypatch.setattr(more, "SIZES", (BlankSize(32, 1), BlankSize(64, 2)))
    monkeypatch.setattr(more, "STEPS", more.STEPS | {"max_steps": 12, "eval_steps": 12})
    with_sample(session, user, "shop-questions")
    read(session, _text.dataset(session, user))
    assert press(client, "more").status_code == 303
    jobs = queued(session)
    assert len(jobs) == 5 and "0 of 5 runs done" in shown(client, "more")
    for job in jobs:
        carry_out(session, data_dir, job, live=True)
    page, visit = shown(client, "more"), visit_of(session, "more")
    assert page.count('<polyline class="line-1"') == 2 and visit.done_at is not None
    small, large = (float(n) for n in re.search(r"loss (\d\.\d+) → (\d\.\d+)", visit.headline).groups())
    assert large < small < 5.6
    session.delete(session.get_one(StopVisit, visit.id))
    session.commit()
    assert "Your result" not in html.unescape(client.get("/learn/more").text) and uuid.UUID(visit.refs["comparison"])
