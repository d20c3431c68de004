"""What the web process and the queue add to a job: the same order through a whole studio and without one, in turn.

    python -m benchmarks.overhead [--model FOLDER] [--rounds 3] [--steps 30] [--json FILE]

`here` is `luthier train job.yaml --here`; `studio` is the same order through `POST /v1/fine_tuning/jobs` of a running studio that
has tuned the model once before. Printed are the seconds from the order to the first step, the seconds of a step, and the processor
time that every other process of the studio took while the job ran, as a share of the job's time on all cores, and which took how
much. The job is asked about once a second until its first step, then once in five: that is part of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.servers import PROJECT, STARTER, studio, trained_alone

SAMPLE = PROJECT / "samples" / "support-replies.jsonl"
GOAL_SHARE, GOAL_SECONDS = 0.01, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the starter model; the studio's own when left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from benchmarks.generation import _starter

    found = measure((given.model or _starter()).resolve(), given.rounds, given.steps)
    print(as_text(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def settings(steps: int) -> dict[str, Any]:
    """Steps and nothing else, so that the rest does not hide what is asked for."""
    return {
        "max_steps": steps, "epochs": 1000, "max_tokens_per_step": 1024, "samples": 0, "forgetting": False, "row_losses": False,
        "evaluations_per_epoch": 0, "early_stopping_patience": 0, "validation_fraction": 0,
    }  # fmt: skip


def measure(model: Path, rounds: int, steps: int) -> dict[str, Any]:
    from openai import OpenAI

    found: dict[str, Any] = {"steps": steps, "here": [], "studio": []}
    with studio(model) as here, OpenAI(base_url=f"{here.url}/v1", api_key=here.key) as client:
        with SAMPLE.open("rb") as file:
            uploaded = client.files.create(file=file, purpose="fine-tune")
        through_studio(client, uploaded.id, 2)  # warm: the model is checked, its tokens are counted, bf16 is measured
        for round_ in range(rounds):
            found["studio"].append(through_studio(client, uploaded.id, steps))
            found["here"].append(without(model, steps))
            print(f"  round {round_ + 1}: {found['studio'][-1]} / {found['here'][-1]}", flush=True)
    return found


def through_studio(client: Any, file_id: str, steps: int) -> dict[str, float]:
    """One job of a running studio: seconds to its first step, of a step, and what the other processes spent."""
    others = Spent()
    began = time.monotonic()
    body = {"strategy": {"name": "lora"}, "run": settings(steps)}
    job = client.fine_tuning.jobs.create(model=STARTER, training_file=file_id, extra_body=body)
    first: float | None = None
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(1.0 if first is None else 5.0)
        job = client.fine_tuning.jobs.retrieve(job.id)
        told = (job.model_extra or {}).get("progress") or {}
        first = time.monotonic() - began if first is None and told.get("step") else first
    took = time.monotonic() - began
    if job.status != "succeeded":
        raise SystemExit(f"The job ended as {job.status}: {job.error}")
    ends = [e.data["seconds"] for e in events_of(client, job.id) if e.data and e.data.get("event") == "step"]
    return {
        "first_step_seconds": round(first or took, 2),
        "step_seconds": round(step_seconds(ends), 4),
        "job_seconds": round(took, 2),
        "share": round(sum((spent := others.since()).values()) / took / (psutil.cpu_count() or 1), 5),
        "shares": {
            name: round(seconds / took / (psutil.cpu_count() or 1), 5) for name, seconds in spent.items() if seconds >= 0.005 * took
        },
    }


def events_of(client: Any, job_id: str) -> list[Any]:
    return list(client.fine_tuning.jobs.list_events(job_id, limit=100))


def step_seconds(ends: list[float]) -> float:
    """The median length of a step, from the seconds at which steps ended, in any order."""
    ordered = sorted(ends)
    return statistics.median(after - before for before, after in itertools.pairwise(ordered))


class Spent:
    """Processor seconds of every process under the studio but the trainers, from now on. The benchmark's own asking is part of it."""

    def __init__(self) -> None:
        self.before = self.now()

    @staticmethod
    def now() -> dict[tuple[int, str], float]:
        seen: dict[tuple[int, str], float] = {}
        for process in psutil.Process().children(recursive=True):
            try:
                command = process.cmdline()
                if "worker.run" not in command:
                    times = process.cpu_times()
                    seen[process.pid, name_of(command)] = times.user + times.system
            except psutil.Error:
                continue
        return seen

    def since(self) -> dict[str, float]:
        """By what they are."""
        found: dict[str, float] = {}
        for (pid, name), spent in self.now().items():
            found[name] = found.get(name, 0.0) + spent - self.before.get((pid, name), 0.0)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def name_of(command: list[str]) -> str:
    """What a process is called here: its module and what that was told, or its program."""
    if "-m" in command[:-1]:
        told = command[command.index("-m") + 1 :]
        queues = [told[i + 1] for i, word in enumerate(told[:-1]) if word in ("-Q", "--queues")]
        return " ".join([told[0], *queues])
    return Path(command[0].split(":")[0]).name if command else "?"


def without(model: Path, steps: int) -> dict[str, float]:
    """The same order trained at once by the command line."""
    order = {"model": str(model), "training_file": str(SAMPLE), "strategy": {"name": "lora"}, "run": settings(steps)}
    told = trained_alone(order, HERE)
    return {
        "first_step_seconds": round(told["first"], 2),
        "step_seconds": round(step_seconds(told["ends"]), 4),
        "job_seconds": round(told["all"], 2),
    }


HERE = """
import json, sys, time
from pathlib import Path
began = time.monotonic()
from app.jobs import local as alone
from app import events
path = Path(sys.argv[1])
first, ends = None, []
for event in alone.train(alone.spec_of(json.loads(path.read_text()), path.parent)):
    if isinstance(event, events.Step):
        first = first or time.monotonic() - began
        ends.append(event.seconds)
print(json.dumps({"first": first, "ends": ends, "all": time.monotonic() - began}))
"""
"""What `luthier train --here` does, with a clock."""


def as_text(found: dict[str, Any]) -> str:
    def middle(way: str, key: str) -> float:
        return statistics.median(one[key] for one in found[way])

    first, share = middle("studio", "first_step_seconds"), middle("studio", "share")
    lines = [f"{'':10}{'first step s':>14}{'a step s':>12}{'the job s':>12}"]
    for way in ("studio", "here"):
        lines.append(
            f"{way:10}{middle(way, 'first_step_seconds'):14.2f}{middle(way, 'step_seconds'):12.4f}{middle(way, 'job_seconds'):12.2f}"
        )
    ratio = middle("studio", "step_seconds") / middle("here", "step_seconds") - 1
    lines += [
        f"From submit to the first step {first:.1f} s: {'reached' if first < GOAL_SECONDS else 'MISSED'} (goal: under {GOAL_SECONDS:.0f} s)",
        f"Other processes took {share:.2%} of the job's time: {'reached' if share < GOAL_SHARE else 'MISSED'} (goal: under {GOAL_SHARE:.0%})",
        *(f"    {part:.2%} {name}" for name, part in found["studio"][-1].get("shares", {}).items()),
        f"A step took {ratio:+.1%} in the studio",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
