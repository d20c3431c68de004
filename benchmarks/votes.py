"""From votes to a tuned model: a whole studio, blind votes, one request that makes a dataset of them, and DPO on it.

    python -m benchmarks.votes [--model FOLDER] [--votes 40] [--epochs 3] [--json FILE]

Each vote stands for a person who likes straight answers: the model's own answer to a question of the sample
`straight-answers` against the answer written there, which is preferred. The job is ordered as the openai client orders it
(`method={"type": "dpo"}`); its reward margin and accuracy (Rafailov et al. 2023, DPO) are printed as they come.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.servers import PROJECT, STARTER, studio


def vote(client: Any, count: int) -> None:
    """The model's answer on the left, the written one on the right; the right one wins."""
    rows = [json.loads(line) for line in (PROJECT / "samples" / "straight-answers.jsonl").read_text().splitlines()][:count]
    for i, row in enumerate(rows):
        asked = [{"role": "user", "content": row["prompt"]}]
        said = client.chat.completions.create(model=STARTER, messages=asked, max_tokens=60, seed=i).choices[0].message.content
        body = {"models": [STARTER, "a person"], "messages": asked, "answers": [said, row["chosen"]], "choice": 2}
        client.post("/votes", body=body, cast_to=object)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the starter model; the studio's own when left out")
    parser.add_argument("--votes", type=int, default=40)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from openai import OpenAI

    from benchmarks.generation import _starter

    with studio(given.model or _starter()) as here, OpenAI(base_url=f"{here.url}/v1", api_key=here.key) as client:
        found = run(client, given.votes, given.epochs)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def run(client: Any, votes: int, epochs: float) -> dict[str, Any]:
    began = time.monotonic()
    vote(client, votes)
    print(f"{votes} votes in {time.monotonic() - began:.0f} s", flush=True)
    made = client.post("/votes/dataset", body={"kind": "preference"}, cast_to=object)
    job = client.fine_tuning.jobs.create(
        model=STARTER,
        training_file="",
        suffix="straight",
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": epochs}}},
        extra_body={
            "dataset_id": made["id"],
            "strategy": {"name": "lora", "rank": 8},
            "run": {"samples": 0, "forgetting": False, "max_tokens_per_step": 512},
        },
    )
    seen: dict[int, dict[str, Any]] = {}
    while True:
        job = client.fine_tuning.jobs.retrieve(job.id)
        for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=100).data):
            data: Any = event.data or {}
            said = data.get("metrics") or {}
            if data.get("event") == "step" and "reward_margin" in said and data["step"] not in seen:
                seen[data["step"]] = said
                print(f"step {data['step']:4}  margin {said['reward_margin']:+.4f}  accuracy {said['reward_accuracy']:.0%}", flush=True)
        if job.status in ("succeeded", "failed", "cancelled"):
            break
        time.sleep(2)
    margins = [seen[step]["reward_margin"] for step in sorted(seen)]
    print(f"{job.status} as {job.fine_tuned_model} after {time.monotonic() - began:.0f} s; margin {margins[0]:+.4f} → {margins[-1]:+.4f}")
    if job.status != "succeeded" or margins[-1] <= margins[0]:
        raise SystemExit(f"The margin did not rise. {job.error}")
    return {"status": job.status, "votes": votes, "steps": len(margins), "margins": margins}


if __name__ == "__main__":
    main()
