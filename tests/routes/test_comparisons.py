"""Comparisons: ordered as one, read in one table, through the service, `/v1/comparisons` and the pages."""

from __future__ import annotations

import html
import itertools
import json
import math
import re

import pytest
from sqlalchemy import select, update

from app.datasets import service as datasets
from app.errors import BadField
from app.evaluation import comparison_table, comparisons
from app.events import Evaluated, Measured
from app.jobs import row_losses
from app.jobs import service as jobs
from app.jobs.lifecycle import finish
from app.kit import ids
from app.storage import files
from app.strategies import STRATEGIES
from app.tables import Comparison, Event, Job, Model, Outbox, User
from app.web import charts
from tests import lives
from tests.factories import upload


@pytest.fixture
def chats(session, user, data_dir):
    return upload(session, user, [{"prompt": f"{n}?", "completion": "Yes. " * 9} for n in range(60)], "chats.jsonl")


@pytest.fixture
def kinds(session, user, data_dir):
    return upload(session, user, [{"text": f"text number {n} about things", "label": "abc"[n % 3]} for n in range(60)], "kinds.jsonl")


def body(dataset, *strategies, **more) -> dict:
    return {"model": "tiny", "dataset_id": ids.public(ids.DATASET, dataset.id), "strategies": list(strategies), **more}


def words(page) -> str:
    text = re.sub(r"<script.*?</script>", "", page.text, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))


def create(session, user, order: dict) -> Comparison:
    found = comparisons.create(session, user, comparisons.read_order(order))
    session.commit()
    return found


def end(
    session,
    job: Job,
    *,
    loss: float,
    memory: int,
    seconds: float,
    change: float = 0.0,
    verdict: str = "within noise",
    noise: float | None = None,
    **scores,
) -> None:
    """The job's whole life as a supervisor would record it, with these figures; `noise` is how far the score it is judged by may be off."""
    life = lives.Life(session, job).claim().say(lives.started(10), *list(lives.steps(1, 2, 10)), Evaluated(step=2, loss=loss, best=True))
    measured = Measured(
        peak_memory_bytes=memory, seconds=seconds, tokens_per_second=100, tokens=100, trained_tokens=50, steps=10, device="cpu, 2 cores"
    )
    forgetting = {"before": 1.0, "after": 1 + change, "change": change, "interval": [change - 0.01, change + 0.01], "verdict": verdict}
    evaluation = {"rows": 40, "base": {"loss": 3.0}, "tuned": {"loss": loss, **scores}}
    if noise is not None:
        metric, base, tuned = ("accuracy", 0.5, scores["accuracy"]) if "accuracy" in scores else ("loss", 3.0, loss)
        side = {"rows": 40, "score": base, "tuned": tuned, "interval": [tuned - base - noise, tuned - base + noise]}
        evaluation["contest"] = {"metric": metric, "base": side}
        evaluation["tuned"]["intervals"] = {metric: [tuned - 0.4, tuned + 0.4]}
    own = {"path": f"runs/{job.id}/a1/final", "measured": measured, "forgetting": forgetting, "evaluation": evaluation}
    said = lives.finished(10).model_copy(update=own)
    finish(session, life.held, said)
    session.commit()


# Ordering -------------------------------------------------------------------------------------------------------------


def test_all_jobs_are_ordinary_ones_on_the_same_ground_and_queued_as_one(session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", {"name": "lora", "rank": 2}, "ia3", run={"epochs": 2}, seed=9))
    made = comparisons.jobs_of(session, found)
    assert [job.spec["strategy"]["name"] for job in made] == ["lora", "lora", "ia3"]
    same = {json.dumps([j.spec["model"], j.spec["dataset"], {**j.spec["run"], "learning_rate": None}], sort_keys=True) for j in made}
    assert len(same) == 1, "all but the learning rate, which is each method's own"
    assert [job.spec["run"]["learning_rate"] for job in made] == [
        STRATEGIES[name].default_learning_rate for name in ("lora", "lora", "ia3")
    ]
    run = made[0].spec["run"]
    assert (run["seed"], run["epochs"], run["early_stopping_patience"]) == (9, 2, 0)
    sent = session.scalars(select(Outbox.key)).all()
    assert {job.id for job in made} <= set(sent) and all(job.estimate["memory_bytes"] > 0 for job in made)
    assert made[1].name == "3 methods on chats: LoRA (rank 2)"


def test_what_cannot_be_had_says_why_and_the_others_go_on(session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", "bitfit", "ia3", "feature_extraction"))
    assert len(comparisons.jobs_of(session, found)) == 2
    assert {r["strategy"] for r in found.refused} == {"bitfit", "feature_extraction"} and all(r["reason"] for r in found.refused)


def test_a_comparison_in_which_none_fits_is_refused_with_the_reasons(api, session, user, tiny_registered, chats, monkeypatch):
    answer = api.post("/v1/comparisons", json=body(chats, "bitfit", "feature_extraction"))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "no_strategy_fits" and error["param"] == "strategies"
    assert "bias" in error["message"].lower() and "does not support the task generation" in error["message"]
    only = api.post("/v1/comparisons", json=body(chats, "lora", "bitfit")).json()["error"]
    assert only["code"] == "nothing_to_compare" and "Only LoRA is left" in only["message"]
    from app.machines import heartbeats

    small = heartbeats.training_machine().model_copy(update={"memory_bytes": 2**20})
    monkeypatch.setattr(heartbeats, "training_machines", lambda *_: [small])
    tight = api.post("/v1/comparisons", json=body(chats, "lora", "full")).json()["error"]
    assert tight["code"] == "no_strategy_fits" and "GB of memory, which this machine does not have" in tight["message"]
    assert jobs.list_(session, user) == [] and session.scalars(select(Comparison)).all() == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"strategies": []}, "strategies"),
        ({"strategies": ["lora", {"name": "lora", "rank": 0}]}, "strategies.1.rank"),
        ({"strategies": ["lora", "magic"]}, "strategies.1.name"),
        ({"strategies": ["lora", "lora"]}, "strategies.1"),
        ({"run": {"epochs": -1}}, "run.epochs"),
        ({"run": {"colour": "red"}}, "run.colour"),
        ({"colour": "red"}, "colour"),
        ({"kind": "learning_curve"}, "strategies"),
        ({"kind": "learning_curve", "strategies": ["lora"], "fractions": [0.5]}, "fractions"),
        ({"kind": "learning_curve", "strategies": ["lora"], "fractions": [0.5, 2]}, "fractions.1"),
        ({"model": "gone"}, "model"),
        ({"dataset_id": "ds-" + "0" * 32}, "dataset_id"),
        ({"dataset_id": None}, "training_file"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_queued(api, session, user, tiny_registered, chats, change, param):
    answer = api.post("/v1/comparisons", json={**body(chats, "lora", "ia3"), **change})
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param, answer.text
    assert jobs.list_(session, user) == []


def test_a_plan_queues_nothing_and_says_what_each_would_take(api, session, user, tiny_registered, chats):
    found = api.post("/v1/comparisons/plan", json=body(chats, "lora", "ia3", "bitfit")).json()
    assert [one["strategy"] for one in found["data"]] == ["lora", "ia3"] and [r["strategy"] for r in found["refused"]] == ["bitfit"]
    assert found["seconds"] == pytest.approx(sum(one["estimate"]["seconds"] for one in found["data"]))
    assert jobs.list_(session, user) == []


def test_a_learning_curve_reads_as_many_tokens_from_fewer_rows(session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", kind="learning_curve", run={"epochs": 2, "max_tokens_per_step": 256}))
    runs = [job.spec["run"] for job in comparisons.jobs_of(session, found)]
    assert [(run["data_fraction"], run["epochs"], run["evaluations_per_epoch"]) for run in runs] == [(0.25, 8, 0.5), (0.5, 4, 1), (1, 2, 2)]
    tokens = [job.estimate["tokens"] for job in comparisons.jobs_of(session, found)]
    assert max(tokens) == pytest.approx(min(tokens), rel=0.02)


def test_the_same_key_orders_once(api, session, user, tiny_registered, chats):
    headers = {"idempotency-key": "k"}
    first, again = (api.post("/v1/comparisons", json=body(chats, "lora", "ia3"), headers=headers).json() for _ in range(2))
    assert first["id"] == again["id"] and len(jobs.list_(session, user)) == 2
    other = api.post("/v1/comparisons", json=body(chats, "lora", "full"), headers=headers)
    assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_key_reused"


def test_an_unread_dataset_is_waited_for(session, user, tiny_registered, data_dir):
    file = files.add_bytes(session, user, b'{"prompt": "a", "completion": "b"}', "later.jsonl", "fine-tune")
    session.flush()
    dataset = datasets.create(session, user, file)
    session.commit()
    with pytest.raises(Exception, match="still being read"):
        comparisons.create(session, user, comparisons.read_order(body(dataset, "lora", "ia3")))


def test_another_persons_comparison_is_not_there(api, client, session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", "ia3"))
    other = User(name="somebody else")
    session.add(other)
    session.flush()
    session.execute(update(Comparison).values(owner_id=other.id, project_id=other.id))
    session.commit()
    public = ids.public(ids.COMPARISON, found.id)
    assert api.get(f"/v1/comparisons/{public}").status_code == 404 and api.get("/v1/comparisons").json()["data"] == []
    for method, path in (("get", ""), ("post", "/cancel"), ("post", "/delete")):
        assert getattr(client, method)(f"/compare/{public}{path}").status_code == 404
    assert api.delete(f"/v1/comparisons/{public}").status_code == 404


# Stopping and deleting ------------------------------------------------------------------------------------------------


def test_cancelling_stops_every_job_and_only_then_it_can_be_deleted(api, session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", "ia3", "full"))
    first, second, third = comparisons.jobs_of(session, found)
    end(session, first, loss=1.0, memory=100, seconds=5)
    lives.Life(session, second).claim().say(lives.started(10))
    public = ids.public(ids.COMPARISON, found.id)
    refused = api.delete(f"/v1/comparisons/{public}")
    assert refused.status_code == 409 and "2 of its jobs have not ended" in refused.json()["error"]["message"]
    assert api.post(f"/v1/comparisons/{public}/cancel").json()["status"] == "running", "the running one is asked, not killed"
    session.expire_all()
    assert session.get_one(Job, second.id).cancel_requested and session.get_one(Job, third.id).status == "cancelled"
    session.execute(update(Job).where(Job.id == second.id).values(status="cancelled"))
    session.commit()
    assert api.delete(f"/v1/comparisons/{public}").json()["deleted"] is True
    assert api.get(f"/v1/comparisons/{public}").status_code == 404 and len(jobs.list_(session, user)) == 3, "jobs stay"


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_holds_what_was_measured_beside_what_was_predicted_and_marks_the_best(api, session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", "ia3", "full", "layer_norm"))
    a, b, c, d = comparisons.jobs_of(session, found)
    end(session, a, loss=1.2, memory=300, seconds=30, change=0.004, verdict="within noise")
    end(session, b, loss=1.6, memory=200, seconds=30, change=-0.02, verdict="gained")
    end(session, c, loss=1.2, memory=900, seconds=90, change=0.2, verdict="forgot much")
    lives.Life(session, d).claim().say(lives.started(10), Evaluated(step=1, loss=0.1, best=True))
    answer = api.get(f"/v1/comparisons/{ids.public(ids.COMPARISON, found.id)}").json()
    rows = {row["strategy"]: row for row in answer["data"]}
    assert answer["status"] == "running" and answer["score"] == "loss" and answer["base"] == {"loss": 3.0}
    assert rows["lora"]["predicted_memory_bytes"] == a.estimate["memory_bytes"] and rows["lora"]["peak_memory_bytes"] == 300
    assert rows["lora"]["trainable_parameters"] == 2_442_240, "as the trainer counted"
    assert rows["layer_norm"]["loss"] == 0.1, "of a running job the best so far"
    best = {
        column: [next(r["strategy"] for r in answer["data"] if r["job"] == job) for job in won] for column, won in answer["winners"].items()
    }
    assert best["loss"] == [], "how sure the losses are was not told"
    assert best["forgetting"] == ["ia3"], "it gained more than chance explains"
    assert best["peak_memory_bytes"] == ["ia3"] and best["seconds"] == [], "a tie has no winner"
    assert best["trainable_parameters"] == []


@pytest.mark.parametrize(("noise", "change", "score", "ability"), [(0.05, 0.0, ["lora"], []), (0.15, 0.05, [], ["lora"])])
def test_a_figure_is_marked_only_beyond_chance(session, user, tiny_registered, chats, noise, change, score, ability):
    """Two runs without a change of general ability, and a worse third, had two marks in one column."""
    found = create(session, user, body(chats, "lora", "ia3"))
    first, second = comparisons.jobs_of(session, found)
    end(session, first, loss=1.2, memory=1, seconds=1, noise=noise)
    end(session, second, loss=1.4, memory=1, seconds=1, noise=noise, change=change, verdict="dropped" if change else "within noise")
    table = comparison_table.table(session, found)
    titles = {row["job"]: row["strategy"] for row in table.rows}
    assert [titles[job] for job in table.winners["loss"]] == score, "on the same rows, by the distance from the base"
    assert [titles[job] for job in table.winners["forgetting"]] == ability


def test_a_running_classifier_shows_the_accuracy_of_its_best_evaluation(session, user, tiny_registered, kinds):
    found = create(session, user, body(kinds, "lora", "dense_head"))
    first, _ = comparisons.jobs_of(session, found)
    said = [Evaluated(step=n, loss=loss, metrics={"accuracy": acc}) for n, loss, acc in ((1, 0.9, 0.4), (2, 0.5, 0.7), (3, 0.6, 0.8))]
    lives.Life(session, first).claim().say(lives.started(10), *said)
    row, other = comparison_table.table(session, found).rows
    assert (row["loss"], row["accuracy"]) == (0.5, 0.7) and other["accuracy"] is None


def test_classifiers_are_told_apart_by_accuracy_first(session, user, tiny_registered, kinds):
    found = create(session, user, body(kinds, "feature_extraction", "dense_head"))
    first, second = comparisons.jobs_of(session, found)
    end(session, first, loss=0.7, memory=1, seconds=1, accuracy=0.9, macro_f1=0.88, noise=0.02)
    end(session, second, loss=0.6, memory=1, seconds=2, accuracy=0.8, macro_f1=0.7, noise=0.02)
    table = comparison_table.table(session, found)
    assert [column.key for column in table.columns[:3]] == ["accuracy", "macro_f1", "loss"]
    assert table.winners["accuracy"] == [ids.public(ids.JOB, first.id)] and table.winners["macro_f1"] == []


@pytest.mark.parametrize(
    ("losses", "answer", "says"),
    [
        ((2.0, 1.6, 1.2), "more", "25% better"),
        ((2.0, 1.21, 1.2), "enough", "would bring little"),
        ((2.0, 1.2, 1.4), "unclear", "which is worse"),
    ],
)
def test_a_learning_curve_says_whether_more_data_would_help(session, user, tiny_registered, chats, losses, answer, says):
    found = create(session, user, body(chats, "lora", kind="learning_curve"))
    for job, loss in zip(comparisons.jobs_of(session, found), losses, strict=True):
        assert comparison_table.more_data(session, comparison_table.table(session, found)) is None, "not before all ended"
        end(session, job, loss=loss, memory=1, seconds=1)
    told = comparison_table.more_data(session, comparison_table.table(session, found))
    assert told.answer == answer and says in told.sentence


@pytest.mark.parametrize(
    ("losses", "noise", "answer", "says"),
    [
        ((1.6, 1.2), 0.3, "more", "-0.4"),  # 40 rows tell 0.4 from chance
        ((1.6, 1.5), 2.0, "unclear", "too few"),  # but not 0.1
        ((1.21, 1.2), 0.02, "enough", "would bring little"),
        ((1.21, 1.2), 2.0, "unclear", "too few"),  # nothing moved, but much may have
        ((1.2, 1.4), 0.3, "unclear", "which is worse"),
    ],
)
def test_a_learning_curve_is_judged_by_the_same_rows(session, user, tiny_registered, chats, data_dir, losses, noise, answer, says):
    found = create(session, user, body(chats, "lora", kind="learning_curve"))
    for place, (job, loss) in enumerate(zip(comparisons.jobs_of(session, found), (3.0, *losses), strict=True)):
        end(session, job, loss=loss, memory=1, seconds=1)
        path = session.scalar(select(Event.data).where(Event.job_id == job.id, Event.type == "finished"))["path"]
        wave = [noise * math.sin(row * (place + 1)) for row in range(40)]  # other rows get harder and easier each time
        after = [loss + x - sum(wave) / 40 for x in wave]
        columns = {"line": list(range(40)), "before": [3.0] * 40, "after": after, "tokens": [5] * 40, "held_out": [True] * 40}
        folder = data_dir / path
        folder.parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / row_losses.FILE).write_text(json.dumps(columns))
    told = comparison_table.more_data(session, comparison_table.table(session, found))
    assert (told.answer, says in told.sentence) == (answer, True), told.sentence


@pytest.mark.parametrize(("shares", "answer"), [
    ((0.4, 0.5, 0.9), "more"), ((0.8, 0.9, 0.92), "enough"), ((0.8, 0.9, 0.4), "unclear"), ((0.5, 0.7, 0.8), "unclear"), ((0.5, 0.5, 0.5), "unclear"),
])  # fmt: skip
def test_a_share_of_right_answers_is_known_no_better_than_its_rows_allow(session, user, tiny_registered, kinds, shares, answer):
    found = create(session, user, body(kinds, "dense_head", kind="learning_curve"))
    for job, share in zip(comparisons.jobs_of(session, found), shares, strict=True):
        end(session, job, loss=1.0, memory=1, seconds=1, accuracy=share)
    assert comparison_table.more_data(session, comparison_table.table(session, found)).answer == answer


def test_a_model_of_a_comparison_is_offered_once_it_is_kept(client, session, user, tiny_registered, kinds):
    found = create(session, user, body(kinds, "dense_head", "top_layers"))
    for job in comparisons.jobs_of(session, found):
        end(session, job, loss=1.0, memory=1, seconds=1, accuracy=0.5)
    first, second = session.scalars(select(Model).where(Model.job_id.is_not(None)).order_by(Model.created_at)).all()
    assert ids.public(ids.MODEL, second.id) not in client.get("/").text
    first.kept = True
    first.kind = second.kind = "classifier"
    session.commit()
    assert ids.public(ids.MODEL, first.id) in client.get("/").text
    chosen = re.search(r'<option value="([^"]+)"[^>]* selected', client.get("/playground/classify").text.split("<main")[1])
    assert chosen and chosen.group(1) == first.name, "the other is newer, and not kept"


# The pages ------------------------------------------------------------------------------------------------------------


def typed(dataset, *strategies, **more):
    fields = {"model": "tiny", "dataset": ids.public(ids.DATASET, dataset.id), "kind": "strategies", "shown": "strategies", **more}
    return {**fields, "strategy": list(strategies)}


def test_an_empty_list_says_how_to_fill_it(client, tiny_registered):
    page = client.get("/compare")
    assert page.status_code == 200 and "No comparison yet" in page.text and 'href="/compare/new"' in page.text
    assert "A dataset is needed first" in client.get("/compare/new").text


def test_the_form_checks_the_first_of_each_family_and_says_what_cannot_be_had(client, session, user, tiny_registered, chats):
    page = client.get("/compare/new", params={"model": "tiny", "dataset": ids.public(ids.DATASET, chats.id)})
    checked = re.findall(r'name="strategy" value="(\w+)" checked', page.text)
    families = [STRATEGIES[name].family for name in checked]
    assert set(families) == {"reparametrized", "additive", "selective", "partial", "full"} and len(checked) == len(families)
    assert re.search(r'value="bitfit" disabled>', page.text) and re.search(r'value="feature_extraction" disabled>', page.text)
    assert f"Start {len(checked)} runs" in page.text and "disabled>Start" not in page.text
    plan = comparisons.planned(session, user, comparisons.read_order(body(chats, *checked)))
    from app.kit.humanize import human_seconds

    assert f"Total time {human_seconds(plan.seconds)}" in words(page)


def test_what_was_checked_stays_and_too_few_are_refused(client, session, user, tiny_registered, chats):
    page = client.get("/compare/new", params=typed(chats, "lora", "ia3", **{"run.epochs": "2"}))
    assert re.findall(r'name="strategy" value="(\w+)" checked', page.text) == ["lora", "ia3"] and 'value="2"' in page.text
    for chosen, status, said in (
        ((), 400, "Choose at least two methods"),
        (("lora",), 400, "Choose at least two methods"),
        (("bitfit", "lora", "ia3"), 409, "BitFit cannot be part of it."),
    ):
        answer = client.post("/compare", data=typed(chats, *chosen))
        assert answer.status_code == status and said in answer.text
    wrong = client.post("/compare", data=typed(chats, "lora", "ia3", **{"run.epochs": "-1"}))
    assert wrong.status_code == 400 and "Epochs must be more than 0; you wrote -1." in wrong.text
    assert jobs.list_(session, user) == []


def test_a_comparison_is_ordered_once_followed_and_deleted(client, session, user, tiny_registered, chats):
    answer = client.post("/compare", data=typed(chats, "lora", "ia3", key="k", name="mine"), follow_redirects=False)
    assert answer.status_code == 303
    where = answer.headers["location"]
    assert (
        client.post("/compare", data=typed(chats, "lora", "ia3", key="k", name="mine"), follow_redirects=False).headers["location"] == where
    )
    assert len(jobs.list_(session, user)) == 2
    page = client.get(where)
    assert "0 of 2 runs" in words(page) and "every 3s" in page.text and "Cancel all" in page.text
    part = client.get(f"{where}?part=live")
    assert "<html" not in part.text and part.text.lstrip().startswith('<div id="comparison"')
    one, two = jobs.list_(session, user)
    for job, loss in ((one, 1.1), (two, 1.3)):
        end(session, job, loss=loss, memory=10**9, seconds=50 * loss, change=0.03, verdict="forgot some")
    page = client.get(where)
    assert "every 3s" not in page.text and page.text.count('class="winner"') == 1 and '<svg class="picture"' in page.text
    assert f'href="/jobs/{ids.public(ids.JOB, one.id)}"' in page.text and ">Base</td>" in page.text
    assert "mine" in client.get("/compare").text
    assert f'href="{where}"' in client.get(f"/jobs/{ids.public(ids.JOB, one.id)}").text, "a job leads to its comparison"
    assert client.post(f"{where}/delete", follow_redirects=False).headers["location"] == "/compare"
    assert client.get(where).status_code == 404
    assert where not in client.get(f"/jobs/{ids.public(ids.JOB, one.id)}").text


def test_deleting_is_refused_while_a_job_is_open(client, session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", "ia3"))
    where = f"/compare/{ids.public(ids.COMPARISON, found.id)}"
    page = client.post(f"{where}/delete")
    assert "2 of its jobs have not ended" in words(page)
    assert "are being stopped" in words(client.post(f"{where}/cancel"))
    assert all(job.status == "cancelled" for job in comparisons.jobs_of(session, found))


def test_the_plot_takes_any_two_columns(client, session, user, tiny_registered, chats):
    found = create(session, user, body(chats, "lora", "ia3"))
    for job, loss in zip(comparisons.jobs_of(session, found), (1.1, 1.3), strict=True):
        end(session, job, loss=loss, memory=int(loss * 10**9), seconds=9)
    where = f"/compare/{ids.public(ids.COMPARISON, found.id)}"
    page = client.get(f"{where}?x=peak_memory_bytes&y=forgetting")
    assert "General ability against peak memory" in page.text
    assert "Validation loss against time" in client.get(f"{where}?x=nothing&y=<script>").text


def test_a_learning_curve_is_ordered_and_drawn(client, session, user, tiny_registered, chats):
    page = client.get("/compare/new", params={"kind": "learning_curve", "model": "tiny", "dataset": ids.public(ids.DATASET, chats.id)})
    assert len(re.findall(r'type="radio" id="method-\w+" name="strategy"', page.text)) > 5 and "Start 3 runs" in page.text
    fields = typed(chats, "lora") | {"kind": "learning_curve", "shown": "learning_curve"}
    where = client.post("/compare", data=fields, follow_redirects=False).headers["location"]
    for job, loss in zip(sorted(jobs.list_(session, user), key=lambda j: j.created_at), (2.0, 1.5, 1.1), strict=True):
        end(session, job, loss=loss, memory=1, seconds=1)
    page = client.get(where)
    assert "More data would very likely help." in words(page) and "<polyline" in page.text and ">base</text>" in page.text
    assert "25% of the rows" in words(page) and "100% of the rows" in words(page)


def test_form_fields_are_never_markup(client, session, user, tiny_registered, chats):
    page = client.get("/compare/new", params=typed(chats, "lora", "<b>x</b>", name="<i>n</i>"))
    assert page.status_code == 200 and "<i>n</i>" not in page.text and "<b>x</b>" not in page.text


# Pictures -------------------------------------------------------------------------------------------------------------


def test_dots_lie_where_their_values_say():
    plain = charts.Scale("x", str)
    found = charts.picture([charts.Dot(0, 1, 1, "a"), charts.Dot(10, 3, 2, "b"), charts.Dot(5, 2, 3, "c")], plain, plain)
    a, b, c = found.dots
    assert a.x < c.x < b.x and a.y > c.y > b.y and c.x == pytest.approx((a.x + b.x) / 2) and c.y == pytest.approx((a.y + b.y) / 2)
    assert all(found.left <= dot.x <= found.right and found.top <= dot.y <= found.bottom for dot in found.dots)
    long = charts.picture([charts.Dot(0, 1, 1, "a"), charts.Dot(9, 3, 2, "b")], plain, charts.Scale("y", lambda _: "1 min 40 s"))
    assert long and long.left > found.left == charts.LEFT and min(dot.x for dot in long.dots) > long.left, "the labels have room"
    assert charts.picture([charts.Dot(0, 1, 1, "a")], plain, plain) is None


def test_amounts_far_apart_are_drawn_in_logarithms():
    dots = [charts.Dot(n, 1.0, i, str(n)) for i, n in enumerate((1e3, 1e5, 1e7), 1)]
    found = charts.picture(dots, charts.Scale("n", lambda v: f"{v:g}", amount=True), charts.Scale("y", str))
    places = [dot.x for dot in found.dots]
    assert places[1] == pytest.approx((places[0] + places[2]) / 2, abs=0.01)
    assert [text for _, text in found.x_ticks] == ["1000", "10000", "100000", "1e+06", "1e+07"]


def test_dots_on_each_other_are_moved_apart():
    same = [charts.Dot(1, 1, n, "") for n in range(1, 5)] + [charts.Dot(9, 9, 5, "")]
    found = charts.picture(same, charts.Scale("x", str), charts.Scale("y", str)).dots
    for one in found:
        assert all(one is two or abs(one.x - two.x) >= 15 or abs(one.y - two.y) >= 15 for two in found)


@pytest.mark.parametrize(("low", "high"), [(0, 7), (0.123, 0.129), (-3, 10), (0, 1e9), (1.02, 1.9)])
def test_ticks_are_round_few_and_inside(low, high):
    found = charts.ticks(low, high)
    steps = {round((b - a) / (high - low), 9) for a, b in itertools.pairwise(found)}
    assert 2 <= len(found) <= 8 and len(steps) == 1 and all(low - 1e-9 <= v <= high + 1e-9 for v in found)


def test_a_wrong_order_is_a_bad_field():
    with pytest.raises(BadField):
        comparisons.read_order({"model": "tiny"})
