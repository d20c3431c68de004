"""What prompts alone reach: zero-shot, few-shot and chain of thought, scored on rows with a question and a numeric answer.

    python -m benchmarks.prompts --data test.jsonl [--train train.jsonl] [--tune TOKENS] [--model FOLDER] [--rows 100]
        [--max-tokens 128] [--keep FOLDER] [--json FILE]

Each line of the data is {"question", "answer"}, the result standing after #### as in GSM8K (Cobbe et al. 2021). The
prompts, the rules and the engine are those of the prompt lab. Examples come from --train, or from the rows that are not scored.
With --tune a LoRA learns that many tokens of the training rows first, in a process of its own, and is asked the bare question:
would a better prompt have been enough?
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app.datasets.row_store import write_rows
from app.events import Finished
from app.kit import stats
from app.kit.token_meter import TokenMeter
from app.prompts import service as prompts
from app.prompts.runs import RunSpec
from app.prompts.service import PromptBody
from app.shapes import shape_of
from app.spec import Adapter, DatasetRef, JobSpec, ModelRef, RunSettings
from app.strategies import STRATEGIES
from worker.evaluation import prompt_runs, row_answers
from worker.evaluation.few_shot import Shots, Solved

COMMON = {"score": "numeric", "reference": "after"}
PROMPTS: dict[str, dict[str, Any]] = {
    "zero-shot": {
        "template": "{{input}}\nAnswer with the number alone.", "extract": "last_number", "max_tokens": 32,
    },
    "few-shot, similar": {
        "builder": "few_shot", "template": "{{examples}}Question: {{input}}\nAnswer:", "example": "Question: {{input}}\nAnswer: {{answer}}",
        "choose": "similar", "extract": "last_number", "max_tokens": 32, "stop": "\\nQuestion:",
    },
    "chain of thought, instruction": {
        "builder": "chain_of_thought", "template": "{{input}}\n\n{{instruction}}", "extract": "last_number",
    },
    "chain of thought, worked": {
        "builder": "chain_of_thought", "template": "{{examples}}Question: {{input}}\nAnswer:", "example": "Question: {{input}}\nAnswer: {{output}}",
        "choose": "similar", "extract": "after", "stop": "\\nQuestion:",
    },
}  # fmt: skip


TUNED: dict[str, Any] = {"template": "{{input}}", "extract": "after"}
"""What the tuned model is asked: it has learnt the form of the answer, so the question alone is enough."""
HELD_OUT_ROWS = 64  # held out while tuning, to see its loss


def read(path: Path) -> list[Solved]:
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [Solved(i, row["question"], row["answer"]) for i, row in enumerate(map(json.loads, lines), 1)]


def reference(folder: Path, kind: str) -> ModelRef:
    config = json.loads((folder / "config.json").read_text())
    return ModelRef(id=uuid.uuid4(), name=folder.name, kind=kind, path=str(folder.resolve()), revision="", shape=shape_of(config))  # type: ignore[arg-type]


def score(spec: RunSpec, rows: list[Solved], shots: Shots) -> dict[str, Any]:
    began, meter = time.monotonic(), TokenMeter()
    with ThreadPoolExecutor(row_answers.AT_ONCE) as pool:
        asked: list[tuple[Solved, Future[row_answers.RowAnswer]]] = []
        for row in rows:
            text = prompts.text_of(spec.body, row.question, [(s.question, s.answer) for s in shots.of(row)])
            asked.append((row, pool.submit(prompt_runs._ask, spec, text, [], row.line, [False], meter)))
        heard = [(row, future.result()) for row, future in asked]
    scores = [prompt_runs._scored(spec, row, said, [], meter)["score"] for row, said in heard]
    low, high = stats.interval(scores)
    return {
        "score": sum(scores) / len(scores),
        "low": low,
        "high": high,
        "rows": len(scores),
        "seconds": time.monotonic() - began,
        "prompt_tokens": sum(said.prompt_tokens for _, said in heard),
        "tokens": sum(said.tokens for _, said in heard),
    }


def tune(model: ModelRef, rows: list[Solved], tokens: int, keep: Path | None) -> tuple[ModelRef, dict[str, Any]]:
    """LoRA at the studio's usual settings on the first rows, until so many tokens were seen. Returns the tuned model and what it cost."""
    from app.settings import get_settings

    found = get_settings().folder("rows") / "rows.parquet"
    said = [{"messages": [{"role": "user", "content": r.question}, {"role": "assistant", "content": r.answer}]} for r in rows]
    sha256 = write_rows(found, said)
    data = DatasetRef(
        id=uuid.uuid4(), name="train", path="rows/rows.parquet", sha256=sha256, format="chat", rows=len(rows)
    )  # fmt: skip
    step = 2048
    run = RunSettings(
        epochs=1, max_tokens_per_step=step, max_steps=max(tokens // step, 1), max_length=512, samples=0, forgetting=False,
        row_losses=False, evaluations_per_epoch=0, early_stopping_patience=0, validation_fraction=min(0.1, HELD_OUT_ROWS / len(rows)),
    )  # fmt: skip
    spec = JobSpec(name="gsm8k", task="generation", model=model, dataset=data, run=run, strategy=STRATEGIES["lora"]())
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_train, args=(spec.model_dump_json(), sender))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise SystemExit("The tuning failed; what went wrong stands above.") from None
    child.join()
    finished = Finished.model_validate_json(result["finished"])
    if keep:
        shutil.copytree(get_settings().data_dir / finished.path, keep, dirs_exist_ok=True)
    adapter = Adapter(strategy="lora", path=finished.path, sha256=finished.adapter_sha256 or "")
    return model.model_copy(update={"adapters": (adapter,), "kind": finished.kind}), result["facts"]


def _train(order: str, out: Any) -> None:
    from app.events import Evaluated, Step
    from app.settings import get_settings
    from worker.train import train

    spec, steps, evaluated, finished, began = JobSpec.model_validate_json(order), [], [], None, time.monotonic()
    for event in train(spec, get_settings().folder("runs", "gsm8k", "attempt-1")):
        if isinstance(event, Step):
            steps.append(event)
            if event.step % 10 == 0:
                print(f"  step {event.step}: loss {event.loss:.3f}, {event.tokens_per_second:.0f} tokens/s", flush=True)
        elif isinstance(event, Evaluated):
            evaluated.append(event.loss)
        elif isinstance(event, Finished):
            finished = event
    assert finished is not None
    last = steps[-5:]
    facts = {
        "tokens": steps[-1].tokens, "steps": len(steps), "seconds": time.monotonic() - began, "first_loss": steps[0].loss,
        "last_loss": sum(step.loss for step in last) / len(last), "validation_losses": evaluated,
    }  # fmt: skip
    out.send({"finished": finished.model_dump_json(), "facts": facts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the model; the studio's starter model when left out")
    parser.add_argument("--kind", default="dialogue", choices=("generic", "instruction", "dialogue"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument(
        "--tune", type=int, default=0, metavar="TOKENS", help="tokens of the training rows that a LoRA learns; 0 tunes nothing"
    )
    parser.add_argument("--keep", type=Path, help="where the tuned adapter is copied")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--shots", type=int, default=4, help="worked examples before the question, the most similar of the training rows")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest reasoning; answers without it get 32")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        from benchmarks.generation import _starter

        folder = (given.model or _starter()).resolve()
        os.environ["LUTHIER_DATA_DIR"] = scratch
        from app.settings import get_settings

        get_settings.cache_clear()
        found = compare(given, folder)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every prompt on the same rows, then the tuned model. Prints a line for each."""
    everything = read(given.data)
    rows = sorted(random.Random(42).sample(everything, min(given.rows, len(everything))))
    lines = {row.line for row in rows}
    training = read(given.train) if given.train else [row for row in everything if row.line not in lines]
    model, found = reference(folder, given.kind), {}
    data = DatasetRef(id=uuid.uuid4(), name=given.data.name, path="", sha256="", format="completion", rows=len(everything))
    asked: list[tuple[str, ModelRef, dict[str, Any]]] = [(name, model, start) for name, start in PROMPTS.items()]
    facts: dict[str, Any] = {}
    if given.tune:
        tuned, facts = tune(model, training, given.tune, given.keep)
        print(
            f"LoRA: {facts['tokens']:,} tokens in {facts['steps']} steps, {facts['seconds']:.0f} s; loss {facts['first_loss']:.3f} at the "
            f"first step, {facts['last_loss']:.3f} over the last five",
            flush=True,
        )
        asked.append(("tuned by LoRA, question alone", tuned, TUNED))
    for name, who, start in asked:
        shown = {"shots": given.shots} if "choose" in start else {}
        body = PromptBody(**({"max_tokens": given.max_tokens} | COMMON | start | shown))
        spec = RunSpec(
            owner=uuid.uuid4(), body=body, model=who, dataset=data, task="generation", part="all", rows=len(rows),
            validation_fraction=0.1, split_seed=42,
        )  # fmt: skip
        found[name] = result = score(spec, rows, Shots(body, training, training))
        print(
            f"{name:32} {result['score']:6.1%}  ({result['low']:.1%} to {result['high']:.1%}, {result['rows']} rows)  "
            f"{result['tokens'] / result['rows']:5.0f} tokens a row  {result['seconds']:5.0f} s",
            flush=True,
        )
    return {"model": model.name, "tuned": facts, "results": found}


if __name__ == "__main__":
    main()
