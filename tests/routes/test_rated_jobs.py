"""Jobs on rated answers (KTO): through OpenAI's client, in the form, and on datasets that an older studio read."""

from __future__ import annotations

import html
import re

import openai
import pytest

from app.jobs import service as jobs
from app.kit import ids
from tests.factories import upload


@pytest.fixture
def rated(session, user, data_dir):
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}." if n % 3 else "Who knows?", "label": n % 3 != 0} for n in range(40)]
    return upload(session, user, rows, "rated.jsonl")


def create(openai_client, rated, **order):
    return openai_client.fine_tuning.jobs.create(model="tiny", training_file=ids.public(ids.FILE, rated.file_id), **order)


def test_rated_answers_are_learnt_with_and_without_being_asked_for_by_name(openai_client, tiny_registered, rated):
    job = create(openai_client, rated)
    assert job.task == "kto" and job.method.type == "kto"
    assert job.preference == {"beta": 0.1, "desirable_weight": None, "undesirable_weight": None}
    method = {"type": "kto", "kto": {"hyperparameters": {"beta": 0.3, "n_epochs": 2}}}
    named = create(openai_client, rated, method=method, extra_body={"preference": {"desirable_weight": 1.5}})
    assert named.method.type == "kto" and named.run["epochs"] == 2 and named.preference["beta"] == 0.3
    assert named.preference["desirable_weight"] == 1.5 and named.estimate["seconds"] > 0
    again = openai_client.fine_tuning.jobs.retrieve(named.id)
    assert again.preference == named.preference and again.method.to_dict()["kto"]["hyperparameters"]["beta"] == 0.3


@pytest.mark.parametrize(
    ("ask", "param", "says"),
    [
        ({"method": {"type": "supervised"}}, "method.type", "Set the method to kto"),
        ({"method": {"type": "dpo"}}, "task", "cannot be used for preference"),
        ({"extra_body": {"task": "generation"}}, "task", "holds rows for kto (rated), which cannot be used for generation"),
        ({"extra_body": {"preference": {"loss": "dpo"}}}, "preference.loss", "no setting"),
        ({"extra_body": {"preference": {"desirable_weight": 0}}}, "preference.desirable_weight", "cannot be 0"),
        ({"extra_body": {"run": {"packing": False}}}, "run.packing", "always packed"),
        ({"extra_body": {"strategy": {"name": "feature_extraction"}}}, "strategy", "does not support the task kto"),
    ],
)
def test_what_rated_answers_cannot_be_combined_with(openai_client, tiny_registered, rated, ask, param, says):
    with pytest.raises(openai.BadRequestError) as caught:
        create(openai_client, rated, **ask)
    assert caught.value.param == param and says in caught.value.message


def test_the_form_offers_them_and_shows_their_settings(client, session, user, tiny_registered, rated):
    typed = {"model": "tiny", "dataset": ids.public(ids.DATASET, rated.id), "strategy": "lora"}
    page = client.get("/jobs/new", params=typed).text
    assert set(re.findall(r'name="preference\.(\w+)"', page)) == {"beta", "desirable_weight", "undesirable_weight"}
    assert "Ethayarajh" in page and "Fits in memory." in page
    wrong = client.post("/jobs", data={**typed, "preference.undesirable_weight": "-1"})
    assert wrong.status_code == 400 and "Weight of bad answers must be more than 0" in html.unescape(wrong.text)
    assert client.post("/jobs", data={**typed, "preference.undesirable_weight": "2"}, follow_redirects=False).status_code == 303
    (job,) = jobs.list_(session, user)
    assert (job.spec["task"], job.spec["preference"]["undesirable_weight"]) == ("kto", 2.0)
    assert (
        'value="2'
        in re.search(r'<input id="preference-undesirable-weight"[^>]*>', client.get(f"/jobs/new?clone={ids.public(ids.JOB, job.id)}").text)[
            0
        ]
    )


def test_advice_ranks_the_methods_for_them(client, tiny_registered, rated):
    page = client.get("/jobs/advice", params={"model": "tiny", "dataset": ids.public(ids.DATASET, rated.id)})
    assert page.status_code == 200 and "rated answers" in page.text and "LoRA" in page.text
    assert f"dataset={ids.public(ids.DATASET, rated.id)}" in page.text and "/jobs/new?" in page.text


def test_rows_that_an_older_studio_read_are_learnt_too(client, session, openai_client, tiny_registered, rated):
    """It wrote them down as rows for preferences."""
    rated.task = "preference"
    session.commit()
    assert create(openai_client, rated).task == "kto"
    page = client.get("/jobs/new", params={"model": "tiny", "dataset": ids.public(ids.DATASET, rated.id)}).text
    assert "preference.desirable_weight" in page and "preference.loss" not in page
    with pytest.raises(openai.BadRequestError, match="cannot be used for preference"):
        create(openai_client, rated, extra_body={"task": "preference"})
    listed = openai_client.get(f"/strategies?model=tiny&dataset={ids.public(ids.DATASET, rated.id)}", cast_to=object)
    assert {one["name"] for one in listed["data"] if one.get("advised")}
