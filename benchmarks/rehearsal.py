"""What does rehearsal keep of a model's general ability, and what does it cost?

    python -m benchmarks.rehearsal [--shares 0,0.1,0.25] [--strategy full] [--steps 40] [--tokens 512] [--model FOLDER] [--data FILE] [--json FILE]

The same rows are trained from the same seed with each share of general rows, in turn, each time in a process of its own that has the
base write its answers anew. Steps are given for the share 0; another share has as many more as its rows of the dataset need. Printed are
the held-out loss before and after, the change of general ability with its 95% interval (bits per byte on the probe, above zero is
forgetting), the share of tokens that were general, the optimizer steps, and the seconds before the first step and in all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.servers import PROJECT, trained_alone

SAMPLE = PROJECT / "samples" / "support-replies.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", default="0,0.1,0.25", help="shares of general rows, with commas between them")
    parser.add_argument("--strategy", default="full")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--model", type=Path, help="folder of a decoder; the studio's starter when left out")
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from benchmarks.generation import _starter

    model, found = (given.model or _starter()).resolve(), []
    print(HEADER, flush=True)
    for share in map(float, given.shares.split(",")):
        found.append({"share": share, **trained(share, model, given)})
        print(line(found[-1]), flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n")


def trained(share: float, model: Path, given: argparse.Namespace) -> dict[str, Any]:
    run = {
        "max_steps": round(given.steps / (1 - share)), "epochs": 1000, "max_tokens_per_step": given.tokens, "samples": 0, "row_losses": False,
        "evaluations_per_epoch": 0, "early_stopping_patience": 0, "seed": 1, "rehearsal_fraction": share,
        "learning_rate": given.learning_rate,
    }  # fmt: skip
    order = {"model": str(model), "training_file": str(given.data.resolve()), "strategy": {"name": given.strategy}, "run": run}
    return trained_alone(order, HERE)


HERE = """
import json, sys, time
from pathlib import Path
from app.jobs import local as alone
from app import events
path, began = Path(sys.argv[1]), time.monotonic()
scores = []
for event in alone.train(alone.spec_of(json.loads(path.read_text()), path.parent)):
    if isinstance(event, events.Evaluated):
        scores.append(event.loss)
    if isinstance(event, events.Started):
        started = event
    if isinstance(event, events.Finished):
        finished = event
change, (low, high) = finished.forgetting["change"], finished.forgetting["interval"]
print(json.dumps({"before": scores[0], "after": scores[-1], "change": change, "low": low, "high": high, "steps": finished.step,
    "general": started.details.get("general_share", 0.0), "first": started.seconds_to_load, "seconds": time.monotonic() - began}))
"""

HEADER = (
    f"{'share':>6}{'before':>9}{'after':>9}{'forgetting':>12}{'95% interval':>20}{'general':>9}{'steps':>7}{'to start':>10}{'in all':>9}"
)


def line(found: dict[str, Any]) -> str:
    interval = f"{found['low']:+.1%} to {found['high']:+.1%}"
    return (
        f"{found['share']:6.2f}{found['before']:9.4f}{found['after']:9.4f}{found['change']:+12.2%}{interval:>20}{found['general']:9.1%}"
        f"{found['steps']:7}{found['first']:8.1f} s{found['seconds']:7.1f} s"
    )


if __name__ == "__main__":
    main()
