"""Advice and the guide: what they show follows from the strategies, the data and the machine."""

from __future__ import annotations

import html
import re

import pytest

from app.kit import ids
from app.kit.humanize import human_bytes, human_number
from app.machines.hardware import this_machine
from app.planning import calculator
from app.planning import memory as memory_estimate
from app.shapes import Shape
from app.spec import RunSettings
from app.strategies import STRATEGIES
from app.tables import Model
from app.views.glossary import GLOSSARY
from tests import lives
from tests.factories import upload
from tests.planning.test_advisor import ENCODER
from tests.warm import warm_attempts  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("warm_attempts")


@pytest.fixture
def chats(session, user, data_dir):
    turns = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes. " * 9}]} for n in range(60)]
    return upload(session, user, turns, "replies.jsonl")


@pytest.fixture
def labelled(session, user, data_dir):
    rows = [{"text": f"text number {n} about things", "label": "abc"[n % 3] if n % 5 else "a"} for n in range(60)]
    return upload(session, user, rows, "kinds.jsonl")


def ask(api, model, dataset, change=None):
    return api.post("/v1/advice", json={"model": model.name, "dataset_id": ids.public(ids.DATASET, dataset.id), **(change or {})})


def test_every_strategy_is_ranked_with_its_cost_or_the_reason_against_it(api, tiny_registered, chats):
    found = ask(api, tiny_registered, chats).json()
    assert {a["strategy"] for a in found["ranking"]} == set(STRATEGIES)
    shape = Shape.model_validate(tiny_registered.shape)
    for a in found["ranking"]:
        reason = STRATEGIES[a["strategy"]]().unavailable(shape, task="generation", cuda=this_machine().cuda)
        assert a["available"] == (reason is None) and a["reason"] == reason
        if a["available"]:
            assert a["cost"]["memory_bytes"] > 0 and a["cost"]["trainable_parameters"] == STRATEGIES[a["strategy"]]().trainable_parameters(
                shape
            )
    scores = [a["score"] for a in found["ranking"] if a["available"]]
    assert scores == sorted(scores, reverse=True) and [a["advised"] for a in found["ranking"]].count(True) == 1
    assert found["facts"]["rows"] == 60 and found["facts"]["memory_bytes"] == this_machine().training_memory_bytes


def test_labels_change_the_facts_and_the_advice(api, tiny_registered, labelled):
    found = ask(api, tiny_registered, labelled).json()
    counts = labelled.report["labels"]
    assert found["facts"]["task"] == "classification" and found["facts"]["classes"] == 3
    assert (found["facts"]["smallest_class"], found["facts"]["largest_class"]) == (min(counts.values()), max(counts.values()))
    assert found["ranking"][0]["strategy"] == "feature_extraction"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gone"}, 404, "model"),
        ({"dataset_id": "ds-" + "0" * 32}, 404, None),
        ({"dataset_id": None}, 400, "dataset_id"),
        ({"run": {"max_length": 1}}, 400, "run.max_length"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_a_wrong_question_says_what_is_wrong(api, tiny_registered, chats, change, status, param):
    answer = ask(api, tiny_registered, chats, change)
    assert answer.status_code == status, answer.text
    assert param is None or answer.json()["error"]["param"] == param


def test_another_persons_dataset_is_not_there(api, session, tiny_registered, chats):
    from app.tables import User

    other = User(name="somebody else")
    session.add(other)
    session.flush()
    chats.owner_id = chats.project_id = other.id
    session.commit()
    assert ask(api, tiny_registered, chats).status_code == 404


def test_the_form_leads_to_the_advice_and_the_advice_back(client, tiny_registered, chats):
    form = client.get(f"/jobs/new?dataset={ids.public(ids.DATASET, chats.id)}")
    link = html.unescape(re.search(r'href="(/jobs/advice[^"]*)"', form.text).group(1))
    page = client.get(link)
    assert page.status_code == 200 and 'class="pill ok">Recommended' in page.text and "Use this method" in page.text
    assert "Add rows: 60 are few" in page.text
    back = html.unescape(re.search(r'href="(/jobs/new\?[^"]*strategy=[^"]*)"', page.text).group(1))
    named = re.search(r"strategy=(\w+)", back).group(1)
    assert re.search(rf'value="{named}" checked', client.get(back).text)


@pytest.mark.long
def test_what_would_help_more_than_another_method_is_said_first(api, client, session, user, tiny_registered, labelled, data_dir):
    """An encoder for labels, rows for a small class, even classes, and a max length that keeps the rows whole."""
    rows = [{"text": "a text", "label": "a"}] * 50 + [{"text": "a rare text", "label": "b"}]
    uneven = upload(session, user, rows, "uneven.jsonl")
    uneven.report = uneven.report | {"token_lengths": [[512, 90], [1024, 8], [2048, 2]]}
    tiny_registered.shape = tiny_registered.shape | {"positions": 4096}
    session.commit()
    steps = {s["about"]: s for s in ask(api, tiny_registered, uneven).json()["steps"]}
    assert steps["classes"]["text"].startswith("Balance the classes: the largest has 50 times")
    assert steps["rows"]["text"].startswith("Get 15 more rows of “b”: the smallest class has 1") and "all-MiniLM" in steps["model"]["text"]
    assert steps["length"]["text"].startswith("Raise max length to 2,048: it keeps 98") and "run.max_length=2048" in steps["length"]["url"]
    assert 'value="2048"' in client.get(steps["length"]["url"]).text
    encoder = Model(name="mini", title="Mini", kind="encoder", status="ready", shape=ENCODER.model_dump())
    session.add(encoder)
    tiny_registered.shape = tiny_registered.shape | {"layers": 2000}
    session.commit()
    step = next(s for s in ask(api, tiny_registered, uneven).json()["steps"] if s["about"] == "model")
    assert "Use the encoder Mini for labels" in step["text"] and step["url"].startswith("/jobs/advice?model=mini&")


def test_the_page_recommends_whole_runs_and_says_no_sentence_twice(api, client, session, user, tiny_registered, chats):
    """Also where a run was measured: it counts, and is told by its numbers."""
    larger = Model(name="wide", title="Wide", kind="dialogue", status="ready", revision="0" * 64, path="models/wide", source={})
    larger.shape = tiny_registered.shape | {"layers": 2 * tiny_registered.shape["layers"]}
    session.add(larger)
    life = lives.Life(session, lives.order(session, user, tiny_registered)).claim()
    life.say(lives.started(), *lives.steps(1, 12)).finish(12)
    key = ids.public(ids.DATASET, chats.id)
    said = ask(api, tiny_registered, chats).json()
    first = said["cards"][0]
    names = [one["name"] for one in first["settings"]]
    assert first["model"] == "tiny" and names == ["Epochs", "Learning rate", "A step", "Max length"] and first["seconds"] > 0
    assert {card["kind"] for card in said["cards"]} >= {"recommended", "stronger"}
    lora = next(a for a in said["ranking"] if a["strategy"] == "lora")
    measured = "Measured here: 1 run on this model lowered validation loss by 55.0%."
    assert measured in lora["reasons"]
    text = html.unescape(client.get(f"/jobs/advice?model=tiny&dataset={key}").text)
    assert text.count(measured) == 1
    shown = re.findall(r"<(?:p|li|td|summary)[^>]*>(.*?)</(?:p|li|td|summary)>", text.split('id="advice"')[1], flags=re.S)
    plain = [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", one)).strip() for one in shown]
    sentences = [part for one in plain for part in re.split(r"(?<=[.:]) ", one) if len(part.split()) > 5]
    assert len(sentences) > 15 and len(sentences) == len(set(sentences)), [one for one in sentences if sentences.count(one) > 1]
    stronger = next(card for card in said["cards"] if card["kind"] == "stronger")
    assert client.get(stronger["url"]).status_code == 200


def test_without_data_the_advice_says_where_to_get_it(client, tiny_registered):
    assert "A dataset is needed first" in client.get("/jobs/advice").text


def test_the_guide_has_a_page_for_every_strategy_with_all_its_settings(client, tiny_registered):
    index = html.unescape(client.get("/guide").text)
    for name, cls in STRATEGIES.items():
        assert f'href="/guide/{name}"' in index and cls.summary in index
        page = client.get(f"/guide/{name}")
        text = html.unescape(page.text)
        assert page.status_code == 200 and cls.when_to_use in text
        assert all(info.description in text for field, info in cls.model_fields.items() if field != "name"), name
        assert cls.paper is None or cls.paper[1] in text
    assert client.get("/guide/nothing").status_code == 404


def test_the_guide_counts_by_a_task_that_the_model_can_do(client, session):
    session.add(Model(name="mini", title="Mini", kind="encoder", status="ready", shape=ENCODER.model_dump()))
    session.commit()
    for name in ("lora", "full"):
        text = html.unescape(client.get(f"/guide/{name}").text)
        learns = STRATEGIES[name]().trainable_parameters(ENCODER, task="classification", labels=10)
        assert human_number(learns) in text and "not available" not in text, name
    assert "not available" in client.get("/guide/qlora").text or this_machine().cuda


def test_the_guide_explains_the_words_of_the_field(client):
    text = html.unescape(client.get("/guide").text)
    entries = re.findall(r'<dt id="word-[^"]+">', text)
    assert len(entries) == len(set(entries)) == len(GLOSSARY) >= 30
    for word in (
        "zero-shot", "few-shot", "prompt engineering", "epoch", "step", "batch", "loss", "token", "learning rate", "rank", "overfitting",
        "validation set", "perplexity", "quantization",
    ):  # fmt: skip
        assert f'id="word-{word.replace(" ", "-")}"' in text, word


def test_the_calculator_is_the_estimate(client):
    shape = calculator.shape_for(175)
    assert (shape.hidden, shape.layers) == (12288, 96) and shape.parameters() == pytest.approx(175e9, rel=0.01)
    for billions in (0.1, 1.5, 7, 70):
        assert calculator.shape_for(billions).parameters() == pytest.approx(billions * 1e9, rel=0.05)
    rows = {row.strategy: row for row in calculator.table(shape, 2048)}
    for name, bits, precision in (("full", 0, "fp32"), ("lora", 1, "bf16")):
        run = RunSettings(precision=precision, max_tokens_per_step=2048, max_length=2048)
        parts = memory_estimate.memory_of(shape, STRATEGIES[name](), run, 2048, calculator.GPU, 0)
        assert rows[name].bytes[bits] == sum(parts.model_dump().values())
    assert rows["full"].bytes[0] > 16 * shape.parameters() and rows["full"].bytes[2:] == (None, None)
    assert list(rows["lora"].bytes) == sorted(rows["lora"].bytes, reverse=True)
    assert rows[None].bytes == tuple(shape.parameters() * bits // 8 for bits in calculator.BITS)
    page = client.get("/guide?parameters=175").text
    assert human_bytes(rows["lora"].bytes[3]) in page and human_bytes(rows["full"].bytes[1]) in page
    for query, says in (
        ("parameters=much", "a number of billions"),
        ("parameters=nan", "a number of billions"),
        ("tokens=0", "a whole number from 16"),
    ):
        answer = client.get(f"/guide?{query}")
        assert answer.status_code == 400 and says in answer.text


def test_the_guide_tells_open_bounds_from_closed_ones(client, tiny_registered):
    text = html.unescape(client.get("/guide/lora").text)
    assert "1 or more, up to 1024" in text and "more than 0, up to 4096" in text and "0 or more, less than 1" in text


def test_what_the_model_can_do_already_is_measured_once_and_used(api, client, session, tiny_registered, chats):
    from app.tables import Evaluation
    from worker.evaluation import attempt as evaluation_attempt

    before = ask(api, tiny_registered, chats).json()
    assert before["evaluation"] is None and "measure" in before["how_to_measure"] and not before["tune"]["measured"]
    assert before["facts"]["distance"] is None and before["tune"]["worth_it"] is None
    asked = ask(api, tiny_registered, chats, {"measure": True}).json()
    assert asked["evaluation"]["status"] == "queued" and asked["evaluation"]["kind"] == "advice"
    assert ask(api, tiny_registered, chats, {"measure": True}).json()["evaluation"]["id"] == asked["evaluation"]["id"]
    page = f"/jobs/advice?model=tiny&dataset={ids.public(ids.DATASET, chats.id)}"
    assert "waiting for a worker" in client.get(page).text
    made = session.query(Evaluation).one()
    evaluation_attempt.work(made.id)
    after = ask(api, tiny_registered, chats, {"measure": True}).json()
    assert after["evaluation"]["status"] == "succeeded", after["evaluation"]
    found = after["evaluation"]["result"]
    assert (
        found["distance"] == pytest.approx(found["data_bits_per_byte"] / found["general_bits_per_byte"]) and found["compared"] == "answers"
    )
    assert after["facts"]["distance"] == found["distance"] and after["tune"]["measured"] and after["tune"]["worth_it"] is True
    assert after["tune"]["metric"] == "ROUGE-L" and after["tune"]["rows"] == 10 and after["tune"]["shots"] == 4
    assert after["how_to_measure"] is None and session.query(Evaluation).count() == 1
    shown = html.unescape(client.get(page).text)
    assert (
        "Test the base model (1 min)" not in shown
        and "Zero-shot" in shown
        and after["tune"]["changed"] in shown
        and f"{found['distance']:.2f} ×" in shown
    )


def test_a_label_is_chosen_by_likelihood_and_compared_with_chance(api, session, user, tiny_registered, labelled):
    from app.evaluation import advice
    from app.tables import Evaluation
    from worker.evaluation import attempt as evaluation_attempt

    made = advice.measure(session, user, "tiny", labelled)
    session.commit()
    evaluation_attempt.work(made.id)
    session.expire_all()
    found = session.get_one(Evaluation, made.id)
    assert found.status == "succeeded", found.error
    result = found.result
    assert result["how"] == "labels" and result["compared"] == "texts" and result["shots"] == 8
    assert 0 <= result["zero_shot"]["accuracy"] <= 1 and 0 < result["chance"] < 1
    told = ask(api, tiny_registered, labelled).json()
    assert told["tune"]["metric"] == "accuracy" and told["tune"]["chance"] == result["chance"] and told["facts"]["how"] == "labels"


@pytest.mark.parametrize(
    ("result", "says", "worth"),
    [
        (
            {"zero_shot": {"accuracy": 0.95}, "few_shot": {"accuracy": 0.9}, "chance": 0.3, "how": "labels"},
            "Perhaps not. Zero-shot the base model reaches accuracy 95.0%",
            False,
        ),
        ({"zero_shot": {"accuracy": 0.2}, "few_shot": {"accuracy": 0.3}, "chance": 0.3, "how": "vectors"}, "much headroom", True),
        (
            {"zero_shot": {"rouge_l": 0.2}, "few_shot": {"rouge_l": 0.4}, "how": "answers"},
            "Few-shot the base model reaches ROUGE-L 0.40",
            True,
        ),
        ({"zero_shot": None, "few_shot": None, "reason": "These rows are plain texts."}, "plain texts", None),
    ],
)
def test_whether_to_tune_at_all_in_words(session, chats, result, says, worth):
    from app.evaluation import advice

    told = advice.should_tune(advice.facts_of(chats, result), result)
    assert says in told.answer and told.worth_it is worth and told.measured
