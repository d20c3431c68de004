"""What past runs say of a method: the nearest count, by their median."""

from __future__ import annotations

import pytest

from app.evaluation import experience
from app.evaluation.experience import PastRun, weighed
from app.tables import Job, User
from tests.routes.test_comparisons import chats, create, end
from tests.routes.test_model_comparisons import several, two

__all__ = ["chats", "two"]


def run(strategy: str, gain: float, nearness: int = 2, forgot: float | None = None, metric: str = "loss") -> PastRun:
    return PastRun(strategy, nearness, metric, gain, forgot)


def test_the_nearest_runs_of_a_method_count_by_their_median():
    found = weighed(
        [run("lora", 0.1), run("lora", 0.4, forgot=0.02), run("lora", 0.3), run("lora", 0.9, nearness=1), run("ia3", 0.1, nearness=0)]
    )
    assert (
        found["lora"].text
        == "Measured here: 3 runs on this model and data lowered validation loss by 30.0% (median), with general ability −2.0%."
    )
    assert found["ia3"].text == "Measured here: 1 run on the same task lowered validation loss by 10.0%."
    assert weighed([run("lora", -0.05)])["lora"].text.endswith("raised validation loss by 5.0%.")
    assert weighed([run("lora", 0.12, metric="accuracy")])["lora"].text.endswith("raised accuracy by 12.0 points.")


@pytest.mark.parametrize(
    ("gains", "points"),
    [
        ({"lora": 0.4, "ia3": 0.3}, {"lora": 8, "ia3": 2}),
        ({"lora": 0.4, "ia3": 0.1}, {"lora": 8, "ia3": -2}),
        ({"lora": 0.4, "ia3": -0.1}, {"lora": 8, "ia3": -8}),
        ({"lora": 0.4}, {"lora": 2}),
    ],
)
def test_methods_are_weighed_against_each_other(gains, points):
    found = weighed([run(name, gain) for name, gain in gains.items()])
    assert {name: reason.points for name, reason in found.items()} == points
    elsewhere = weighed([run(name, abs(gain), nearness=0) for name, gain in gains.items()])
    assert {reason.points for reason in elsewhere.values()} == {2}, "other models and data are no contest"


def test_runs_of_the_project_are_read_with_how_near_they_are(session, user, tiny_registered, two, chats):
    found = create(session, user, several(chats, "lora"))
    first, second = session.query(Job).filter(Job.comparison_id == found.id).order_by(Job.created_at).all()
    end(session, first, loss=1.5, memory=1, seconds=1, change=0.01)
    end(session, second, loss=2.4, memory=1, seconds=1)
    here = experience.reasons(session, user, tiny_registered.id, chats, "generation")
    assert here["lora"].text == "Measured here: 1 run on this model and data lowered validation loss by 50.0%, with general ability −1.0%."
    assert experience.reasons(session, user, two.id, chats, "generation")["lora"].text.startswith(
        "Measured here: 1 run on this model and data lowered validation loss by 20.0%"
    )
    assert experience.reasons(session, user, tiny_registered.id, chats, "classification") == {}
    stranger = User(name="somebody else")
    session.add(stranger)
    session.flush()
    assert experience.reasons(session, stranger.work_in(stranger.id), tiny_registered.id, chats, "generation") == {}
