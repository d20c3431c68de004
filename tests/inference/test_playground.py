"""The playground: histories, records and the page, with a real worker and a real browser."""

from __future__ import annotations

import json
import re
import uuid
from urllib.parse import urlencode

import httpx
import pytest
from sqlalchemy import select

from app.errors import BadField, NotFound
from app.inference import playground
from app.inference.playground import AnswerFold
from app.inference.protocol import AnswerStarted, ChoiceFinished, Done, ReasoningPart, Sampling, TextPart
from app.tables import Answer, Exchange, User
from tests.conftest import csrf_token
from tests.generating import (  # noqa: F401
    _workers,
    answering_dir,
    generate_worker,
    leave_while_it_speaks,
    register_long,
    register_tiny,
    stopped_after,
    stored_answers,
)

KINDS = {"tiny": "dialogue", "tiny-generic": "generic", "tiny-instruction": "instruction"}
NAMES = list(KINDS)


@pytest.fixture
def three(session):
    return [register_tiny(session, name, kind) for name, kind in KINDS.items()]


def answered(session, user, names, prompt, text, parent=None):
    """An exchange with its answers, as if the worker had given them."""
    exchange, asked = playground.ask(session, user, names, prompt, Sampling(), parent=parent)
    heard = AnswerFold()
    heard.take([AnswerStarted(rendered_prompt="x", prompt_tokens=1, max_tokens=5, context=512), TextPart(index=0, text=text, tokens=1)])
    heard.take(
        [
            ChoiceFinished(index=0, reason="stop", tokens=2),
            Done(prompt_tokens=1, completion_tokens=2, first_token_seconds=0.1, tokens_per_second=9),
        ]
    )
    for one in asked:
        playground.record(session, exchange.id, one, heard)
    return exchange, asked


def test_each_kind_is_given_the_conversation_as_it_takes_it(session, user, three):
    first, _ = answered(session, user, NAMES, "One.", " Two.")
    _, asked = playground.ask(session, user, NAMES, "Three?", Sampling(), system="Be short.", parent=first.id)
    dialogue, generic, instruction = (one.request for one in asked)
    assert dialogue.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": " Two."},
        {"role": "user", "content": "Three?"},
    ]
    assert generic.prompt == "One. Two.Three?" and generic.messages is None
    assert instruction.messages == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Three?"}]
    assert dialogue.seed == generic.seed == instruction.seed
    failed, asked = playground.ask(session, user, NAMES, "Broken?", Sampling(), parent=first.id)
    heard = AnswerFold(error={"message": "The model failed.", "hint": "", "code": "internal_error"})
    heard.take([TextPart(index=0, text=" Half an ans", tokens=3)])
    for one in asked:
        playground.record(session, failed.id, one, heard)
    _, asked = playground.ask(session, user, NAMES, "Three?", Sampling(), parent=failed.id)
    dialogue, generic, _ = (one.request for one in asked)
    assert [m["content"] for m in dialogue.messages] == ["One.", " Two.", "Three?"] and generic.prompt == "One. Two.Three?"


def test_blends_are_offered_and_any_share_can_be_named(client, session, user, three):
    from app.tables import Model
    from tests import lives

    job = lives.order(session, user, three[0])
    tuned = register_tiny(session, "tuned", path="models/x", base_id=three[0].id, job_id=job.id, strategy="lora", adapter=True)
    page = client.get("/playground?models=tuned")
    assert 'value="tuned@0.5"' in page.text and 'value="tiny@0.5"' not in page.text
    page = client.get("/playground?models=tuned@0.25,tiny")
    places = re.findall(r'<a href="/playground\?models=([^"]*)"( aria-current="true")?>(0|0\.25|0\.5|0\.75|1)</a>', page.text)
    assert [place for place, _, at in places] == [f"tuned{at}%2Ctiny" for at in ("%400", "%400.25", "%400.5", "%400.75", "")]
    assert [at for _, here, at in places if here] == ["0.25"]
    for place, _, at in places:  # each leads to the column it names, and the other stays
        there = client.get(f"/playground?models={place}").text
        assert there.count("data-pane") == 2 and f'aria-current="true">{at}</a>' in there
    assert (
        '<option value="tuned@0.25" selected>' in page.text and "tuned at 25% strength" in page.text and page.text.count(" selected") >= 2
    )
    session.get(Model, tuned.id).strategy = "prompt_tuning"
    session.commit()
    assert 'value="tuned@0.5"' not in client.get("/playground?models=tuned").text


def test_orders_that_cannot_be(session, user, three):
    for names, prompt in (
        ([], "a"),
        (["tiny"] * 2, "a"),
        (["tiny", "tiny-generic", "tiny-instruction", "four", "five"], "a"),
        (["tiny"], ""),
    ):
        with pytest.raises(BadField):
            playground.ask(session, user, names, prompt, Sampling())
    with pytest.raises(NotFound):
        playground.ask(session, user, ["nobody"], "a", Sampling())


def test_a_conversation_is_private(session, user, three):
    exchange, _ = answered(session, user, ["tiny"], "One.", "Two.")
    other = User(name="somebody else")
    session.add(other)
    session.flush()
    with pytest.raises(NotFound):
        playground.thread(session, other, exchange.id)
    assert playground.history(session, other) == []
    second, _ = answered(session, user, ["tiny"], "More.", "Yes.", parent=exchange.id)
    assert [e.id for e, _ in playground.history(session, user)] == [second.id]


def test_the_plain_form_answers(client, session, three, generate_worker):  # noqa: F811
    page = client.get("/playground?models=tiny,tiny-generic")
    assert page.status_code == 200 and page.text.count("data-pane") == 2
    order = {"models": ["tiny", "tiny-generic"], "prompt": "The <b>bridge</b>", "sampling.max_tokens": "5", "sampling.seed": "4"}
    done = client.post("/playground", data=order, follow_redirects=False)
    assert done.status_code == 303
    page = client.get(done.headers["location"])
    assert page.status_code == 200 and "The &lt;b&gt;bridge&lt;/b&gt;" in page.text and "<b>bridge" not in page.text
    rows = session.scalars(select(Answer)).all()
    assert len(rows) == 2 and all(r.finish_reason in ("stop", "length") and r.seed == 4 for r in rows)
    assert "&lt;|im_start|&gt;user" in page.text and "revision 000000" in page.text
    more = client.post("/playground", data={**order, "prompt": "And?", "parent": done.headers["location"].split("/")[-1]})
    assert more.text.count('class="spoken"') == 4 + 2  # two turns in each of two columns, and the two templates
    newest = session.scalars(select(Answer).where(Answer.model_name == "tiny").order_by(Answer.created_at.desc())).first()
    assert newest.rendered_prompt.count("<|im_start|>user") == 2


def test_a_browser_that_leaves_the_plain_form_stops_the_models(served, session, user, generate_worker, answering_dir):  # noqa: F811
    from app.web import auth

    link = auth.new_sign_in_link(session, user)
    session.commit()
    with httpx.Client(base_url=served, headers={"origin": served}, follow_redirects=True) as browser:
        token = csrf_token(browser.get(link).text)
        cookies = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    for name, kind in KINDS.items():
        register_long(session, name, kind)
    order = {"models": NAMES, "prompt": "Go on", "sampling.max_tokens": "8000", "sampling.temperature": "0"}
    headers = {"origin": served, "x-csrf-token": token, "cookie": cookies, "content-type": "application/x-www-form-urlencoded"}
    leave_while_it_speaks(served, "/playground", urlencode(order, doseq=True).encode(), headers)
    rows = stored_answers(session, 3)
    assert {r.finish_reason for r in rows} == {"cancelled"}
    heard = [r for r in rows if r.usage["completion_tokens"]]  # a model that had not begun yet did not begin any more
    assert heard and all(r.usage["completion_tokens"] <= stopped_after(answering_dir, r.id) < 8000 for r in heard)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sampling.temperature": "9"}, "2 or less"),
        ({"prompt": ""}, "empty"),
        ({"models": []}, "between one and"),
        ({"models": ["gone"]}, "No such model"),
    ],
)
def test_the_plain_form_says_what_is_wrong_and_keeps_the_prompt(client, three, change, says):
    answer = client.post("/playground", data={"models": ["tiny"], "prompt": "keep this", **change})
    assert answer.status_code in (400, 404) and says in answer.text
    assert change.get("prompt") == "" or "keep this" in answer.text


def test_the_stream_tells_each_column(client, session, three, generate_worker):  # noqa: F811
    register_tiny(session, "broken", path="models/not-there")
    order = {"models": ["tiny", "broken"], "prompt": "Good morning!", "sampling.max_tokens": "4"}
    told = [json.loads(line) for line in client.post("/playground/stream", data=order).text.splitlines()]
    assert told[0]["type"] == "asked" and [p["model"] for p in told[0]["panes"]] == ["tiny", "broken"] and told[-1] == {"type": "end"}
    assert [t["type"] for t in told if t.get("pane") == 0][-1] == "done"
    wrong = [t for t in told if t.get("pane") == 1]
    assert len(wrong) == 1 and "gone" in wrong[0]["message"] and wrong[0]["hint"]
    assert sorted(session.scalars(select(Answer.finish_reason)).all())[0] == "error"


def shown(page):
    """The answers of the page as they were written. What is stored holds a mark in the place of each NUL."""
    texts = page.locator("[data-pane] [data-source]").evaluate_all("parts => parts.map(part => part.content.textContent)")
    return [" ".join(text.replace("\0", "�").split()) for text in texts]


def test_in_the_browser(browser_page, served, session, user, generate_worker, answering_dir):  # noqa: F811
    from app.web import auth

    for name in NAMES[:2]:
        register_long(session, name, KINDS[name])
    link = auth.new_sign_in_link(session, user)
    session.commit()
    page = browser_page
    page.goto(served + link)
    if page.locator("form button").count() and "/sign-in" in page.url:
        page.locator("main form button").first.click()
    page.goto(f"{served}/playground?models=tiny&models=tiny-generic")
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("Prompt", exact=True).fill("What wood is the belly made of?")
    page.keyboard.press("Control+Enter")
    page.get_by_text("Done.").wait_for()
    texts = shown(page)
    rows = session.scalars(select(Answer)).all()
    assert {" ".join(r.text.split()) for r in rows} == set(texts) and len(texts) == 2
    assert re.search(r"/playground/[0-9a-f-]{36}$", page.url)
    page.locator("[data-rendered] summary").first.click()
    assert "<|im_start|>user" in page.locator("[data-prompt]").first.inner_text()
    page.reload()
    assert shown(page) == texts
    assert page.locator("[data-keep]").is_visible()

    page.get_by_label("Max tokens").fill("8000")
    page.get_by_label("Temperature").fill("0")  # the likeliest letter again and again, never the end
    page.get_by_label("Prompt", exact=True).fill("Go on until you are stopped")
    page.keyboard.press("Control+Enter")
    page.locator("[data-pane] [data-text]").nth(3).filter(has_text=re.compile("..")).wait_for()  # the second turn of the second column
    page.keyboard.press("Escape")
    page.get_by_text("Stopped").first.wait_for()
    last = [r for r in stored_answers(session, 4) if r.finish_reason == "cancelled" and r.usage["completion_tokens"]]
    assert last and all(r.usage["completion_tokens"] <= stopped_after(answering_dir, r.id) < 8000 for r in last)
    assert len(session.scalars(select(Exchange)).all()) == 2


def test_a_comparison_is_saved_and_exported(client, session, user, three):
    first, _ = answered(session, user, ["tiny", "tiny-generic"], "Show ```code```", "```\n<b>x</b>")
    second, _ = answered(session, user, ["tiny", "tiny-generic"], "And?", "No.", parent=first.id)
    answered(session, user, ["tiny"], "Later", "Yes.")
    session.commit()
    page = client.post(f"/playground/{second.id}/save", data={"title": " Two <i>answers</i> "})
    assert page.status_code == 200 and "Two &lt;i&gt;answers&lt;/i&gt;" in page.text
    session.expire_all()
    assert playground.history(session, user)[0][0].id == second.id  # saved ones stand first
    answered(session, user, ["tiny"], "More?", "No.", parent=second.id)
    session.commit()
    assert playground.history(session, user)[0][0].id == second.id  # and stay there when the conversation goes on
    lines = [json.loads(line) for line in client.get(f"/playground/{second.id}/export?format=jsonl").text.splitlines()]
    assert [(x["turn"], x["model"]) for x in lines] == [(1, "tiny"), (1, "tiny-generic"), (2, "tiny"), (2, "tiny-generic")]
    assert lines[0]["revision"] == "0" * 64 and lines[0]["text"] == "```\n<b>x</b>" and isinstance(lines[0]["seed"], int)
    document = client.get(f"/playground/{second.id}/export?format=md")
    assert document.text.startswith("# Two <i>answers</i>") and "````text\n```\n<b>x</b>\n````" in document.text
    assert document.text.count(f"- revision {'0' * 64}\n- adapter none: the base answered\n- seed {lines[0]['seed']}\n") == 2
    assert document.text.count("Rendered prompt:\n\n```text\nx\n```") == 4 and lines[0]["rendered_prompt"] == "x"
    assert "attachment" in document.headers["content-disposition"]
    assert client.get(f"/playground/{second.id}/export?format=exe").status_code == 400
    assert client.get(f"/playground/{uuid.uuid4()}/export").status_code == 404


def test_reasoning_is_folded_exported_and_no_part_of_the_next_turn(client, session, user, three):
    exchange, (one,) = playground.ask(session, user, ["tiny"], "What wood?", Sampling())
    assert one.request.split, "what a model thinks is told from its answer"
    done = Done(prompt_tokens=1, completion_tokens=2, first_token_seconds=0.1, tokens_per_second=9)
    parts = [ReasoningPart(index=0, text="It is <light>.", tokens=1), TextPart(index=0, text="Spruce.", tokens=2)]
    playground.record(session, exchange.id, one, AnswerFold.of([*parts, ChoiceFinished(index=0, reason="stop", tokens=2), done]))
    session.commit()
    page = client.get(f"/playground/{exchange.id}").text
    assert re.search(r"data-thought>\s*<summary>Reasoning</summary>.*data-reasoning>It is &lt;light&gt;\.<", page)
    (line,) = client.get(f"/playground/{exchange.id}/export?format=jsonl").text.splitlines()
    assert json.loads(line)["reasoning"] == "It is <light>." and json.loads(line)["text"] == "Spruce."
    assert "Reasoning:\n\n```text\nIt is <light>.\n```" in client.get(f"/playground/{exchange.id}/export?format=md").text
    _, (following,) = playground.ask(session, user, ["tiny"], "And the back?", Sampling(), parent=exchange.id)
    assert following.request.messages[1] == {"role": "assistant", "content": "Spruce."}
