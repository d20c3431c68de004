"""The pages of jobs, with lives recorded through the real services."""

from __future__ import annotations

import html
import json
import re

import pytest

from app import events
from app.jobs import service as jobs
from app.kit import ids
from app.settings import get_settings
from app.strategies import STRATEGIES
from app.views import job_tabs
from tests import lives
from tests.factories import upload


@pytest.fixture
def dataset(session, user, data_dir):
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes. " * 9}]} for n in range(60)]
    return upload(session, user, rows, "replies.jsonl")


def address(life_or_job) -> str:
    return f"/jobs/{ids.public(ids.JOB, getattr(life_or_job, 'job_id', None) or life_or_job.id)}"


def words(page) -> str:
    """The text of a page as a reader sees it."""
    body = re.sub(r"<script.*?</script>", "", page.text, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def points(page) -> dict:
    return json.loads(re.search(r'id="points">(.*?)</script>', page.text, re.S).group(1))


# The list -------------------------------------------------------------------------------------------------------------


def test_an_empty_list_says_how_to_fill_it(client):
    page = client.get("/jobs")
    assert page.status_code == 200 and "No run yet" in page.text and 'href="/jobs/new"' in page.text


def test_the_list_shows_each_job_with_what_was_measured_and_predicted(client, session, user, tiny_registered):
    lives.running(session, user, tiny_registered)
    lives.Life(session, lives.order(session, user, tiny_registered, name="done-one")).claim().say(
        lives.started(), *lives.steps(1, 120)
    ).finish()
    said = words(client.get("/jobs"))
    assert "1 running, 1 succeeded" in said
    assert "step 74 of 120" in said
    assert "1.31 GB predicted 1.36 GB" in said and "5 min 36 s predicted 5 min" in said
    assert "1.17" in said  # the best validation loss of the running one


def test_another_persons_job_is_not_there(client, session, tiny_registered):
    from app.tables import User

    other = User(name="somebody else")
    session.add(other)
    session.commit()
    job = lives.order(session, other, tiny_registered)
    assert "support-tone" not in client.get("/jobs").text
    for path in ("", "/stream", "/results.csv", "/job.yaml", "/log.txt"):
        assert client.get(address(job) + path).status_code == 404
    for action in ("pause", "resume", "stop", "save", "again", "delete"):
        assert client.post(f"{address(job)}/{action}").status_code == 404
    assert client.get(f"/jobs/new?clone={ids.public(ids.JOB, job.id)}").status_code == 200


# One job --------------------------------------------------------------------------------------------------------------


def test_a_reload_shows_all_that_was_said(client, session, user, tiny_registered):
    where = address(lives.running(session, user, tiny_registered))
    page = client.get(where)
    said = words(page)
    assert "Step 74 of 120 , epoch 2 of 3, attempt 2 (resumed at step 36 after the worker was lost)" in said
    assert "2 min" in said and "left" in said
    assert "best at step 72" in said and "predicted 1.36 GB" in said
    assert "Step 36 validation loss 1.39 Try" in said
    samples = words(client.get(f"{where}?tab=samples"))
    assert "Sample generations at step 72" in samples and "There are several reasons" in samples
    assert "Sample generations at step 36" in words(client.get(f"{where}?tab=samples&prompt=1&step=36"))
    assert "Attempt 2 started on w1." in words(client.get(f"{where}?tab=config"))
    data = points(client.get(f"{where}?tab=metrics"))
    assert data["total"] == 120
    assert data["charts"]["loss"]["loss"][0] == list(range(1, 75))
    assert data["charts"]["loss"]["validation"][0] == [12, 24, 36, 48, 60, 72]
    assert set(data["charts"]) == {"loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes"}


def test_work_that_is_no_step_says_how_far_it_is(client, session, user, tiny_registered):
    life = lives.running(session, user, tiny_registered)
    life.say(*lives.steps(75, 120), events.TaskProgress(what="Comparing base and result", share=0.4))
    said = words(client.get(address(life)))
    assert "comparing base and result, 40" in said and "finishing" in said


@pytest.mark.parametrize("tab", job_tabs.TABS)
def test_the_live_part_is_the_same_as_the_page(client, session, user, tiny_registered, tab):
    where = address(lives.running(session, user, tiny_registered))
    part, page = client.get(f"{where}?tab={tab}&part=live"), client.get(f"{where}?tab={tab}")
    assert "<html" not in part.text and part.text.lstrip().startswith('<div id="live"')

    def settled(text: str) -> str:  # what differs from one answer to the next by nature
        return re.sub(r'nonce="[^"]*"|csrf_token" value="[^"]*"|<time.*?</time>', "", text).strip()

    assert settled(part.text) in settled(page.text)


def test_folding_goes_on_from_where_the_last_look_stopped(client, session, user, tiny_registered):
    life = lives.running(session, user, tiny_registered)
    assert points(client.get(address(life)))["charts"]["loss"]["loss"][0][-1] == 74
    life.say(*lives.steps(75, 80))
    assert points(client.get(address(life)))["charts"]["loss"]["loss"][0] == list(range(1, 81))


def test_a_table_says_what_a_chart_shows(client, session, user, tiny_registered):
    page = client.get(address(lives.running(session, user, tiny_registered)))
    table = re.search(r'id="table-loss">(.*?)</details>', page.text, re.S).group(1)
    assert table.count("<tr>") > 40 and 'tabindex="0"' in table
    shown = {row[0] for row in re.findall(r'<tr><td class="n">(\d+)</td>', table) for row in [(int(row),)]}
    assert {1, 12, 24, 36, 48, 60, 72, 74} <= shown


def test_the_page_can_show_a_job_of_every_strategy(client, session, user, tiny_registered):
    for name, strategy in STRATEGIES.items():
        page = client.get(address(lives.order(session, user, tiny_registered, strategy=name)))
        assert page.status_code == 200 and strategy.title in html.unescape(page.text), name


def test_a_failed_job_says_why_and_what_to_do_and_offers_it_as_one_click(client, session, user, tiny_registered, dataset):
    job = lives.order(session, user, tiny_registered)
    job.order = {**job.order, "dataset_id": str(dataset.id)}
    life = lives.Life(session, job).claim().say(lives.started(), *lives.steps(1, 5))
    hint = "Take fewer tokens per step."
    life.fail(events.Failed(kind="cuda_out_of_memory", message="Memory was full.", hint=hint, suggestion={"max_tokens_per_step": 512}))
    said = words(client.get(address(job)))
    assert "Memory was full." in said and hint in said and "Try again with max tokens per step 512" in said
    answer = client.post(f"{address(job)}/retry", follow_redirects=False)
    assert answer.status_code == 303
    new = jobs.get(session, user, ids.parse(ids.JOB, answer.headers["location"].rpartition("/")[2]))
    assert new.id != job.id and new.spec["run"]["max_tokens_per_step"] == 512


def test_a_finished_job_leads_to_the_playground(client, session, user, tiny_registered):
    life = lives.Life(session, lives.order(session, user, tiny_registered)).claim().say(lives.started(), *lives.steps(1, 120)).finish()
    page = client.get(address(life))
    name = jobs.tuned_model(session, jobs.get(session, user, life.job_id)).name
    assert "Compare in the playground" in page.text and name in page.text
    for link in re.findall(r'href="(/(?:playground|models)[^"]*)"', page.text):  # where the page leads, somebody answers
        if not link.endswith("/download"):
            assert client.get(html.unescape(link)).status_code == 200, link
    compare = re.search(r'href="(/playground[^"]*)">Compare', page.text).group(1)
    assert html.unescape(compare).count("models=") == 2
    assert 'data-live="false"' in page.text
    assert "2.5100 1.1300" in words(client.get(f"{address(life)}?tab=evaluation"))


def test_text_from_a_model_cannot_become_markup(client, session, user, tiny_registered):
    life = lives.Life(session, lives.order(session, user, tiny_registered, name="<b>x</b>")).claim()
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    life.say(lives.started(), events.Sampled(step=1, samples=[events.Sample(prompt=evil, reference=evil, answer=evil)]))
    life.say(events.Log(message=evil))
    for tab in job_tabs.TABS:
        page = client.get(f"{address(life)}?tab={tab}").text
        assert "<script>alert" not in page and "<img src=x" not in page and "<b>x</b>" not in page


def test_a_button_does_what_it_says(client, session, user, tiny_registered):
    life = lives.running(session, user, tiny_registered)
    page = client.post(f"{address(life)}/save")
    assert "A checkpoint is saved" in words(page) and "Saving…" in page.text
    assert "Pausing…" in client.post(f"{address(life)}/pause").text
    waiting = lives.order(session, user, tiny_registered)
    assert "Paused" in words(client.post(f"{address(waiting)}/pause"))
    assert "Queued" in words(client.post(f"{address(waiting)}/resume"))
    assert "Cancelled" in words(client.post(f"{address(waiting)}/stop"))
    assert client.post(f"{address(waiting)}/resume").status_code == 409
    assert client.post(f"{address(waiting)}/delete").status_code == 200
    assert client.get(address(waiting)).status_code == 404


def test_a_cancelled_job_with_a_checkpoint_can_be_resumed(client, api, session, user, tiny_registered):
    life = lives.running(session, user, tiny_registered)
    jobs.cancel(session, user, life.job_id)
    life.leave(74)
    said = words(client.get(address(life)))
    assert "Cancelled" in said and "Resume" in said and "Keep as model" in said
    where = f"/v1/fine_tuning/jobs/{ids.public(ids.JOB, life.job_id)}"
    assert api.post(f"{where}/resume", json={"step": 5}).status_code == 404
    assert api.post(f"{where}/resume", json={"steps": 72}).status_code == 400
    unwhole = api.post(f"{where}/checkpoints/72/keep")
    assert unwhole.status_code == 400 and "cannot be trusted" in unwhole.json()["error"]["message"]
    assert "Queued" in words(client.post(f"{address(life)}/resume"))
    assert jobs.get(session, user, life.job_id).finished_at is None


def test_the_config_orders_the_same_job_again_and_the_log_can_be_taken_away(client, api, session, user, tiny_registered, dataset):
    import yaml

    answer = client.post("/jobs", data=typed(tiny_registered, dataset, **{"strategy.rank": "4", "run.epochs": "2"}), follow_redirects=False)
    job = jobs.get(session, user, ids.parse(ids.JOB, answer.headers["location"].rpartition("/")[2]))
    body = yaml.safe_load(client.get(f"{address(job)}/job.yaml").text)
    assert body["model"] == "tiny" and body["run"]["learning_rate"] == 5e-4 and body["run"]["seed"] == 42  # also what nobody typed
    again = api.post("/v1/fine_tuning/jobs", json=body)
    assert again.status_code == 200, again.text
    assert again.json()["strategy"] == job.spec["strategy"] and again.json()["run"] == {**job.spec["run"], "learning_rate": 5e-4}

    folder = get_settings().data_dir / "runs" / str(job.id) / "a1"
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "trainer.log").write_text("loading\nwarning: <b>slow</b> disk\n")
    page = words(client.get(f"{address(job)}?tab=config"))
    assert f"tensorboard --logdir {folder.parent}" in page and "warning: <b>slow</b> disk loading" in page
    found = words(client.get(f"{address(job)}?tab=config&filter=SLOW"))
    assert "<b>slow</b>" in found and "loading" not in found and "No line matches the filter." in found
    log = client.get(f"{address(job)}/log.txt").text
    assert "INFO  Queued." in log and "==> a1/trainer.log <==\nloading" in log
    assert client.get(f"{address(job)}?tab=nothing").status_code == 400


def test_every_figure_can_be_taken_away_as_csv(client, session, user, tiny_registered):
    answer = client.get(address(lives.running(session, user, tiny_registered)) + "/results.csv")
    assert answer.headers["content-type"].startswith("text/csv") and len(answer.text.splitlines()) == 75


# Ordering -------------------------------------------------------------------------------------------------------------


def typed(model, dataset, **more: str) -> dict[str, str]:
    return {"model": model.name, "dataset": ids.public(ids.DATASET, dataset.id), "strategy": "lora", "shown": "lora", **more}


def test_without_data_the_form_says_where_to_get_it(client, tiny_registered):
    assert "A dataset is needed first" in client.get("/jobs/new").text


def test_the_form_comes_from_the_class_with_an_estimate_beside_it(client, tiny_registered, dataset):
    page = client.get(f"/jobs/new?dataset={ids.public(ids.DATASET, dataset.id)}&model=tiny")
    said = words(page)
    assert "LoRA rank r. Higher = more capacity and memory." in said
    assert re.search(r'name="strategy\.rank"[^>]*value="8"', page.text) and 'min="1" max="1024"' in page.text
    assert "Fits in memory." in said and "Trainable" in said and "60 valid rows" in said
    assert all(html.escape(cls.title) in page.text for cls in STRATEGIES.values())


def test_a_started_job_is_what_was_typed(client, session, user, tiny_registered, dataset):
    form = typed(tiny_registered, dataset, name="mine", key="k1", **{"strategy.rank": "4", "run.epochs": "2", "run.learning_rate": ""})
    answer = client.post("/jobs", data=form, follow_redirects=False)
    assert answer.status_code == 303
    job = jobs.get(session, user, ids.parse(ids.JOB, answer.headers["location"].rpartition("/")[2]))
    assert (job.name, job.spec["strategy"]["rank"], job.spec["run"]["epochs"]) == ("mine", 4, 2)
    assert job.order["run"] == {"epochs": 2.0} and job.estimate["memory_bytes"] > 0
    again = client.post("/jobs", data=form, follow_redirects=False)
    assert again.headers["location"] == answer.headers["location"]  # a double click orders once
    changed = client.post("/jobs", data={**form, "strategy.rank": "5"}, follow_redirects=False)
    assert changed.status_code == 303 and changed.headers["location"] != answer.headers["location"]


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("strategy.rank", "0", "Rank must be 1 or more; you wrote 0."),
        ("strategy.rank", "many", "Rank takes a whole number; you wrote many."),
        ("run.epochs", "-1", "Epochs must be more than 0; you wrote -1."),
        ("run.validation_fraction", "1", "Validation fraction must be less than 1; you wrote 1."),
    ],
)
def test_what_is_wrong_stands_beside_its_field_and_the_value_is_kept(
    client, session, user, tiny_registered, dataset, field, value, sentence
):
    page = client.post("/jobs", data=typed(tiny_registered, dataset, **{field: value, "run.seed": "7"}))
    assert page.status_code == 400
    place = field.replace(".", "-").replace("_", "-")
    assert re.search(rf'<p class="fault" id="{place}-error">{re.escape(sentence)}</p>', page.text)
    assert re.search(rf'name="{re.escape(field)}"[^>]*value="{re.escape(value)}"[^>]*aria-invalid="true"', page.text)
    assert re.search(r'name="run\.seed"[^>]*value="7"', page.text)
    assert jobs.list_(session, user) == []


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("model", "gone", "There is no model gone."),
        ("dataset", "ds-" + "0" * 32, "There is no dataset ds-0000"),
        ("strategy.width", "3", "There is no setting 'width'."),
        ("run.speed", "9", "There is no setting 'speed'."),
    ],
)
def test_an_order_for_what_is_not_there_is_refused(client, session, user, tiny_registered, dataset, field, value, sentence):
    page = client.post("/jobs", data={**typed(tiny_registered, dataset), field: value})
    assert page.status_code == 400 and sentence in html.unescape(page.text)
    assert jobs.list_(session, user) == []


def test_another_strategy_keeps_what_was_typed(client, tiny_registered, dataset):
    start = typed(tiny_registered, dataset, **{"strategy.rank": "24", "strategy.alpha": "16", "run.epochs": "5"})
    full = client.get("/jobs/new", params={**start, "strategy": "full"})
    assert 'name="kept.rank" value="24"' in full.text and 'name="kept.alpha"' not in full.text
    assert re.search(r'name="run\.epochs"[^>]*value="5"', full.text)
    back = client.get("/jobs/new", params={**start, "strategy": "lora", "shown": "full", "kept.rank": "24"})
    assert re.search(r'name="strategy\.rank"[^>]*value="24"', back.text)
    sibling = client.get("/jobs/new", params={**start, "strategy": "rslora"})
    assert re.search(r'name="strategy\.rank"[^>]*value="24"', sibling.text)


def test_a_clone_starts_from_the_order_of_its_job(client, session, user, tiny_registered, dataset):
    first = client.post("/jobs", data=typed(tiny_registered, dataset, name="first", **{"strategy.rank": "3", "run.seed": "9"}))
    public = re.search(r"ftjob-[0-9a-f]{32}", first.text).group(0)
    page = client.get(f"/jobs/new?clone={public}&run.epochs=7")
    for field, value in (("strategy.rank", "3"), ("run.seed", "9"), ("run.epochs", "7"), ("name", "first")):
        assert re.search(rf'name="{re.escape(field)}"[^>]*value="{value}"', page.text), field


def test_a_clone_of_what_is_not_there_is_an_empty_form(client, tiny_registered, dataset):
    for wrong in ("ftjob-" + "0" * 32, "nonsense", "ftjob-"):
        assert client.get("/jobs/new", params={"clone": wrong}).status_code == 200
    assert client.get("/jobs/new", params={"clone": "ftjob-\x00"}).status_code == 400  # no address holds a NUL


def test_the_copied_texts_order_the_same_job(client, api, session, user, tiny_registered, dataset):
    import yaml

    page = client.get("/jobs/new", params=typed(tiny_registered, dataset, **{"strategy.rank": "4", "run.epochs": "2", "name": "O'Neill"}))

    def text(name: str) -> str:
        return html.unescape(re.search(rf'id="text-{name}"[^>]*>(.*?)</pre>', page.text, re.S).group(1))

    body = yaml.safe_load(text("YAML"))
    assert body["strategy"] == {"name": "lora", "rank": 4} and body["run"] == {"epochs": 2.0}
    answer = api.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 200, answer.text
    import shlex

    arguments = shlex.split(text("curl").replace("\\\n", " "))
    assert json.loads(arguments[arguments.index("-d") + 1]) == body
    sent = {}

    class Client:  # stands where openai.OpenAI stands, to see what the program would send
        def __init__(self, **_: object) -> None:
            self.fine_tuning = self.jobs = self

        def create(self, *, extra_body: dict, **rest: object) -> object:
            sent.update(rest, **extra_body)
            return type("Job", (), {"id": "", "status": ""})

    program = text("Python").replace("from openai import OpenAI", "").replace('os.environ["LUTHIER_API_KEY"]', '""')
    exec(compile(program, "copied.py", "exec"), {"OpenAI": Client})
    assert sent == body


def test_a_page_never_puts_its_token_into_an_address(client, tiny_registered, dataset):
    form = re.search(r'<form id="order".*?</form>', client.get("/jobs/new").text, re.S).group(0)
    assert 'name="csrf_token"' not in form  # its values travel in the address when the estimate is asked for
