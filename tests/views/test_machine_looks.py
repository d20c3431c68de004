"""What a run asks of the machine, in a real browser: it is started as it was typed, and one that no machine can take says so."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from app.jobs import service as jobs
from tests.evaluation.test_claims import fleet  # noqa: F401  # a fixture
from tests.looks import look_at
from tests.routes.test_job_pages import dataset

__all__ = ["dataset"]
pytestmark = pytest.mark.browser


@pytest.mark.long
def test_a_run_asks_for_a_machine(page: Page, served: str, session, user, tiny_registered, dataset, fleet, tmp_path):  # noqa: F811
    page.goto(f"{served}/jobs/new?strategy=lora")
    page.locator("#resources summary").click()
    page.get_by_label("GPUs", exact=True).fill("8")
    page.get_by_label("Labels").fill("lab")
    page.locator("#resources").scroll_into_view_if_needed()
    expect(page.locator("#resources")).to_have_attribute("open", "")
    look_at(page, "new-run-machine", tmp_path)
    page.locator("#start").click()
    page.wait_for_url("**/jobs/ftjob-*")
    job = jobs.list_(session, user)[0]
    assert (job.num_gpus, job.labels) == (8, ["lab"])
    expect(page.get_by_text("No train worker can take it")).to_be_visible()
    look_at(page, "job-without-machine", tmp_path)
