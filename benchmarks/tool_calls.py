"""Does a small model learn to call tools? The answers to held-out rows before and after, graded against each row's own calls.

    python -m benchmarks.tool_calls [--strategy lora] [--epochs 3] [--data FILE] [--model FOLDER] [--json FILE]

The sample rows are trained with the chat template hermes, in a process of its own. A fifth of them is held out; each of its answers is
graded 1 where every call of the row is made with its arguments and no other, or none is made where the row has none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.servers import PROJECT, trained_alone

SAMPLE = PROJECT / "samples" / "tool-calls.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="lora")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--model", type=Path, help="folder of a decoder; the studio's starter when left out")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from benchmarks.generation import _starter

    run = {
        "epochs": given.epochs, "max_steps": given.max_steps, "max_length": 512, "max_tokens_per_step": 2048, "chat_template": "hermes",
        "validation_fraction": 0.2, "evaluations_per_epoch": 1, "graded_rows": 31, "sample_tokens": 48, "samples": 0, "row_losses": False,
        "forgetting": False, "early_stopping_patience": 0, "seed": 1,
    }  # fmt: skip
    model = (given.model or _starter()).resolve()
    order = {"model": str(model), "training_file": str(given.data.resolve()), "strategy": {"name": given.strategy}, "run": run}
    found = trained_alone(order | {"graders": [{"type": "tool_call", "name": "calls"}]}, HERE)
    for step, loss, score in found["curve"]:
        print(f"step {step:4}   validation loss {loss:.4f}   right answers {score:.1%}")
    print(f"{found['seconds']:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


HERE = """
import json, sys, time
from pathlib import Path
from app.jobs import local as alone
from app import events
path, began = Path(sys.argv[1]), time.monotonic()
curve = []
for event in alone.train(alone.spec_of(json.loads(path.read_text()), path.parent)):
    if isinstance(event, events.Evaluated):
        curve.append((event.step, event.loss, event.metrics["grader_calls"]))
print(json.dumps({"curve": curve, "seconds": time.monotonic() - began}))
"""


if __name__ == "__main__":
    main()
