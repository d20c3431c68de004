"""The form that starts a job, in a real browser: it starts what it shows, and its estimate stays in sight."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from app.jobs import service as jobs
from app.machines import heartbeats
from tests.looks import look_at
from tests.routes.test_job_pages import dataset

__all__ = ["dataset"]
pytestmark = pytest.mark.browser


def open_settings(page: Page) -> None:
    page.evaluate("document.querySelectorAll('#order details').forEach((details) => details.open = true)")


def choose(page: Page, method: str) -> None:
    open_settings(page)
    page.locator(f"label:has(#method-{method})").click()


@pytest.mark.long
def test_the_form_starts_what_it_shows(page: Page, served: str, session, user, tiny_registered, dataset):
    def started():
        return jobs.list_(session, user)[0].spec

    # Back from another page: the method, and a setting that was changed, are shown and started.
    page.goto(f"{served}/jobs/new")
    choose(page, "dora")
    expect(page.locator("#shown")).to_have_value("dora")
    page.locator("#run-epochs").fill("7")
    page.get_by_role("link", name="Get a recommendation").click()
    page.wait_for_url("**/jobs/advice*")
    page.go_back()
    for _ in ("Back", "reload"):
        expect(page.locator("#method-dora")).to_be_checked()
        expect(page.locator("#methods .card.on")).to_contain_text("DoRA")
        expect(page.locator("#run-epochs")).to_have_value("7")
        expect(page.locator("#shown")).to_have_value("dora")
        page.reload()
    shared = page.url
    assert "strategy=dora" in shared and "run.epochs=7" in shared and "run.seed" not in shared and "key=" not in shared

    # A second tab with another method changes nothing here.
    other = page.context.new_page()
    other.goto(shared)
    choose(other, "full")
    expect(other.locator("#shown")).to_have_value("full")
    page.locator("#start").click()
    page.wait_for_url("**/jobs/ftjob-*")
    assert (started()["strategy"]["name"], started()["run"]["epochs"]) == ("dora", 7)
    other.locator("#start").click()
    other.wait_for_url("**/jobs/ftjob-*")
    assert (started()["strategy"]["name"], started()["run"]["epochs"]) == ("full", 7)

    # A slow network: Start waits for the settings of a method that was just chosen, and typing meanwhile is kept.
    other.goto(shared)
    other.route("**/jobs/new?*", lambda route: (other.wait_for_timeout(600), route.continue_()))
    choose(other, "rslora")
    expect(other.locator("#start")).to_be_disabled()
    other.locator("#run-seed").fill("11")
    expect(other.locator("#start")).to_be_enabled()
    expect(other.locator("#shown")).to_have_value("rslora")
    other.locator("#start").click()
    other.wait_for_url("**/jobs/ftjob-*")
    assert (started()["strategy"]["name"], started()["run"]["epochs"], started()["run"]["seed"]) == ("rslora", 7, 11)
    other.close()


@pytest.mark.long
@pytest.mark.parametrize("path", ["/jobs/new", "/compare/new"])
def test_the_summary_stays_in_sight(page: Page, served: str, session, user, tiny_registered, dataset, path: str, tmp_path):
    page.goto(served + path)
    open_settings(page)
    for width in (1360, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("scrollTo(0, 1500)")
        assert page.evaluate("scrollY") == 1500
        expect(page.locator("#start")).to_be_in_viewport(ratio=1)
    expect(page.locator(".in-short")).to_contain_text("steps")
    page.evaluate("scrollTo(0, 1e6)")
    last, bar = page.locator("#name").bounding_box(), page.locator(".bar").bounding_box()
    assert last["y"] + last["height"] <= bar["y"], "the bar hides no field"
    look_at(page, "new-run" + path.replace("/", "-"), tmp_path)


@pytest.mark.long
def test_a_wrong_value_is_marked_where_it_stands(page: Page, served: str, session, user, tiny_registered, dataset):
    page.goto(f"{served}/jobs/new")
    open_settings(page)
    rank = page.locator("#strategy-rank")
    rank.fill("0")
    sentence = "Rank must be 1 or more; you wrote 0."
    expect(page.locator("#strategy-rank-error")).to_have_text(sentence)
    expect(rank).to_have_attribute("aria-invalid", "true")
    assert "strategy-rank-error" in rank.get_attribute("aria-describedby") and rank.evaluate("e => e === document.activeElement")
    assert rank.input_value() == "0" and page.locator("#start").is_disabled()
    page.locator("#before").get_by_role("link", name=sentence).click()
    expect(rank).to_be_in_viewport()
    rank.fill("4")
    expect(page.locator("#start")).to_be_enabled()
    expect(page.locator("#strategy-rank-error")).to_have_count(0)


@pytest.mark.long
def test_a_chat_template_is_chosen_by_what_it_looks_like_or_written(
    page: Page, served: str, session, user, tiny_registered, dataset, tmp_path
):
    page.goto(f"{served}/jobs/new")
    choose(page, "lora")
    named = page.locator("#run-chat-template")
    expect(named.locator("option[value=llama3]")).to_contain_text("<|start_header_id|>user<|end_header_id|>")
    named.select_option("jinja")
    expect(page.locator("#run-chat-template-jinja-error")).to_contain_text("It is missing")
    written = page.locator("#run-chat-template-jinja")
    own = "{% for m in messages %}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    written.fill(own)
    expect(page.locator("#start")).to_be_enabled()
    written.scroll_into_view_if_needed()
    look_at(page, "new-run-chat-template", tmp_path)
    page.reload()
    expect(written).to_have_value(own)
    page.locator("#start").click()
    page.wait_for_url("**/jobs/ftjob-*")
    run = jobs.list_(session, user)[0].spec["run"]
    assert (run["chat_template"], run["chat_template_jinja"].splitlines()) == ("jinja", own.splitlines())


@pytest.mark.long
def test_the_device_is_chosen_and_the_estimate_follows(
    page: Page, served: str, session, user, tiny_registered, dataset, monkeypatch, tmp_path
):
    card = heartbeats.training_machine().model_copy(update={"gpu_name": "a card", "gpu_memory_bytes": 80 * 2**30})
    monkeypatch.setattr(heartbeats, "training_machines", lambda *_: [card])
    page.goto(f"{served}/jobs/new?strategy=lora")
    open_settings(page)
    before = page.locator("#before")
    expect(before.get_by_role("row", name="Device")).to_contain_text("GPU")
    page.get_by_label("Device").select_option("cpu")
    expect(before.get_by_role("row", name="Device")).to_contain_text("CPU")
    look_at(page, "new-run-device", tmp_path)
    page.locator("#start").click()
    page.wait_for_url("**/jobs/ftjob-*")
    job = jobs.list_(session, user)[0]
    assert job.spec["run"]["device"] == job.estimate["device"] == "cpu"
