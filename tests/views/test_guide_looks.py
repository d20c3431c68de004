"""Advice and the guide in a real browser: light, dark and 320 px wide, with axe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.looks import COLORS, check
from tests.routes.test_advice import chats  # noqa: F401  a fixture

pytestmark = pytest.mark.browser


@pytest.mark.long
@pytest.mark.parametrize(("theme", "width"), [("light", 1360), ("dark", 1360), ("light", 320)])
def test_pages(page, served: str, tiny_registered, chats, tmp_path: Path, theme: str, width: int):  # noqa: F811
    page.set_viewport_size({"width": width, "height": 900})
    page.context.add_cookies([{"name": "luthier_theme", "value": theme, "url": served}])
    for name, path in (("advice", "/jobs/advice"), ("guide", "/guide"), ("strategy", "/guide/lora")):
        page.goto(served + path)
        check(page, tmp_path, f"{name}-{theme}-{width}", COLORS if theme == "dark" else ())
        if name == "advice":
            page.locator("details").evaluate_all("all => all.forEach((one) => (one.open = true))")
            assert set(page.locator("main .scroll").evaluate_all("all => all.map((one) => one.scrollWidth - one.clientWidth)")) == {0}
            check(page, tmp_path, f"{name}-open-{theme}-{width}", COLORS if theme == "dark" else ())
