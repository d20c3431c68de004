"""The playground in a real browser where other tests do not look: four columns, saved comparisons, an engine outside, and pairs learnt live."""

from __future__ import annotations

import shutil

import pytest
from sqlalchemy import select

from app import events
from app.evaluation import predictions
from app.inference import playground, votes
from app.inference.playground import AnswerFold
from app.inference.protocol import Sampling
from app.jobs import service as jobs
from app.kit import ids
from app.storage import files
from app.tables import Answer, Exchange, Job
from tests import lives
from tests.data_worker import data_worker
from tests.factories import carry_out, make_dataset, tune
from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401
from tests.inference.test_external_servers import allow, outside, url  # noqa: F401
from tests.looks import look_at, sign_in

pytestmark = pytest.mark.browser


def ask(page, prompt: str, tokens: str = "8") -> None:
    page.get_by_label("Max tokens").fill(tokens)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Control+Enter")
    page.get_by_text("Done.").wait_for(timeout=60_000)  # the first answer waits for the worker and its model


def rendered(page) -> list[str]:
    """The rendered prompts. A browser that reads a page makes a line's end of a carriage return, which such a model writes too."""
    return [text.replace("\r", "\n") for text in page.locator("[data-prompt]").all_text_contents()]


@pytest.mark.long
def test_four_columns_a_conversation_and_a_saved_comparison(browser_page, browser, served, session, user, generate_worker, tmp_path):  # noqa: F811
    """By keyboard, at both widths: four kinds of answers, a second turn, a title, a link that shows it again, and both exports."""
    names = ["tiny", "tiny-generic", "tiny-instruction", "tiny-other"]
    for name, kind in zip(names, ("dialogue", "generic", "instruction", "dialogue"), strict=True):
        register_tiny(session, name, kind)
    page = sign_in(browser_page, served, session, user)
    page.goto(f"{served}/playground?models={','.join(names)}")
    ask(page, "What wood is the belly made of?")
    ask(page, "And the back?")
    assert page.locator("[data-pane]").count() == 4
    assert page.locator("[data-pane] [data-turn]").count() == 8 and page.locator("[data-kind=generic] .you").count() == 0
    proofs, prompts = page.locator("[data-proof]").all_inner_texts(), rendered(page)
    assert (
        len(proofs) == len(prompts) == 8 and len(set(prompts)) >= 5 and all("revision 000000" in text and "seed" in text for text in proofs)
    )
    assert page.locator("[data-keep]").is_visible(), "it can be kept as soon as it is there"
    page.reload()
    assert page.locator("[data-proof]").all_inner_texts() == proofs and rendered(page) == prompts
    page.locator("[data-rendered] summary").first.click()  # of a turn that is not the last
    look_at(page, "playground-four", tmp_path)
    for width, columns in ((320, 1), (1280, 2)):
        page.set_viewport_size({"width": width, "height": 900})
        places = page.evaluate("[...document.querySelectorAll('[data-pane]')].map(pane => pane.getBoundingClientRect().x)")
        assert len(set(places)) == columns, f"{columns} columns at {width} px"
    page.get_by_label("Title").fill("Four of a kind")
    page.keyboard.press("Enter")
    page.locator("#history summary").click()
    page.get_by_role("link", name="Four of a kind").wait_for()
    place = page.get_by_role("link", name="Copy link").get_attribute("href")
    ask(page, "Later words", "2")  # the script goes on from the saved state, and what stands on the page is of the new one
    assert page.get_by_label("Title").input_value() == "" and page.get_by_role("link", name="Copy link").get_attribute("href") != place
    bare = browser.new_context(java_script_enabled=False, storage_state=page.context.storage_state()).new_page()
    bare.set_default_timeout(10_000)
    for one in (page, bare):  # with scripts and without
        one.goto(served + place)
        assert one.get_by_label("Title").input_value() == "Four of a kind" and one.locator("[data-turn]").count() == 8
        for name in ("JSONL", "Markdown"):
            with one.expect_download() as saved:
                one.get_by_role("link", name=name).click()
            text = saved.value.path().read_text()
            assert "What wood is the belly made of?" in text and "Later words" not in text
            assert text.count("0" * 64) == 8 and text.count("<|im_start|>assistant") >= 3
    bare.get_by_label("Title").fill("Kept without scripts")
    bare.get_by_role("button", name="Save").click()
    bare.locator("#history summary").click()
    bare.get_by_role("link", name="Kept without scripts").wait_for()
    bare.context.close()


@pytest.mark.long
def test_a_tuned_model_gets_a_fair_first_look(
    browser_page,
    served,
    session,
    user,
    data_dir,
    tiny_registered,
    generate_worker,  # noqa: F811
    answering_dir,  # noqa: F811
    tmp_path,
):
    """From the job's button to three columns: the system prompt of its training rows, a held-out question with its reference,
    temperature 0, the examples of the verdict before the question of the base alone; then another model in a column, retry and edit."""
    data = make_dataset(session, user, data_dir, system="You are Luthier, and brief.")
    job, tuned = tune(session, user, data_dir, tiny_registered, data, validation_fraction=0.2, epochs=1)
    left = job.evaluation["tryout"]
    assert left["system"] == "You are Luthier, and brief." and len(left["questions"]) == 8 and len(left["examples"]) == 4
    shutil.copytree(data_dir / "models", answering_dir / "models", dirs_exist_ok=True)
    shutil.copytree(data_dir / "runs", answering_dir / "runs", dirs_exist_ok=True)
    page = sign_in(browser_page, served, session, user)
    page.goto(f"{served}/jobs/{ids.public(ids.JOB, job.id)}")
    page.get_by_role("link", name="Compare in the playground").click()
    assert page.locator("[data-pane]").count() == 3 and page.get_by_label("System prompt").input_value() == left["system"]
    assert page.get_by_label("Temperature").input_value() == "0" and tuned.title in page.title()
    question = left["questions"][2]
    page.get_by_label("Max tokens").fill("7")
    page.get_by_role("link", name=question["prompt"]).click()
    assert page.get_by_label("Prompt", exact=True).input_value() == question["prompt"]
    assert page.get_by_label("Max tokens").input_value() == "7", "a chip keeps the settings"
    page.get_by_text("Show reference").click()
    page.locator("[data-reference]").get_by_text(question["reference"]).wait_for()
    ask(page, question["prompt"], "8")
    base, few_shot, mine = rendered(page)
    assert base == mine and left["system"] in base and few_shot.startswith(base[: base.index("<|im_end|>")])
    assert [few_shot.count(example["reference"]) > 0 for example in left["examples"]] == [True] * 4
    session.rollback()
    exchange, answers = session.scalars(select(Exchange)).one(), session.scalars(select(Answer)).all()
    assert exchange.sampling["temperature"] == 0 and {a.model_name for a in answers} == {"tiny", f"few-shot:{tuned.name}", tuned.name}
    notes = {"End of answer", "Stopped at max tokens"}
    assert set(page.locator("[data-pane] [data-note]").all_inner_texts()) <= notes
    look_at(page, "playground-first-look", tmp_path)
    page.get_by_label("Model of column 1").select_option(tuned.name + "@0.5")
    page.wait_for_url("**follows=**")
    page.get_by_label("Prompt", exact=True).fill("And then?")
    ask(page, "And then?", "6")
    assert rendered(page)[1].count("<|im_start|>user") == 2, "the new model of the column knows what was said in it"
    page.locator("[data-pane]").first.locator("[data-retry]").last.click()
    page.get_by_text("Done.").wait_for()
    assert page.locator("[data-pane]").first.locator("[data-turn]").count() == 2, (
        "the same question once more, in the place of the first try"
    )
    page.locator("[data-pane]").first.locator("[data-edit]").first.click()
    assert page.get_by_label("Prompt", exact=True).input_value() == question["prompt"] and page.locator("[data-turn]").count() == 0
    page.go_back()
    page.locator("a.close").first.click()
    page.wait_for_url("**models=**")
    assert page.locator("[data-pane]").count() == 2 and page.locator("[data-turn]").count() == 4
    page.locator("[data-prefer]").first.click()
    page.get_by_text("2 votes added").wait_for()
    points = [
        {"line": n + 1, "x": n / 8 - 1, "y": 0.5 - n / 16, "label": "abc"[n % 3], "text": f"row {n}", "near": [[(n + 1) % 16, 0.9]]}
        for n in range(16)
    ]
    shown = predictions.create_vectors(session, user, "tiny", ids.public(ids.DATASET, data.id))
    shown.status, shown.result = "succeeded", {"rows": 16, "dimensions": 64, "explained": [0.4, 0.2], "points": points}
    file = files.add_bytes(session, user, b"text\nhello\n", "tickets.csv", "user_data")
    predictions.create(session, user, predictions.PredictionOrder(model="tiny", file=ids.public(ids.FILE, file.id)))
    session.commit()
    for name in ("batch", "vectors"):
        page.goto(f"{served}/playground/{name}")
        look_at(page, name, tmp_path)
    page.get_by_role("link", name="chat", exact=True).click()
    page.locator(".map a").nth(4).click()
    page.get_by_role("table").get_by_role("link", name="6").wait_for()
    look_at(page, "vectors-map", tmp_path)
    page.goto(f"{served}/models")
    look_at(page, "models", tmp_path)
    page.get_by_role("link", name=tuned.title, exact=True).first.click()
    for tab in ("Export", "Evaluations", "Lineage", "Files & hashes", "Settings", "Use"):
        page.get_by_label("Parts of the model").get_by_role("link", name=tab, exact=True).click()
        if tab in ("Use", "Files & hashes"):
            look_at(page, f"model-{tab[:3].lower()}", tmp_path)
    page.set_viewport_size({"width": 390, "height": 800})
    for path in ("/models", f"/models/{ids.public(ids.MODEL, tuned.id)}?tab=files"):
        page.goto(served + path)
        cut = page.locator("main table").evaluate_all("ts => ts.map(t => t.parentElement.scrollWidth - t.parentElement.clientWidth)")
        assert cut and max(cut) <= 0, f"a table of {path} is cut at 390 px"


def test_markdown_of_an_answer_is_shown_and_harmless(browser_page, served, session, user):
    """What a model writes is rendered as Markdown and never runs: no script, no handler, no foreign picture, no javascript: link."""
    register_tiny(session)
    exchange, asked = playground.ask(session, user, ["tiny"], "Show <b>me</b>", Sampling())
    wild = "# Head\n\n**bold** <img src=x onerror=document.title='owned'>\n\n[x](javascript:document.title='owned') ![p](http://example.com/p.png)\n\n- one\n- two"
    heard = AnswerFold(choices={0: playground.Choice(wild, finish_reason="stop", tokens=9)})
    playground.record(session, exchange.id, asked[0], heard)
    session.commit()
    page = sign_in(browser_page, served, session, user)
    page.goto(f"{served}/playground/{exchange.id}")
    shown = page.locator("[data-pane] [data-text]")
    assert (
        shown.locator("strong").inner_text() == "bold" and shown.locator("li").count() == 2 and shown.locator("h1").inner_text() == "Head"
    )
    assert shown.locator("img, script, [onerror], a[href^=javascript]").count() == 0 and "owned" not in page.title()
    assert page.locator("[data-note]").first.inner_text() == "End of answer"


@pytest.mark.long
def test_an_engine_is_chosen_and_answers(browser_page, served, session, user, generate_worker, url, outside, tmp_path):  # noqa: F811
    model = register_tiny(session)
    page = sign_in(browser_page, served, session, user)
    page.goto(f"{served}/models/{ids.public(ids.MODEL, model.id)}?tab=settings")
    look_at(page, "engine", tmp_path)
    page.get_by_label("Model name on server").fill("served-base")
    page.get_by_role("button", name="Use this server").click()
    page.get_by_text("runs on 127.0.0.1").wait_for()
    look_at(page, "engine-chosen", tmp_path)
    page.goto(f"{served}/playground?models=tiny")
    ask(page, "Which glue should I use?")
    assert f"through 127.0.0.1:{outside}" in page.locator("[data-proof]").inner_text()
    page.locator("[data-rendered] summary").click()
    assert "<|im_start|>user" in page.locator("[data-prompt]").inner_text()
    session.rollback()
    answer = session.scalars(select(Answer)).one()
    assert answer.usage["engine"] == f"127.0.0.1:{outside}" and answer.text  # at temperature 0 the small model writes line ends alone
    page.goto(f"{served}/models/{ids.public(ids.MODEL, model.id)}?tab=settings")
    page.get_by_role("button", name="Use built-in").click()
    page.get_by_text("runs on the built-in engine").wait_for()


@pytest.mark.long
@pytest.mark.timeout(240)
def test_votes_become_pairs_and_pairs_a_tuned_model(browser_page, served, session, user, data_dir, tiny_model, tmp_path):
    """All the way by its buttons: votes, a dataset of pairs, a DPO job that really learns, and its margin on the page."""
    shutil.copytree(tiny_model, data_dir / "models" / "tiny", dirs_exist_ok=True)
    register_tiny(session)
    for n in range(16):
        asked = [{"role": "user", "content": f"What is {n}?"}]
        votes.add(session, user, ["a", "b"], asked, ["Who knows, and who asks?", f"It is {n}."], 2, None)
    session.commit()
    page = sign_in(browser_page, served, session, user)
    page.goto(f"{served}/playground/arena")
    assert "b is preferred" in page.get_by_role("row", name="a against b").inner_text()
    with data_worker():
        page.get_by_role("button", name="Create preference dataset").click()
        page.get_by_role("link", name="Fine-tune on this dataset").click(timeout=60_000)
        page.goto(page.url + "&model=tiny&run.epochs=8&run.learning_rate=0.01&run.max_tokens_per_step=256&run.forgetting=false")
        page.get_by_role("button", name="Start").click()
        page.wait_for_url("**/jobs/ftjob-*")
    session.rollback()
    job = session.scalars(select(Job)).one()
    assert job.spec["task"] == "preference"
    carry_out(session, data_dir, job, live=True)
    page.goto(page.url + "?tab=metrics")
    page.locator('[data-chart="reward_margin"] canvas').first.wait_for()
    assert page.locator('[data-chart="reward_accuracy"]').count() == 1
    margins = [event.data["metrics"]["reward_margin"] for event in jobs.events(session, job) if event.type == "step"]
    assert margins[0] == 0 and margins[-1] > 1 and margins[-1] > margins[len(margins) // 2] > 0
    page.reload()
    page.locator("#table-reward_margin summary").click()
    shown = page.locator("#table-reward_margin tbody tr").last.inner_text()
    assert shown.split()[0] == str(len(margins)), shown
    look_at(page, "pairs-learnt", tmp_path)


@pytest.mark.long
def test_pairs_are_learnt_before_ones_eyes(browser_page, served, session, user, tiny_registered, tmp_path):
    """The margin's curve grows on the open page as the job says its steps."""

    def said(first: int, last: int) -> list[events.TrainerEvent]:
        return [
            event.model_copy(update={"metrics": {"reward_margin": event.step / 10, "reward_accuracy": 0.5 + event.step / 50}})
            if isinstance(event, events.Step | events.Evaluated)
            else event
            for event in lives.steps(first, last)
        ]

    job = lives.order(session, user, tiny_registered)
    life = lives.Life(session, job).claim().say(lives.started(), *said(1, 6))
    page = sign_in(browser_page, served, session, user)
    page.goto(f"{served}/jobs/{ids.public(ids.JOB, job.id)}?tab=metrics")
    page.locator('[data-chart="reward_margin"] canvas').first.wait_for()
    page.locator("#table-reward_margin summary").click()
    last = page.locator("#table-reward_margin tbody tr").filter(has_text="0.6")
    last.first.wait_for()
    life.say(*said(7, 14))
    page.locator("#table-reward_margin tbody tr").filter(has_text="1.4").first.wait_for()
    assert page.locator('[data-chart="reward_accuracy"]').count() == 1
    look_at(page, "pairs", tmp_path)
