"""Preference tuning in the browser: its settings stand in the form for pairs alone, and its curves on the job's page."""

from __future__ import annotations

import html
import json
import re

import pytest

from app import events
from app.jobs import service as jobs
from app.kit import ids
from tests import lives
from tests.factories import upload


@pytest.fixture
def make(session, user, data_dir):
    return lambda name, rows: ids.public(ids.DATASET, upload(session, user, rows, name).id)


@pytest.fixture
def pairs(make):
    return make(
        "pairs.jsonl",
        [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "Who knows, and who asks? " * 3} for n in range(40)],
    )


@pytest.fixture
def chats(make):
    return make(
        "chats.jsonl", [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}]} for n in range(40)]
    )


def test_the_form_has_the_settings_for_pairs_alone(client, tiny_registered, pairs, chats):
    page = client.get(f"/jobs/new?model=tiny&dataset={pairs}")
    beta = re.search(r'<input id="preference-beta"[^>]*>', page.text).group(0)
    assert 'placeholder="0.1"' in beta and 'value=""' in beta and 'type="number"' in beta and "Rafailov" in page.text
    assert "does not support the task preference" in html.unescape(page.text), "strategies that cannot are named with the reason"
    assert "preference-beta" not in client.get(f"/jobs/new?model=tiny&dataset={chats}").text


def test_an_order_keeps_its_settings_and_can_be_cloned(client, session, user, tiny_registered, pairs):
    typed = {"model": "tiny", "dataset": pairs, "strategy": "lora", "preference.beta": "0.4", "preference.loss": "ipo"}
    page = client.get("/jobs/new", params=typed)
    assert "beta: 0.4" in page.text and "Fits in memory." in page.text
    assert client.post("/jobs", data=typed, follow_redirects=False).status_code == 303
    (job,) = jobs.list_(session, user)
    assert job.spec["task"] == "preference" and job.spec["preference"]["beta"] == 0.4 and job.spec["preference"]["loss"] == "ipo"
    cloned = client.get(f"/jobs/new?clone={ids.public(ids.JOB, job.id)}").text
    assert 'value="0.4"' in re.search(r'<input id="preference-beta"[^>]*>', cloned).group(0)


def shown(page: str) -> dict[str, str]:
    """The settings of pairs that a form shows, with what stands in them while they are empty."""
    inputs = re.findall(r'<(?:input|select)[^>]* name="preference\.(\w+)"[^>]*>', page)
    return {name: (re.search(rf'name="preference\.{name}"[^>]*placeholder="([^"]*)"', page) or [""] * 2)[1] for name in inputs}


def test_the_form_shows_the_settings_of_the_loss_alone(client, session, user, tiny_registered, pairs):
    def page(**typed: str) -> str:
        return client.get("/jobs/new", params={"model": "tiny", "dataset": pairs, **{f"preference.{k}": v for k, v in typed.items()}}).text

    dpo, simpo, cpo = shown(page()), shown(page(loss="simpo")), shown(page(loss="cpo", beta=""))
    assert dpo == {"beta": "0.1", "loss": "", "label_smoothing": "0", "length_normalised": ""}
    assert simpo == {"beta": "2", "loss": "", "gamma": "1"} and cpo == {"beta": "0.1", "loss": "", "nll_weight": "1"}
    assert shown(page(loss="robust_dpo"))["label_smoothing"] == "0.1" and "Fits in memory." in page(loss="robust_dpo")
    # A setting of another loss that a person typed stays, and is refused at its field.
    other = html.unescape(page(loss="cpo", gamma="0.5"))
    assert "gamma" in shown(other) and re.search(r'id="preference-gamma-error">gamma means nothing with the loss cpo', other)
    assert "gamma: 0.5" in page(loss="simpo", gamma="0.5") and "loss: simpo" in page(loss="simpo")
    typed = {"model": "tiny", "dataset": pairs, "strategy": "lora", "preference.loss": "simpo", "preference.beta": "0.1"}
    assert client.post("/jobs", data=typed, follow_redirects=False).status_code == 303
    (job,) = jobs.list_(session, user)
    assert (job.spec["preference"]["beta"], job.spec["preference"]["gamma"]) == (0.1, 1.0), "0.1 is another loss's default and was typed"
    cloned = client.get(f"/jobs/new?clone={ids.public(ids.JOB, job.id)}").text
    assert re.search(r'<input id="preference-beta"[^>]*value="0.1"', cloned) and re.search(
        r'<input id="preference-gamma"[^>]*value=""', cloned
    )


def test_a_wrong_beta_is_said_beside_its_field(client, session, user, tiny_registered, pairs):
    page = client.post("/jobs", data={"model": "tiny", "dataset": pairs, "strategy": "lora", "preference.beta": "0"})
    assert page.status_code == 400 and "Beta must be more than 0" in html.unescape(page.text) and jobs.list_(session, user) == []


def test_margin_and_accuracy_are_drawn_as_they_come(client, session, user, tiny_registered):
    def measured(step: int) -> dict[str, float]:
        return {"reward_margin": step / 10, "reward_accuracy": 0.5 + step / 50, "chosen_reward": step / 20, "rejected_reward": -step / 20}

    said: list[events.TrainerEvent] = [
        event.model_copy(update={"metrics": measured(event.step)}) if isinstance(event, events.Step | events.Evaluated) else event
        for event in lives.steps(1, 12)
    ]
    job = lives.order(session, user, tiny_registered)
    lives.Life(session, job).claim().say(lives.started(), *said)
    page = client.get(f"/jobs/{ids.public(ids.JOB, job.id)}?tab=metrics")
    drawn = json.loads(re.search(r'id="points">(.*?)</script>', page.text, re.S).group(1))["charts"]
    shown = re.findall(r'data-chart="(\w+)"', page.text)
    assert shown[0] == "loss" and set(shown[1:5]) == set(measured(1)), "what is learnt stands before what explains it"
    assert drawn["reward_margin"]["training"][1][-1] == 1.2 and drawn["reward_margin"]["reward_margin"] == [[12], [1.2]]
    assert 'data-lines="training:1:line reward_margin:2:dots "' in page.text and "Reward margin" in page.text
