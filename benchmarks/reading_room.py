"""Every stop of the reading room in Chromium, and how long each takes: `python -m benchmarks.reading_room --models data/models`.

A whole studio of its own with the starter models that are in the folder (SmolLM2 and all-MiniLM at least), and nothing else. Each stop is
done by its buttons, as a person would, and timed from the first click until the page shows its result. Then every result is looked at in
light, in dark and 320 px wide: by axe, by its width and by its size. Exit code 1 where a stop takes over two minutes, a page is over
100 kB, or anything is found. With `--pictures FOLDER` the pages are kept; with `--only NAME` one stop is done.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.servers import STARTER, starters_in, studio

MOST_SECONDS, MOST_BYTES = 120.0, 100_000
PATIENCE = 1000 * 5 * MOST_SECONDS
"""Milliseconds after which a stop that is far too slow is given up."""
LOOKS = (("light", 1280), ("dark", 1280), ("light", 320))


class Walked(NamedTuple):
    """One stop: the seconds of each of its clicks, those of a CPU that the studio took for it, the bytes of its page, its result in a line, and what is wrong."""

    name: str
    seconds: list[float]
    cpu: float
    bytes: int
    headline: str
    faults: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="the folder `models` of a studio that has the starters")
    parser.add_argument("--pictures", type=Path, help="also keep pictures of every page there")
    parser.add_argument("--only", default="", help="a regular expression that the name of a stop must match")
    given = parser.parse_args()
    found = starters_in(given.models)
    if not {STARTER, "all-minilm-l6-v2"} <= found.keys():
        sys.exit(f"{given.models} has not the starters; there are {', '.join(found) or 'none'}.")
    if given.pictures:
        given.pictures.mkdir(parents=True, exist_ok=True)
    first = found.pop(STARTER)
    with studio(first, STARTER, found) as own:
        walked = walk(own.url, own.link, own.folder, re.compile(given.only), given.pictures)
    print(as_text(walked))
    sys.exit(1 if any(one.faults for one in walked) else 0)


def walk(url: str, link: str, folder: Path, only: re.Pattern[str], pictures: Path | None) -> list[Walked]:
    from playwright.sync_api import sync_playwright

    from app.learn import STOPS

    with sync_playwright() as driver:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(url + link if link.startswith("/") else link)
        found = [done(page, url, folder, name, pictures) for name in STOPS if only.search(name)]
        page.goto(f"{url}/learn")
        found.append(
            Walked(
                "(the room)",
                [],
                0.0,
                len(page.content().encode()),
                page.locator("main p.muted").first.inner_text(),
                looked(page, "room", pictures),
            )
        )
        browser.close()
    return found


def done(page: Any, url: str, folder: Path, name: str, pictures: Path | None) -> Walked:
    """Press every button that leads on, and wait for what each starts."""
    page.goto(f"{url}/learn/{name}")
    steps = [button for button in page.locator("form[data-learn] button").all() if re.match(r"\d\.", button.inner_text())]
    seconds, used = [], cpu_of(folder)
    for place in range(max(1, len(steps))):
        button = page.locator("form[data-learn] button").nth(place)
        began = time.monotonic()
        with page.expect_navigation(timeout=PATIENCE):
            button.click(no_wait_after=True)
        page.locator("#stop[hx-get]").wait_for(state="detached", timeout=PATIENCE)
        seconds.append(time.monotonic() - began)
    used = cpu_of(folder) - used
    faults = [f"takes {sum(seconds):.0f} s"] if sum(seconds) > MOST_SECONDS else []
    faults += [f"says: {one}" for one in page.locator(".error").all_inner_texts()]
    if not faults and page.locator("#result-title").inner_text() != "Your result":
        faults.append("has not come to an end")
    page.goto(f"{url}/learn/{name}")
    size = len(page.content().encode())
    faults += [f"{size} bytes"] if size > MOST_BYTES else []
    page.goto(f"{url}/learn")
    headline = page.locator(f'li:has(a[href="/learn/{name}"]) a[href*="visit="]')
    said = headline.inner_text() if headline.count() else ""
    page.goto(f"{url}/learn/{name}")
    return Walked(name, seconds, used, size, said, faults + looked(page, name, pictures))


def cpu_of(folder: Path) -> float:
    """Seconds of a CPU that the processes of a studio have used, with those that have ended: on a busy machine they say more than the clock."""
    import psutil

    found = 0.0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("LUTHIER_DATA_DIR") == str(folder):
                found += sum(process.cpu_times()[:4])
    return found


def looked(page: Any, name: str, pictures: Path | None) -> list[str]:
    """What axe and the width of the page object to, in each look."""
    from axe_playwright_python.sync_playwright import Axe

    faults = []
    for theme, width in LOOKS:
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        faults += [f"{wide} px too wide at {width} px"] if wide > 0 else []
        faults += [f"{one['id']} ({theme}, {width}): {one['nodes'][0]['html'][:120]}" for one in Axe().run(page).response["violations"]]
        if pictures:
            page.screenshot(path=pictures / f"{name.strip('()').replace(' ', '-')}-{theme}-{width}.png", full_page=True)
    page.set_viewport_size({"width": 1280, "height": 900})
    return faults


def as_text(walked: list[Walked]) -> str:
    """A Markdown table, and below it what is wrong."""
    lines = ["| stop | seconds | CPU s | kB | result |", "|---|---:|---:|---:|---|"]
    lines += [
        f"| {one.name} | {' + '.join(f'{s:.0f}' for s in one.seconds)} | {one.cpu:.0f} | {one.bytes / 1000:.0f} | {one.headline} |"
        for one in walked
    ]
    return "\n".join([*lines, "", *(f"{one.name}: {fault}" for one in walked for fault in one.faults)]).rstrip()


if __name__ == "__main__":
    main()
