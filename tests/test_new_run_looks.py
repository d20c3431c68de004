"""The form that starts a job, in a real browser: it starts what it shows, and its estimate stays in sight."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from app import jobs
from tests.routes.test_job_pages import dataset
from tests.test_looks import page, served

__all__ = ["dataset", "page", "served"]
pytestmark = pytest.mark.browser


def open_settings(page: Page) -> None:
    page.evaluate("document.querySelectorAll('#order details').forEach((details) => details.open = true)")


def choose(page: Page, method: str) -> None:
    open_settings(page)
    page.locator(f"label:has(#method-{method})").click()


def test_the_form_starts_what_it_shows(page: Page, served: str, session, user, tiny_registered, dataset):
    def started():
        return jobs.list_(session, user)[0].spec

    # Back from another page: the method, and a setting that was changed, are shown and started.
    page.goto(f"{served}/jobs/new")
    choose(page, "dora")
    expect(page.locator("#shown")).to_have_value("dora")
    page.locator("#run-epochs").fill("7")
    page.get_by_role("link", name="Which one suits this data?").click()
    page.wait_for_url("**/jobs/advice*")
    page.go_back()
    for _ in ("Back", "reload"):
        expect(page.locator("#method-dora")).to_be_checked()
        expect(page.locator(".card.on")).to_contain_text("DoRA")
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
