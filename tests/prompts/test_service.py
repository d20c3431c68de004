"""The prompt lab: templates, rules, scores and intervals; runs through the real engine; the API; the page in a browser."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from sqlalchemy import select

from app import leases, queue
from app.datasets import ingest_task
from app.datasets import service as datasets
from app.errors import BadData, BadField
from app.kit import ids, stats
from app.prompts import prompt_vs_tuning
from app.prompts import runs as prompt_runs
from app.prompts import service as prompts
from app.prompts.service import PromptBody
from app.storage import files
from app.tables import Outbox, Prompt, PromptResult, PromptRun, TokenUse
from tests.conftest import wait_until
from tests.generating import _running, register_tiny, start_worker, stop_worker

COLOURS = ("red", "green", "blue")


@pytest.fixture
def sums(session, user, data_dir, tiny_model):
    """Sixty questions with their reasoning and a number after ####, read; and the small model beside them."""
    shutil.copytree(tiny_model, data_dir / "models" / "tiny", dirs_exist_ok=True)
    rows = [
        {"instruction": f"What is {i} plus {i + 1}, in {COLOURS[i % 3]}?", "output": f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}"}
        for i in range(60)
    ]
    return ready(session, user, rows, "sums.jsonl")


@pytest.fixture
def words(session, user, data_dir, tiny_model):
    shutil.copytree(tiny_model, data_dir / "models" / "tiny", dirs_exist_ok=True)
    rows = [{"text": f"A thing number {i}", "label": COLOURS[i % 7 % 3]} for i in range(60)]
    return ready(session, user, rows, "words.jsonl")


def ready(session, user, rows, name):
    file = files.add_bytes(session, user, "\n".join(map(json.dumps, rows)).encode(), name, "fine-tune")
    dataset = datasets.create(session, user, file)
    session.commit()
    ingest_task.read(dataset.id)
    session.refresh(dataset)
    assert dataset.status == "ready", dataset.error
    return dataset


def test_a_template_is_filled_in_one_pass():
    body = PromptBody(
        template="{{greeting}} {{input}} {{examples}}",
        example="Q {{input}} A {{answer}}",
        separator=";",
        variables={"greeting": "Say"},
        reference="after",
    )
    asked = prompts.text_of(body, "{{examples}} {{secret}}", [("one", "because\n#### 1")])
    assert asked == "Say {{examples}} {{secret}} Q one A 1;"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"template": "no variable"}, "{{input}}"),
        ({"template": "{{input}} {{oops}}"}, "oops"),
        ({"builder": "few_shot"}, "at least one example"),
        ({"samples": 3}, "raise the temperature"),
        ({"choose": "chosen", "shots": 1}, "need their row numbers"),
    ],
)
def test_prompts_that_cannot_work_say_why(change, says):
    with pytest.raises(BadField, match=says.replace("{", r"\{")):
        prompts.read_body(change)


@pytest.mark.parametrize(
    ("rule", "text", "taken"),
    [
        ("after", "2 + 2 = 4\n#### 4\n", "4"),
        ("after", "no marker\nso 5", "so 5"),
        ("after", "ends at ####", ""),
        ("last_number", "first 3, then $1,204.50.", "$1,204.50"),
        ("last_number", "none", ""),
        ("first_line", "\n yes \nno", "yes"),
        ("all", " as it is ", "as it is"),
    ],
)
def test_rules_that_take_the_answer(rule, text, taken):
    assert prompts.take(text, rule, "####") == taken


def test_scores():
    assert prompts.right("It is $1,204.50", "1204.5", "numeric") == 1
    assert prompts.right("12", "13", "numeric") == prompts.right("", "13", "numeric") == prompts.right("x", "y", "numeric") == 0
    assert prompts.right(" Yes. ", "yes", "exact") == 1 and prompts.right("yes, it is", "yes", "exact") == 0
    assert prompts.right("I say: Yes, it is", "yes", "contains") == 1 and prompts.right("anything", "", "contains") == 0
    assert prompts.right("not bad, good", "good", "label", ["good", "bad"]) == 0
    assert prompts.right("goodness", "good", "label", ["good", "bad"]) == 0
    assert prompts.majority(["4", "5", "4.0"], "numeric") == "4" and prompts.majority(["", "b", "B."], "exact") == "b"


def test_intervals():
    low, high = stats.wilson(0, 100)
    assert low == 0 and high == pytest.approx(0.0370, abs=1e-3)
    low, high = stats.wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
    low, high = stats.interval([0.2, 0.4, 0.6, 0.8] * 25)
    assert low == pytest.approx(0.455, abs=0.02) and high == pytest.approx(0.545, abs=0.02)


def test_examples_come_from_training_rows_and_are_the_similar_ones():
    from worker.evaluation.few_shot import Shots, Solved

    rows = [Solved(i, f"{kind} number {i}", kind) for i, kind in enumerate(["apple", "pear", "plum"] * 5)]
    asked = Solved(99, "a pear, please", "pear")
    near = Shots(PromptBody(shots=3, choose="similar"), rows, rows).of(asked)
    assert [s.answer for s in near] == ["pear"] * 3
    even = Shots(PromptBody(shots=6, choose="balanced"), rows, rows).of(asked)
    assert sorted(s.answer for s in even) == ["apple"] * 2 + ["pear"] * 2 + ["plum"] * 2
    drawn = Shots(PromptBody(shots=4, choose="random"), rows, rows)
    assert drawn.of(asked) == drawn.of(asked) and len(set(drawn.of(asked))) == 4
    assert [s.line for s in Shots(PromptBody(shots=2, choose="chosen", lines=[3, 1]), [], rows).of(asked)] == [3, 1]


def order(session, user, dataset, body, model="tiny", **more):
    _, version = prompts.create(session, user, "a prompt", prompts.read_body(body))
    run = prompt_runs.create(session, user, version, model, dataset, prompt_runs.RunOrder(**more))
    session.commit()
    return run


def test_a_run_scores_the_rows_that_training_holds_out(session, user, sums, monkeypatch):
    from app.spec import DatasetRef
    from worker.data.batching import read_rows, split
    from worker.evaluation import prompt_runs as evaluation_prompt_runs
    from worker.evaluation import row_answers

    monkeypatch.setattr(row_answers, "AT_ONCE", 1)  # whose rows stand beside whose in a batch rounds differently

    register_tiny(session)
    body = prompts.STARTS["few_shot"] | {"reference": "after", "score": "numeric", "max_tokens": 4, "samples": 2, "temperature": 0.5}
    run = order(session, user, sums, body, validation_fraction=0.2)
    assert session.scalar(select(Outbox.task).where(Outbox.key == run.id)) == queue.PROMPT
    evaluation_prompt_runs.work(run.id)
    session.refresh(run)
    assert run.status == "succeeded", run.error
    _, held = split(read_rows(DatasetRef.model_validate(run.spec["dataset"])), 0.2, 42)
    results = session.scalars(select(PromptResult).where(PromptResult.run_id == run.id).order_by(PromptResult.line)).all()
    assert [r.line for r in results] == [r.line for r in held] and len(held) == run.result["rows"] == 12
    for row in results:
        assert row.rendered_prompt.count("Question:") == 5 and row.rendered_prompt.startswith("<|im_start|>") and len(row.said) == 2
        shown = [q for q in row.rendered_prompt.split("Question: ")[1:-1]]
        assert all(q.split("\n")[0] not in {h.row["messages"][0]["content"] for h in held} for q in shown)
        assert "####" not in row.rendered_prompt and row.expected.isdecimal()
    assert run.result["score"] == sum(r.score for r in results) / 12 and run.result["low"] <= run.result["score"] <= run.result["high"]
    used = session.scalars(select(TokenUse)).one()
    assert (used.user_id, used.project_id) == (user.id, user.project_id)
    assert (used.read, used.written) == (run.result["prompt_tokens"], run.result["tokens"]) and used.written >= 24
    before = [(r.line, r.said) for r in results]
    again = order(session, user, sums, body, validation_fraction=0.2)
    evaluation_prompt_runs.work(again.id)
    session.expire_all()
    assert [(r.line, r.said) for r in prompt_runs.results(session, again)] == before


def test_a_run_goes_on_where_a_dead_worker_left_it(session, user, sums):
    from worker.evaluation import prompt_runs as evaluation_prompt_runs

    register_tiny(session)
    run = order(session, user, sums, {"max_tokens": 2}, part="all", rows=10)
    fence, _, done, _ = prompt_runs.claim(session, run.id)
    row = {"line": 1, "input": "x", "rendered_prompt": "\0", "expected": "x", "said": ["mine"], "answer": "x", "score": 1.0}
    assert not done and prompt_runs.heartbeat(session, run.id, fence, 0.1, [row], {"tokens": 1000, "seconds": 50.0})
    session.commit()
    evaluation_prompt_runs.work(run.id)  # another one has it
    session.refresh(run)
    assert run.status == "running" and run.fence == fence
    run.lease_until = leases.OVER
    session.commit()
    assert prompt_runs.reap(session) == {"lapsed": 1, "announced": 0}
    session.commit()
    evaluation_prompt_runs.work(run.id)
    session.refresh(run)
    assert run.status == "succeeded" and run.fence == fence + 1
    assert run.result["rows"] == 10 and 1000 < run.result["tokens"] <= 1020 and run.result["seconds"] > 50, "both workers' work is in it"
    assert run.deaths == 0 and run.progress == 1, "rows were scored since"
    assert not prompt_runs.heartbeat(session, run.id, fence, 0.5, [], {})
    kept = {r.line: r.said for r in prompt_runs.results(session, run)}
    assert kept.get(1, ["mine"]) == ["mine"]


def test_workers_that_die_without_a_row_between_end_a_run(session, user, sums):
    register_tiny(session)
    run = order(session, user, sums, {"max_tokens": 2}, part="all", rows=10)

    def die(line=None):
        fence, _, _, before = prompt_runs.claim(session, run.id)
        row = {"line": line, "input": "x", "rendered_prompt": "x", "expected": "x", "said": ["x"], "answer": "x", "score": 1.0}
        assert prompt_runs.heartbeat(session, run.id, fence, 0.1, [row] if line else [], {"tokens": 1} | before)
        session.expire_all()
        run.lease_until = leases.OVER
        session.commit()
        assert prompt_runs.reap(session)["lapsed"] == 1
        session.commit()
        session.refresh(run)
        return run.status

    assert [die(), die(), die(1), die(2), die(), die()] == ["queued"] * 5 + ["failed"]  # a row scored between begins to count anew
    assert run.error["code"] == "crashed" and run.finished_at and run.result["rows"] == 2 and run.result["score"] == 1


def test_few_runs_go_on_at_once_and_a_leaving_worker_lets_go(session, user, sums):
    from worker.evaluation import prompt_runs as evaluation_prompt_runs

    register_tiny(session)
    run = order(session, user, sums, prompts.STARTS["zero_shot"] | {"max_tokens": 2}, rows=3)
    for _ in range(evaluation_prompt_runs.RUNS_AT_ONCE):
        assert evaluation_prompt_runs._runs.free.acquire(timeout=5)
    evaluation_prompt_runs.begin(run.id, lambda: True)
    evaluation_prompt_runs.begin(run.id)  # announced again meanwhile
    time.sleep(0.3)
    session.refresh(run)
    assert run.status == "queued" and len(evaluation_prompt_runs._runs.held) == 1, "it was claimed before its turn"
    evaluation_prompt_runs._runs.free.release(evaluation_prompt_runs.RUNS_AT_ONCE)
    wait_until(lambda: not evaluation_prompt_runs._runs.held, what="the run's turn", seconds=30)
    session.refresh(run)
    assert run.status == "running", "a worker that is leaving went on to the end"
    run.lease_until = leases.OVER
    session.commit()
    evaluation_prompt_runs.begin(run.id)
    wait_until(lambda: not evaluation_prompt_runs._runs.held, what="the run's end", seconds=30)
    session.refresh(run)
    assert run.status == "succeeded" and run.result["rows"] == 3


def test_labels_and_rouge(session, user, words, sums):
    from worker.evaluation import prompt_runs as evaluation_prompt_runs

    register_tiny(session, "tiny-generic", "generic")
    run = order(
        session, user, words, {"score": "label", "template": "One of {{labels}}: {{input}}", "max_tokens": 3}, "tiny-generic", rows=5
    )
    evaluation_prompt_runs.work(run.id)
    rouge = order(session, user, sums, {"score": "rouge_l", "max_tokens": 3}, "tiny-generic", rows=3)
    evaluation_prompt_runs.work(rouge.id)
    session.refresh(run)
    session.refresh(rouge)
    assert run.status == rouge.status == "succeeded", (run.error, rouge.error)
    assert prompt_runs.results(session, run)[0].rendered_prompt.startswith("One of blue, green, red: A thing")
    with pytest.raises(BadField, match="no labels"):
        order(session, user, sums, {"score": "label"}, "tiny-generic")
    with pytest.raises(BadField, match="leaves none"):
        order(session, user, sums, {"shots": 2, "builder": "few_shot"}, "tiny-generic", part="all")


def test_what_goes_wrong_is_told(client, session, user, sums):
    from worker.evaluation import prompt_runs as evaluation_prompt_runs

    register_tiny(session, "gone", path="models/not-there")
    run = order(session, user, sums, {}, "gone", rows=3)
    evaluation_prompt_runs.work(run.id)
    session.refresh(run)
    assert run.status == "failed" and "gone" in run.error["message"] and run.error["hint"]
    register_tiny(session)
    long = order(session, user, sums, {"template": "{{input}} " + "wood " * 1500, "max_tokens": 2}, rows=3)
    evaluation_prompt_runs.work(long.id)
    session.refresh(long)
    assert long.status == "failed" and "None of the 3 rows" in long.error["message"] and long.error["code"] == "context_length_exceeded"
    page = client.get("/playground/prompts").text + client.get(f"/playground/prompts/runs/{ids.public('run', long.id)}").text
    assert page.count("None of the 3 rows") == 3 and "3 rows got no answer" in page
    rows = [{"instruction": "One? " + "wood " * (1500 if i == 2 else 1), "output": "Two."} for i in range(5)]
    mixed = order(session, user, ready(session, user, rows, "mixed.jsonl"), {"max_tokens": 2}, part="all")
    evaluation_prompt_runs.work(mixed.id)
    session.refresh(mixed)
    assert mixed.status == "succeeded" and mixed.result["rows"] == 4, "an answer that failed says nothing about the prompt"
    assert mixed.result["unanswered"] == 1 and mixed.result["unanswered_lines"] == [3] and mixed.result["asked_of"] == 5
    assert "line 3." in client.get(f"/playground/prompts/runs/{ids.public('run', mixed.id)}").text


def test_prompts_and_a_tuned_model_are_asked_lines_that_it_has_not_learnt(session, user, sums):
    """By the split of the job that tuned it, also for the models beside it; by versions of the data too."""
    from app.tables import Job
    from tests.factories import make_spec
    from worker.data.batching import read_rows, split
    from worker.evaluation.prompt_runs import _rows

    base = register_tiny(session)
    spec = make_spec(base, sums, validation_fraction=0.4, seed=7)
    job = Job(owner_id=user.id, name="tuned", spec=spec.model_dump(mode="json"), model_id=base.id, dataset_id=sums.id, order={})
    session.add(job)
    session.flush()
    register_tiny(session, "ft:tiny:sums", path="models/x", owner_id=user.id, base_id=base.id, job_id=job.id, strategy="lora")
    training, held = split(read_rows(spec.dataset), 0.4, 7)
    asked = []
    for model, more in (
        ("ft:tiny:sums", {}),
        ("tiny", {"beside": ["ft:tiny:sums"]}),
        ("tiny", {"beside": ["ft:tiny:sums"], "split_seed": 3}),
    ):
        run = order(session, user, sums, {"max_tokens": 2}, model, **more)
        asked.append({row.line for row, _ in _rows(prompt_runs.RunSpec.model_validate(run.spec))[0]})
    assert asked[0] == asked[1] == {row.line for row in held} and len(held) == 24
    assert asked[2] and asked[2] < asked[0] and not asked[2] & {row.line for row in training}
    fewer = order(session, user, sums, {"max_tokens": 2}, "ft:tiny:sums", rows=5)
    assert len(few := {r.line for r, _ in _rows(prompt_runs.RunSpec.model_validate(fewer.spec))[0]}) == 5 and few < asked[0]
    whole = spec.model_copy(update={"validation": spec.dataset.model_copy(update={"id": job.id})})
    job.spec = whole.model_dump(mode="json")
    session.commit()
    with pytest.raises(BadData, match="Every row of sums was in the training set"):
        _rows(prompt_runs.RunSpec.model_validate(order(session, user, sums, {"max_tokens": 2}, "ft:tiny:sums").spec))


def test_the_verdict_compares_line_by_line(session, user, sums):
    """Both right on most lines says nothing; the lines on which they differ do."""
    register_tiny(session)
    register_tiny(session, "ft:tiny:sums", owner_id=user.id)

    def scored(model, right_on, score="exact", lines=range(1, 41)):
        run = order(session, user, sums, {"max_tokens": 2, "score": score}, model)
        fence, *_ = prompt_runs.claim(session, run.id)
        rows = [
            {"line": n, "input": "x", "rendered_prompt": "x", "expected": "x", "said": ["x"], "answer": "x", "score": float(n in right_on)}
            for n in lines
        ]
        assert prompt_runs.heartbeat(session, run.id, fence, 1, rows, {}) and prompt_runs.finish(session, run.id, fence)
        session.commit()
        session.expire_all()

    def says():
        ((_, rows),) = prompt_runs.table(session, user)
        return prompt_vs_tuning.verdict(session, rows)

    scored("tiny", range(1, 21))
    assert says().startswith("Run a prompt on a base model and on a fine-tuned one")
    scored("ft:tiny:sums", range(1, 26))  # five more, and none lost: p = 0.0625, although the intervals are far from apart
    assert says().startswith("Prompting may be sufficient.") and "ahead on 5 rows and behind on 0" in says() and "p = 0.062" in says()
    scored("ft:tiny:sums", range(1, 27))
    assert says().startswith("Fine-tuning was needed. On the 40 rows") and "p = 0.031" in says() and "65.0%" in says() and "50.0%" in says()
    scored("tiny", range(1, 41))
    assert says().startswith("Prompting is sufficient.") and "ahead on 0 rows and behind on 14" in says()
    scored("ft:tiny:sums", range(41, 61), lines=range(41, 61))  # the best of all, but on other lines
    assert says().startswith("Only 0 rows were run with both")


def test_the_api_and_versions(api, session, user, sums):
    register_tiny(session)
    made = api.post("/v1/prompts", json={"name": "sums", "template": "{{input}}", "score": "numeric"}).json()
    assert made["object"] == "prompt" and made["version"] == 1
    place = f"/v1/prompts/{made['id']}"
    assert api.post(place, json={"template": "{{input}}"}).json()["version"] == 1  # nothing changed
    assert api.post(place, json={"template": "Please: {{input}}"}).json()["version"] == 2
    assert api.get(place).json()["versions"][0]["body"]["template"] == "{{input}}"
    run = api.post(f"{place}/runs", json={"model": "tiny", "dataset_id": ids.public(ids.DATASET, sums.id), "version": 1, "rows": 5}).json()
    assert run["status"] == "queued" and api.get(f"{place}/runs").json()["data"][0]["id"] == run["id"]
    assert api.post(f"/v1/prompts/runs/{run['id']}/cancel").json()["status"] == "cancelled"
    assert api.get(f"/v1/prompts/runs/{run['id']}/results").json() == {"object": "list", "data": [], "has_more": False}
    for body, param in (
        ({"name": ""}, "name"),
        ({}, "name"),
        ({"name": "x", "shots": 99}, "shots"),
        ({"name": "x", "nonsense": 1}, "nonsense"),
    ):
        answer = api.post("/v1/prompts", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert api.post(f"{place}/runs", json={"model": "tiny", "rows": 5}).json()["error"]["param"] == "dataset_id"
    assert api.delete(place).json()["deleted"] and api.get(place).status_code == 404


def test_prompts_times_models_are_one_matrix(client, session, user, sums):
    """Every chosen prompt runs on every chosen model, each cell shows its newest run, and nothing is made of an order that is too much."""
    for name in ("tiny", "tiny-2"):
        register_tiny(session, name)
    versions = [prompts.create(session, user, name, PromptBody())[0] for name in ("one", "two")]
    session.commit()
    names = [f"{ids.public(ids.PROMPT, prompt.id)}:1" for prompt in versions]
    data = {"prompts": names, "models": ["tiny", "tiny-2"], "dataset": ids.public(ids.DATASET, sums.id), "rows": "5"}
    assert client.post("/playground/prompts/runs", data=data, follow_redirects=False).status_code == 303
    runs = session.scalars(select(PromptRun)).all()
    assert len(runs) == 4 and {run.spec["rows"] for run in runs} == {5}
    page = client.get("/playground/prompts").text
    assert page.count('<th scope="col" class="n">tiny') == 2 and page.count("Queued") == 4
    wrong = client.post("/playground/prompts/runs", data=data | {"models": [f"m{n}" for n in range(20)]})
    assert wrong.status_code == 400 and "2 prompts × 20 models are 40 runs; at most 32" in wrong.text
    for missing, says in (("prompts", "No prompt was chosen."), ("models", "No model was chosen.")):
        assert says in client.post("/playground/prompts/runs", data=data | {missing: []}).text
    assert "gone" in client.post("/playground/prompts/runs", data=data | {"models": ["tiny", "gone"]}).text
    assert session.query(PromptRun).count() == 4


def test_a_field_that_is_wrong_says_so_itself_and_nothing_is_saved(client, session, sums):
    register_tiny(session)
    form = {"name": "x", "prompt.template": "{{input}}", "prompt.max_tokens": "0", "dataset": ids.public(ids.DATASET, sums.id)}
    page = client.post("/playground/prompts", data=form | {"do": "run", "models": ["tiny"]})
    assert page.status_code == 400 and 'id="prompt-max-tokens-error"' in page.text and "<details open>" in page.text
    assert client.post("/playground/prompts", data=form | {"prompt.max_tokens": "4", "do": "run", "models": ["gone"]}).status_code == 404
    assert session.query(PromptRun).count() == 0 and session.query(Prompt).count() == 0


@pytest.mark.long
def test_in_the_browser_through_a_real_worker(browser_page, served, session, user, sums, data_dir, valkey):
    """The preview follows the keys, a try shows three answers and is kept nowhere, and Save & run ends with a score."""
    import os

    from tests.looks import look_at, sign_in

    register_tiny(session)
    page = sign_in(browser_page, served, session, user)
    for other in _running:  # one without a database, on the same queue, would take the run
        stop_worker(other)
    worker = start_worker(data_dir, valkey.url, LUTHIER_DATABASE_URL=os.environ["LUTHIER_DATABASE_URL"])
    try:
        page.goto(f"{served}/playground/prompts")
        page.get_by_role("link", name="Few-shot").click()
        assert page.locator("#prompt-form > .field").count() == 5
        page.get_by_label("Name").fill("Four like it")
        page.get_by_label("Number of examples").fill("2")
        shown = page.locator("#preview pre")
        wait_until(lambda: shown.inner_text().count("Question:") == 3, what="the preview of two examples")
        assert "What is 0 plus 1, in red?" in shown.inner_text()
        page.get_by_label("Prompt template").fill("{{nobody}}")
        page.locator("#preview .error").wait_for()
        page.get_by_label("Prompt template").fill("{{examples}}Question: {{input}}\nSum:")
        page.locator("#preview pre", has_text="Sum:").wait_for()
        page.get_by_text("Advanced", exact=True).click()
        page.get_by_label("Max tokens").fill("3")
        page.get_by_label("Metric").select_option("numeric")
        page.get_by_label("Reference parser").select_option("after")
        page.get_by_role("button", name="Try on 3 rows").click()
        page.locator("#trial .pill", has_text="Queued").wait_for()
        trial = session.scalars(select(PromptRun)).one()
        queue.celery.send_task(queue.PROMPT, args=[str(trial.id)])
        page.locator("#trial article.sample").nth(2).wait_for(timeout=90_000)
        one = page.locator("#trial article.sample").first.inner_text()
        assert "Parsed answer" in one and "Reference" in one and ("right" in one or "wrong" in one) and one.count("Question:") >= 3
        look_at(page, "prompt", data_dir)
        page.get_by_role("button", name="Save & run").click()
        page.get_by_text("Saved “Four like it”, version 1.").wait_for()
        session.rollback()
        run = session.scalars(select(PromptRun).where(PromptRun.id != trial.id)).one()
        queue.celery.send_task(queue.PROMPT, args=[str(run.id)])
        page.get_by_text("Succeeded").wait_for(timeout=90_000)
        assert page.locator("table.scored tbody tr").count() == 1, "the try is not among the scores"
        look_at(page, "lab", data_dir)
        page.locator("table.scored a").first.click()
        page.locator("article.sample").first.wait_for()
        page.get_by_text("Full transcript").first.click()
        assert page.locator("article.sample pre").first.inner_text().count("Question:") == 3, "two examples and the question"
        look_at(page, "prompt-run", data_dir)
    finally:
        stop_worker(worker)
