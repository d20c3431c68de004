"""A search next to the full grid of the same settings, on real data through a whole studio.

    python -m benchmarks.search DATA [DATA …] [--rows N] [--model NAME] [--folder FOLDER] [--trials 12] [--minutes 20]
                                [--rates 1e-4,3e-4,1e-3,3e-3] [--ranks 4,16] [--epochs 1,3] [--run '{"max_length": 256}'] [--json FILE]

The search may choose any learning rate between the ends of the grid's, and its ranks and epochs; both use the same seed, so the same
validation rows. It is within 10 % where the loss of the run that it calls best (the winner's own, not its repetition's) is at most 1.1
times that of the grid's best. Exit code 1 where it is not on some data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.comparison import SEED, folder_of, sent
from benchmarks.servers import STARTER, Studio, studio

WITHIN = 1.1
STRATEGY = "lora"
ENDED = ("succeeded", "failed", "cancelled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, help="draw at most so many rows")
    parser.add_argument("--model", default=STARTER, help="the name of the model to tune")
    parser.add_argument("--folder", type=Path, help="where its files are; the studio's own data folder when left out")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rates", default="1e-4,3e-4,1e-3,3e-3")
    parser.add_argument("--ranks", default="4,16")
    parser.add_argument("--epochs", default="1,3")
    parser.add_argument("--run", type=json.loads, default={}, help="run settings of every job, as JSON")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with studio(given.folder or folder_of(given.model), given.model) as here:
        found = []
        for path in given.data:
            found.append(both(here, path, given))
            print(as_text(found[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    if not all(one["ratio"] <= WITHIN for one in found):
        raise SystemExit(1)


def both(here: Studio, path: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The best loss of the search and of the grid, and what each took."""
    from openai import OpenAI

    with OpenAI(base_url=f"{here.url}/v1", api_key=here.key) as client:
        file = sent(client, path, given.rows)
        searched = search(client, file, given)
        grid = [run(client, file, given, *chosen) for chosen in settings(given)]
    best = next(entry for entry in searched["data"] if entry["number"] == searched["best"])
    least = min(grid, key=lambda one: one["loss"])
    return {
        "data": path.name,
        "search": {"loss": best["loss"], "params": best["params"], "seconds": searched["seconds"], "says": searched["says"], "runs": len(searched["data"])},
        "grid": {"loss": least["loss"], "params": least["params"], "seconds": sum(one["seconds"] for one in grid), "runs": len(grid)},
        "ratio": best["loss"] / least["loss"],
    }  # fmt: skip


def settings(given: argparse.Namespace) -> list[tuple[float, int, float]]:
    """Every combination of the grid."""
    rates, ranks, epochs = (text.split(",") for text in (given.rates, given.ranks, given.epochs))
    return [(float(rate), int(rank), float(passes)) for rate, rank, passes in itertools.product(rates, ranks, epochs)]


def search(client: Any, file: str, given: argparse.Namespace) -> Any:
    grid = settings(given)
    order = {
        "model": given.model, "training_file": file, "strategies": [STRATEGY], "trials": given.trials, "minutes": given.minutes, "seed": SEED,
        "learning_rate": [min(rate for rate, _, _ in grid), max(rate for rate, _, _ in grid)], "rank": sorted({rank for _, rank, _ in grid}),
        "epochs": sorted({passes for _, _, passes in grid}), "run": given.run,
    }  # fmt: skip
    found: Any = client.post("/searches", body=order, cast_to=object)
    while found["status"] == "running":
        time.sleep(2)
        found = client.get(f"/searches/{found['id']}", cast_to=object)
    print(f"  search: {found['says']}", flush=True)
    if found["best"] is None:
        raise SystemExit("The search ended without a run: give it more minutes.")
    return found


def run(client: Any, file: str, given: argparse.Namespace, rate: float, rank: int, epochs: float) -> dict[str, Any]:
    """One job of the grid, as a trial trains it."""
    order = {
        "model": given.model, "training_file": file, "seed": SEED, "strategy": {"name": STRATEGY, "rank": rank},
        "run": {"samples": 0, **given.run, "epochs": epochs, "learning_rate": rate, "early_stopping_patience": 0},
    }  # fmt: skip
    job: Any = client.post("/fine_tuning/jobs", body=order, cast_to=object)
    while job["status"] not in ENDED:
        time.sleep(1)
        job = client.get(f"/fine_tuning/jobs/{job['id']}", cast_to=object)
    if job["status"] != "succeeded":
        raise SystemExit(f"A run of the grid {job['status']}: {job['error']}")
    loss = job["evaluation"]["tuned"]["loss"]
    print(f"  grid: {rate:g}, rank {rank}, {epochs:g} epochs: {loss:.4f}", flush=True)
    params = {"learning_rate": rate, "rank": rank, "epochs": epochs}
    return {"loss": loss, "params": params, "seconds": job["measured"]["seconds"]}


def as_text(one: dict[str, Any]) -> str:
    lines = [f"{one['data']}: the search's best is {one['ratio']:.3f} times the loss of the grid's best"]
    for name in ("search", "grid"):
        side = one[name]
        lines.append(f"  {name}: loss {side['loss']:.4f} with {side['params']}, {side['runs']} runs in {side['seconds'] / 60:.1f} min")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
