"""Does a reward rise? Reinforcement, rejection sampling and worked examples on the sample Small sums, graded on the same held-out prompts.

    python -m benchmarks.reinforcement [--ways reinforcement,rejection,examples] [--seeds 3] [--steps 12] [--updates 1] [--variant grpo]
        [--strategy lora] [--rate RATE] [--model FOLDER] [--json FILE]
    python -m benchmarks.reinforcement --rewards [--steps 12] …

For each seed a process of its own trains: with the reward Right number; on those answers of the model itself to the training prompts that are
right, of as many as reinforcement draws for a prompt (rejection sampling); and on the reference answers. All answer the held-out prompts
as they are trained, greedily, and are graded by the same grader. The interval is 95%: of the paired difference where the job knows
it, else of the difference of two shares (Newcombe 1998, method 10), which is wider.

--rewards tries five rewards, two that can teach and three that cannot: what the check says before the start, and what happens when the job
is run all the same.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from app.kit.stats import wilson
from benchmarks.servers import PROJECT, trained_alone

SAMPLE = PROJECT / "samples" / "small-sums.jsonl"
REWARD = {"type": "numeric", "name": "right", "reference": "{{item.reference}}"}
SHORT = "def grade(sample, item):\n    return 1.0 / (1 + abs(len(sample['output_text']) - len(item['reference'])))"
REWARDS: dict[str, dict[str, Any]] = {
    "right number": REWARD,
    "length of the reference": {"type": "python", "name": "length", "source": SHORT},
    "always the same": {"type": "python", "name": "same", "source": "def grade(sample, item):\n    return 0.5"},
    "reads the wrong field": {"type": "string_check", "name": "wrong", "input": "{{sample.output_text}}", "operation": "eq", "reference": "{{item.prompt}}"},
    "any answer will do": {"type": "python", "name": "any", "source": "def grade(sample, item):\n    return float(len(sample['output_text']) > 0)"},
}  # fmt: skip
"""The first two can teach."""
HELD_OUT = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default="reinforcement,rejection,examples")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--variant", default="grpo")
    parser.add_argument("--strategy", default="lora")
    parser.add_argument("--rate", type=float, help="the method's own when left out")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--model", type=Path, help="folder of a decoder; the studio's starter when left out")
    parser.add_argument("--rewards", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from benchmarks.generation import _starter

    model = str((given.model or _starter()).resolve())
    found = [*(rewards_tried(given, model) if given.rewards else ways_compared(given, model))]
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def ways_compared(given: argparse.Namespace, model: str) -> Any:
    for seed in range(1, given.seeds + 1):
        for way in given.ways.split(","):
            one = trained_alone(order_of(given, model, way, seed), HERE)
            low, high = one["interval"] or difference_of_shares(one["before"], one["after"], one["rows"])
            print(
                f"{way:13}  seed {seed}  right answers {one['before']:.1%} → {one['after']:.1%} (difference {low:+.1%} to {high:+.1%}, "
                f"{one['rows']} prompts)  {one['seconds']:.0f} s{one['note']}",
                flush=True,
            )
            yield {"way": way, "seed": seed, **one}


def difference_of_shares(one: float, other: float, rows: int) -> tuple[float, float]:
    """Newcombe's 95% interval of the difference of two shares of so many rows each, as of different rows."""
    (low, high), (other_low, other_high) = (wilson(share * rows, rows) for share in (one, other))
    apart = other - one
    return apart - math.hypot(other - other_low, high - one), apart + math.hypot(other_high - other, one - low)


def rewards_tried(given: argparse.Namespace, model: str) -> Any:
    for name, reward in REWARDS.items():
        order = order_of(given, model, "reinforcement", 1)
        order["preference"] |= {"grader": reward, "check_prompts": 16, "despite_check": True}
        order["graders"] = [REWARD] if reward is not REWARD else []
        one = trained_alone(order, HERE)
        check = one["check"]
        said = f"{'starts' if check['teaches'] else 'not worth starting'}. {check['why']} {check['hint']}".strip()
        print(
            f"{name}: {said}\n    reward of steps {one['rewards'][0]:.2f} → {one['rewards'][-1]:.2f}, right answers {one['before']:.1%} → "
            f"{one['after']:.1%}, mean gradient norm {one['norm']:.3g}, groups with one reward {one['dead']:.0%}, {one['seconds']:.0f} s",
            flush=True,
        )
        yield {"reward": name, **one}


def order_of(given: argparse.Namespace, model: str, way: str, seed: int) -> dict[str, Any]:
    run = {
        "max_steps": given.steps, "epochs": 1000, "validation_fraction": 0.25, "evaluations_per_epoch": 0, "graded_rows": HELD_OUT, "samples": 0,
        "row_losses": False, "forgetting": False, "early_stopping_patience": 0, "load_best": False, "seed": seed,
    }  # fmt: skip
    if given.rate:
        run["learning_rate"] = given.rate
    order = {
        "model": model,
        "training_file": str(SAMPLE),
        "task": "reinforcement" if way == "rejection" else way,
        "strategy": {"name": given.strategy},
    }
    own = {
        "grader": REWARD, "variant": given.variant, "prompts_per_step": given.prompts, "group_size": given.group,
        "answer_tokens": given.answer_tokens, "updates_per_batch": given.updates, "check_prompts": 0,
    }  # fmt: skip
    if way == "reinforcement":
        return order | {"run": run | {"max_tokens_per_step": 2048}, "preference": own}
    # as many rows in a step as the other has prompts, in three epochs at most
    run |= {"sample_tokens": given.answer_tokens, "max_tokens_per_step": max(512, given.prompts * 55), "epochs": 3}
    order |= {"task": "generation", "run": run, "graders": [REWARD]}
    return order | ({"preference": own} if way == "rejection" else {})


HERE = """
import json, sys, time
from pathlib import Path
from statistics import fmean
from app.jobs import local as alone
from app import events
path, began, note = Path(sys.argv[1]), time.monotonic(), ""
order = json.loads(path.read_text())
if order["task"] == "generation" and "preference" in order:
    from benchmarks.reinforcement import rejected
    order, note = rejected(order, path.parent)
scores, steps, check, contest = [], [], None, {}
for event in alone.train(alone.spec_of(order, path.parent)):
    if isinstance(event, events.Started):
        check = event.details.get("reward_check")
    if isinstance(event, events.Evaluated):
        scores.append(event.metrics.get("grader_right", event.metrics.get("reward")))
    if isinstance(event, events.Step):
        steps.append(event)
    if isinstance(event, events.Finished):
        contest = (event.evaluation.get("contest") or {}).get("base") or {}
rewards = [step.metrics.get("reward") for step in steps]
interval = contest.get("interval") if order["task"] == "reinforcement" else None
print(json.dumps({
    "before": scores[0], "after": scores[-1], "interval": interval, "rows": contest.get("rows") or 60, "rewards": rewards, "check": check,
    "norm": fmean(step.grad_norm for step in steps), "dead": fmean(step.metrics.get("zero_variance_groups", 0) for step in steps),
    "seconds": time.monotonic() - began, "note": note,
}))
"""


def rejected(order: dict[str, Any], folder: Path) -> tuple[dict[str, Any], str]:
    """An order whose rows are the model's own right answers to the training prompts, one of each, and how many there are."""
    from app.jobs import local
    from worker.modeling.loading import load_tokenizer
    from worker.runtime.device import choose
    from worker.runtime.progress import drained
    from worker.training.objectives import objective_of
    from worker.training.rollouts import rolled

    own = order.pop("preference")
    draws = order | {"task": "reinforcement", "preference": own, "graders": []}
    spec = local.spec_of(draws, folder)
    engine = choose(spec.run, spec.strategy, {})
    lesson: Any = objective_of(spec, load_tokenizer(spec.model))
    found = drained(rolled(lesson.load(engine).eval(), lesson.prompts, lesson.rewarding, spec.run.seed, engine))
    right: dict[int, str] = {}
    for group, text, reward in zip(found.groups, found.texts, found.rewards, strict=True):
        if (reward or 0.0) >= 0.5:
            right.setdefault(group, text)
    chats = [[*lesson.prompts[group].row.row["messages"][:-1], {"role": "assistant", "content": text}] for group, text in right.items()]
    for name, rows in (("kept", chats), ("held_out", [row.row["messages"] for row in lesson.held_rows])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in rows))
    order |= {"training_file": "kept.jsonl", "validation_file": "held_out.jsonl"}
    return order, f"  {len(chats)} of {len(lesson.prompts)} prompts have a right answer of its own"


if __name__ == "__main__":
    main()
