"""Whether the settings that nobody chose train a model that is any better: `python -m benchmarks.defaults [--data FILE …]`.

    python -m benchmarks.defaults [--only NAME,…] [--data FILE[:ROWS] …] [--method NAME] [--run JSON] [--json FILE]

Every sample dataset and the three small sets beside this file are uploaded to a whole studio and tuned with a model, the data and
nothing else; `--data` adds files, drawn down to ROWS. Labeled rows are learned by the starter encoder, all others by the starter
that writes. The table is what the job's verdict says: the scores of the base, of the base behind solved examples, and of the tuned
model on the same held-out rows, with the 95 % interval of tuned less base.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.comparison import ENCODER, folder_of, read, sent
from benchmarks.servers import PROJECT, STARTER, Studio, studio

SETS = PROJECT / "benchmarks" / "sets"
MAPPINGS = {"bibliothek.csv": {"format": "classification", "mapping": {"text": "Frage", "label": "Kategorie"}}}
METHODS = {ENCODER: "feature_extraction", STARTER: "lora"}
"""What the form has chosen when it is opened with such data."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of samples and sets, with commas between them")
    parser.add_argument("--data", action="append", default=[], metavar="FILE[:ROWS]", help="one more file")
    parser.add_argument("--method", help="another strategy than the form's")
    parser.add_argument("--run", type=json.loads, default={}, help="settings of every job, as JSON")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = []
    for model in (STARTER, ENCODER):
        chosen = [(path, rows) for path, rows in data_of(given) if model == (ENCODER if path.suffix == ".csv" else STARTER)]
        if chosen:
            with studio(folder_of(model), model) as here:
                for path, rows in chosen:
                    found.append(tune(here, model, path, rows, given.method or METHODS[model], given.run))
                    print(as_text(found[-1:]), flush=True)
    print(as_text(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def data_of(given: argparse.Namespace) -> list[tuple[Path, int | None]]:
    own = [*sorted((PROJECT / "samples").glob("*-*.*")), *sorted(SETS.iterdir())]
    names = given.only.split(",") if given.only else None
    added = [(Path(name), int(rows) if rows else None) for name, _, rows in (text.partition(":") for text in given.data)]
    return [*((path, None) for path in own if names is None or path.stem in names), *added]


def tune(here: Studio, model: str, path: Path, rows: int | None, method: str, run: dict[str, Any]) -> dict[str, Any]:
    """One job of default settings: its steps, seconds and verdict."""
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob

    with OpenAI(base_url=f"{here.url}/v1", api_key=here.key) as client:
        named = {"training_file": sent(client, path, rows, MAPPINGS.get(path.name))}
        read(client, named["training_file"])
        began = time.monotonic()
        order = {"model": model, "strategy": {"name": method}, "run": run, **named}
        job = client.post("/fine_tuning/jobs", body=order, cast_to=FineTuningJob)
        while job.status not in ("succeeded", "failed", "cancelled"):
            time.sleep(1)
            job = client.fine_tuning.jobs.retrieve(job.id)
        more: Any = job.model_extra
        return {
            "dataset": f"{path.stem}{f' ({rows:,} rows)' if rows else ''}",
            "method": method,
            "status": job.status,
            "steps": (more.get("measured") or {}).get("steps"),
            "seconds": round(time.monotonic() - began, 1),
            "verdict": more.get("verdict"),
            "error": job.error and job.error.message,
        }


def as_text(found: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "| dataset | method | steps | seconds | metric | base | few-shot | tuned | 95 % interval | n | verdict |",
        "|---|---|--:|--:|---|--:|--:|--:|---|--:|---|",
    ]
    for row in found:
        said = row["verdict"] or {}
        low, high = said.get("interval") or (None, None)
        cells = [
            row["dataset"], row["method"], row["steps"], row["seconds"], said.get("metric"),
            *(_written(said.get(side)) for side in ("base", "few_shot", "tuned")),
            f"{low:+.3f} to {high:+.3f}" if low is not None else "", said.get("n"), said.get("outcome") or row["error"] or row["status"],
        ]  # fmt: skip
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _written(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
