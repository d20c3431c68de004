"""Aliases on a model's page in a real browser: set, moved from another model, removed; light, dark and 320 px."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app.evaluation import gates
from app.kit import ids
from app.models import aliases
from tests.factories import make_dataset
from tests.generating import register_tiny
from tests.looks import look_at

pytestmark = pytest.mark.browser


@pytest.mark.long
def test_an_alias_is_set_moved_and_removed(page: Page, served: str, session, user, tmp_path: Path) -> None:
    first, second = register_tiny(session, "tiny"), register_tiny(session, "other")

    def stands_for() -> dict[str, str]:
        session.expire_all()
        return {one.alias.name: one.model.name for one in aliases.list_(session, user)}

    def show(model) -> None:
        page.goto(f"{served}/models/{ids.public(ids.MODEL, model.id)}")

    show(first)
    for name in ("support-bot", "a-" + "long-" * 12 + "w"):
        page.get_by_label("New alias").fill(name)
        page.get_by_role("button", name="Set alias").click()
        expect(page.locator(".message")).to_contain_text(f"{name} points to tiny")
    expect(page.locator("#python-code")).to_contain_text('model="a-long')
    show(second)
    look_at(page, "aliases-elsewhere", tmp_path)
    page.locator("#aliases li", has_text="support-bot").get_by_role("button", name="Move here").click()
    expect(page.locator(".message")).to_contain_text("support-bot points to other")
    assert stands_for()["support-bot"] == "other"
    page.get_by_label("New alias").fill("tiny")
    page.get_by_role("button", name="Set alias").click()
    expect(page.locator("[role=alert]")).to_contain_text("tiny is the name of a model.")
    expect(page.get_by_label("New alias")).to_have_value("tiny")
    look_at(page, "aliases", tmp_path)
    page.once("dialog", lambda asked: asked.accept())
    page.locator("#aliases li", has_text="support-bot").get_by_role("button", name="Remove").click()
    expect(page.locator(".message")).to_contain_text("The alias support-bot was removed.")
    assert list(stands_for().values()) == ["tiny"]


@pytest.mark.long
def test_a_gate_is_set_refuses_and_is_passed_by_force(page: Page, served: str, session, user, data_dir: Path, tmp_path: Path) -> None:
    first, _ = register_tiny(session, "tiny"), register_tiny(session, "other")
    make_dataset(session, user, data_dir)
    gates.apply(session, user, "support-bot", gates.AliasOrder(model="tiny"))
    session.commit()
    page.goto(f"{served}/models/{ids.public(ids.MODEL, first.id)}")
    page.get_by_role("link", name="support-bot").click()
    look_at(page, "alias", tmp_path)
    page.get_by_label("Dataset").select_option("chat")
    page.get_by_label("Max forgetting").fill("2")
    page.get_by_role("button", name="Save gate").click()
    expect(page.locator(".message")).to_contain_text("The gate of support-bot was set.")
    page.get_by_label("Another model").select_option("other")
    page.get_by_role("button", name="Check").click()
    expect(page.locator("[role=alert]")).to_contain_text("no finished evaluation of tiny and other")
    page.get_by_role("button", name="Start 2 evaluations").click()
    expect(page.locator("#look")).to_contain_text("Evaluation of tiny")
    page.get_by_text("Move it without passing the gate").click()
    look_at(page, "alias-refused", tmp_path)
    page.get_by_label("Reason").fill("The old one is gone tomorrow.")
    page.get_by_role("button", name="by force").click()
    expect(page.locator(".message")).to_contain_text("support-bot points to other")
    page.once("dialog", lambda asked: asked.accept())
    look_at(page, "alias-moved", tmp_path)
    page.get_by_role("button", name="Go back to tiny").click()
    expect(page.locator(".message")).to_contain_text("support-bot points to tiny again.")
    expect(page.locator("table")).to_contain_text("Went back")
