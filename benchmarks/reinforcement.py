"""Does a reward rise? Reinforcement and supervised training on the sample Small sums, graded on the same held-out prompts.

    python -m benchmarks.reinforcement [--seeds 3] [--steps 12] [--variant grpo] [--strategy lora] [--model FOLDER] [--json FILE]

For each seed a process of its own trains with the reward Right number, and another for as many steps on the reference answers. Both answer the
held-out prompts as they are trained and are graded by the same grader; the interval is that of the paired difference from the base, where reinforcement knows it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.servers import PROJECT, trained_alone

SAMPLE = PROJECT / "samples" / "small-sums.jsonl"
REWARD = {"type": "numeric", "name": "right", "reference": "{{item.reference}}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--variant", default="grpo")
    parser.add_argument("--strategy", default="lora")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--model", type=Path, help="folder of a decoder; the studio's starter when left out")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from benchmarks.generation import _starter

    model = str((given.model or _starter()).resolve())
    found = []
    for seed in range(1, given.seeds + 1):
        for task in ("reinforcement", "generation"):
            one = trained_alone(order_of(given, model, task, seed), HERE)
            found.append({"task": task, "seed": seed, **one})
            between = f"difference {one['interval'][0]:+.1%} to {one['interval'][1]:+.1%}, " if one["interval"] else ""
            print(
                f"{task:13}  seed {seed}  right answers {one['before']:.1%} → {one['after']:.1%} ({between}{one['rows']} prompts)  "
                f"{one['seconds']:.0f} s",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def order_of(given: argparse.Namespace, model: str, task: str, seed: int) -> dict[str, Any]:
    run = {
        "max_steps": given.steps, "epochs": 100, "validation_fraction": 0.25, "evaluations_per_epoch": 0, "graded_rows": 60, "samples": 0,
        "row_losses": False, "forgetting": False, "early_stopping_patience": 0, "load_best": False, "seed": seed,
    }  # fmt: skip
    order = {"model": model, "training_file": str(SAMPLE), "task": task, "strategy": {"name": given.strategy}}
    if task == "generation":  # as many rows in a step as the other has prompts
        run |= {"sample_tokens": given.answer_tokens, "max_tokens_per_step": given.prompts * 55}
        return order | {"run": run, "graders": [REWARD]}
    own = {
        "grader": REWARD, "variant": given.variant, "prompts_per_step": given.prompts, "group_size": given.group,
        "answer_tokens": given.answer_tokens, "check_prompts": 0,
    }  # fmt: skip
    return order | {"run": run | {"max_tokens_per_step": 2048}, "preference": own}


HERE = """
import json, sys, time
from pathlib import Path
from app.jobs import local as alone
from app import events
from app.kit import stats
path, began = Path(sys.argv[1]), time.monotonic()
scores, rewards = [], []
for event in alone.train(alone.spec_of(json.loads(path.read_text()), path.parent)):
    if isinstance(event, events.Evaluated):
        scores.append(event.metrics.get("reward", event.metrics.get("grader_right")))
    if isinstance(event, events.Step):
        rewards.append(event.metrics.get("reward"))
    if isinstance(event, events.Finished):
        contest = (event.evaluation.get("contest") or {}).get("base") or {}
n = contest.get("rows") or 60
interval = contest.get("interval") if rewards[0] is not None else None
print(json.dumps({"before": scores[0], "after": scores[-1], "interval": interval, "rows": n, "rewards": rewards, "seconds": time.monotonic() - began}))
"""


if __name__ == "__main__":
    main()
