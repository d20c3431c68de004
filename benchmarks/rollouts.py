"""How fast a step of reinforcement is next to TRL's GRPOTrainer: sampling and update, on the same model, prompts and settings, in one run
and in turn.

    PYTHONPATH=FOLDER python -m benchmarks.rollouts [--model FOLDER] [--strategy lora] [--engines luthier,trl] [--rounds 2] [--steps 4]
        [--prompts 8] [--group 8] [--answer-tokens 32] [--updates 1] [--json FILE]

FOLDER has TRL and what it imports (see `benchmarks/trl_losses.py`). Both draw at temperature 1 from the whole distribution, answers to the prompts
of the sample Small sums, in float32; only tokens of answers count, up to the one that ends each. Engines:

    luthier            as a job runs
    luthier_unshared   each answer with a prompt of its own in the update
    trl                GRPOTrainer as it comes, but in float32 and on the CPU
    trl_tuned          the same without recomputing activations

The first step of each is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.servers import PROJECT

SAMPLE = PROJECT / "samples" / "small-sums.jsonl"
RATE = 1e-5


class Laps:
    """Seconds and tokens of sampling, and seconds of everything, step by step."""

    def __init__(self) -> None:
        self.sampling = self.update = 0.0
        self.tokens = self.answers = 0
        self.steps: list[tuple[float, float, int, int]] = []  # (seconds of sampling, of the update, tokens, answers)

    def end_step(self) -> None:
        self.steps.append((self.sampling, self.update, self.tokens, self.answers))
        self.sampling = self.update = 0.0
        self.tokens = self.answers = 0

    def result(self) -> dict[str, Any]:
        sampling, update, tokens, answers = (sum(column) for column in zip(*self.steps[1:], strict=True))
        return {
            "sampled_per_second": tokens / sampling if sampling else 0.0,
            "updated_per_second": tokens / update,
            "tokens_per_second": tokens / (sampling + update),
            "seconds_per_step": (sampling + update) / (len(self.steps) - 1),
            "answer_tokens": tokens / answers,
            "peak_memory_bytes": peak_memory(),
        }


def peak_memory() -> int:
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a decoder; the studio's starter when left out")
    parser.add_argument("--strategy", default="lora", choices=["lora", "full"])
    parser.add_argument("--engines", default="luthier,trl_tuned,trl")
    for name, usual in (("rounds", 2), ("steps", 4), ("prompts", 8), ("group", 8), ("answer-tokens", 32), ("updates", 1)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        plan = json.loads(given.child.read_text())
        print("RESULT " + json.dumps(luthier(plan) if plan["engine"].startswith("luthier") else trl(plan)), flush=True)
        return
    from benchmarks.generation import _starter

    model = str((given.model or _starter()).resolve())
    told = {name: getattr(given, name) for name in ("strategy", "steps", "prompts", "group", "answer_tokens", "updates")}
    found: dict[str, list[dict[str, Any]]] = {}
    for round_ in range(given.rounds):
        for engine in given.engines.split(","):
            one = measured(told | {"model": model, "engine": engine})
            found.setdefault(engine, []).append(one)
            print(f"round {round_ + 1}  {line(engine, one)}", flush=True)
    best = {engine: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for engine, runs in found.items()}
    print("\nmedians\n" + "\n".join(line(engine, one, best.get("luthier")) for engine, one in best.items()))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def line(engine: str, one: dict[str, Any], ours: dict[str, Any] | None = None) -> str:
    text = (
        f"{engine:18} sampling {one['sampled_per_second']:7.0f} tokens/s  update {one['updated_per_second']:7.0f} tokens/s  "
        f"step {one['seconds_per_step']:6.2f} s  {one['answer_tokens']:4.1f} tokens an answer  {one['peak_memory_bytes'] / 1e6:5.0f} MB"
    )
    if ours is None or ours is one:
        return text
    ratios = [ours[key] / one[key] for key in ("sampled_per_second", "updated_per_second", "tokens_per_second") if one[key]]
    return f"{text}  Luthier {' / '.join(f'{ratio:.2f}' for ratio in ratios)} ×"


def measured(plan: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(plan))
        environment = {**os.environ, "LUTHIER_DATA_DIR": folder, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "benchmarks.rollouts", "--child", str(path)]
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    lines = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{plan['engine']}: {done.stderr[-3000:]}")
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def luthier(plan: dict[str, Any]) -> dict[str, Any]:
    """A job from its first line to the last timed step."""
    from app import events
    from app.jobs import local
    from worker import train
    from worker.modeling import packed_attention
    from worker.training import rollouts

    run = {
        "max_steps": plan["steps"] + plan["updates"], "epochs": 1000, "validation_fraction": 0.05, "graded_rows": 5, "evaluations_per_epoch": 0,
        "samples": 0, "row_losses": False, "forgetting": False, "early_stopping_patience": 0, "load_best": False, "learning_rate": RATE,
        "max_tokens_per_step": 2048, "precision": "fp32",
    }  # fmt: skip
    own = {
        "grader": {"type": "numeric", "name": "right", "reference": "{{item.reference}}"}, "prompts_per_step": plan["prompts"],
        "group_size": plan["group"], "answer_tokens": plan["answer_tokens"], "updates_per_batch": plan["updates"], "check_prompts": 0,
    }  # fmt: skip
    order = {"model": plan["model"], "training_file": str(SAMPLE), "task": "reinforcement", "run": run, "preference": own}
    order |= {"strategy": {"name": plan["strategy"], **({"rank": 8} if plan["strategy"] == "lora" else {})}}
    laps, drawing, take_step = Laps(), rollouts.drawing, train.take_step

    def timed_drawing(*told: Any) -> Any:
        began = time.perf_counter()
        found = yield from drawing(*told)
        laps.sampling += time.perf_counter() - began
        laps.tokens += sum(len(answer.ids) for several in found for answer in several)
        laps.answers += sum(map(len, found))
        return found

    def timed_step(*told: Any) -> Any:
        began = time.perf_counter()
        found = take_step(*told)
        laps.update += time.perf_counter() - began
        return found

    if plan["engine"] == "luthier_unshared":
        packed_attention.takes_branches = lambda model: False
    steps = 0
    rollouts.drawing, train.take_step = timed_drawing, timed_step
    for event in train.train(local.spec_of(order, PROJECT), Path(os.environ["LUTHIER_DATA_DIR"]) / "runs" / "job" / "a1"):
        if isinstance(event, events.Started):
            laps.sampling = laps.update = 0.0  # of the held-out prompts
        if isinstance(event, events.Step):
            steps += 1
            if steps % plan["updates"] == 0:
                laps.end_step()
            if steps == run["max_steps"]:
                break
    return laps.result()


def trl(plan: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer on the same prompts."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    laps = Laps()

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *told: Any, **more: Any) -> Any:
            began = time.perf_counter()
            ids, rest = super()._generate_single_turn(*told, **more)
            laps.sampling += time.perf_counter() - began
            laps.tokens, laps.answers = laps.tokens + sum(map(len, ids)), laps.answers + len(ids)
            return ids, rest

        def _generate_and_score_completions(self, *told: Any) -> Any:
            began = time.perf_counter()
            found = super()._generate_and_score_completions(*told)
            laps.update -= time.perf_counter() - began
            return found

    class Marks(TrainerCallback):
        began, count = 0.0, 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            laps.update += time.perf_counter() - self.began
            self.count += 1
            if self.count % plan["updates"] == 0:
                laps.end_step()

    def right(completions: list[Any], reference: list[str], **_: Any) -> list[float]:
        texts = [one[0]["content"] for one in completions]
        return [float((re.findall(r"-?\d+", text) or [""])[-1] == wanted) for text, wanted in zip(texts, reference, strict=True)]

    chats = [json.loads(text)["messages"] for text in SAMPLE.read_text().splitlines()]
    rows = Dataset.from_list([{"prompt": chat[:-1], "reference": chat[-1]["content"]} for chat in chats])
    size = plan["prompts"] * plan["group"]
    recomputes = {} if plan["engine"] == "trl" else {"gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
            learning_rate=RATE, max_steps=plan["steps"] + plan["updates"], per_device_train_batch_size=size, num_generations=plan["group"],
            max_completion_length=plan["answer_tokens"], num_iterations=plan["updates"], loss_type="grpo", **recomputes,
        )  # fmt: skip
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM") if plan["strategy"] == "lora" else None
        model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(plan["model"])
        trainer = Timed(model, right, settings, rows, processing_class=tokenizer, peft_config=lora, callbacks=[Marks()])
        trainer.train()
    return laps.result()


if __name__ == "__main__":
    main()
