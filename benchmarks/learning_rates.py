"""Whether the default learning rate of each method is a good one: `python -m benchmarks.learning_rates`.

    python -m benchmarks.learning_rates [--model NAME|FOLDER] [--methods NAME,…] [--factors 0.33,1,3] [--data FILE] [--steps 40] [--json FILE]

Each method trains the same rows of the same model for the same steps with its default rate times each factor, by the trainer's own
recipe in this process. Where the lowest loss is at an end of the rates tried, the next rate beyond is tried too, `MORE` times at most.
The table holds the loss on the held-out rows after the last step, lowest in bold. A default is kept where no other rate is lower by
more than `TELLING`, and is otherwise a reason to change `default_learning_rate` of that strategy. Results are kept in the file after
each run, and runs that it holds are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from app.errors import BadField
from app.strategies import STRATEGIES
from benchmarks.servers import PROJECT, STARTER

METHODS = (
    "lora",
    "dora",
    "full",
    "top_layers",
    "bottleneck_adapter",
    "ia3",
    "bitfit",
    "layer_norm",
    "prompt_tuning",
    "prefix_tuning",
    "p_tuning",
)
TELLING = 0.05
"""Nats per token: less than this is the noise of a seed on a dozen held-out rows."""
MORE = 3
TOKENS = 384
"""Of a step: about six rows, as the defaults for small data have it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=STARTER)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--factors", default="0.33,1,3")
    parser.add_argument("--data", type=Path, default=PROJECT / "samples" / "plain-explanations.jsonl")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    factors, found = [float(factor) for factor in given.factors.split(",")], _kept(given.json)
    with tempfile.TemporaryDirectory() as home:
        os.environ["LUTHIER_DATA_DIR"] = home
        for method in given.methods.split(","):
            rates, more = [STRATEGIES[method].default_learning_rate * factor for factor in factors], MORE
            losses: dict[float, float | None] = {}
            while rates:
                rate = rates.pop(0)
                key = {"model": Path(given.model).name, "method": method, "rate": rate, "steps": given.steps, "data": given.data.name}
                one = next((one for one in found if key.items() <= one.items()), None)
                if one is None:
                    try:
                        one = key | tuned(given.model, given.data, method, rate, given.steps)
                    except BadField as why:  # BitFit on a model without biases
                        print(method, why.message, flush=True)
                        break
                    found.append(one)
                    if given.json:
                        given.json.write_text(json.dumps(found, indent=1) + "\n")
                    print(method, f"{rate:.2g}", one["loss"], f"{one['seconds']:.0f} s", flush=True)
                losses[rate] = one["loss"]
                if not rates and more and (beyond := _beyond(losses)):
                    rates, more = [beyond], more - 1
    print(as_text([one for one in found if one["model"] == Path(given.model).name]))


def tuned(model: str, data: Path, method: str, rate: float, steps: int) -> dict[str, Any]:
    """One run: the loss on its held-out rows after the last step, None where it diverged, and its seconds."""
    from app import events
    from app.jobs.local import spec_of
    from app.settings import get_settings
    from worker.runtime.failures import Diverged
    from worker.train import train

    run = {
        "learning_rate": rate,
        "max_steps": steps,
        "epochs": 100,
        "max_tokens_per_step": TOKENS,
        "eval_steps": steps,
        "early_stopping_patience": 0,
        "samples": 0,
    }
    run |= {"forgetting": False, "row_losses": False}
    began, loss = time.monotonic(), None
    spec = spec_of({"model": model, "training_file": str(data), "strategy": {"name": method}, "run": run}, PROJECT)
    with tempfile.TemporaryDirectory(dir=get_settings().folder("runs")) as folder:
        try:
            for event in train(spec, Path(folder) / "a1"):
                if isinstance(event, events.Evaluated) and event.step == steps:
                    loss = event.loss
                    break
        except Diverged:
            loss = None
    return {"loss": loss, "seconds": round(time.monotonic() - began, 1)}


def _kept(path: Path | None) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path and path.exists() else []


def _beyond(losses: dict[float, float | None]) -> float | None:
    """The next rate past the end at which the lowest loss stands; None where it stands between two others."""
    tried = sorted(losses)
    known = [rate for rate in tried if losses[rate] is not None]
    if not known or len(tried) < 2:
        return None
    best = min(known, key=lambda rate: losses[rate] or 0.0)
    if best == tried[-1]:
        return best * best / tried[-2]
    return best * best / tried[1] if best == tried[0] else None


def as_text(found: list[dict[str, Any]]) -> str:
    """The table in Markdown: a line for each method, its rates with their losses, and whether the default stands."""
    lines = ["| model | method | steps | default rate | rate: loss | the default |", "|---|---|--:|--:|---|---|"]
    for method in dict.fromkeys(one["method"] for one in found):
        mine = sorted((one for one in found if one["method"] == method), key=lambda one: one["rate"])
        losses = {one["rate"]: one["loss"] for one in mine}
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        default = STRATEGIES[method].default_learning_rate
        best = min(known, key=lambda rate: known[rate], default=None)
        cells = []
        for rate, loss in losses.items():
            text = f"{rate:.2g}: {'diverged' if loss is None else f'{loss:.3f}'}"
            cells.append(f"**{text}**" if rate == best else text)
        own = known.get(default)
        if best is None or own is None:
            said = "not told"
        elif own - known[best] <= TELLING:
            said = "stands"
        else:
            said = f"{own - known[best]:.2f} above {best:.2g}"
        lines.append(f"| {mine[0]['model']} | {method} | {mine[0]['steps']} | {default:.2g} | {', '.join(cells)} | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
