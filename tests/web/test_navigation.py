"""The menu: each page declares its own line."""

from __future__ import annotations

from types import SimpleNamespace

from app.main import create_app
from app.web.navigation import MenuPage, each_route, menu_of


def test_every_line_of_the_menu_is_declared_where_its_page_is_answered(client):
    app = create_app()
    menu = app.state.menu
    known = {
        "start": ["Home", "Datasets", "Models"],
        "training": ["Runs", "New run", "Comparisons", "Advice"],
        "evaluation": ["Scores", "Prompt lab", "Blind A/B", "Learning curves"],
        "playground": ["Chat", "Next token", "Classify"],
        "end": ["Reading room", "Guide", "Settings"],
    }
    for group, titles in known.items():  # others may stand among them
        assert [page.title for page in menu[group] if page.title in titles] == titles
    answered = {path: route.endpoint.__module__ for path, route in each_route(app.router) if "GET" in getattr(route, "methods", ())}
    assert all(page.path in answered for pages in menu.values() for page in pages)
    text = client.get("/settings").text
    lines = [f'href="{page.path}"' for pages in menu.values() for page in pages]
    places = [text.index(line) for line in lines]
    assert places == sorted(places) and 'href="/settings" aria-current="page"' in text


def test_a_page_of_one_file_has_its_line():
    page = SimpleNamespace(MENU=(MenuPage("Tokens", "/tokens", "playground", 15), MenuPage("First", "/first", "start", 1)))
    found = menu_of([page, SimpleNamespace()])
    assert found["playground"] == [page.MENU[0]] and found["start"] == [page.MENU[1]] and found["end"] == []
