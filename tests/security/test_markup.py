"""Markup in everything that people, files, models and servers name or say (S11): every page shows it as text.

After Open WebUI CVE-2026-44568 and MLflow CVE-2023-6568. All free text of a studio with something for each page is replaced by markup, and
no page may then hold an element or an attribute that comes from it. What scripts make of it in a browser, and that the policy stops what
would pass, is looked at by `tests/views`."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from sqlalchemy import text

from app.db import get_engine
from app.tables import Base
from benchmarks.pages import pages, seed
from tests.data_worker import data_worker

MARK = "data-injected"
MARKUP = (
    f"""</script></style></textarea></title></option>"'`><b {MARK}=1 onerror=a() onclick='a()'>x</b><img src=x onerror=a()>"""
    """<!--><svg onload=a()>javascript:a() {{7*7}} [a](javascript:a()) ![a](https://elsewhere.example/a.png)"""
)
FREE = {
    "answers": ("text", "rendered_prompt"), "api_keys": ("name",), "comparisons": ("name",), "datasets": ("name",), "evaluations": ("stage",),
    "exchanges": ("title", "prompt"), "files": ("filename",), "findings": ("message",), "graders": ("name",), "jobs": ("name",),
    "models": ("title",), "projects": ("name",), "prompts": ("name",), "users": ("name",), "votes": ("left_text", "right_text"),
    "browser_sessions": ("browser",),
}  # fmt: skip
"""Columns of free text: names, titles, and what models and people said."""


class Injected(HTMLParser):
    """The start tags of a page that only markup of ours can have made."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.shown = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs}
        links = [value or "" for name, value in attrs if name in ("href", "src", "action", "formaction")]
        if MARK in names or any(name.startswith("on") for name in names):
            self.found.append(f"<{tag} {attrs}>")
        self.found += [f"<{tag} {link}>" for link in links if link.strip().lower().startswith("javascript:") or "elsewhere.example" in link]

    def handle_data(self, data: str) -> None:
        self.shown += MARK in data

    def handle_comment(self, data: str) -> None:
        self.found += [f"a comment: {data[:80]}"] if MARK in data else []


def injected(html: str) -> Injected:
    found = Injected()
    found.feed(html)
    found.close()
    return found


@pytest.mark.long
def test_no_text_becomes_markup_on_any_page(client, session, user, data_dir):
    samples = seed(session, user, data_dir)
    session.commit()
    known, wrong, shown = {table: set(Base.metadata.tables[table].columns.keys()) for table in Base.metadata.tables}, {}, 0
    with get_engine().begin() as connection:
        for table, columns in FREE.items():
            assert set(columns) <= known[table], f"{table} has other columns: {known[table]}"
            for column in columns:
                connection.execute(text(f'UPDATE "{table}" SET "{column}" = :markup || id'), {"markup": MARKUP})
    with data_worker():
        for page in pages(samples):
            answer = client.get(page.path)
            assert answer.status_code == 200, (page, answer.text[:500])
            found = injected(answer.text)
            shown += found.shown > 0
            if found.found:
                wrong[page.title] = found.found[:3]
    assert not wrong
    assert shown >= 25, f"the markup is on {shown} pages only, so little was looked at"


@pytest.mark.parametrize(
    "html",
    [
        f"<p><b {MARK}=1>",
        "<img src=x onerror=a()>",
        "<a href='javascript:a()'>",
        "<img src='https://elsewhere.example/a.png'>",
        f"<!-- <b {MARK}> -->",
    ],
)
def test_what_is_markup_is_found(html):
    assert injected(html).found


def test_what_is_text_is_not():
    assert not injected(f"<p title='&lt;b {MARK}&gt;'>&lt;img onerror=a()&gt;</p>").found
