"""The main job, whole: upload a dataset, tune the starter model with LoRA, watch it, compare it with its base.

Once in a browser as a person does it, once with the unmodified `openai` client; both on a studio started by `luthier up`.
The figures go to `test-results/main-job-*.json`, and are printed after the run (tests/conftest.py).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import PROJECT

SAMPLE = PROJECT / "samples" / "support-replies.jsonl"
ROWS = 47
"""Of the sample, so that what is scored before and after the steps takes no longer than the steps themselves."""
QUESTION = "My cello case lost a wheel."  # held out: not a row of the sample
STEPS = 8
pytestmark = [pytest.mark.studio, pytest.mark.starter, pytest.mark.timeout(900)]


@pytest.fixture
def sample(tmp_path) -> Path:
    path = tmp_path / "replies.jsonl"
    path.write_text("".join(SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]), encoding="utf-8")
    return path


@pytest.fixture
def note(record_property) -> Callable[..., None]:
    """Keep what a test measured, and have it printed after the run."""

    def keep(how: str, job: dict[str, Any], losses: dict[int, float], answers: list[str], **more: Any) -> None:
        measured, evaluation = job["measured"], job["evaluation"]
        figures = {
            "first_loss": losses[1],
            "last_loss": losses[STEPS],
            "validation_before": evaluation["base"]["loss"],
            "validation_after": evaluation["tuned"]["loss"],
            "tokens_per_second": measured["tokens_per_second"],
            "seconds": measured["seconds"],
            "predicted_seconds": job["estimate"]["seconds"],
            "peak_memory_bytes": measured["peak_memory_bytes"],
            "predicted_memory_bytes": job["estimate"]["memory_bytes"],
            "base_answer": answers[0],
            "tuned_answer": answers[1],
        }
        folder = PROJECT / "test-results"
        folder.mkdir(exist_ok=True)
        (folder / f"main-job-{how}.json").write_text(json.dumps(figures | more, indent=2, ensure_ascii=False) + "\n")
        record_property(f"main job ({how})", in_words(figures))

    return keep


def in_words(figures: dict[str, Any]) -> str:
    return (
        f"{STEPS} steps in {figures['seconds']:.0f} s (predicted {figures['predicted_seconds']:.0f} s), "
        f"{figures['tokens_per_second']:.0f} tokens/s, peak memory {figures['peak_memory_bytes'] / 1e9:.2f} GB "
        f"(predicted {figures['predicted_memory_bytes'] / 1e9:.2f} GB)\n"
        f"training loss {figures['first_loss']:.4f} at the first step, {figures['last_loss']:.4f} at the last; "
        f"validation loss {figures['validation_before']:.4f} before, {figures['validation_after']:.4f} after\n"
        f"asked: {QUESTION}\nbase:  {figures['base_answer']!r}\ntuned: {figures['tuned_answer']!r}"
    )


def losses_of(events: list[dict[str, Any]]) -> dict[int, float]:
    """Step → training loss, of a job's events as the API gives them."""
    told = [e["data"] for e in events if e["type"] == "metrics" and "train_loss" in (e["data"] or {})]
    return {data["step"]: data["train_loss"] for data in told}


def wait_for(page, text: str, seconds: float) -> None:
    page.get_by_text(text, exact=False).first.wait_for(timeout=seconds * 1000)


@pytest.mark.long
@pytest.mark.browser
def test_in_the_browser(studio, browser_page, note, sample):
    page = browser_page
    fresh = studio.luthier("link").stdout
    page.goto(re.search(r"http://\S+", fresh).group(0))

    # Upload, and see what is in it.
    page.goto(f"{studio.url}/datasets/new")
    page.set_input_files("#file", str(sample))
    page.fill("#name", "browser-replies")
    page.click("#send")
    wait_for(page, "Fine-tune on this dataset", 60)
    assert str(ROWS) in page.inner_text("main")
    page.get_by_role("link", name="Fine-tune on this dataset").click()

    # Order a short LoRA; the estimate stands beside the form.
    page.locator("#advanced > summary").click()
    page.locator("input[name='strategy.rank']").fill("8")
    page.locator("input[name='run.max_steps']").fill(str(STEPS))
    page.locator("input[name='run.max_tokens_per_step']").fill("512")
    page.locator("input[name='run.sample_tokens']").fill("16")
    page.locator("input[name='run.evaluations_per_epoch']").fill("1")
    assert re.search(r"\d GB", page.inner_text("aside"))
    began = time.monotonic()
    page.get_by_role("button", name="Start").click()

    # Watch it: the first step appears by itself, and a reload shows the same.
    page.wait_for_url(re.compile(r"/jobs/ftjob-"))
    address = page.url
    wait_for(page, f"of {STEPS}", 240)
    first_step = time.monotonic() - began
    page.goto(address)
    wait_for(page, f"of {STEPS}", 10)
    wait_for(page, "The model is called", 600)
    tiles = page.inner_text("dl.tiles")
    assert "Validation loss" in tiles and "predicted" in tiles
    page.set_viewport_size({"width": 1360, "height": 700})
    heights = {}
    for tab in ("overview", "metrics", "samples", "evaluation", "data", "config"):
        page.goto(f"{address}?tab={tab}")
        page.wait_for_timeout(200)  # charts find their size
        heights[tab] = page.evaluate("document.documentElement.scrollHeight")
    assert max(heights.values()) <= 1000, heights
    page.goto(address)

    # Compare base, few-shot base and tuned, side by side.
    page.get_by_role("link", name="Compare in the playground").click()
    page.fill("#prompt", QUESTION)
    assert page.locator("input[name$='temperature']").input_value() == "0"
    page.click("[data-send]")
    panes = page.locator("[data-pane]")
    assert panes.count() == 3
    deadline = time.monotonic() + 120
    while any(not re.search(r"tokens/s", panes.nth(i).locator("[data-proof]").inner_text()) for i in range(3)):
        assert time.monotonic() < deadline, panes.all_inner_texts()
        page.wait_for_timeout(200)
    answers = [panes.nth(i).locator("[data-text]").last.inner_text() for i in range(3)]
    proofs = [panes.nth(i).locator("[data-proof]").inner_text() for i in range(3)]
    assert answers[0] != answers[2], "the tuned model answers as its base does"
    assert proofs[0] != proofs[2]
    panes.nth(2).locator("[data-rendered] > summary").click()
    assert "<|im_start|>user" in panes.nth(2).locator("[data-prompt]").inner_text()

    with httpx.Client(base_url=f"{studio.url}/v1/fine_tuning/jobs", headers={"authorization": f"Bearer {studio.key}"}) as api:
        key = address.rpartition("/")[2]
        job, events = api.get(f"/{key}").json(), api.get(f"/{key}/events?limit=100").json()["data"]
    note("browser", job, losses_of(events), answers, seconds_to_first_step=round(first_step, 1), heights=heights, proofs=proofs)


@pytest.mark.long
def test_with_the_openai_client(studio, note, sample):
    import openai

    client = openai.OpenAI(base_url=f"{studio.url}/v1", api_key=studio.key, timeout=120)
    with sample.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    uploaded = client.files.wait_for_processing(uploaded.id, poll_interval=0.3)
    assert uploaded.status == "processed"

    job = client.fine_tuning.jobs.create(
        model="smollm2-135m-instruct",
        training_file=uploaded.id,
        suffix="replies",
        seed=7,
        extra_body={
            "strategy": {"name": "lora", "rank": 8},
            # What was forgotten and what each row lost are scored in the browser's job, and take longer than these steps.
            "run": {
                "max_steps": STEPS,
                "max_tokens_per_step": 512,
                "sample_tokens": 16,
                "evaluations_per_epoch": 1,
                "forgetting": False,
                "row_losses": False,
            },
        },
    )
    deadline = time.monotonic() + 700
    while job.status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < deadline, job
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    losses = losses_of([event.to_dict() for event in client.fine_tuning.jobs.list_events(job.id, limit=100)])
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1]

    told = job.to_dict()
    before, after = told["evaluation"]["base"]["loss"], told["evaluation"]["tuned"]["loss"]
    assert after < before
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert checkpoints

    def ask(model: str) -> str:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=48, temperature=0, seed=1
        )
        assert answer.choices[0].finish_reason in ("stop", "length")
        return answer.choices[0].message.content

    base, tuned = ask("smollm2-135m-instruct"), ask(job.fine_tuned_model)
    assert base != tuned
    streamed = client.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": QUESTION}], max_tokens=48, temperature=0, seed=1, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == tuned
    assert ask(checkpoints[0].fine_tuned_model_checkpoint)
    assert job.fine_tuned_model in {model.id for model in client.models.list()}
    note("client", told, losses, [base, tuned])
