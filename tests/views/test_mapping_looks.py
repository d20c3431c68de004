"""Data comes in, in a real browser: columns are mapped by one click, unknown roles are asked, tables are pasted."""

from __future__ import annotations

import json

import pytest

from tests.data_worker import data_worker
from tests.looks import look_at
from tests.routes.test_mapping import ENGLISH, GERMAN

pytestmark = pytest.mark.browser


def upload(page, served, path):
    page.goto(f"{served}/datasets/new")
    page.set_input_files("#file", path)
    page.click("#send")
    page.wait_for_url("**/datasets/ds-*")


@pytest.mark.long
def test_a_table_with_headers_of_its_own_is_mapped_by_one_click(page, served, tmp_path):
    (tmp_path / "fragen.csv").write_text(GERMAN, encoding="utf-8")
    (tmp_path / "tickets.csv").write_text(ENGLISH)
    with data_worker():
        upload(page, served, tmp_path / "fragen.csv")
        page.get_by_text("Map the columns").wait_for()
        first = page.locator("table.first")
        assert "→ text" in first.locator("th", has_text="Frage").inner_text()
        assert "→ label" in first.locator("th", has_text="Kategorie").inner_text()
        assert "extra column" in first.locator("th", has_text="Nr").inner_text() and "über Ihre Seite" in first.inner_text()
        look_at(page, "mapping-error", tmp_path)
        page.get_by_role("button", name="Import with this mapping").click()
        page.get_by_text("Valid rows").first.wait_for()
        assert "12" in page.locator(".facts").first.inner_text() and "Rückgabe" in page.inner_text("main")

        upload(page, served, tmp_path / "tickets.csv")
        page.get_by_label("Format").select_option("plain_text")  # a choice of one's own
        assert page.locator("table.first th", has_text="queue").inner_text().endswith("extra column")
        page.get_by_role("button", name="Import with this mapping").click()
        page.locator("summary", has_text="Change format or columns").click()
        assert page.get_by_label("Format").input_value() == "plain_text"
        page.get_by_label("Format").select_option("classification")
        assert page.locator("table.first th", has_text="queue").inner_text().endswith("→ label")
        look_at(page, "mapping-ready", tmp_path)
        page.get_by_role("button", name="Re-import as new version").click()
        page.get_by_text("shipping").first.wait_for()
        assert "classification" in page.inner_text("main").lower()


@pytest.mark.long
def test_unknown_roles_are_asked_and_tables_are_pasted(page, served, tmp_path):
    talk = [{"role": "customer", "content": "Hi?"}, {"role": "agent", "content": "Yes."}, {"role": "narrator", "content": "He left."}]
    rows = [json.dumps({"messages": [*talk[: 2 + n % 2]], "n": n}) for n in range(12)]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    with data_worker():
        upload(page, served, tmp_path / "chats.jsonl")
        panel = page.locator("#roles")
        panel.get_by_label("narrator").wait_for()
        assert [panel.get_by_label(name).input_value() for name in ("customer", "agent", "narrator")] == ["user", "assistant", ""]
        look_at(page, "roles", tmp_path)
        panel.get_by_role("button", name="Change roles").click()
        page.get_by_text("Changed roles: ").wait_for()
        assert "6" in page.locator(".facts").first.inner_text() and page.locator("#roles").get_by_label("narrator").is_visible()

        page.goto(f"{served}/datasets/new")
        page.get_by_role("button", name="Add the sample DPO preferences").click()
        page.wait_for_url("**/datasets/ds-*")
        page.goto(f"{served}/datasets/new")
        page.get_by_role("link", name="Added: DPO preferences").wait_for()
        page.locator("summary", has_text="Paste a table").click()
        page.get_by_label("Table").fill(ENGLISH.replace(",", "\t"))
        look_at(page, "upload", tmp_path)
        page.get_by_role("button", name="Create dataset").click()
        page.locator("summary", has_text="Map the columns").wait_for()
        assert "→ label" in page.locator("table.first th", has_text="queue").inner_text()
        page.goto(f"{served}/datasets")
        page.get_by_role("link", name="Pasted table").wait_for()
        look_at(page, "datasets", tmp_path)
        page.goto(f"{served}/datasets/combine")
        look_at(page, "join", tmp_path)
