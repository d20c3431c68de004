"""How fast the generation engine answers, beside transformers' own `generate` in the same run.

    python -m benchmarks.generation [--model FOLDER] [--tokens 48] [--chats 8] [--adapters 3] [--json FILE]

Measured warm, on prompts that differ from each other: time to the first token of a lone chat (p50 and p95); tokens per
second of one chat alone, and of several at once spread over LoRA adapters of one base; the same prompts one after the
other through `model.generate`, and as one padded batch of it (the base alone, since it cannot mix adapters).
Beside the clock stands the processor's time per token, which other programs on the machine hardly change.
Tokens are counted until each answer's end; the end token is switched off, so that every engine writes the same number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the generate worker does

TOPICS = [
    "the wood of a violin", "how bread rises", "why the sky is blue", "a walk by the sea", "the history of paper", "learning to swim",
    "how bees find flowers", "a good night's sleep", "the phases of the moon", "how to plant a tree", "what makes a story", "old clocks",
]  # fmt: skip


def prompt(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{i}: Please tell me something about {TOPICS[i % len(TOPICS)]}, in a few plain sentences."}]


def make_adapters(folder: Path, model_folder: Path, count: int) -> list[Path]:
    """LoRA adapters of rank 8 on all linear layers, drawn at random: their speed is that of learnt ones."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    for i in range(count):
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        torch.manual_seed(i)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.002)
        model.save_pretrained(folder / f"adapter-{i}")
        made.append(folder / f"adapter-{i}")
    return made


def references(model_folder: Path, adapters: list[Path]) -> list[Any]:
    """The base, then each adapter on it, as the engine knows them."""
    from app.manifest import sha256_of
    from app.shapes import shape_of
    from app.spec import Adapter, ModelRef

    shape = shape_of(json.loads((model_folder / "config.json").read_text()))
    laid = [(), *[(Adapter(strategy="lora", path=str(a), sha256=sha256_of(a / "adapter_model.safetensors")),) for a in adapters]]
    return [
        ModelRef(id=uuid.uuid4(), name="benchmark", kind="dialogue", path=str(model_folder), revision="benchmark", adapters=a, shape=shape)
        for a in laid
    ]


def run_engine(engine: Any, ref: Any, i: int, tokens: int, bias: dict[int, float]) -> dict[str, float]:
    from app.generation import Sampling
    from worker.engine import quick_request

    sampling = Sampling(temperature=0.7, top_p=0.95, max_tokens=tokens, logit_bias=bias)
    began, first, done = time.perf_counter(), None, None
    for entries in engine.answer(quick_request(ref, sampling, messages=prompt(i), seed=i)):
        for entry in entries:
            if entry.type == "text" and first is None:
                first = time.perf_counter() - began
            elif entry.type == "done":
                done = entry
            elif entry.type == "error":
                raise SystemExit(entry.message)
    assert done is not None and first is not None
    return {"first": first, "seconds": time.perf_counter() - began, "tokens": done.completion_tokens, "prompt_tokens": done.prompt_tokens}


def crowd(engine: Any, refs: list[Any], numbers: range, tokens: int, bias: dict[int, float]) -> tuple[float, list[dict[str, float]]]:
    found: list[dict[str, float]] = []
    work = [threading.Thread(target=lambda i=i: found.append(run_engine(engine, refs[i % len(refs)], i, tokens, bias))) for i in numbers]
    began = time.perf_counter()
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    return time.perf_counter() - began, found


def plain(model_folder: Path, chats: int, tokens: int, device: str) -> dict[str, float]:
    """`model.generate`: one after the other, and as one padded batch. Tokens per second."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).to(device).eval()
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "temperature": 0.7, "top_p": 0.95}

    def encode(numbers: range) -> Any:
        texts = [tokenizer.apply_chat_template(prompt(i), tokenize=False, add_generation_prompt=True) for i in numbers]
        return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)

    model.generate(**encode(range(1)), **how)
    began, cpu = time.perf_counter(), time.process_time()
    for i in range(2):
        model.generate(**encode(range(100 + i, 101 + i)), **how)
    alone, alone_cpu = 2 * tokens / (time.perf_counter() - began), (time.process_time() - cpu) / 2 / tokens
    began, cpu = time.perf_counter(), time.process_time()
    model.generate(**encode(range(200, 200 + chats)), **how)
    batch, batch_cpu = chats * tokens / (time.perf_counter() - began), (time.process_time() - cpu) / chats / tokens
    return {"alone": alone, "batch": batch, "alone_cpu": alone_cpu, "batch_cpu": batch_cpu}


def measure(folder: Path, tokens: int, chats: int, adapters: int, rounds: int) -> dict[str, Any]:
    os.environ.setdefault("LUTHIER_DATA_DIR", str(folder.parent))
    import torch
    from transformers import AutoTokenizer

    from worker.engine import Engine
    from worker.lanes import Shelf

    tokenizer = AutoTokenizer.from_pretrained(folder)
    bias = {tokenizer.eos_token_id: -100.0}
    with tempfile.TemporaryDirectory() as scratch:
        refs = references(folder, make_adapters(Path(scratch), folder, adapters))
        engine = Engine(Shelf())
        for i, ref in enumerate(refs):  # everything is loaded and has run once
            run_engine(engine, ref, 900 + i, 4, bias)
        lone = [run_engine(engine, refs[0], 300 + i, 4, bias) for i in range(12)]
        alone, together, firsts = [], [], [x["first"] for x in lone]
        alone_cpu, together_cpu = [], []
        crowd_firsts: list[float] = []
        for r in range(rounds):
            cpu = time.process_time()
            one = run_engine(engine, refs[1 % len(refs)], 400 + r, tokens, bias)
            alone_cpu.append((time.process_time() - cpu) / one["tokens"])
            cpu = time.process_time()
            alone.append(one["tokens"] / one["seconds"])
            seconds, found = crowd(engine, refs[1:] or refs, range(500 + 50 * r, 500 + 50 * r + chats), tokens, bias)
            together.append(sum(x["tokens"] for x in found) / seconds)
            together_cpu.append((time.process_time() - cpu) / sum(x["tokens"] for x in found))
            crowd_firsts += [x["first"] for x in found]
        device = str(engine.shelf.device)
        engine.close()
        beside = plain(folder, chats, tokens, device)
    firsts.sort()
    crowd_firsts.sort()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "model": folder.name,
        "prompt_tokens": lone[0]["prompt_tokens"],
        "tokens": tokens,
        "chats": chats,
        "adapters": adapters,
        "first_token_seconds": {"p50": statistics.median(firsts), "p95": firsts[int(0.95 * (len(firsts) - 1))]},
        "first_token_seconds_in_crowd": {"p50": statistics.median(crowd_firsts), "worst": crowd_firsts[-1]},
        "tokens_per_second": {
            "engine_alone": statistics.median(alone),
            "engine_crowd": statistics.median(together),
            "generate_alone": beside["alone"],
            "generate_padded_batch": beside["batch"],
        },
        "cpu_seconds_per_token": {
            "engine_alone": statistics.median(alone_cpu),
            "engine_crowd": statistics.median(together_cpu),
            "generate_alone": beside["alone_cpu"],
            "generate_padded_batch": beside["batch_cpu"],
        },
        "crowd_over_alone": statistics.median(together) / statistics.median(alone),
    }


def as_text(r: dict[str, Any]) -> str:
    speed, first, crowded = r["tokens_per_second"], r["first_token_seconds"], r["first_token_seconds_in_crowd"]
    cpu = {name: f"{seconds * 1000:7.1f} ms of processor per token" for name, seconds in r["cpu_seconds_per_token"].items()}
    return "\n".join(
        [
            f"{r['model']} on {r['device']}; prompts of about {r['prompt_tokens']} tokens, answers of {r['tokens']}",
            f"first token, one chat            p50 {first['p50'] * 1000:6.0f} ms   p95 {first['p95'] * 1000:6.0f} ms",
            f"first token, {r['chats']} chats at once     p50 {crowded['p50'] * 1000:6.0f} ms worst {crowded['worst'] * 1000:6.0f} ms",
            f"engine, one chat                 {speed['engine_alone']:8.1f} tokens/s {cpu['engine_alone']}",
            f"engine, {r['chats']} chats, {r['adapters']} adapters     {speed['engine_crowd']:8.1f} tokens/s {cpu['engine_crowd']}  ({r['crowd_over_alone']:.2f} times one)",
            f"model.generate, one by one       {speed['generate_alone']:8.1f} tokens/s {cpu['generate_alone']}",
            f"model.generate, padded batch     {speed['generate_padded_batch']:8.1f} tokens/s {cpu['generate_padded_batch']}  (base alone)",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a dialogue model; the studio's starter model when left out")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = given.model or _starter()
    result = measure(folder.resolve(), given.tokens, given.chats, given.adapters, given.rounds)
    print(as_text(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def _starter() -> Path:
    from app.settings import get_settings

    for config in sorted((get_settings().data_dir / "models").glob("*/config.json")):
        if json.loads(config.read_text()).get("hidden_size") == 576:
            return config.parent
    raise SystemExit("The starter model is not in the data folder. Run `make studio` first, or name a folder with --model.")


if __name__ == "__main__":
    main()
