"""Comparisons of several base models: ordered, judged by what does not depend on a tokenizer, and shown."""

from __future__ import annotations

import html
import json
import math
import uuid

import pytest
from sqlalchemy import select

from app.errors import BadField, DoesNotFit
from app.evaluation import comparison_table, comparisons
from app.jobs import row_losses
from app.kit import ids
from app.tables import Event, Model
from tests.routes.test_comparisons import body, chats, create, end, kinds, words

__all__ = ["chats", "kinds"]


@pytest.fixture
def two(session, tiny_registered) -> Model:
    """A second base, `wide`, whose vocabulary is twice the small one's."""
    shape = tiny_registered.shape
    columns = {name: getattr(tiny_registered, name) for name in ("kind", "path", "revision", "source", "license", "bytes")}
    wide = Model(
        id=uuid.uuid4(),
        name="wide",
        title="Wide",
        shape={**shape, "vocabulary": 2 * shape["vocabulary"]},
        status="ready",
        owner_id=None,
        **columns,
    )
    session.add(wide)
    session.commit()
    return wide


def several(dataset, *strategies, **more) -> dict:
    return {**body(dataset, *strategies, **more), "model": None, "models": ["tiny", "wide"], "kind": "models"}


def test_every_strategy_is_run_on_every_base(api, session, user, two, chats):
    found = create(session, user, several(chats, "lora", "ia3", seed=9))
    made = comparisons.jobs_of(session, found)
    assert [(job.spec["model"]["name"], job.spec["strategy"]["name"]) for job in made] == [
        ("tiny", "lora"), ("tiny", "ia3"), ("wide", "lora"), ("wide", "ia3"),
    ]  # fmt: skip
    assert len({(job.spec["dataset"]["sha256"], job.spec["run"]["seed"], job.spec["run"]["epochs"]) for job in made}) == 1
    assert found.name == "2 base models on chats" and made[0].name == "2 base models on chats: tiny, LoRA"
    answer = api.get(f"/v1/comparisons/{ids.public(ids.COMPARISON, found.id)}").json()
    assert (answer["model"], answer["models"], answer["score"]) == (None, ["tiny", "wide"], "bits_per_byte")
    assert [row["title"] for row in answer["data"]] == ["tiny, LoRA", "tiny, (IA)³", "wide, LoRA", "wide, (IA)³"]
    assert answer["data"][0]["parameters"] < answer["data"][2]["parameters"]
    assert "loss" not in {column["key"] for column in answer["columns"]}, "a loss per token of another tokenizer is no score"
    plan = api.post("/v1/comparisons/plan", json=several(chats, "lora")).json()
    assert [one["model"] for one in plan["data"]] == ["tiny", "wide"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"models": ["tiny"]}, "at least 2"),
        ({"models": ["tiny", "tiny"]}, "named twice"),
        ({"models": None, "model": "tiny"}, "the kinds `models` and `matrix`"),
        ({"kind": "strategies"}, "no other kind"),
        ({"model": "tiny"}, "one base model in `model`, or several"),
        ({"models": ["tiny", "nobody"]}, "nobody"),
    ],
)
def test_what_is_wrong_is_said(api, two, chats, change, says):
    answer = api.post("/v1/comparisons", json={name: value for name, value in {**several(chats, "lora"), **change}.items() if value})
    assert answer.status_code in (400, 404) and says in answer.text


def test_a_strategy_that_one_base_cannot_run_leaves_the_others(session, user, two, chats):
    found = create(session, user, several(chats, "lora", "bitfit"))
    assert [(one["model"], one["strategy"]) for one in found.refused] == [("tiny", "bitfit"), ("wide", "bitfit")]
    assert len(comparisons.jobs_of(session, found)) == 2
    with pytest.raises(DoesNotFit, match="No method"):
        comparisons.create(session, user, comparisons.read_order(several(chats, "bitfit")))
    with pytest.raises(BadField):
        comparisons.read_order({**several(chats, "lora"), "models": []})


@pytest.mark.parametrize(("noise", "wins"), [(0.3, True), (6.0, False)])
def test_bits_per_byte_are_told_apart_row_by_row_of_the_same_texts(session, user, two, chats, data_dir, noise, wins):
    """The second reads twice as many tokens of half the loss each: the texts cost it as much, and 10 % less."""
    found = create(session, user, several(chats, "lora"))
    first, second = comparisons.jobs_of(session, found)
    for place, (job, bits, nats, tokens) in enumerate(((first, 1.0, 10.0, 5), (second, 0.9, 9.0, 10))):
        end(session, job, loss=nats / tokens, memory=1, seconds=1, bits_per_byte=bits)
        path = session.scalar(select(Event.data).where(Event.job_id == job.id, Event.type == "finished"))["path"]
        after = [(nats + noise * math.sin(row * (place + 1))) / tokens for row in range(40)]
        columns = {"line": [*range(40)], "before": [3.0] * 40, "after": after, "tokens": [tokens] * 40, "held_out": [True] * 40}
        (data_dir / path).parent.mkdir(parents=True, exist_ok=True)
        ((data_dir / path).parent / row_losses.FILE).write_text(json.dumps(columns))
    table = comparison_table.table(session, found)
    assert table.winners["bits_per_byte"] == ([ids.public(ids.JOB, second.id)] if wins else [])
    assert table.winners["parameters"] == [] and set(table.bases) == {"tiny", "wide"} and table.base == {}


def test_classes_are_told_apart_by_their_distance_from_the_commonest_label(session, user, two, kinds):
    found = create(session, user, several(kinds, "dense_head"))
    first, second = comparisons.jobs_of(session, found)
    end(session, first, loss=0.7, memory=1, seconds=1, accuracy=0.8, macro_f1=0.8, noise=0.02)
    end(session, second, loss=0.6, memory=1, seconds=2, accuracy=0.9, macro_f1=0.9, noise=0.02)
    table = comparison_table.table(session, found)
    assert table.columns[0].key == "accuracy" and table.winners["accuracy"] == [ids.public(ids.JOB, second.id)]


def test_base_models_are_chosen_in_the_form_ordered_and_drawn_by_their_size(client, session, user, two, chats):
    page = client.get("/compare/new", params={"kind": "models"})
    assert page.text.count('name="base"') == 2 and "Start 2 runs" in words(page), "both are of one kind, with the recommended method"
    key = ids.public(ids.DATASET, chats.id)
    sent = {"kind": "models", "shown": "models", "dataset": key, "strategy": ["lora"], "run.epochs": "1"}
    one = client.get("/compare/new", params={**sent, "base": ["tiny"]})
    assert "Choose at least two base models" in words(one) and 'id="start" disabled' in one.text
    gone = client.get("/compare/new", params={**sent, "base": ["tiny", "nobody"]})
    assert "There is no model nobody" in words(gone)
    both = client.get("/compare/new", params={**sent, "base": ["tiny", "wide"]}, headers={"hx-request": "true"})
    assert "base=tiny&base=wide" in both.headers["hx-replace-url"] and "Start 2 runs" in words(both)
    command = html.unescape(both.text).split('id="text-curl"')[1].split("</pre>")[0]
    assert '"models": [' in command and '"model":' not in command
    ordered = client.post("/compare", data={**sent, "base": ["tiny", "wide"], "key": "k"}, follow_redirects=False)
    found = session.scalars(comparisons.mine(user)).one()
    for job, bits in zip(comparisons.jobs_of(session, found), (1.0, 0.9), strict=True):
        end(session, job, loss=1.0, memory=1, seconds=1, bits_per_byte=bits)
    page = client.get(ordered.headers["location"])
    assert "Bits per byte against parameters" in words(page) and "tiny, LoRA" in words(page) and "Base wide" in words(page)
    assert "base models" in words(client.get("/compare"))
