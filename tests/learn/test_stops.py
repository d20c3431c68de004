"""The stops of the reading room: each click through the route, with real workers and small models, and the result read back."""

from __future__ import annotations

import html
import json
import re
import shutil
import uuid
from pathlib import Path

import pytest
from sqlalchemy import select

from app.datasets import samples
from app.learn import STOPS, _text, _visits
from app.learn.bat_or_stick import by_rules
from app.learn.chain_of_thought import COWS, PENS
from app.learn.frozen import SHOWN as METHODS
from app.learn.frozen import count_layers
from app.learn.what_it_takes import SIZES, disk_bytes, seconds_for
from app.models import from_nothing
from app.models.from_nothing import BlankSize
from app.planning import calculator
from app.shapes import Shape
from app.strategies import STRATEGIES
from app.tables import Dataset, Evaluation, Exchange, Job, Model, PromptResult, PromptRun, StopVisit, User
from app.views.glossary import GLOSSARY
from tests.factories import carry_out, read
from tests.generating import _workers, answering_dir, generate_worker, register_long, register_tiny  # noqa: F401
from tests.routes.test_embeddings import encoder  # noqa: F401


def press(client, stop: str, **typed: str):
    return client.post(f"/learn/{stop}", data=typed, follow_redirects=False)


def shown(client, stop: str) -> str:
    page = client.get(f"/learn/{stop}")
    assert page.status_code == 200, page.text[:2000]
    return html.unescape(page.text)


def visit_of(session, stop: str) -> StopVisit:
    session.rollback()
    return session.scalars(select(StopVisit).where(StopVisit.stop == stop).order_by(StopVisit.created_at.desc())).first()


def with_sample(session, user, name: str) -> Dataset:
    return read(session, samples.add(session, user, name))


# What every stop has ---------------------------------------------------------------------------------------------------------


def test_every_stop_has_its_page_and_its_words(client):
    room = html.unescape(client.get("/learn").text)
    assert len(STOPS) == 14 and f"0 of {len(STOPS)} done" in room
    for name, stop in STOPS.items():
        assert set(stop.words) <= GLOSSARY.keys() and f'href="/learn/{name}"' in room and stop.idea in room, name
        page = shown(client, name)
        assert stop.do in page and all(GLOSSARY[word] in page for word in stop.words), name
        assert len(page.encode()) < 100_000
        assert not stop.needs or ("disabled" in page and "Get " in page), "without its model the click is no click"
    assert client.get("/learn/none").status_code == 404 and press(client, "none").status_code == 404


def test_what_it_lacks_is_said_when_it_is_started_all_the_same(client, session, user, data_dir):
    refused = press(client, "six-tasks")
    assert refused.status_code == 409 and "This stop needs a model such as SmolLM2" in html.unescape(refused.text)
    assert visit_of(session, "six-tasks") is None


# Answers that a click waits for ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_answers_are_kept_as_results(client, session, user, generate_worker):  # noqa: F811
    """Next token, six tasks and three kinds, by the real engine: the result is what it said, and each has its exchange."""
    register_long(session, "talks")
    assert press(client, "next-token", text="The cat <sat> on").headers["location"] == "/learn/next-token#result"
    visit = visit_of(session, "next-token")
    answer = client.get("/playground/next-tokens", params={"models": "talks", "text": "The cat <sat> on"}).text
    assert len(visit.refs["next"]) == 8 and "<sat>" not in answer
    for token, share in visit.refs["next"][:3]:
        assert f"{share:.1%}" in answer, token
    page = shown(client, "next-token")
    assert page.count('<rect class="bar"') == 8 and visit.refs["model"] == "talks"
    session.refresh(visit)
    assert visit.done_at is not None and visit.headline.startswith("After “The cat <sat> on”")
    assert press(client, "next-token", text="").status_code == 400

    assert press(client, "six-tasks", do="translation").status_code == 303
    assert "5 to go" in shown(client, "six-tasks") and visit_of(session, "six-tasks").done_at is None
    assert press(client, "six-tasks").status_code == 303
    page, visit = shown(client, "six-tasks"), visit_of(session, "six-tasks")
    assert page.count('aria-label="Prompt of') == 6 and visit.done_at is not None
    assert session.get(Exchange, uuid.UUID(visit.refs["exchanges"]["chat"])).owner_id == user.id
    assert client.get(f"/playground/{visit.refs['exchanges']['chat']}").status_code == 200

    register_long(session, "continues", "generic")
    assert press(client, "kinds").status_code == 303
    page, visit = shown(client, "kinds"), visit_of(session, "kinds")
    assert visit.refs["stand_ins"] == ["instruction"] and "No model of the kind instruction is installed" in page
    prompts = re.findall(r'aria-label="Prompt of [^"]*">(.*?)</pre>', page, re.DOTALL)
    assert (
        prompts[0].endswith("1. What is the capital of France?\n2.")
        and prompts[1].count("<|im_start|>") == 2
        and prompts[2].count("<|im_start|>") == 4
    )

    room = html.unescape(client.get("/learn").text)
    assert "3 of 14 done" in room and "talks did 6 tasks" in room


def test_a_text_becomes_a_vector_next_to_its_like(client, session, user, encoder, generate_worker):  # noqa: F811
    """By the real engine: a row of the sample is nearest to itself, and the map is an evaluation that waits for its worker."""
    dataset = with_sample(session, user, "shop-questions")
    row = dataset.report["preview"][3]["row"]
    assert press(client, "vector", text=row["text"]).status_code == 303
    page, visit = shown(client, "vector"), visit_of(session, "vector")
    near = max(visit.refs["rows"], key=lambda one: one["cosine"])
    assert near["text"] == row["text"] and near["cosine"] == pytest.approx(1, abs=1e-4) and visit.refs["size"] == 32
    assert "The map is being drawn" in page and "32 numbers" in page and f"{visit.refs['numbers'][0]:+.3f}" in page
    found = session.get(Evaluation, uuid.UUID(visit.refs["map"]))
    assert found.kind == "vectors" and found.status == "queued" and visit.done_at is None
    assert press(client, "vector", text="  ").status_code == 400


@pytest.mark.long
def test_prompts_are_scored_by_runs(client, session, user, data_dir, tiny_model):
    """The click starts the runs; the worker's own body carries them out; the page says how often each was right."""
    from worker.evaluation import prompt_runs as worker_runs

    shutil.copytree(tiny_model, data_dir / "models" / "tiny", dirs_exist_ok=True)
    register_tiny(session)
    with_sample(session, user, "opposites")
    assert press(client, "shots").status_code == 303
    assert "0 of 3 prompts scored" in shown(client, "shots")
    runs = session.scalars(select(PromptRun)).all()
    assert [run.spec["body"]["shots"] for run in runs] == [0, 2, 6] and len({run.spec["split_seed"] for run in runs}) == 1
    for run in runs:
        worker_runs.work(run.id)
    said = session.scalars(select(PromptResult).order_by(PromptResult.line)).all()
    assert all(row.rendered_prompt.startswith("Write the opposite.\n\n") and row.rendered_prompt.endswith(f"{row.input}:") for row in said)
    page = shown(client, "shots")
    assert page.count('<rect class="between"') == 3 and "of 24 rows" in page and "exact paired test" in page
    visit = visit_of(session, "shots")
    assert visit.done_at is not None and visit.headline.startswith("zero-shot ")
    press(client, "shots")
    session.rollback()
    assert len(session.scalars(select(PromptRun)).all()) == 6 and len({run.version_id for run in session.scalars(select(PromptRun))}) == 3


def test_the_word_problems_are_graded_by_their_numbers():
    from app.learn._base import StopText
    from app.learn.chain_of_thought import _graded

    assert (PENS.answer, COWS.answer) == (10 + 5 * 15, 90 - 15 + 30)
    said = {"It is 105.": True, "90 - 15 = 75\n#### 105": True, "#### 75": False, "75": False, "": False}
    assert {text: _graded(COWS, StopText("", text)).right for text in said} == said
    rows = [json.loads(line) for line in (samples.FOLDER / "word-problems.jsonl").read_text().splitlines()]
    for row in rows:
        steps, _, answer = row["output"].rpartition("\n#### ")
        assert steps.removesuffix(".").endswith(f"= {answer}"), row
        for left, right in re.findall(r"([\d+ -]+) = (\d+)", steps):
            assert sum(int(n) for n in left.replace(" - ", " -").replace(" + ", " +").split()) == int(right), row


def test_rules_decide_by_the_first_that_fits():
    assert by_rules("It has a WIDE bottom") == by_rules("a handle") == "cricket bat"
    assert by_rules("A wide curved blade") == by_rules("nothing of it") == "hockey stick"


# What is computed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_layers_add_up_to_what_the_method_trains(method: str):
    """On a Llama and with tied and untied heads: nothing is counted twice or missed."""
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    }  # fmt: skip
    for tied in (True, False):
        from app.shapes import shape_of

        shape, strategy = shape_of(config | {"tie_word_embeddings": tied}), STRATEGIES[method]()
        layers = count_layers(strategy, shape)
        assert sum(layer.parameters for layer in layers) == shape.parameters()
        assert sum(layer.trained for layer in layers) == strategy.trainable_parameters(shape, task=strategy.tasks[0], labels=2)
        assert all(layer.trained >= 0 for layer in layers) and [layer.title for layer in layers][1] == "Layer 5"
        own = [layer.trained for layer in layers[1:-1]]
        if method == "top_layers":
            assert own == [layers[1].parameters] * 2 + [0] * 3
        elif method in ("lora", "full", "bottleneck_adapter", "prefix_tuning", "layer_norm"):
            assert len(set(own)) == 1 and own[0] > 0
        else:
            assert set(own) == {0}


def test_what_it_takes_is_the_calculators(client, session, user, data_dir):
    assert press(client, "what-it-takes", method="full", tokens="1,000,000").status_code == 303
    page = shown(client, "what-it-takes")
    for size in SIZES:
        row = next(row for row in calculator.table(calculator.shape_for(size), 2048) if row.strategy == "full")
        assert f"{row.bytes[1] / (1e12 if row.bytes[1] >= 999.5e9 else 1e9):.3g}"[:3] in page
    shape = calculator.shape_for(7)
    assert seconds_for(shape, "full", 10**6) == pytest.approx(6 * shape.parameters() * 1e6 / 150e12, rel=0.05)
    assert seconds_for(shape, "lora", 10**6) < seconds_for(shape, "full", 10**6) and disk_bytes(shape, "weights") == 2 * shape.parameters()
    assert "GPT-3 175 B" in page and visit_of(session, "what-it-takes").done_at is not None
    for wrong in ({"method": "none"}, {"method": "qlora"}, {"tokens": "-1"}, {"tokens": "0"}, {"tokens": ""}, {"tokens": "9" * 400}):
        refused = press(client, "what-it-takes", **{"method": "lora", "tokens": "1000"} | wrong)
        assert refused.status_code == 400, wrong


# Models from nothing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [BlankSize(32, 2), BlankSize(64, 3)])
def test_a_model_from_nothing_is_one_that_transformers_reads(session, user, data_dir: Path, size: BlankSize):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = from_nothing.ensure(session, user, size)
    assert from_nothing.ensure(session, user, size).id == model.id and from_nothing.is_blank(model)
    folder = data_dir / model.path
    loaded, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert sum(p.numel() for p in loaded.parameters()) == Shape.model_validate(model.shape).parameters()
    weights = loaded.model.layers[0].mlp.up_proj.weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.05) and torch.equal(loaded.model.norm.weight, torch.ones(size.hidden))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Zoë’s 3 violins:\n\t“ready” — 木"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and 0 not in ids and tokenizer.decode(ids) == text
    loss = loaded(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert loss == pytest.approx(5.55, abs=0.15), "it knows nothing: ln 257"
    assert _visits.bases(session, user) == [], "nothing prompts it by itself"


@pytest.mark.long
def test_pre_training_helps_what_follows(client, session, user, data_dir, monkeypatch):
    """Both clicks with real jobs, shorter ones: the pre-trained model starts lower than its twin and stays below it."""
    from app.learn import pre_training

    monkeypatch.setattr(pre_training, "SIZE", BlankSize(64, 2))
    monkeypatch.setattr(pre_training, "FROM_NOTHING", pre_training.FROM_NOTHING | {"max_steps": 40, "eval_steps": 20})
    monkeypatch.setattr(pre_training, "TUNED", pre_training.TUNED | {"max_steps": 6, "eval_steps": 3})
    read(session, _text.dataset(session, user))
    with_sample(session, user, "workshop-notes")
    assert press(client, "pre-training", do="tune").status_code == 409
    assert press(client, "pre-training").status_code == 303
    assert "Waiting for the worker" in shown(client, "pre-training")
    carry_out(session, data_dir, session.scalars(select(Job)).one(), live=True)
    page = shown(client, "pre-training")
    assert "Now fine-tune it" in page and "After 0 steps" in page and visit_of(session, "pre-training").done_at is None
    assert press(client, "pre-training", do="tune").status_code == 303
    for job in session.scalars(select(Job).where(Job.status == "queued")).all():
        carry_out(session, data_dir, job, live=True)
    page, visit = shown(client, "pre-training"), visit_of(session, "pre-training")
    assert page.count('<polyline class="line-') == 3 and visit.done_at is not None
    with_it, without = (float(n) for n in re.findall(r"(\d\.\d\d)", visit.headline))
    assert with_it < without - 0.2
    assert session.get(Model, session.get_one(Job, uuid.UUID(visit.refs["twin"])).model_id).base_id is None


# Whose they are ---------------------------------------------------------------------------------------------------------------------


def test_a_visit_is_its_persons(client, session, user, data_dir):
    press(client, "what-it-takes", method="lora", tokens="1000")
    mine = visit_of(session, "what-it-takes")
    assert client.get(f"/learn/what-it-takes?visit={mine.id}").status_code == 200
    assert (
        client.get(f"/learn/frozen?visit={mine.id}").status_code == 404
        and client.get(f"/learn/what-it-takes?visit={uuid.uuid4()}").status_code == 404
    )
    other = User(name="Bo", role="member")
    session.add(other)
    session.flush()
    mine.owner_id = other.id
    session.commit()
    assert client.get(f"/learn/what-it-takes?visit={mine.id}").status_code == 404 and "0 of 14 done" in client.get("/learn").text
    assert "Your result" not in shown(client, "what-it-takes")
