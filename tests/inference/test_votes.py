"""Blind votes: what is hidden, what is counted, what becomes a dataset; and a vote by keyboard in a browser."""

from __future__ import annotations

import json
import re
import uuid

import pytest
from sqlalchemy import select

from app.datasets import ingest_task
from app.datasets import service as datasets
from app.inference import votes
from app.kit import ids, stats
from app.tables import Answer, Dataset, Exchange, User, Vote
from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401

ASK = [{"role": "user", "content": "Which wood is it?"}]


@pytest.fixture
def two(session):
    return [register_tiny(session, name, kind) for name, kind in (("tiny", "dialogue"), ("tiny-generic", "generic"))]


def test_win_rates_count_sides_rightly(session, user):
    for left, right, choice in (("b", "a", 2), ("a", "b", 1), ("a", "b", 0), ("a", "b", 2)):
        votes.add(session, user, [left, right], ASK, ["x", "y"], choice, None)
    (score,) = votes.scores(session, user)
    assert (score.first, score.second, score.won, score.lost, score.tied) == ("a", "b", 2, 1, 1)
    assert score.rate == pytest.approx(2 / 3) and score.votes == 4 and "3 more votes" in score.says  # a tie decides nothing
    for choice, says in (
        (2, "2 more votes"),
        (2, "1 more vote "),
        (2, "Too close to tell"),
        (2, "Too close"),
        (2, "Too close"),
        (2, "a is"),
    ):
        votes.add(session, user, ["b", "a"], ASK, ["x", "y"], choice, None)
        assert votes.scores(session, user)[0].says.startswith(says) or says in votes.scores(session, user)[0].says
    assert (score := votes.scores(session, user)[0]).p == pytest.approx(0.0391, abs=1e-4) and score.interval[0] > 0.5  # 8 of 9
    other = User(name="somebody else")
    session.add(other)
    session.flush()
    assert votes.scores(session, other) == []


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 0), (6, 0), (0, 6), (8, 1), (3, 11), (50, 50), (300, 250), (1500, 1400)])
def test_the_sign_test_and_its_interval_are_exact(won, lost):
    """Against scipy; and both always say the same."""
    from scipy.stats import binomtest

    low, high = stats.clopper_pearson(won, won + lost)
    if won + lost:
        exact = binomtest(won, won + lost)
        assert stats.sign_test(won, lost) == pytest.approx(exact.pvalue, rel=1e-9)
        assert (low, high) == pytest.approx(tuple(exact.proportion_ci(0.95, "exact")), abs=1e-8)
    assert (low > 0.5 or high < 0.5) == (stats.sign_test(won, lost) < stats.SURE)
    assert votes.Score("a", "b", won, lost, 9).says.startswith("Too") or (won + lost >= 6 and not low <= 0.5 <= high)


def test_votes_and_edits_become_datasets(api, session, user):
    def vote(**more):
        return api.post("/v1/votes", json={"models": ["a", "b"], "messages": ASK, "answers": ["Spruce.", "Stone."], "choice": 1} | more)

    assert api.post("/v1/votes/dataset", json={}).status_code == 409
    assert vote().json()["left_model"] == "a"
    assert vote(choice=0).status_code == 200
    assert vote(choice=2, edited="Spruce, from a cold valley.").status_code == 200
    for change, param in (
        ({"choice": 3}, "choice"),
        ({"models": ["a"]}, "models"),
        ({"models": ["a", "a"]}, "models"),
        ({"messages": []}, "messages"),
    ):
        answer = vote(**change)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert api.get("/v1/votes/scores").json()["data"][0]["votes"] == 3
    for kind, count in (("preference", 3), ("chat", 2)):
        made = api.post("/v1/votes/dataset", json={"kind": kind})
        assert made.status_code == 200, made.text
        row = session.scalars(select(Dataset).order_by(Dataset.created_at.desc())).first()
        ingest_task.read(row.id)
        session.refresh(row)
        assert row.status == "ready" and row.format == kind and row.good_rows == count, (row.error, datasets.rules(row))
    assert datasets.preview(row)[1]["messages"][-1]["content"] == "Spruce, from a cold valley."


def test_names_are_hidden_until_the_vote(client, session, two, generate_worker):  # noqa: F811
    done = client.post(
        "/playground/arena", data={"models": ["tiny", "tiny-generic"], "prompt": "Hello <b>", "max_tokens": "5"}, follow_redirects=False
    )
    assert done.status_code == 303, done.text
    place = done.headers["location"]
    page = client.get(place).text
    panes = page[page.index('<div class="panes') : page.index('id="vote"')]
    assert "tiny" not in panes and "Hello &lt;b&gt;" in page
    assert len(session.scalars(select(Answer)).all()) == 2 and session.scalars(select(Exchange.source)).one() == "vote"
    assert client.post(place, data={"choice": "7"}).status_code == 400
    after = client.post(place, data={"choice": "1", "edited": "Better."})
    assert "preferred" in after.text and "tiny-generic" in after.text and "Better." in after.text
    assert client.post(place, data={"choice": "2"}).status_code == 409
    assert session.scalars(select(Vote.choice)).one() == 1


def test_rows_of_a_dataset_ask(client, session, user, two, generate_worker, data_dir):  # noqa: F811
    from app.storage import files

    def bring(name, lines, format_):
        data = "\n".join(json.dumps(line) for line in lines).encode()
        made = datasets.create(session, user, files.add_bytes(session, user, data, f"{name}.jsonl", "fine-tune"), name=name, format=format_)
        session.commit()
        ingest_task.read(made.id)
        session.refresh(made)
        assert made.status == "ready", made.error
        return made

    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    chats = bring("chats", [{"messages": [*talk, {"role": "user", "content": f"Number {n}?"}, {"role": "assistant", "content": "Yes."}]} for n in range(40)], "chat")  # fmt: skip
    texts = bring("texts", [{"text": f"The bridge stands at {n}."} for n in range(40)], "plain_text")
    order = {"models": ["tiny", "tiny-generic"], "prompt": "", "max_tokens": "4"}
    page = client.post("/playground/arena", data={**order, "dataset": ids.public(ids.DATASET, chats.id)})
    vote = session.scalars(select(Vote)).one()
    assert vote.dataset_id == chats.id and [m["role"] for m in vote.messages] == ["system", "user", "assistant", "user"]
    assert (
        vote.messages[-1]["content"].startswith("Number ") and vote.messages[-1]["content"] in page.text and "3 earlier turns" in page.text
    )
    after = client.post(f"/playground/arena/{ids.public(ids.VOTE, vote.id)}", data={"choice": "1"})
    assert f'value="{ids.public(ids.DATASET, chats.id)}" selected' in after.text  # the next round draws from it too
    assert len({json.dumps(votes.draw(chats)) for _ in range(30)}) > 5
    assert client.post("/playground/arena", data={**order, "dataset": ids.public(ids.DATASET, texts.id)}).status_code == 400
    assert client.post("/playground/arena", data={**order, "dataset": ids.public(ids.DATASET, uuid.uuid4())}).status_code == 404
    own = client.post("/playground/arena", data={**order, "prompt": "My own words", "dataset": ids.public(ids.DATASET, chats.id)})
    assert "My own words" in own.text


@pytest.mark.parametrize(
    ("row", "asks"),
    [
        ({"prompt": "a", "completion": "b"}, "a"),
        ({"text": "a", "label": "b"}, "a"),
        ({"text": "a"}, None),
        ({"messages": ASK, "chosen": [], "rejected": []}, "Which wood is it?"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, None),
        ({}, None),
    ],
)
def test_what_a_row_asks(row, asks):
    found = votes._asks(row)
    assert (found[-1]["content"] if found else None) == asks


def test_a_model_that_fails_leaves_no_round(client, session, two, generate_worker):  # noqa: F811
    register_tiny(session, "broken", path="models/not-there")
    said = client.post("/playground/arena", data={"models": ["tiny", "broken"], "prompt": "Hello"})
    assert said.status_code == 503 and "is gone" in said.text and "Hello" in said.text
    assert session.scalars(select(Vote)).all() == []
    assert client.post("/playground/arena", data={"models": ["tiny", "tiny"], "prompt": "a"}).status_code == 400
    assert client.post("/playground/arena", data={"models": ["tiny", "tiny-generic"], "prompt": " "}).status_code == 400


@pytest.mark.long
def test_in_the_browser(browser_page, served, session, user, two, generate_worker, tmp_path):  # noqa: F811
    from tests.looks import look_at, sign_in

    page = sign_in(browser_page, served, session, user)
    page.goto(f"{served}/playground/arena")
    page.get_by_label("Model 1").select_option("tiny")
    page.get_by_label("Model 2").select_option("tiny-generic")
    page.get_by_label("Prompt", exact=True).fill("What wood is the belly made of?")
    page.get_by_label("Max tokens").fill("8")
    page.get_by_role("button", name="Ask both").click()
    page.get_by_text("Which answer is better?").wait_for()
    assert "tiny" not in page.locator("main section").first.inner_text(), "nobody is named before the vote"
    look_at(page, "ab", tmp_path)
    page.locator("h1").click()
    page.keyboard.press("e")
    page.keyboard.type("Spruce, from a cold valley. 12")  # figures typed here are no votes
    page.keyboard.press("Control+Enter")
    page.keyboard.press("2")
    page.get_by_text("Vote recorded").wait_for()
    look_at(page, "ab-voted", tmp_path)
    session.rollback()
    vote = session.scalars(select(Vote)).one()
    assert vote.choice == 2 and vote.edited == "Spruce, from a cold valley. 12"
    page.get_by_label("Prompt", exact=True).fill("And the back?")
    page.locator("h1").click()
    page.keyboard.press("n")
    page.get_by_text("Which answer is better?").wait_for()
    page.keyboard.press("0")
    page.get_by_text("Vote recorded").wait_for()
    session.rollback()
    assert sorted(session.scalars(select(Vote.choice)).all()) == [0, 2]


@pytest.mark.long
def test_votes_become_a_preference_dataset_in_one_click(studio, browser_page):
    """In a whole studio: the votes over the API, one click on the page, and the data worker has read the pairs."""
    import openai

    with openai.OpenAI(base_url=f"{studio.url}/v1", api_key=studio.key, max_retries=0, timeout=60) as client:
        for n in range(12):
            body = {
                "models": ["a", "b"],
                "messages": [{"role": "user", "content": f"What is {n}?"}],
                "answers": ["Stone.", f"It is {n}."],
                "choice": 2,
            }
            client.post("/votes", body=body, cast_to=object)
    page = browser_page
    page.goto(re.search(r"http\S+", studio.luthier("link").stdout)[0])
    if page.locator("form button").count() and "/sign-in" in page.url:
        page.locator("main form button").first.click()
    page.goto(f"{studio.url}/playground/arena")
    page.get_by_role("button", name="Create preference dataset").click()
    page.get_by_role("heading", name="Preferences from votes").wait_for()
    page.get_by_role("link", name="Fine-tune on this dataset").wait_for(timeout=60_000)
    facts = " ".join(page.locator("main").inner_text().split())
    assert "12 of 12" in facts and "preference" in facts.lower()
