"""Does a strategy learn as well in bf16 as in float32 on this processor, and how much faster?

    python -m benchmarks.precision [--only dora,vera] [--model FOLDER] [--data FILE] [--steps 40] [--tokens 512] [--json FILE]

Each strategy learns the same rows twice from the same seed, in turn: once in each number format, each time in a process of its own
with its usual learning rate. Printed are the held-out loss before and after, the share of float32's gain that bf16 reaches, the
largest difference of a step's loss, and the tokens a second. On a CPU `Strategy.trains_in_bf16` says which format a job takes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.servers import PROJECT, trained_alone

SAMPLE = PROJECT / "samples" / "support-replies.jsonl"
FORMATS = ("fp32", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="strategies, with commas between them")
    parser.add_argument("--model", type=Path, help="folder of a decoder; the studio's starter when left out")
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from benchmarks.generation import _starter

    model, found = (given.model or _starter()).resolve(), []
    print(HEADER, flush=True)
    for name in names(given.only, model):
        found.append({"strategy": name, **{kind: learnt(name, kind, model, given) for kind in FORMATS}})
        print(line(found[-1]), flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n")


def names(only: str | None, model: Path) -> list[str]:
    """The strategies asked for, or all that write text and can be trained here by gradients."""
    from app.machines.hardware import this_machine
    from app.shapes import shape_of
    from app.strategies import STRATEGIES

    shape, cuda = shape_of(json.loads((model / "config.json").read_text())), this_machine().cuda
    if only:
        if unknown := set(only.split(",")) - set(STRATEGIES):
            raise SystemExit(f"There is no strategy {', '.join(sorted(unknown))}; there are {', '.join(STRATEGIES)}.")
        return only.split(",")
    return [name for name, kind in STRATEGIES.items() if kind.recipe == "gradient" and not kind().unavailable(shape, cuda=cuda)]


def learnt(name: str, precision: str, model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One job: held-out loss before and after, the loss of each step, and tokens a second."""
    run = {
        "precision": precision, "max_steps": given.steps, "epochs": 1000, "max_tokens_per_step": given.tokens, "samples": 0,
        "forgetting": False, "row_losses": False, "evaluations_per_epoch": 1, "early_stopping_patience": 0, "seed": 1,
    }  # fmt: skip
    order = {"model": str(model), "training_file": str(given.data.resolve()), "strategy": {"name": name}, "run": run}
    return trained_alone(order, HERE)


HERE = """
import json, sys
from pathlib import Path
from app.jobs import local as alone
from app import events
path = Path(sys.argv[1])
scores, steps = [], []
for event in alone.train(alone.spec_of(json.loads(path.read_text()), path.parent)):
    if isinstance(event, events.Evaluated):
        scores.append(event.loss)
    if isinstance(event, events.Step):
        steps.append(event.loss)
        last = event
print(json.dumps({"before": scores[0], "after": scores[-1], "losses": steps, "tokens_per_second": last.tokens / last.seconds}))
"""

HEADER = f"{'strategy':20}{'before':>8}{'fp32':>8}{'bf16':>8}{'of the gain':>13}{'a step':>9}{'fp32 tok/s':>12}{'bf16 tok/s':>12}"


def line(found: dict[str, Any]) -> str:
    whole, half = found["fp32"], found["bf16"]
    gain = (whole["before"] - half["after"]) / (whole["before"] - whole["after"])
    apart = max(abs(b / a - 1) for a, b in zip(whole["losses"], half["losses"], strict=True))
    return (
        f"{found['strategy']:20}{whole['before']:8.4f}{whole['after']:8.4f}{half['after']:8.4f}{gain:13.1%}{apart:9.2%}"
        f"{whole['tokens_per_second']:12.0f}{half['tokens_per_second']:12.0f}"
    )


if __name__ == "__main__":
    main()
