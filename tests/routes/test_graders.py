"""Graders by the unmodified client, and graders that are saved."""

from __future__ import annotations

import json

import openai
import pytest
from sqlalchemy import select

from app.kit import ids
from app.tables import AuditLog, SavedGrader, TokenUse
from tests.generating import (  # noqa: F401
    _workers,
    answering_dir,
    generate_worker,
    register_tiny,
    stop_worker,
)
from tests.routes.test_advice import chats  # noqa: F401  a fixture

STRING = {"type": "string_check", "name": "same", "input": "{{sample.output_text}}", "operation": "eq", "reference": "{{item.reference}}"}
SIMILAR = {
    "type": "text_similarity",
    "name": "close",
    "input": "{{sample.output_text}}",
    "reference": "{{item.reference}}",
    "evaluation_metric": "fuzzy_match",
}
CODE = {
    "type": "python",
    "name": "code",
    "image_tag": "2025-05-08",
    "source": "def grade(sample, item):\n    return 0.5 if sample['output_json']['a'] == item['a'] else 0.0",
}
JUDGE = {
    "type": "score_model",
    "name": "judge",
    "model": "tiny",
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "Grade {{sample.output_text}}"}]}],
    "range": [0, 10],
    "sampling_params": {"max_completions_tokens": 8, "seed": 1, "temperature": 0, "top_p": 1},
}
MULTI = {"type": "multi", "name": "both", "graders": {"same": STRING, "close": SIMILAR}, "calculate_output": "0.4 * same + 0.6 * close"}


@pytest.fixture
def graders(openai_client):
    return openai_client.fine_tuning.alpha.graders


@pytest.mark.parametrize(
    "grader",
    [STRING, SIMILAR, CODE, MULTI, MULTI | {"graders": STRING, "calculate_output": "same"}],
    ids=["string", "similar", "python", "multi", "multi-one"],
)
def test_validate_gives_the_grader_back(graders, grader):
    found = graders.validate(grader=grader).grader
    assert found.to_dict() == grader and type(found).__name__.endswith("Grader")


def test_run(graders):
    found = graders.run(grader=MULTI, model_sample="fuzzy wuzzy was a bear", item={"reference": "fuzzy wuzzy was a bear"})
    assert found.reward == 1 and found.sub_rewards == {"same": 1, "close": 1}
    metadata = found.metadata
    assert (metadata.name, metadata.type, metadata.sampled_model_name, metadata.token_usage) == ("both", "multi", None, None)
    assert metadata.execution_time > 0 and found.api_model_grader_token_usage_per_model == {}
    assert not any(value is True for value in metadata.errors.to_dict().values())
    near = graders.run(grader=MULTI, model_sample="fuzzy wuzzy was a bee", item={"reference": "fuzzy wuzzy was a bear"})
    assert 0.4 < near.reward < 0.6 and near.sub_rewards["same"] == 0
    assert graders.run(grader=CODE, model_sample='{"a": 1}', item={"a": 1}).reward == 0.5


def test_run_says_what_went_wrong_with_the_answer(graders):
    absent = graders.run(grader=STRING, model_sample="x")
    assert (
        absent.reward == 0
        and absent.metadata.errors.invalid_variable_error
        and "reference" in absent.metadata.errors.model_extra["message"]
    )
    code = graders.run(grader=CODE, model_sample="no json", item={"a": 1}).metadata.errors
    assert code.python_grader_runtime_error and "TypeError" in code.python_grader_runtime_error_details
    parsed = graders.run(grader=STRING | {"input": "{{sample.output_json.a}}"}, model_sample="x", item={"reference": "x"})
    assert parsed.metadata.errors.sample_parse_error


@pytest.mark.parametrize(
    ("grader", "param"),
    [
        ({"type": "none"}, "grader.type"), (STRING | {"operation": "same"}, "grader.operation"), (STRING | {"input": "{{7*7}}"}, "grader.input"),
        (STRING | {"more": 1}, "grader.more"), (CODE | {"source": "import numpy"}, "grader.source"), (MULTI | {"calculate_output": "9**9**nine"}, "grader"),
        (JUDGE | {"model": "nobody"}, "model"), (JUDGE | {"sampling_params": {"reasoning_effort": "low"}}, "grader.sampling_params.reasoning_effort"),
        (SIMILAR | {"evaluation_metric": "cosine"}, "grader.evaluation_metric"),
    ],
)  # fmt: skip
def test_a_grader_that_does_not_work_is_refused(graders, grader, param):
    for call in (lambda: graders.validate(grader=grader), lambda: graders.run(grader=grader, model_sample="x", item={"reference": "x"})):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
            call()
        assert caught.value.param == param and caught.value.body["message"]


def test_no_field_is_ignored(graders):
    with pytest.raises(openai.BadRequestError, match="more"):
        graders.run(grader=STRING, model_sample="x", item={}, extra_body={"more": 1})
    with pytest.raises(openai.BadRequestError) as caught:
        graders.run(grader=STRING, model_sample="x", item=[1])
    assert caught.value.param == "item"


@pytest.mark.long
def test_a_judge_is_asked_through_the_worker(graders, generate_worker, session):  # noqa: F811
    register_tiny(session)
    graders.validate(grader=JUDGE)
    found = graders.run(grader=JUDGE, model_sample="The belly is made of spruce.", item={})
    errors = found.metadata.errors
    if errors.api_model_grader_parse_error:  # a model of 100,000 weights need not give a number
        assert found.reward == 0 and "judge gave" in errors.model_extra["message"]
    else:
        assert 0 <= found.reward <= 10 and found.metadata.sampled_model_name == "tiny" and found.metadata.token_usage > 8
    assert not errors.api_model_grader_server_error
    used = session.scalars(select(TokenUse)).one()
    assert used.read > 8 and 1 <= used.written <= 8


def test_saved_changed_named_and_deleted(api, session):
    made = api.post("/v1/graders", json={"grader": MULTI}).json()
    assert made["object"] == "grader" and made["name"] == "both" and made["grader"] == MULTI and made["id"].startswith("grader-")
    assert api.get("/v1/graders").json()["data"] == [made]
    assert api.get(f"/v1/graders/{made['id']}").json() == made
    changed = api.patch(f"/v1/graders/{made['id']}", json={"grader": STRING}).json()
    assert changed["name"] == "same" and changed["grader"] == STRING and changed["updated_at"] >= made["updated_at"]
    refused = api.patch(f"/v1/graders/{made['id']}", json={"grader": STRING | {"input": "{{none}}"}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "grader.input"
    assert api.get(f"/v1/graders/{made['id']}").json()["grader"] == STRING
    assert api.delete(f"/v1/graders/{made['id']}").json() == {"id": made["id"], "object": "grader", "deleted": True}
    assert api.get(f"/v1/graders/{made['id']}").status_code == 404 and api.get("/v1/graders").json()["data"] == []
    row = session.get_one(SavedGrader, ids.parse_grader(made["id"]))
    assert row.deleted_at is not None and json.dumps(row.body)
    types = [one.type for one in session.query(AuditLog).order_by(AuditLog.id)]
    assert [one for one in types if one.startswith("grader.")] == ["grader.created", "grader.updated", "grader.deleted"]


PAIRS = [{"item": {"reference": "maple"}, "first": "Spruce.", "second": "Maple."}, {"first": "a", "second": "b"}]


def test_pairs_are_judged_in_both_orders_by_the_worker(api, generate_worker, session):  # noqa: F811
    register_tiny(session)
    found = api.post("/v1/graders/compare", json={"grader": JUDGE, "rows": PAIRS}).json()
    assert found["object"] == "grader.comparison" and len(found["rows"]) == 2
    for row in found["rows"]:  # a model of 100,000 weights need not name an answer
        verdicts = [row["straight"], row["swapped"]]
        assert (row["error"] is None) == (None not in verdicts) and (row["winner"] is None or row["winner"] == row["straight"])
    both = [row for row in found["rows"] if row["error"] is None]
    assert (found["agreement"] is None) == (not both)
    used = session.scalars(select(TokenUse)).one()
    assert 4 <= used.written <= 4 * 8 and used.read > 4 * 40, "two rows, two orders"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"grader": STRING, "rows": PAIRS}, "grader.type"), ({"grader": MULTI, "rows": PAIRS}, "grader.type"),
        ({"grader": JUDGE, "rows": []}, "rows"), ({"grader": JUDGE, "rows": PAIRS * 26}, "rows"), ({"grader": JUDGE, "rows": [3]}, "rows.0"),
        ({"grader": JUDGE, "rows": [{"first": "a"}]}, "rows.0.second"), ({"grader": JUDGE, "rows": [{**PAIRS[1], "third": "c"}]}, "rows.0.third"),
        ({"grader": JUDGE, "rows": [{**PAIRS[1], "item": [1]}]}, "rows.0.item"), ({"grader": JUDGE | {"model": "nobody"}, "rows": PAIRS}, "model"),
        ({"grader": JUDGE, "rows": PAIRS, "swap": False}, "swap"),
    ],
)  # fmt: skip
def test_a_comparison_that_is_none_is_refused(api, tiny_registered, body, param):
    refused = api.post("/v1/graders/compare", json=body)
    assert refused.status_code in (400, 404) and refused.json()["error"]["param"] == param, refused.text


@pytest.mark.long
def test_two_models_are_compared_on_the_page(client, generate_worker, session, chats):  # noqa: F811
    """Both answer five rows, and the judge, one of them, is asked ten times."""
    register_tiny(session), register_tiny(session, "other")
    form = {"type": "label_model", "name": "j", "grader.model": "tiny", "grader.input": json.dumps(JUDGE["input"]), "grader.labels": '["a", "b"]', "grader.passing_labels": '["a"]'}  # fmt: skip
    shown = client.get("/graders/new?type=label_model").text
    assert "Compare the answers of both models" in shown and "Compare the answers" not in client.get("/graders/new?type=python").text
    page = client.post("/graders/try", data={**form, "model": "tiny", "other": "other", "do": "compare"})
    assert page.status_code == 200 and "Which of two answers is better" in page.text, page.text[-2000:]
    table = page.text.partition('aria-label="Compared answers"')[2].partition("</table>")[0]
    assert table.count("<tr>") == 1 + 5 and ("The judge named none" in table or "self-agreement" in page.text)
    same = client.post("/graders/try", data={**form, "model": "tiny", "other": "tiny", "do": "compare"})
    assert same.status_code == 400 and "cannot be compared with itself" in same.text
    other = client.post(
        "/graders/try", data={"type": "length", "name": "l", "grader.max": "3", "model": "tiny", "other": "other", "do": "compare"}
    )
    assert other.status_code == 400 and "compares no answers" in other.text
