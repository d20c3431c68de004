"""A comparison on real data through a whole studio: ordered as the openai client orders it, waited for, printed and pictured.

    python -m benchmarks.comparison DATA [--test FILE] [--rows N] [--model NAME] [--folder FOLDER] [--strategies lora,ia3,…]
                                    [--run '{"epochs": 2}'] [--picture FILE.png] [--json FILE]
    python -m benchmarks.comparison DATA --models FOLDER --strategies lora,feature_extraction …

DATA is any file the studio reads. Labelled rows are learnt with the starter encoder, all others with the starter that writes,
unless a model is named. With `--models`, the folder `models` of a studio, every starter in it is a base model of one comparison, with its
size curve. `--rows` draws so many rows by the seed, each class as large as it is. `--test` names the rows to check
with; without it the studio holds a share out. `--picture` takes the comparison's page with a headless Chromium, in light and
dark at 1440 px, and at 390 and 320 px.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.servers import STARTER, Studio, starters_in, studio

ENCODER = "all-minilm-l6-v2"
STRATEGIES = {
    ENCODER: "feature_extraction,dense_head,lora,ia3,bitfit,top_layers,full",
    STARTER: "lora,dora,ia3,prompt_tuning,bottleneck_adapter,layer_norm,top_layers",
}
VIEWS = (("light", 1440), ("dark", 1440), ("light", 390), ("light", 320))
SEED = 42


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--test", type=Path, help="validation rows")
    parser.add_argument("--rows", type=int, help="draw at most so many training rows, and half as many test rows")
    parser.add_argument("--model", choices=list(STRATEGIES), help="the starter to tune")
    parser.add_argument("--folder", type=Path, help="where its files are; the studio's own data folder when left out")
    parser.add_argument("--models", type=Path, help="compare every starter that is in this folder")
    parser.add_argument("--strategies", help="names, with commas between them")
    parser.add_argument("--run", type=json.loads, default={}, help="run settings of every job, as JSON")
    parser.add_argument("--picture", type=Path, help="take pictures of the page; the names of the others end in theme and width")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    name = given.model or (ENCODER if given.data.suffix in (".csv", ".tsv") else STARTER)
    bases = starters_in(given.models) if given.models else {name: given.folder or folder_of(name)}
    if name not in bases:
        raise SystemExit(f"{given.models} has not {name}; there are {', '.join(bases) or 'none'}.")
    with studio(bases.pop(name), name, bases) as here:
        found = compare(here, [name, *bases], given)
        print(as_text(found), flush=True)
        if given.picture:
            take(here, f"/compare/{found['id']}", given.picture)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def folder_of(name: str) -> Path:
    from app.models import starters

    if starters.present(name) is None:
        raise SystemExit(f"{name} is not here: `luthier models add {name} --files-only` brings it, or name a folder with --folder.")
    return starters.folder(name)


def compare(here: Studio, bases: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """The comparison as `GET /v1/comparisons/{id}` gives it once every job of it has ended."""
    from openai import OpenAI

    with OpenAI(base_url=f"{here.url}/v1", api_key=here.key) as client:
        order = {"strategies": (given.strategies or STRATEGIES[bases[0]]).split(","), "run": given.run, "seed": SEED}
        order |= {"model": bases[0]} if len(bases) == 1 else {"kind": "models", "models": bases}
        order["training_file"] = sent(client, given.data, given.rows)
        if given.test:
            order["validation_file"] = sent(client, given.test, given.rows and given.rows // 2)
        found: Any = client.post("/comparisons", body=order, cast_to=object)
        for refused in found["refused"]:
            print(f"  {refused['title']} is refused: {refused['reason']}", flush=True)
        told: set[str] = set()
        while found["status"] in ("queued", "running", "paused"):
            time.sleep(2)
            found = client.get(f"/comparisons/{found['id']}", cast_to=object)
            for row in found["data"]:
                if row["status"] in ("succeeded", "failed", "cancelled") and row["job"] not in told:
                    told.add(row["job"])
                    why = f": {row['error']['message']}" if row["error"] else ""
                    print(f"  {row['title']} {row['status']}{why}", flush=True)
    return found


def sent(client: Any, path: Path, rows: int | None, mapping: dict[str, Any] | None = None) -> str:
    """The id of the uploaded file once the studio has read it, as `mapping` says where it cannot know: `{"format": …, "mapping": …}`."""
    data = path.read_bytes() if rows is None else drawn(path, rows)
    file = client.files.create(file=(path.name, data), purpose="fine-tune")
    report = read(client, file.id)
    if mapping:
        client.post(f"/datasets/{report['dataset']}/reparse", body=mapping, cast_to=object)
        report = read(client, file.id)
    if report["status"] == "error":
        raise SystemExit(f"{path.name}: {report['error']['message']}")
    print(f"{path.name}: {report['good_rows']:,} valid rows as {report['format']}", flush=True)
    return str(file.id)


def read(client: Any, file: str) -> Any:
    """The report of a file's newest reading once that has ended."""
    report: Any = {"status": "reading"}
    while report["status"] == "reading":
        time.sleep(0.5)
        report = client.get(f"/files/{file}/report", cast_to=object)
    return report


def drawn(path: Path, rows: int) -> bytes:
    """So many rows of a CSV or of JSON lines, drawn by the seed and left in their order."""
    draw = random.Random(SEED)

    def some(found: list[Any]) -> list[Any]:
        return [found[place] for place in sorted(draw.sample(range(len(found)), min(rows, len(found))))]

    if path.suffix not in (".csv", ".tsv"):
        return b"".join(some([line for line in path.read_bytes().splitlines(keepends=True) if line.strip()]))
    separator = "\t" if path.suffix == ".tsv" else ","
    head, *body = csv.reader(path.open(encoding="utf-8", newline=""), delimiter=separator)
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows([head, *some(body)])
    return out.getvalue().encode()


# What was found -----------------------------------------------------------------------------------------------------------


def as_text(found: dict[str, Any]) -> str:
    """The table: figures as the page writes them, `predicted → measured` where one was predicted, the best of a column starred."""
    from app.views.comparison import write

    columns = found["columns"]
    lines = [["strategy", *(column["title"] for column in columns)]]
    for row in found["data"]:
        cells = []
        for column in columns:
            text = write(row[column["key"]], column["unit"])
            if column["predicted"]:
                text = f"{write(row[column['predicted']], column['unit'])} → {text}"
            elif column["key"] == "forgetting" and row["verdict"]:
                text = f"{text} {row['verdict']}"
            cells.append(f"{text} *" if row["job"] in found["winners"][column["key"]] else text)
        lines.append([row["title"], *cells])
    for model, scores in found["bases"].items():
        base = [write(scores[column["key"]], column["unit"]) if column["key"] in scores else "" for column in columns]
        lines.append([f"base model {model}", *base])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    off = [f"{title} is off by {_off(found, have, said):.0%} at most" for title, have, said in OFF if _off(found, have, said) is not None]
    return "\n".join([found["name"], "", *rows, "", "; ".join(off)]).rstrip()


OFF = (("Predicted memory", "peak_memory_bytes", "predicted_memory_bytes"), ("predicted time", "seconds", "predicted_seconds"))


def _off(found: dict[str, Any], measured: str, predicted: str) -> float | None:
    """How far the prediction that was furthest off lies from what was measured, as a share of that; None without any."""
    errors = [abs(row[predicted] / row[measured] - 1) for row in found["data"] if row[measured] and row[predicted]]
    return max(errors, default=None)


def take(here: Studio, path: str, picture: Path) -> None:
    """The page in light and dark, wide and narrow: `FILE.png` is the first of VIEWS, `FILE-dark-1440.png` another."""
    import shutil

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.goto(here.link)
        if "/sign-in" in page.url:
            page.locator("main form button").first.click()
        page.goto(here.url + path)
        for theme, width in VIEWS:
            page.set_viewport_size({"width": width, "height": 900})
            page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
            name = picture if (theme, width) == VIEWS[0] else picture.with_name(f"{picture.stem}-{theme}-{width}{picture.suffix}")
            page.screenshot(path=name, full_page=True)
            print(f"  {name}", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
