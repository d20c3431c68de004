"""What prompts alone reach: zero-shot, few-shot and chain of thought, scored on rows with a question and a numeric answer.

    python -m benchmarks.prompts --model FOLDER --data test.jsonl [--train train.jsonl] [--rows 100] [--max-tokens 128] [--json FILE]

Each line of the data is {"question", "answer"}, the result standing after #### as in GSM8K (Cobbe et al. 2021). The
prompts, the rules and the engine are those of the prompt lab. Examples come from --train, or from the rows that are not scored.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app import prompts
from app.prompt_runs import RunSpec
from app.prompts import PromptBody
from app.shapes import shape_of
from app.spec import DatasetRef, ModelRef
from worker import promptlab
from worker.shots import Shots, Solved

COMMON = {"score": "numeric", "reference": "after"}
PROMPTS: dict[str, dict[str, Any]] = {
    "zero-shot": {
        "template": "{{input}}\nAnswer with the number alone.", "extract": "last_number", "max_tokens": 32,
    },
    "few-shot, 4 similar": {
        "builder": "few_shot", "template": "{{examples}}Question: {{input}}\nAnswer:", "example": "Question: {{input}}\nAnswer: {{answer}}",
        "shots": 4, "choose": "similar", "extract": "last_number", "max_tokens": 32, "stop": "\\nQuestion:",
    },
    "chain of thought, instruction": {
        "builder": "chain_of_thought", "template": "{{input}}\n\n{{instruction}}", "extract": "last_number",
    },
    "chain of thought, 4 worked": {
        "builder": "chain_of_thought", "template": "{{examples}}Question: {{input}}\nAnswer:", "example": "Question: {{input}}\nAnswer: {{output}}",
        "shots": 4, "choose": "similar", "extract": "after", "stop": "\\nQuestion:",
    },
}  # fmt: skip


def read(path: Path) -> list[Solved]:
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [Solved(i, row["question"], row["answer"]) for i, row in enumerate(map(json.loads, lines), 1)]


def reference(folder: Path, kind: str) -> ModelRef:
    config = json.loads((folder / "config.json").read_text())
    return ModelRef(id=uuid.uuid4(), name=folder.name, kind=kind, path=str(folder.resolve()), revision="", shape=shape_of(config))  # type: ignore[arg-type]


def score(spec: RunSpec, rows: list[Solved], shots: Shots) -> dict[str, Any]:
    totals, began = {"prompt_tokens": 0, "tokens": 0, "unanswered": 0}, time.monotonic()
    with ThreadPoolExecutor(promptlab.AT_ONCE) as pool:
        asked: list[tuple[Solved, Future[promptlab.Said]]] = []
        for row in rows:
            text = prompts.text_of(spec.body, row.question, [(s.question, s.answer) for s in shots.of(row)])
            asked.append((row, pool.submit(promptlab._ask, spec, text, [], row.line, [False])))
        results = [promptlab._scored(spec, row, future, [], totals) for row, future in asked]
    scores = [result["score"] for result in results]
    low, high = prompts.interval(scores)
    return {
        "score": sum(scores) / len(scores),
        "low": low,
        "high": high,
        "rows": len(scores),
        "seconds": time.monotonic() - began,
        **totals,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kind", default="dialogue", choices=("generic", "instruction", "dialogue"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=128, help="longest reasoning; answers without it get 32")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    everything = read(given.data)
    rows = sorted(random.Random(42).sample(everything, min(given.rows, len(everything))))
    lines = {row.line for row in rows}
    training = read(given.train) if given.train else [row for row in everything if row.line not in lines]
    model, found = reference(given.model, given.kind), {}
    data = DatasetRef(id=uuid.uuid4(), name=given.data.name, path="", sha256="", format="completion", rows=len(everything))
    for name, start in PROMPTS.items():
        body = PromptBody(**({"max_tokens": given.max_tokens} | COMMON | start))
        spec = RunSpec(
            owner=uuid.uuid4(), body=body, model=model, dataset=data, task="generation", part="all", rows=len(rows),
            validation_fraction=0.1, split_seed=42,
        )  # fmt: skip
        found[name] = result = score(spec, rows, Shots(body, training, training))
        print(
            f"{name:32} {result['score']:6.1%}  ({result['low']:.1%} to {result['high']:.1%}, {result['rows']} rows)  "
            f"{result['tokens'] / result['rows']:5.0f} tokens a row  {result['seconds']:5.0f} s",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps({"model": model.name, "results": found}, indent=1))


if __name__ == "__main__":
    main()
