"""How long the report on a large dataset takes: `python -m benchmarks.report --rows 50000`.

Rows of instruction data of about a kilobyte, with a share of everything the report looks for, are read as the studio reads
them: by the data worker's limited child, each row through the trainer's own converter and the model's tokenizer. Seconds,
rows per second, the child's largest memory; then a page of findings, over HTTP from a real web process, `--requests` times each.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.servers import free_port, python, servers
from tests.datasets.malformed_run import Children, wait

PROJECT = Path(__file__).resolve().parent.parent
SECONDS, BYTES, PAGE_SECONDS = 60.0, 1 << 30, 0.150
"""What is to be reached, on two cores."""


def rows(count: int, seed: int = 1) -> str:
    """Alpaca rows as JSON Lines, about 1,000 bytes each: words of this project's own texts, as often as they stand there."""
    draw = random.Random(seed)
    text = " ".join(path.read_text() for path in [PROJECT / "README.md", *sorted((PROJECT / "samples").glob("*.jsonl"))])
    words = [word for word in re.findall(r"[\w’'-]+[.,?!]?", text) if not word.isdigit()]

    def say(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    made: list[dict[str, str]] = []
    for n in range(count):
        row = {"instruction": f"{say(8, 30)} {n}?", "input": say(0, 60) if n % 2 else "", "output": say(70, 175)}
        match draw.random():
            case luck if luck < 0.02:
                row["output"] += f" Write to anna.{n}@hafen.de."
            case luck if luck < 0.03:
                row["output"] = ""
            case luck if luck < 0.05 and made:
                row = dict(draw.choice(made))
            case luck if luck < 0.07 and made:
                row = {**draw.choice(made), "output": draw.choice(made)["output"]}
            case luck if luck < 0.08:
                row["output"] += " <|im_end|>"
            case luck if luck < 0.09:
                row["output"] += " \x07"
            case luck if luck < 0.10:
                row["output"] = say(1500, 2500)
            case luck if luck < 0.12 and made:
                other = draw.choice(made)
                row = {**other, "output": f"{other['output']} Indeed."}
        made.append(row)
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in made) + "\n"


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import httpx

    from app.datasets import service as datasets
    from app.db import transaction
    from app.kit import ids
    from app.storage import files
    from app.tables import Dataset, Finding
    from app.web import auth

    data = rows(options.rows).encode()
    with transaction() as session:
        user = auth.first_user(session)
        link = auth.new_sign_in_link(session, user)
        model = register(session, options.model, folder / "data")
        dataset = datasets.create(session, user, files.add_bytes(session, user, data, "rows.jsonl", "fine-tune"))
    children = Children()
    seconds, peak = children.read(dataset.id)
    with transaction() as session:
        found = session.get_one(Dataset, dataset.id)
        assert found.status == "ready", found.error
        listed = session.query(Finding).filter_by(dataset_id=dataset.id).count()
        rules = {rule["rule"]: rule["count"] for rule in datasets.rules(found)}
    port = free_port()
    command = ["-m", "uvicorn", "app.main:create_app", "--factory", "--port", str(port), "--no-access-log", "--log-level", "warning"]
    web = python(*command, log=folder / "web.log", LUTHIER_LOG_LEVEL="WARNING")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", follow_redirects=True, timeout=60) as http:
            wait(http)
            http.get(link)  # the page is measured as a browser gets it
            pages = browse(
                http, f"/datasets/{ids.public(ids.DATASET, dataset.id)}", max(rules, key=lambda rule: rules[rule]), listed, options.requests
            )
    finally:
        web.terminate()
        web.wait(20)
    return {
        "rows": options.rows,
        "bytes": len(data),
        "good_rows": found.good_rows,
        "tokens": (found.report or {}).get("tokens"),
        "model": model,
        "seconds": round(seconds, 1),
        "processor_seconds": round(children.cpu, 1),
        "rows_per_second": round(options.rows / seconds),
        "child_mb": round(peak / 2**20),
        "findings": sum(rules.values()),
        "listed": listed,
        "rules": rules,
        "pages": pages,
        "load_average": psutil.getloadavg()[0],
    }


def browse(http: Any, page: str, rule: str, listed: int, requests: int) -> dict[str, dict[str, float]]:
    """Seconds of the dataset's page with 50 findings, in the orders a person turns them in."""
    ways = {
        "first page": {"sort": "line"},
        "by severity": {"sort": "severity"},
        f"only {rule}": {"rule": rule},
        "the last page": {"sort": "line", "page": max(1, -(-listed // 50))},
    }
    found = {}
    for name, query in ways.items():
        times = []
        for _ in range(requests):
            began = time.monotonic()
            answer = http.get(page, params={"tab": "issues"} | query)
            times.append(time.monotonic() - began)
            assert answer.status_code == 200 and "<th>Problem</th>" in answer.text, answer.text[:300]
        cuts = statistics.quantiles(times, n=20)
        found[name] = {"p50": round(cuts[9], 4), "p95": round(cuts[18], 4)}
    return found


def register(session: Any, folder: Path | None, data_dir: Path) -> str:
    """The model whose tokenizer counts: the one in `folder`, or a small one made here."""
    import shutil
    import uuid

    from app.shapes import shape_of
    from app.tables import Model
    from benchmarks.servers import tiny_model

    if folder is None:
        return tiny_model(data_dir, session).name
    key = uuid.uuid4()
    place = data_dir / "models" / str(key)
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = shape_of(json.loads((place / "config.json").read_text())).model_dump()
    path = place.relative_to(data_dir).as_posix()
    session.add(Model(id=key, name=folder.name, title=folder.name, kind="dialogue", path=path, revision="0" * 64, shape=shape))
    return folder.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--model", type=Path, help="folder of a dialogue model whose tokenizer counts; a small one's when left out")
    parser.add_argument("--requests", type=int, default=50, help="for each page")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with servers() as running:
        result = measure(options, running.folder)
    slowest = max(page["p95"] for page in result["pages"].values())
    print(json.dumps(result, indent=1))
    for name, value, goal in (
        ("seconds", result["seconds"], SECONDS),
        ("child's MB", result["child_mb"], BYTES / 2**20),
        ("page p95", slowest, PAGE_SECONDS),
    ):
        print(f"{name:12} {value:8} of at most {goal:g}: {'reached' if value <= goal else 'MISSED'}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
