"""Gates of aliases: a model is promoted where paired evaluations show that it is better, the history of moves, and the way back."""

from __future__ import annotations

import random

import pytest
from sqlalchemy import func, select
from starlette.testclient import TestClient

from app.evaluation import gates
from app.evaluation import service as evaluations
from app.kit import ids, stats
from app.models import aliases
from app.tables import AliasMove, AuditLog, Dataset, Evaluation, Model, User
from app.web import auth, project_deletion, projects
from tests.conftest import ORIGIN
from tests.factories import make_dataset, tune
from tests.generating import register_tiny
from tests.warm import warm_attempts  # noqa: F401  a fixture
from worker.evaluation import attempt as evaluation_attempt

SAME = {"type": "string_check", "name": "same", "input": "{{sample.output_text}}", "operation": "eq", "reference": "{{item.reference}}"}


@pytest.fixture
def two(session):
    return register_tiny(session, "tiny"), register_tiny(session, "other")


@pytest.fixture
def data(session, user, data_dir) -> Dataset:
    return make_dataset(session, user, data_dir)


def gate_on(data: Dataset, **more):
    return {"dataset": ids.public(ids.DATASET, data.id), **more}


def scored(session, user, model: Model, data: Dataset, values: dict[int, float], grader: dict | None = None, **more) -> Evaluation:
    """A finished evaluation, as its worker would have left it."""
    body = {"model": model.name, "dataset_id": ids.public(ids.DATASET, data.id), **({"graders": [grader]} if grader else {}), **more}
    made = evaluations.create(session, user, evaluations.read_order(body))
    found = {"row_scores": {"metric": "bits_per_byte", "rows": [[line, value] for line, value in values.items()]}}
    if grader:
        sides = {line: {grader["name"]: {"base": None, "tuned": value, "error": None}} for line, value in values.items()}
        about = {"prompt": "", "reference": "", "base_answer": None, "tuned_answer": ""}
        found = {"graded": [{"line": line, **about, "scores": scores} for line, scores in sides.items()]}
    made.status, made.result, made.finished_at = "succeeded", {"scores": {}, **found}, func.clock_timestamp()
    session.commit()
    return made


def noisy(mean: float, rows: int = 30, seed: int = 1) -> dict[int, float]:
    draw = random.Random(seed)
    return {line: mean + draw.gauss(0, 0.1) for line in range(1, rows + 1)}


def put(api, **body):
    return api.put("/v1/model_aliases/prod", json=body)


def refused(answer, code: str) -> str:
    fault = answer.json()["error"]
    assert (answer.status_code, fault["code"]) == (409, code), answer.text
    return fault["message"]


def moves(api) -> list[dict]:
    return api.get("/v1/model_aliases/prod/moves").json()["data"]


def test_a_model_moves_in_where_it_is_better_on_the_same_rows(api, session, user, two, data):
    made = put(api, model="tiny", gate=gate_on(data, max_forgetting=0.02)).json()
    assert made["gate"] == gate_on(data, grader="bits_per_byte", max_forgetting=0.02), "the metric of the task is named"
    said = refused(put(api, model="other"), "evaluations_missing")
    assert "no finished evaluation of tiny and other" in said and "/v1/model_aliases/prod/evaluations" in said
    before = scored(session, user, two[0], data, noisy(2.0))
    assert "no finished evaluation of other" in refused(put(api, model="other"), "evaluations_missing")
    scored(session, user, two[1], data, noisy(2.0, seed=2))
    said = refused(put(api, model="other"), "gate_not_passed")
    assert "other is not shown to be better than tiny: bits per byte" in said and "on 30 rows" in said and "95% interval" in said
    assert api.get("/v1/models/prod").json()["alias_of"] == "tiny"
    better = scored(session, user, two[1], data, noisy(1.5, rows=40, seed=3), answers=3)  # the pair with the most rows counts
    assert put(api, model="other", reason="the July data").json()["model"] == "other"
    last, first = moves(api)
    assert (first["from"], first["to"], first["how"], first["result"]) == (None, "tiny", "set", None)
    assert (last["from"], last["to"], last["how"], last["reason"], last["by"]) == ("tiny", "other", "gate", "the July data", "owner")
    found = last["result"]
    old, new = [noisy(2.0)[line] for line in range(1, 31)], [noisy(1.5, rows=40, seed=3)[line] for line in range(1, 31)]
    assert found["rows"] == 30 and found["better"] and found["passed"] and found["forgetting"] == 0, "a base forgets nothing"
    assert tuple(found["interval"]) == pytest.approx(stats.paired(old, new)) and found["interval"][1] < 0
    assert found["evaluations"] == [ids.public(ids.EVALUATION, before.id), ids.public(ids.EVALUATION, better.id)]
    assert session.scalars(select(AuditLog.type).where(AuditLog.object_id == "prod")).all() == ["model_alias.set"] * 2, "not the refusals"


def test_a_grader_decides_and_lower_is_not_better_for_it(api, session, user, two, data):
    saved = api.post("/v1/graders", json={"grader": SAME}).json()
    put(api, model="tiny", gate=gate_on(data, grader=saved["id"]))
    scored(session, user, two[0], data, dict.fromkeys(range(1, 31), 0.0), SAME)
    scored(session, user, two[1], data, noisy(0.5))  # without the grader it does not count
    assert "the grader same" in refused(put(api, model="other"), "evaluations_missing")
    worse = {line: float(line % 10 == 0) for line in range(1, 31)}
    scored(session, user, two[1], data, worse, SAME)
    assert "the grader same 10.0%, before 0.0%" in refused(put(api, model="other"), "gate_not_passed")
    scored(session, user, two[1], data, {line: float(line % 2) for line in range(1, 31)} | {31: 1.0}, SAME)
    assert put(api, model="other").json()["model"] == "other", "of equally many common rows the newest count"
    api.delete(f"/v1/graders/{saved['id']}")
    assert "was deleted" in refused(put(api, model="tiny"), "conflict")


def test_few_rows_in_common_and_rows_that_were_trained_on_do_not_count(api, session, user, two, data):
    put(api, model="tiny", gate=gate_on(data))
    scored(session, user, two[0], data, noisy(2.0))
    scored(session, user, two[1], data, {line + 27: 1.0 for line in range(1, 31)})
    assert "fewer than 5 rows in common" in refused(put(api, model="other"), "evaluations_missing")
    learned = scored(session, user, two[1], data, noisy(0.1))
    learned.spec = learned.spec | {"note": evaluations.TRAINED_ON}
    session.commit()
    assert "fewer than 5 rows in common" in refused(put(api, model="other"), "evaluations_missing")


def test_forgetting_is_bounded(api, session, user, two, data):
    put(api, model="tiny", gate=gate_on(data, max_forgetting=0.02))
    scored(session, user, two[0], data, noisy(2.0))
    made = scored(session, user, two[1], data, noisy(1.0))
    made.spec = made.spec | {"base": made.spec["model"]}
    session.commit()
    assert "its forgetting was not measured" in refused(put(api, model="other"), "gate_not_passed")
    made.result = made.result | {"forgetting": {"change": 0.031}}
    session.commit()
    answer = put(api, model="other")
    assert "+3.1% bits" in refused(answer, "gate_not_passed") and "forget less" in answer.json()["error"]["message"]
    made.result = made.result | {"forgetting": {"change": 0.019}}
    session.commit()
    assert put(api, model="other").json()["model"] == "other" and moves(api)[0]["result"]["forgetting"] == 0.019


def test_force_needs_a_reason_and_the_right_and_the_way_back_is_one_call(api, session, user, two, data):
    put(api, model="tiny", gate=gate_on(data))
    without = put(api, model="other", force=True)
    assert (without.status_code, without.json()["error"]["param"]) == (400, "reason")
    assert put(api, model="other", force=True, reason="an incident").json()["model"] == "other"
    third = register_tiny(session, "third")
    put(api, model=third.name, force=True, reason="a test")
    back = api.post("/v1/model_aliases/prod/back", json={"reason": "it was worse"})
    assert back.json()["model"] == "other" and back.json()["gate"], "the gate stays, and is not asked"
    assert api.post("/v1/model_aliases/prod/back").json()["model"] == "tiny", "one move further back"
    assert "has always pointed" in refused(api.post("/v1/model_aliases/prod/back"), "conflict")
    assert [(one["to"], one["how"], one["reason"]) for one in moves(api)] == [
        ("tiny", "back", None), ("other", "back", "it was worse"), ("third", "force", "a test"), ("other", "force", "an incident"), ("tiny", "set", None),
    ]  # fmt: skip
    assert session.scalars(select(AuditLog.type).order_by(AuditLog.id.desc())).first() == "model_alias.moved_back"
    page = api.get("/v1/model_aliases/prod/moves?limit=2").json()
    assert page["has_more"] and len(api.get(f"/v1/model_aliases/prod/moves?after={page['last_id']}").json()["data"]) == 3
    assert api.delete("/v1/models/other").json()["deleted"], "the history holds no model back"
    assert moves(api)[1]["to"] == "other"


def test_a_deleted_model_is_no_way_back(api, session, two):
    put(api, model="tiny")
    put(api, model="other")
    assert api.delete("/v1/models/tiny").json()["deleted"]
    assert "tiny, to which prod pointed before, was deleted" in refused(api.post("/v1/model_aliases/prod/back"), "conflict")


@pytest.fixture
def others(web, session, user, two, data):
    """A project with an alias of one member's and a gate, and the API as another member and as an admin of the project."""
    team = projects.create(session, user, "Violins")
    session.add_all([User(name="Ada", role="member"), User(name="Bea", role="member")])
    session.flush()
    found = {}
    for name, role in (("Ada", "member"), ("Bea", "admin")):
        person = session.scalars(select(User).where(User.name == name)).one()
        projects.set_member(session, team, person, role)
        _, key = auth.create_key(session, person, name)
        headers = {"authorization": f"Bearer {key}", "openai-project": ids.public(ids.PROJECT, team.id)}
        found[name] = TestClient(web.app, base_url=ORIGIN, headers=headers)
    data.project_id = team.id
    owner = User(id=user.id, name=user.name, role="member").work_in(team.id)
    gates.apply(session, owner, "prod", gates.AliasOrder(model="tiny", gate=gates.PromotionGate(**gate_on(data))))
    session.commit()
    return found["Ada"], found["Bea"]


def test_only_who_made_an_alias_and_admins_pass_its_gate_by_force(others):
    member, admin = others
    tries = [
        lambda who: put(who, model="other", force=True, reason="I like it"),
        lambda who: put(who, gate=None),
        lambda who: who.delete("/v1/model_aliases/prod"),
    ]
    for attempt in tries:
        answer = attempt(member)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions"), answer.text
    assert (
        put(member, model="other").status_code == 409
        and put(member, gate=member.get("/v1/model_aliases").json()["data"][0]["gate"]).status_code == 200
    )
    for attempt in tries:
        assert attempt(admin).status_code == 200
    assert member.get("/v1/model_aliases").json()["data"] == []


@pytest.mark.parametrize(
    ("gate", "param"),
    [
        ({"dataset": "ds-" + "0" * 32}, "gate.dataset"),
        ({"grader": "rouge_l"}, "gate.grader"),
        ({"grader": "accuracy"}, "gate.grader"),
        ({"grader": "grader-" + "0" * 32}, "gate.grader.0"),
        ({"max_forgetting": -1}, "gate.max_forgetting"),
        ({"more": 1}, "gate.more"),
    ],
)
def test_a_gate_that_cannot_be_measured_is_refused(api, two, data, gate, param):
    answer = put(api, model="tiny", gate=gate_on(data) | gate)
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param, answer.text
    assert api.get("/v1/model_aliases").json()["data"] == []


def test_a_gate_alone_needs_its_alias_and_null_removes_it(api, two, data):
    assert put(api, gate=gate_on(data)).status_code == 404
    put(api, model="tiny", gate=gate_on(data))
    assert put(api, model="tiny").json()["gate"], "it stays where it is not named"
    assert put(api, gate=None).json()["gate"] is None and put(api, model="other").json()["model"] == "other"


def test_moves_go_with_the_alias_and_with_its_project(api, session, user, two):
    put(api, model="tiny")
    put(api, model="other")
    assert session.scalar(select(func.count()).select_from(AliasMove)) == 2
    api.delete("/v1/model_aliases/prod")
    assert session.scalar(select(func.count()).select_from(AliasMove)) == 0
    team = projects.create(session, user, "Violins")
    aliases.set_(session, User(id=user.id, name=user.name, role=user.role).work_in(team.id), "prod", "tiny")
    project_deletion.remove(session, team, with_contents=True)
    session.commit()
    assert session.scalar(select(func.count()).select_from(AliasMove)) == 0


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_from_missing_evaluations_to_the_move(client, api, session, user, data_dir, tiny_registered, data):
    """A fine-tuned model, real evaluations, started by one click of the page, and the page of every step."""
    _, tuned = tune(session, user, data_dir, tiny_registered, data, epochs=8)
    held = make_dataset(session, user, data_dir, rows=24)
    put(api, model="tiny", gate=gate_on(held))
    key = ids.public(ids.MODEL, tuned.id)
    page = client.post(f"/models/{key}/aliases", data={"alias": "prod"}).text
    assert "no finished evaluation of tiny and ft:" in page and "Start 2 evaluations" in page
    page = client.post("/aliases/prod/evaluations", data={"model": key}).text
    assert "2 evaluations started." in page and page.count("Evaluation of ") == 2 and "Start 2 evaluations" not in page
    assert api.post("/v1/model_aliases/prod/evaluations", json={"model": tuned.name}).json()["data"][1]["status"] == "queued"
    for one in session.scalars(select(Evaluation)).all():
        evaluation_attempt.work(one.id)
    session.expire_all()
    done = session.scalars(select(Evaluation)).all()
    assert [one.status for one in done] == ["succeeded"] * 2, [one.error for one in done]
    for one in done:
        rows = dict(one.result["row_scores"]["rows"])
        assert sorted(rows) == list(range(1, 25)) and one.result["row_scores"]["metric"] == "bits_per_byte"
        assert min(rows.values()) < one.result["scores"]["bits_per_byte"] < max(rows.values())
    page = client.get(f"/aliases/prod?model={key}").text
    assert "passes the gate" in page and "bits per byte" in page
    page = client.post("/aliases/prod/model", data={"model": key}).text
    assert "points to" in page and "Passed the gate" in page and "Go back to tiny" in page
    assert api.get("/v1/models/prod").json()["alias_of"] == tuned.name
    page = client.post("/aliases/prod/back").text
    assert " again." in page and "Went back" in page and api.get("/v1/models/prod").json()["alias_of"] == "tiny"
    refusal = put(api, model=tuned.name)
    assert refusal.status_code == 200, "it passed before, and passes again"
    assert "not shown to be better" in refused(put(api, model="tiny"), "gate_not_passed")


@pytest.mark.long
@pytest.mark.usefixtures("warm_attempts")
def test_rows_of_the_training_set_are_held_out_for_both(api, session, user, data_dir, tiny_registered, data):
    """The gate's dataset is the one that a model was trained on: both are scored on the rows that its job held out."""
    job, tuned = tune(session, user, data_dir, tiny_registered, data, epochs=1, validation_fraction=0.25)
    put(api, model="tiny", gate=gate_on(data))
    started = api.post("/v1/model_aliases/prod/evaluations", json={"model": tuned.name}).json()["data"]
    assert [one["part"] for one in started] == ["validation"] * 2
    for one in started:
        evaluation_attempt.work(ids.parse_evaluation(one["id"]))
    session.expire_all()
    lines = [[line for line, _ in one.result["row_scores"]["rows"]] for one in session.scalars(select(Evaluation))]
    assert lines[0] == lines[1] and len(lines[0]) == 10 == job.spec["run"]["validation_fraction"] * 40


def test_the_form_of_the_gate_and_the_force_of_the_page(client, session, two, data):
    client.post(f"/models/{ids.public(ids.MODEL, two[0].id)}/aliases", data={"alias": "team/prod"})
    page = client.post("/aliases/team/prod/gate", data={"dataset": ids.public(ids.DATASET, data.id), "max_forgetting": "2.5"}).text
    assert "The gate of team/prod was set." in page and "at most 2.5% more bits" in page and 'value="2.5"' in page
    wrong = client.post("/aliases/team/prod/gate", data={"dataset": ids.public(ids.DATASET, data.id), "max_forgetting": "much"})
    assert wrong.status_code == 400 and "is no bound of forgetting" in wrong.text and 'value="much"' in wrong.text
    other = ids.public(ids.MODEL, two[1].id)
    page = client.post("/aliases/team/prod/model", data={"model": other, "force": "true", "reason": "We want it."}).text
    assert "By force" in page and "We want it." in page
    page = client.post("/aliases/team/prod/gate", data={"dataset": ""}).text
    assert "The gate of team/prod was removed." in page and "moved to any model at once" in page
    assert client.get("/aliases/nobody").status_code == 404
