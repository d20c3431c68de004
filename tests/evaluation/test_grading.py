"""Graders in evaluations: means, intervals and rows, the base beside the fine-tuned model, and judges that are away."""

from __future__ import annotations

import random

import pytest
from scipy import stats as scipy_stats
from sqlalchemy import select

from app import graders
from app.errors import BadField, Unavailable
from app.evaluation import grading
from app.graders import Reply
from app.kit import ids, stats
from app.tables import Dataset, Evaluation, TokenUse
from tests.evaluation.test_service import data, now_of, order  # noqa: F401  fixtures
from tests.factories import make_dataset, tune
from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401
from tests.warm import warm_attempts  # noqa: F401  a fixture
from worker.evaluation import attempt as evaluation_attempt

SAME = {"type": "string_check", "name": "same", "input": "{{sample.output_text}}", "operation": "eq", "reference": "{{item.reference}}"}
SHORT = {"type": "length", "name": "short", "unit": "words", "max": 3}
ABSENT = {"type": "string_check", "name": "absent", "input": "{{item.nothing}}", "operation": "eq", "reference": "x"}
CODE = {"type": "python", "name": "code", "source": "def grade(sample, item):\n    return len(set(sample['output_text'])) / 1000"}
JUDGE = {"type": "score_model", "name": "judge", "model": "judge", "input": [{"role": "user", "content": "{{sample.output_text}}"}]}


def test_the_quantile_of_student_is_that_of_scipy():
    for freedom in (4, 5, 10, 30, 1000):
        assert stats.t_quantile(freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), rel=1e-3)


def test_a_paired_interval_covers_the_difference_and_few_rows_tell_nothing():
    assert stats.paired([0.0] * 4, [1.0] * 4) is None
    low, high = stats.paired([0.0] * 6 + [1.0], [1.0] * 6 + [1.0])
    assert 0 < low < 6 / 7 < high <= 1
    draw, covered = random.Random(1), 0
    for _ in range(400):
        one = [draw.random() for _ in range(12)]
        other = [value + draw.gauss(0.1, 0.2) for value in one]
        low, high = stats.paired(one, other)
        covered += low <= 0.1 <= high
    assert 0.92 < covered / 400 < 0.98


def rows(count: int, base: str | None = "no"):
    return [
        {"line": n, "item": {"prompt": f"{n}?", "reference": "yes"}, "base": base, "tuned": "yes" if n % 4 else "no"} for n in range(count)
    ]


def measured(*given, answer=graders.no_models, count=20, base="no"):
    return grading.measure([graders.read(one) for one in given], rows(count, base), answer)


def test_means_intervals_and_every_row():
    found = measured(SAME, SHORT)
    same, short = found["graders"]
    assert (same["rows"], same["failed"], same["score"], same["base"]) == (20, 0, 0.75, 0)
    assert same["interval"] == stats.wilson(15, 20) and same["difference"] == stats.paired_shares(0, 15, 0, 5)
    assert short["score"] == short["base"] == 1 and short["difference"][0] <= 0 <= short["difference"][1]
    first, second = found["graded"][:2]
    assert first["scores"]["same"] == {"base": 0, "tuned": 0, "error": None} and second["scores"]["same"]["tuned"] == 1
    assert (second["base_answer"], second["tuned_answer"], second["reference"]) == ("no", "yes", "yes")
    alone = measured(SAME, base=None)["graders"][0]
    assert alone["base"] is alone["difference"] is None and alone["score"] == 0.75


def test_a_row_without_a_score_does_not_count_as_0():
    found = measured(ABSENT, SAME)
    absent, same = found["graders"]
    assert absent["rows"] == 0 and absent["failed"] == 20 and absent["score"] is None and absent["interval"] is None
    assert absent["errors"] == [{"message": "The item has no item.nothing: it has prompt, reference.", "count": 40}]
    assert same["rows"] == 20 and "item.nothing" in found["graded"][0]["scores"]["absent"]["error"]


def test_judges_are_asked_for_both_sides_and_given_up_when_they_are_away():
    found = measured(JUDGE, answer=lambda ask: Reply(text="1" if ask.messages[0]["content"].startswith("yes") else "0", tokens=5))
    assert found["graders"][0]["score"] == 0.75 and found["graders"][0]["tokens"] == 200
    asked = []

    def away(ask):
        asked.append(ask)
        raise Unavailable("No generate worker is running.")

    gone = measured(JUDGE, answer=away)["graders"][0]
    assert gone["score"] is None and gone["failed"] == 20 and "No generate worker" in gone["errors"][0]["message"]
    assert grading.MAX_STRIKES <= len(asked) <= grading.MAX_STRIKES + grading.AT_ONCE


def test_grading_stops_when_it_is_told_to():
    shares = []
    assert grading.measure([graders.read(CODE)], rows(200), graders.no_models, lambda share: shares.append(share) or share < 0.1) is None
    assert shares[-1] < 1


@pytest.fixture
def tuned(session, user, data_dir, tiny_registered, data):  # noqa: F811
    return tune(session, user, data_dir, tiny_registered, data, {"name": "full"}, epochs=30)[1]


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_an_evaluation_with_graders_and_its_page(client, api, session, tuned, data):  # noqa: F811
    saved = api.post("/v1/graders", json={"grader": SAME}).json()
    body = {"model": tuned.name, "dataset_id": ids.public(ids.DATASET, data.id), "graders": [saved["id"], SHORT, CODE], "part": "all"}
    made = api.post("/v1/evaluations", json=body | {"rows": 12, "answer_tokens": 8, "forgetting": False}).json()
    api.patch(f"/v1/graders/{saved['id']}", json={"grader": SHORT | {"name": "another"}})
    evaluation_attempt.work(ids.parse_evaluation(made["id"]))
    done = api.get(f"/v1/evaluations/{made['id']}").json()
    assert done["status"] == "succeeded", done["error"]
    same, short, code = done["result"]["graders"]
    assert [one["name"] for one in (same, short, code)] == ["same", "short", "code"], "as they were when it was ordered"
    assert max(one["score"] for one in (same, short)) > 0.3, done["result"]["graded"]
    assert same["rows"] == 12 and same["base"] == 0 and same["score"] > 0.3 and same["difference"][0] > 0
    assert len(done["result"]["graded"]) == 12
    right = [row["tuned_answer"] == row["reference"] for row in done["result"]["graded"]]
    assert sum(right) / 12 == same["score"] and [row["scores"]["same"]["tuned"] == 1 for row in done["result"]["graded"]] == right
    assert code["failed"] == 0 and code["seconds"] > 0
    page = client.get(f"/evaluations/{made['id']}").text
    assert "Graders" in page and "String check" in page and "Score of every row" in page and ">better<" in page


def test_wrong_orders_name_the_grader(api, session, tiny_registered, data):  # noqa: F811
    body = {"model": "tiny", "dataset_id": ids.public(ids.DATASET, data.id)}

    def refused(**change):
        answer = api.post("/v1/evaluations", json=body | change)
        assert answer.status_code in (400, 404), answer.text
        return answer.json()["error"]

    assert refused(graders=[SAME, SHORT | {"max": None}])["param"] == "graders.1"
    assert refused(graders=[SAME | {"input": "{{no}}"}])["param"] == "graders.0.input"
    assert refused(graders=[SAME, SAME])["param"] == "graders" and refused(graders=["grader-" + "0" * 32])["param"] == "graders.0"
    assert refused(graders=[SAME], answers=0)["param"] == "answers" and refused(graders=[SAME], kind="advice")["param"] == "graders"
    assert refused(graders=[JUDGE])["param"] == "model"
    assert session.query(Evaluation).count() == 0


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_a_judge_in_an_evaluation_is_asked_through_the_generate_worker(session, user, data_dir, tiny_registered, generate_worker):  # noqa: F811
    register_tiny(session, "judge")
    made = order(
        session, user, tiny_registered, make_dataset(session, user, data_dir), graders=[JUDGE], answers=2, answer_tokens=4, forgetting=False
    )
    assert made.spec["judges"][0]["name"] == "judge"
    evaluation_attempt.work(made.id)
    done = now_of(made)
    assert done.status == "succeeded", done.error
    (judged,) = done.result["graders"]
    assert judged["rows"] + judged["failed"] == 2 and all("judge gave" in one["message"] for one in judged["errors"])
    used = session.scalars(select(TokenUse)).one()
    read, written = used.read, used.written
    alone = order(session, user, tiny_registered, session.get_one(Dataset, made.dataset_id), answers=2, answer_tokens=4, forgetting=False)
    evaluation_attempt.work(alone.id)
    session.refresh(used)
    assert written > used.written - written > 0 and read > used.read - read > 0, "the answers, and what the judge read and wrote"


def test_graders_of_one_order_have_names_of_their_own(session, user):
    from app import saved_graders

    with pytest.raises(BadField, match="most"):
        saved_graders.named(session, user, [SAME | {"name": str(n)} for n in range(9)])
