"""`/v1/evals`, called by the unmodified client: runs over items that a real generate worker answers, or that bring their answers."""

from __future__ import annotations

import json
import time

import openai
import pytest
from sqlalchemy import func, select

from app.db import transaction
from app.evals import service as evals
from app.evals import sources
from app.kit import ids
from app.tables import EvalItem, EvalRun, TokenUse
from tests.generating import _workers, answering_dir, generate_worker, register_long, register_tiny  # noqa: F401

SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}, "a": {"type": "string"}}, "required": ["a"]}
CONFIG = {"type": "custom", "item_schema": SCHEMA, "include_sample_schema": True}
RIGHT = {"type": "string_check", "name": "right", "operation": "eq", "input": "{{sample.output_text}}", "reference": "{{item.a}}"}
NEAR = {
    "type": "text_similarity", "name": "near", "evaluation_metric": "fuzzy_match", "input": "{{sample.output_text}}", "reference": "{{item.a}}",
    "pass_threshold": 0.5,
}  # fmt: skip


@pytest.fixture
def client(openai_client):
    return openai_client


def given(*pairs: tuple[str, str | None]) -> dict:
    """A data source of items that bring their answers."""
    content = [{"item": {"a": right}, **({} if said is None else {"sample": {"output_text": said}})} for right, said in pairs]
    return {"type": "jsonl", "source": {"type": "file_content", "content": content}}


def ended(client, run, seconds: float = 90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        run = client.evals.runs.retrieve(run.id, eval_id=run.eval_id)
        if run.status not in evals.OPEN:
            return run
        time.sleep(0.1)
    raise AssertionError(f"it has not ended: {run}")


def test_answers_that_come_with_the_items_are_graded(client):
    made = client.evals.create(name="words", data_source_config=CONFIG, testing_criteria=[RIGHT, NEAR], metadata={"for": "the test"})
    assert (
        made.object == "eval" and made.data_source_config.schema_["properties"]["item"] == SCHEMA and made.metadata == {"for": "the test"}
    )
    run = client.evals.runs.create(made.id, name="one", data_source=given(("yes", "yes"), ("yes", "yess"), ("no", "maybe"), ("x", None)))
    assert run.status == "queued" and run.eval_id == made.id
    run = ended(client, run)
    assert run.status == "completed" and run.report_url.endswith(f"/evals/{made.id}?run={run.id}")
    counts = run.result_counts
    assert (counts.total, counts.passed, counts.failed, counts.errored) == (4, 1, 2, 1)
    assert {c.testing_criteria: (c.passed, c.failed) for c in run.per_testing_criteria_results} == {"right": (1, 2), "near": (2, 1)}
    items = list(client.evals.runs.output_items.list(run.id, eval_id=made.id, limit=2))  # in pages
    by_place = {item.datasource_item_id: item for item in items}
    assert {place: item.status for place, item in by_place.items()} == {0: "pass", 1: "fail", 2: "fail", 3: "error"}
    assert [(r.name, r.passed) for r in by_place[1].results] == [("right", False), ("near", True)] and 0.5 < by_place[1].results[
        1
    ].score < 1
    assert by_place[0].sample.output[0].content == "yes" and by_place[3].sample.error.code == "invalid_item"
    failed = client.evals.runs.output_items.list(run.id, eval_id=made.id, status="fail")
    assert sorted(item.datasource_item_id for item in failed) == [1, 2]
    assert client.evals.runs.output_items.retrieve(items[0].id, eval_id=made.id, run_id=run.id).id == items[0].id


def test_a_model_answers_the_items_of_a_file(client, generate_worker, session):  # noqa: F811
    register_tiny(session)
    lines = [{"item": {"q": f"Say {word}.", "a": word}} for word in ("one", "two", "three")]
    file = client.files.create(file=("items.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="evals")
    asked = {"type": "template", "template": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "{{item.q}}"}]}
    source = {
        "type": "completions", "model": "tiny", "source": {"type": "file_id", "id": file.id}, "input_messages": asked,
        "sampling_params": {"temperature": 0, "max_completion_tokens": 6},
    }  # fmt: skip
    made = client.evals.create(data_source_config=CONFIG, testing_criteria=[{**NEAR, "pass_threshold": 0.0}, {**RIGHT, "operation": "ne"}])
    run = ended(client, client.evals.runs.create(made.id, data_source=source))
    assert run.status == "completed" and run.model == "tiny" and run.result_counts.passed == 3, run
    items = {item.datasource_item_id: item for item in client.evals.runs.output_items.list(run.id, eval_id=made.id)}
    sample = items[1].sample
    assert [(m.role, m.content) for m in sample.input] == [("system", "Be short."), ("user", "Say two.")] and sample.temperature == 0
    alone = client.chat.completions.create(
        model="tiny", messages=[{"role": m.role, "content": m.content} for m in sample.input], temperature=0, max_completion_tokens=6
    )
    assert sample.output[0].content == alone.choices[0].message.content and sample.usage.completion_tokens == alone.usage.completion_tokens
    (usage,) = run.per_model_usage
    assert (
        usage.run_model_name == "tiny"
        and usage.invocation_count == 3
        and usage.completion_tokens == sum(i.sample.usage.completion_tokens for i in items.values())
    )
    used = session.scalar(select(func.sum(TokenUse.written)).execution_options(populate_existing=True))
    assert used == usage.completion_tokens + alone.usage.completion_tokens


def test_a_judge_grades_and_its_tokens_count(client, generate_worker, session):  # noqa: F811
    register_tiny(session)
    judge = {
        "type": "label_model", "name": "judge", "model": "tiny", "labels": ["good", "bad"], "passing_labels": ["good", "bad"],
        "input": [{"role": "user", "content": "Is {{sample.output_text}} good?"}],
    }  # fmt: skip
    made = client.evals.create(name="judged", data_source_config=CONFIG, testing_criteria=[judge])
    run = ended(client, client.evals.runs.create(made.id, data_source=given(("a", "b"))))
    assert run.status == "completed" and run.result_counts.total == 1
    (item,) = client.evals.runs.output_items.list(run.id, eval_id=made.id)
    assert item.results[0].passed or item.results[0].error, "an answer that is none of the labels cannot be graded"
    assert session.scalar(select(func.sum(TokenUse.written)).execution_options(populate_existing=True)) > 0


def test_a_run_is_cancelled_and_keeps_what_was_graded(client, generate_worker, session):  # noqa: F811
    register_long(session, "long")
    made = client.evals.create(name="long", data_source_config=CONFIG, testing_criteria=[RIGHT])
    content = [{"item": {"a": "x", "q": f"Say {i}."}} for i in range(10)]
    source = {
        "type": "completions", "model": "long", "source": {"type": "file_content", "content": content},
        "input_messages": {"type": "template", "template": [{"role": "user", "content": "{{item.q}}"}]},
        "sampling_params": {"max_completion_tokens": 16_000},
    }  # fmt: skip
    run = client.evals.runs.create(made.id, data_source=source)
    deadline = time.monotonic() + 30
    while client.evals.runs.retrieve(run.id, eval_id=made.id).result_counts.total == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    client.evals.runs.cancel(run.id, eval_id=made.id)
    run = ended(client, run)
    assert run.status == "canceled" and run.result_counts.total == 10 and run.result_counts.passed + run.result_counts.failed < 10
    assert client.evals.runs.cancel(run.id, eval_id=made.id).status == "canceled"


def test_an_item_that_lacks_what_the_template_names_is_that_items_fault(client, generate_worker, session):  # noqa: F811
    register_tiny(session)
    made = client.evals.create(name="a", data_source_config=CONFIG, testing_criteria=[{**RIGHT, "operation": "ne"}])
    content = [{"item": {"a": "x"}}, {"item": {"a": "x", "q": "Say x."}}]
    source = {
        "type": "completions", "model": "tiny", "source": {"type": "file_content", "content": content},
        "input_messages": {"type": "template", "template": [{"role": "user", "content": {"type": "input_text", "text": "{{item.q}}"}}]},
        "sampling_params": {"max_completion_tokens": 4},
    }  # fmt: skip
    run = ended(client, client.evals.runs.create(made.id, data_source=source))
    assert (run.status, run.result_counts.errored, run.result_counts.passed) == ("completed", 1, 1)
    (wrong,) = client.evals.runs.output_items.list(run.id, eval_id=made.id, status="error")
    assert "item.q" in wrong.sample.error.message


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"data_source_config": {"type": "responses"}}, "data_source_config.type"),
        ({"data_source_config": {"type": "custom", "item_schema": {"type": "thing"}}}, "data_source_config.item_schema"),
        ({"testing_criteria": []}, "testing_criteria"), ({"testing_criteria": [RIGHT, RIGHT]}, "testing_criteria"),
        ({"testing_criteria": [{**RIGHT, "operation": "resembles"}]}, "testing_criteria.0.operation"),
        ({"testing_criteria": [{k: v for k, v in NEAR.items() if k != "pass_threshold"}]}, "testing_criteria.0.pass_threshold"),
        ({"testing_criteria": [{**RIGHT, "input": "{{sample.output}}"}]}, "testing_criteria.0.input"),
    ],
)  # fmt: skip
def test_evals_that_are_refused(client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.evals.create(**{"name": "a", "data_source_config": CONFIG, "testing_criteria": [RIGHT], **more})
    assert caught.value.param == param


def test_runs_that_are_refused(client):
    made = client.evals.create(name="a", data_source_config=CONFIG, testing_criteria=[RIGHT])
    for source, kind in (
        ({"type": "jsonl", "source": {"type": "file_content", "content": [{"item": {"q": "no answer"}}]}}, openai.BadRequestError),
        ({"type": "completions", "model": "nobody", "source": given(("a", "b"))["source"], "input_messages": {"type": "item_reference", "item_reference": "item.q"}}, openai.NotFoundError),
        ({"type": "responses", "source": given(("a", "b"))["source"]}, openai.BadRequestError),
        ({"type": "jsonl", "source": {"type": "file_id", "id": "file-" + "0" * 32}}, openai.NotFoundError),
    ):  # fmt: skip
        with pytest.raises(kind):
            client.evals.runs.create(made.id, data_source=source)
    bad = client.files.create(file=("items.jsonl", b'{"item": {"a": "b"}}\n{"item": 3}\n'), purpose="evals")
    run = ended(client, client.evals.runs.create(made.id, data_source={"type": "jsonl", "source": {"type": "file_id", "id": bad.id}}))
    assert run.status == "failed" and "Line 2" in run.error.message


def test_evals_and_runs_are_listed_changed_and_deleted(client, session):
    made = client.evals.create(name="a", data_source_config=CONFIG, testing_criteria=[RIGHT])
    assert client.evals.update(made.id, name="b", metadata={"x": "y"}).name == "b" and client.evals.retrieve(made.id).metadata == {"x": "y"}
    assert [one.id for one in client.evals.list()] == [made.id]
    runs = [ended(client, client.evals.runs.create(made.id, name=str(i), data_source=given(("a", "a")))) for i in range(2)]
    assert [run.name for run in client.evals.runs.list(made.id)] == ["0", "1"] and not list(
        client.evals.runs.list(made.id, status="failed")
    )
    client.evals.runs.delete(runs[0].id, eval_id=made.id)
    assert [run.id for run in client.evals.runs.list(made.id)] == [runs[1].id]
    other = client.evals.create(name="c", data_source_config=CONFIG, testing_criteria=[RIGHT])
    with pytest.raises(openai.NotFoundError):
        client.evals.runs.retrieve(runs[1].id, eval_id=other.id)
    client.evals.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.evals.runs.retrieve(runs[1].id, eval_id=made.id)


def test_a_run_whose_holder_died_goes_on_without_an_item_twice(client, session, user):
    from app import leases

    made = client.evals.create(name="a", data_source_config=CONFIG, testing_criteria=[RIGHT])
    with transaction() as other:
        found = evals.get(other, user, ids.parse(ids.EVAL, made.id))
        source = sources.read(given(("a", "a"), ("b", "b"), ("c", "x")))
        run = evals.create_run(other, user, found, "left", source, None)
        held = evals.claim_next(other)
        assert held is not None and held.id == run.id
        row = {
            "place": 1, "status": "pass", "item": {"a": "b"}, "sample": {"error": None}, "usage": {},
            "results": [{"name": "right", "type": "string_check", "passed": True, "score": 1.0, "sample": None}],
        }  # fmt: skip
        evals.store(other, run.id, held.fence, [row], 3)
    with transaction() as other:
        other.get_one(EvalRun, run.id).lease_until = leases.OVER
    with transaction() as other:
        evals.reap(other)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with transaction() as other:
            now = other.get_one(EvalRun, run.id)
            if now.status == "completed":
                break
        time.sleep(0.2)
    assert (now.status, now.passed, now.failed, now.total) == ("completed", 2, 1, 3)
    with transaction() as other:
        assert sorted(other.scalars(select(EvalItem.place).where(EvalItem.run_id == run.id))) == [0, 1, 2]
        assert evals.store(other, run.id, held.fence, [row]) is None, "whoever was taken for dead stores nothing more"


def test_the_pages_show_runs_and_items(client, web, session, user):
    from starlette.testclient import TestClient

    from app.web import auth
    from tests.conftest import ORIGIN, csrf_token

    made = client.evals.create(name="<b>words", data_source_config=CONFIG, testing_criteria=[RIGHT])
    run = ended(client, client.evals.runs.create(made.id, name="one", data_source=given(("yes", "yes"), ("no", "<i>maybe"))))
    link = auth.new_sign_in_link(session, user)
    session.commit()
    browser = TestClient(web.app, base_url=ORIGIN, headers={"origin": ORIGIN})
    browser.headers["x-csrf-token"] = csrf_token(browser.get(link).text)
    assert "&lt;b&gt;words" in browser.get("/evals").text
    shown = browser.get(f"/evals/{made.id}").text
    assert "50.0%" in shown and "&lt;i&gt;maybe" in shown
    only = browser.get(f"/evals/{made.id}?run={run.id}&status=pass").text
    assert "&lt;i&gt;maybe" not in only
    browser.post(f"/evals/{made.id}/runs/{run.id}/delete")
    assert "No runs yet" in browser.get(f"/evals/{made.id}").text
    browser.post(f"/evals/{made.id}/delete")
    assert "No evals yet" in browser.get("/evals").text
