"""The life of a job's page in a real browser: what is recorded appears, and a reload shows the same."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from app import events
from app.jobs import lifecycle
from app.jobs import service as jobs
from app.kit import ids
from app.views import job_tabs
from tests import lives
from tests.looks import COLORS, objections
from tests.routes.test_job_pages import address, dataset  # noqa: F401  (a fixture)

pytestmark = pytest.mark.browser

CHART = """(name) => { const box = document.querySelector(`[data-chart="${name}"]`);
  const canvas = box?.querySelector("canvas"); return canvas ? [canvas.clientWidth, canvas.clientHeight, box.clientWidth] : null }"""


def sign_in(context, served, session, user):
    from app.web import auth

    link = auth.new_sign_in_link(session, user)
    session.commit()
    page = context.new_page()
    page.goto(served + link)
    return page


@pytest.fixture
def said() -> list[str]:
    """What the console said."""
    return []


@pytest.fixture
def page(browser_page, served, session, user, said) -> Iterator:
    """Signed in; an error or a refusal by the content security policy in the console fails the test."""
    page = sign_in(browser_page.context, served, session, user)
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    page.close()
    assert said == [], f"the console said {said}"


def until(page, expression: str, seconds: float = 20.0) -> None:
    """Poll until the expression holds. Playwright's own wait evaluates text inside the page, which our policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(f"Boolean({expression})"):
        assert time.monotonic() < deadline, f"never came true: {expression}"
        page.wait_for_timeout(50)


def latest(page) -> str:
    return page.inner_text(".progress p")


@pytest.mark.long
def test_events_appear_as_they_are_recorded_and_a_reload_shows_the_same(page, served, session, user, tiny_registered):
    life = lives.Life(session, lives.order(session, user, tiny_registered))
    page.goto(served + address(life))
    assert "Waiting for the first step." in page.inner_text("main")
    life.claim()
    until(page, "document.querySelector('.head').innerText.includes('Running')")
    assert "Starting up: loading the model and the data" in latest(page) and "predicted to take 5 min" in latest(page)
    life.say(lives.started())
    until(page, "document.querySelector('.progress').innerText.includes('the first of 120 steps is being made')")
    life.say(*lives.steps(1, 11))
    until(page, "document.querySelector('.progress').innerText.includes('Step 11 of 120')")
    until(page, f"({CHART})('loss')")
    page.click("#table-loss summary")
    top = page.locator(".tiles").bounding_box()["y"]
    life.say(*lives.steps(12, 24))
    until(page, "document.querySelector('.tiles').innerText.includes('step 24')")
    assert page.title().startswith("20% ·") and "running" in page.get_attribute("link[rel=icon]", "href")
    assert page.get_attribute("#table-loss", "open") is not None  # what was opened stays open
    assert page.locator(".tiles").bounding_box()["y"] == top  # nothing jumps
    until(page, "document.querySelector('[data-legend=loss]').innerText.replace(/\\s+/g, ' ').includes('validation 1.59')")
    life.lose()
    until(page, "document.querySelector('.head').innerText.includes('Queued')")
    life.claim().say(lives.started(resumed_from=12), *lives.steps(13, 20))
    until(page, "document.querySelector('.progress').innerText.includes('resumed at step 12 after the worker was lost')")
    until(page, "document.querySelector('.progress').innerText.includes('Step 20 of 120')")
    until(page, "document.querySelector('[data-legend=loss]').innerText.replace(/\\s+/g, ' ').includes('validation 1.93')")
    seen, legend = latest(page), page.inner_text("[data-legend=loss]")
    page.reload()
    until(page, f"({CHART})('loss')")
    assert latest(page).split("left")[0].split(",")[0] == seen.split(",")[0]
    assert page.inner_text("[data-legend=loss]") == legend
    life.say(*lives.steps(21, 120)).finish()
    page.get_by_text("Compare in the playground").wait_for()
    until(page, "document.querySelector('#live').dataset.live === 'false'")
    assert "Succeeded" in page.inner_text(".head") and page.title().startswith("✓ support-tone")
    assert "succeeded" in page.get_attribute("link[rel=icon]", "href")


@pytest.mark.long
def test_runs_that_are_compared_are_followed_to_their_end(page, served, session, user, tiny_registered):
    ended = lives.Life(session, lives.order(session, user, tiny_registered, name="first")).claim()
    ended.say(lives.started(), *lives.steps(1, 120)).finish()
    life = lives.Life(session, lives.order(session, user, tiny_registered, name="second"))
    page.goto(f"{served}/jobs/compare?" + "&".join(f"job={ids.public(ids.JOB, one.job_id)}" for one in (ended, life)))
    legend = "document.querySelector('[data-line=loss2] output').textContent"
    drawn = f"({CHART})('loss') && document.querySelector('[data-legend=loss]').innerText"
    until(page, f"{drawn}.includes('2 second')")
    assert page.evaluate(legend) == "–" and "Queued" in page.inner_text(".runs-of")
    page.click("#same summary")
    life.claim().say(lives.started(), *lives.steps(1, 20))
    until(page, "document.querySelector('.runs-of').innerText.includes('Running')")
    until(page, f"{legend} !== '–'")
    early = page.evaluate(legend)
    assert page.get_attribute("#same", "open") is not None  # what was opened stays open
    life.say(*lives.steps(21, 120)).finish()
    until(page, "!document.querySelector('.runs-of').innerText.includes('Running')")
    until(page, f"{legend} !== '{early}'")
    assert page.get_attribute("#live", "hx-get") is None, "two runs that ended are asked for no more"
    seen = page.inner_text("main")
    assert len(page.query_selector_all(".plot canvas")) == 2
    page.reload()
    until(page, f"({CHART})('loss')")
    page.click("#same summary")
    assert page.inner_text("main") == seen


@pytest.mark.long
def test_two_browsers_see_the_same(page, browser, served, session, user, tiny_registered):
    life = lives.running(session, user, tiny_registered)
    context = browser.new_context()
    other = sign_in(context, served, session, user)
    for one in (page, other):
        one.goto(served + address(life))
    life.say(*lives.steps(75, 84))
    for one in (page, other):
        until(one, "document.querySelector('.progress').innerText.includes('Step 84 of 120')")
    for place in (".tiles", "[data-legend=loss]", ".checkpoints", ".log"):
        assert page.inner_text(place) == other.inner_text(place)

    # A pause and what comes of it are seen by both, whoever asked.
    page.click("#do-pause")
    until(page, "document.querySelector('#do-pause').disabled")
    life.leave(84)
    for one in (page, other):
        until(one, "document.querySelector('#do-resume')")
        assert "Paused" in one.inner_text(".head") and "of training left" in latest(one)
    page.click("#do-resume")
    until(other, "document.querySelector('.head').innerText.includes('Queued')")
    life.claim()
    for one in (page, other):
        until(one, "document.querySelector('.head').innerText.includes('Running')")
        assert "attempt 3 (after a pause), starting up: loading the model and the data" in latest(one)
    life.say(lives.started(resumed_from=84), *lives.steps(85, 88))
    for one in (page, other):
        until(one, "document.querySelector('.progress').innerText.includes('resumed at step 84 after a pause')")
        until(one, "document.querySelector('.head').innerText.includes('Running')")
    context.close()


@pytest.mark.long
def test_a_lost_connection_misses_nothing(page, served, session, user, tiny_registered, said):
    life = lives.running(session, user, tiny_registered)
    page.goto(served + address(life))
    until(page, f"({CHART})('loss')")
    page.route("**/stream*", lambda route: route.abort())
    page.evaluate("document.getElementById('live').dispatchEvent(new CustomEvent('luthier:changed'))")
    page.unroute("**/stream*")
    before = len(said)
    page.context.set_offline(True)
    life.say(*lives.steps(75, 90))
    page.wait_for_timeout(300)
    page.context.set_offline(False)
    life.say(*lives.steps(91, 92))
    until(page, "document.querySelector('.progress').innerText.includes('Step 92 of 120')")
    # What the browser itself says while it is offline.
    said[before:] = [text for text in said[before:] if "DISCONNECTED" not in text and "Failed to fetch" not in text]


LOOK = "document.dispatchEvent(new Event('visibilitychange'))"
"""The menu is asked for as if a person had just come back to the tab."""


def note(page, path: str) -> str:
    return page.inner_text(f".side .wide [data-count='{path}']")


@pytest.mark.long
def test_the_menu_stays_true_and_says_when_the_studio_is_away(page, served, session, user, tiny_registered, said):
    life = lives.running(session, user, tiny_registered)
    lives.order(session, user, tiny_registered)  # another version of the same dataset
    page.goto(f"{served}/datasets")
    assert note(page, "/datasets") == "1" and note(page, "/jobs") == "62%"
    assert page.inner_text(".wide [aria-current]").startswith("Datasets")
    life.say(*lives.steps(75, 84))
    page.evaluate(LOOK)
    until(page, "document.querySelector('.wide [data-count=\"/jobs\"]').textContent.startsWith('70')")
    jobs.pause(session, user, life.job_id)
    life.leave(84)
    page.evaluate(LOOK)
    until(page, "document.querySelector('.wide [data-count=\"/jobs\"]').textContent === '2'")

    page.goto(served + address(life))
    page.context.set_offline(True)
    page.click("#do-resume")
    until(page, "document.querySelector('#lost').textContent.includes('Connection lost')")
    assert page.url == served + address(life) and "nothing was changed" in page.inner_text(".messages")
    page.context.set_offline(False)
    page.evaluate(LOOK)
    until(page, "document.querySelector('#lost').textContent === ''")
    page.click("#do-resume")
    until(page, "document.querySelector('.head').innerText.includes('Queued')")
    said[:] = [text for text in said if "DISCONNECTED" not in text and "Failed to fetch" not in text and "NETWORK" not in text]


@pytest.mark.long
def test_the_end_of_a_job_is_told_and_text_is_copied_without_a_clipboard(page, served, session, user, tiny_registered):
    life = lives.running(session, user, tiny_registered)
    page.add_init_script("""window.notes = []; navigator.__proto__.__defineGetter__("clipboard", () => undefined);
        window.Notification = class { static permission = "default"; constructor(title) { window.notes.push(title) }
          static async requestPermission() { return (Notification.permission = "granted") } }""")
    page.goto(served + address(life))
    assert page.evaluate("Notification.permission") == "default"  # nobody is asked before a click
    page.click("#notify")
    until(page, "document.querySelector('#notify').textContent === 'Will notify'")
    life.say(*lives.steps(75, 120)).finish()
    page.evaluate(LOOK)
    until(page, "window.notes.length === 1")
    assert page.evaluate("window.notes[0]") == "support-tone: succeeded" and page.evaluate("localStorage['luthier-watched']") == "{}"

    page.goto(f"{served}{address(life)}?tab=config")
    page.click("[data-copy=config-cli]")
    page.focus("#filter")
    page.keyboard.press("Control+V")
    assert page.input_value("#filter").startswith("luthier train job-")


def test_charts_fit_their_place_and_follow_the_theme(page, served, session, user, tiny_registered):
    page.goto(served + address(lives.running(session, user, tiny_registered)) + "?tab=metrics")
    for width in (1280, 700, 320, 1000):
        page.set_viewport_size({"width": width, "height": 900})
        for name in ("loss", "memory_bytes"):
            until(page, f"(() => {{ const s = ({CHART})('{name}'); return s && Math.abs(s[0] - s[2]) <= 1 && s[1] > 100 }})()")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"the page is wider than {width}"
    pixels = "document.querySelector('[data-chart=loss] canvas').toDataURL()"
    light = page.evaluate(pixels)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    until(page, f"({pixels}) !== {light!r}")


@pytest.mark.long
def test_a_chart_says_the_value_under_the_pointer(page, served, session, user, tiny_registered):
    page.goto(served + address(lives.running(session, user, tiny_registered)))
    until(page, f"({CHART})('loss')")
    page.hover("[data-chart=loss] .u-over", position={"x": 60, "y": 60})
    until(page, "/^step \\d/.test(document.querySelector('[data-legend=loss] [data-at]').textContent)")
    page.mouse.move(1, 1)
    until(page, "document.querySelector('[data-legend=loss] [data-at]').textContent === ''")


@pytest.mark.long
def test_the_form_estimates_as_one_types_and_loses_nothing(page, served, session, user, tiny_registered, dataset):  # noqa: F811
    page.goto(f"{served}/jobs/new?model=tiny")
    page.click("#advanced > summary")
    before = page.inner_text("#before")
    page.fill("#strategy-rank", "64")
    until(page, "document.querySelector('#before').innerText !== " + json.dumps(before))
    page.fill("#strategy-rank", "0")
    page.get_by_text("Rank must be 1 or more; you wrote 0.").first.wait_for()
    assert page.is_disabled("#start")
    page.fill("#strategy-rank", "16")
    until(page, "!document.querySelector('#start').disabled")
    page.locator(".card", has_text="Full fine-tuning").click()
    page.wait_for_selector("#strategy-rank", state="detached")
    page.locator(".card", has_text="LoRA").first.click()
    page.wait_for_selector("#strategy-rank")
    assert page.input_value("#strategy-rank") == "16"
    page.click("#start")
    page.wait_for_url("**/jobs/ftjob-*")
    assert "rank 16" in page.inner_text("main")


@pytest.mark.long
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nobody_is_shut_out(page, served, session, user, tiny_registered, dataset, theme):  # noqa: F811
    failed = lives.Life(session, lives.order(session, user, tiny_registered)).claim().say(lives.started(), *lives.steps(1, 3))
    failed.fail(events.Failed(kind="diverged", message="The loss is not a number.", hint="Lower the learning rate."))
    done = lives.Life(session, lives.order(session, user, tiny_registered)).claim().say(lives.started(), *lives.steps(1, 24)).finish(24)
    page.emulate_media(color_scheme=theme)
    for path in (
        "/jobs",
        "/jobs/new",
        "/jobs/new?strategy.rank=0",
        *map(address, (lives.running(session, user, tiny_registered), failed)),
        *(f"{address(done)}?tab={tab}" for tab in job_tabs.TABS),
    ):
        page.goto(served + path)
        page.evaluate("document.querySelectorAll('details').forEach((d) => d.open = !d.matches('.menu'))")
        assert objections(page, COLORS if theme == "dark" else ()) == [], path


@pytest.mark.long
def test_without_scripts_the_page_shows_all_and_says_how_to_look_again(browser, served, session, user, tiny_registered):
    context = browser.new_context(java_script_enabled=False)
    page = sign_in(context, served, session, user)
    if page.locator("main form button").count():
        page.locator("main form button").first.click()
    page.goto(served + address(lives.running(session, user, tiny_registered)))
    said = page.inner_text("main")
    assert "Step 74 of 120" in said and "Refresh" in said
    page.click("#table-loss summary")
    assert page.locator("#table-loss td").first.is_visible()
    page.click("text=Samples")
    page.select_option("#step", "36")
    page.click("text=Show")
    assert "Sample generations at step 36" in page.inner_text("main")
    context.close()


def test_the_overview_of_a_finished_job_fits_one_screen(page, served, session, user, tiny_registered):
    """With a name of two lines and the longest verdict there is: what came of the job is not pushed below the fold."""
    life = lives.Life(
        session, lives.order(session, user, tiny_registered, name="Ways to classify: " + "Feature extraction (linear probe), " * 2)
    )
    life.claim().say(lives.started(), *lives.steps(1, 120))
    side = {"rows": 96, "score": 0.17, "tuned": 0.83, "interval": [0.54, 0.75]}
    few = side | {"score": 0.79, "interval": [-0.05, 0.12]}
    contest = {"metric": "accuracy", "base": side, "few_shot": few, "few_shot_by": "vectors", "examples": 16, "cross_validated": True}
    evaluation = {"rows": 96, "base": {"loss": 2.51}, "tuned": {"loss": 1.13, "accuracy": 0.83}, "contest": contest}
    lifecycle.finish(session, life.held, lives.finished().model_copy(update={"evaluation": evaluation}))
    session.commit()
    page.set_viewport_size({"width": 1360, "height": 700})
    page.goto(served + address(life))
    verdict = page.locator("#verdict").inner_text()
    assert "95% confidence" in verdict and "cross-validation" in verdict and "no training may be needed" in verdict, verdict
    until(page, "document.querySelector('[data-chart] canvas')")
    assert page.evaluate("document.documentElement.scrollHeight") <= 1000
