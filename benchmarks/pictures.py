"""Pictures of the ten main pages, compared with those that are kept: `python -m benchmarks.pictures [--keep] [--out FOLDER]`.

A studio of its own with the rows, jobs and charts of `benchmarks.pages`, whose pages are drawn in Chromium, wide in light and narrow in dark. Digits
are drawn as 0, since ids, times and the speed of the machine differ. What differs from `tests/pictures/` in more than `MOST` of its pixels is
reported, with a picture of both and of where they differ in FOLDER; `--keep` takes those of today. Fonts and Chromium decide on pixels too, so
compare on the machine whose pictures are kept, before and after a change: they were taken with Chromium and the fonts of Debian 12.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import httpx

from benchmarks.pages import Page, studio, wait_for_studio

KEPT = Path(__file__).resolve().parent.parent / "tests" / "pictures"
MOST = 0.005
"""The share of pixels that may differ."""
CLEARLY = 32
"""A pixel differs where one of its channels does by more than this, of 255."""
MAIN = {
    "start": "/", "datasets": "/datasets", "dataset": "/datasets/{key} support-replies, report", "models": "/models", "new-run": "/jobs/new",
    "run": "/jobs/{job_id} finished, overview", "comparison": "/compare/{comparison_id}", "evaluations": "/evaluations", "playground": "/playground",
    "reading-room": "/learn",
}  # fmt: skip
"""Name of the picture → title of the page."""
LOOKS = (("light", 1360), ("dark", 390))
STILL = """() => {
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) walk.currentNode.textContent = walk.currentNode.textContent.replace(/\\d/g, "0");
  for (const box of document.querySelectorAll("input, textarea, progress")) { if (box.type === "text" || box.type === "number") box.value = ""; }
  for (const told of document.querySelectorAll("[data-foot], [data-count], time, .messages")) told.style.visibility = "hidden";
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the pictures of today")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="where pictures that differ go (default pictures/)")
    given = parser.parse_args()
    with studio() as (url, link, found):
        with httpx.Client(base_url=url) as client:
            wait_for_studio(client)
        drawn = pictures(url, link(), found)
    if given.keep:
        shutil.rmtree(KEPT, ignore_errors=True)
        KEPT.mkdir(parents=True)
        for name, picture in drawn.items():
            picture.save(KEPT / f"{name}.webp", lossless=True, quality=100, method=6)
        print(f"{len(drawn)} pictures are kept in {KEPT.name}/, {sum(p.stat().st_size for p in KEPT.iterdir()):,} bytes.")
        return
    print("| picture | pixels that differ |\n|---|---:|")
    bad = 0
    for name, picture in drawn.items():
        share = compared(name, picture, given.out)
        bad += share > MOST
        print(f"| {name} | {share:.2%} |")
    if bad:
        print(f"{bad} differ: look at {given.out}/, then mend the page or keep the pictures with --keep.")
    sys.exit(1 if bad else 0)


def pictures(url: str, link: str, found: list[Page]) -> dict[str, Any]:
    """Name and look → picture, as tall as the page and at most 4,000 pixels."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    paths = {page.title: page.path for page in found}
    drawn = {}
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage", "--font-render-hinting=none"]
        )
        window = browser.new_page(reduced_motion="reduce")
        window.goto(url + link)
        for name, title in MAIN.items():
            for theme, width in LOOKS:
                window.set_viewport_size({"width": width, "height": 900})
                window.goto(url + paths[title])
                window.wait_for_timeout(400)  # charts are drawn
                window.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
                window.evaluate(STILL)
                height = min(4000, window.evaluate("document.documentElement.scrollHeight"))
                window.set_viewport_size({"width": width, "height": height})
                drawn[f"{name}-{width}"] = Image.open(io.BytesIO(window.screenshot(animations="disabled"))).convert("RGB")
        browser.close()
    return drawn


def compared(name: str, picture: Any, out: Path) -> float:
    """The share of pixels in which a picture differs from the one that is kept; all of them where there is none or it is of another size."""
    from PIL import Image, ImageChops

    path = KEPT / f"{name}.webp"
    kept = Image.open(path).convert("RGB") if path.exists() else Image.new("RGB", picture.size)
    size = (max(kept.width, picture.width), max(kept.height, picture.height))
    before, after = Image.new("RGB", size), Image.new("RGB", size)
    before.paste(kept), after.paste(picture)
    clear = ImageChops.difference(before, after).convert("L").point(lambda value: 255 if value > CLEARLY else 0)
    share = clear.histogram()[255] / (size[0] * size[1])
    if share > MOST:
        out.mkdir(parents=True, exist_ok=True)
        sheet = Image.new("RGB", (3 * size[0], size[1]))
        for place, one in enumerate((before, after, clear.convert("RGB"))):
            sheet.paste(one, (place * size[0], 0))
        sheet.save(out / f"{name}.png")
    return share


if __name__ == "__main__":
    main()
