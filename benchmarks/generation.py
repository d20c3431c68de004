"""How fast the generation engine answers, beside transformers' own `generate` in the same run.

    python -m benchmarks.generation [--model FOLDER] [--tokens 48] [--chats 8] [--adapters 3] [--json FILE]
    python -m benchmarks.generation --llama Q8_0 [--adapters 0]    with llama.cpp as the studio runs it, and a bare server of it
    python -m benchmarks.generation --studio http://127.0.0.1:8000 [--names base,tuned-1,tuned-2]    key in LUTHIER_API_KEY

Measured warm, on prompts that differ from each other: time to the first token of a lone chat (p50 and p95); tokens per
second of one chat alone, and of several at once spread over LoRA adapters of one base; the same prompts one after the
other through `model.generate`, and as one padded batch of it (the base alone, since it cannot mix adapters).
Beside the clock stands the processor's time per token, which other programs on the machine hardly change.
Tokens are counted until each answer's end; the end token is switched off, so that every engine writes the same number.
Behind each figure that has a goal stands the goal, and whether it was reached.

With `--studio` the same is asked of a running studio through its REST API, queue and streams included: of `--names`, or of a
dialogue model and what was tuned from it. There an answer may end by itself; the tokens the studio counted are what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the generate worker does

GOALS = {"first_token_seconds": 0.3, "crowd_over_alone": 3.0}
"""First token of a lone chat at p50, at most; tokens per second of the crowd over those of one chat, at least."""

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
    from app.kit.manifest import sha256_of
    from app.shapes import shape_of
    from app.spec import Adapter, ModelRef

    shape = shape_of(json.loads((model_folder / "config.json").read_text()))
    laid = [(), *[(Adapter(strategy="lora", path=str(a), sha256=sha256_of(a / "adapter_model.safetensors")),) for a in adapters]]
    return [
        ModelRef(id=uuid.uuid4(), name="benchmark", kind="dialogue", path=str(model_folder), revision="", adapters=a, shape=shape)
        for a in laid
    ]


def run_engine(
    engine: Any, ref: Any, i: int, tokens: int, bias: dict[int, float], schema: dict[str, Any] | None = None
) -> dict[str, float]:
    from app.inference.protocol import Sampling
    from worker.inference.engine import quick_request

    sampling = Sampling(temperature=0.7, top_p=0.95, max_tokens=tokens, logit_bias=bias, json_schema=schema)
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


Ask = Callable[[int, int, int], dict[str, float]]
"""(which model, which prompt, tokens) -> seconds to the first token and in all, tokens written and read."""


def crowd(ask: Ask, models: list[int], numbers: range, tokens: int) -> tuple[float, list[dict[str, float]]]:
    """All these prompts at once, spread over the models: seconds until the last has ended, and what each took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(numbers)) as pool:
        found = list(pool.map(lambda i: ask(models[i % len(models)], i, tokens), numbers))
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


def measure(ask: Ask, models: int, tokens: int, chats: int, rounds: int) -> dict[str, Any]:
    """Figures of `models` models that `ask` reaches, the first of them the base."""
    for i in range(models):  # everything is loaded and has run once
        ask(i, 900 + i, 4)
    tuned = list(range(1, models)) or [0]
    lone = [ask(0, 300 + i, 4) for i in range(12)]
    alone, together, alone_cpu, together_cpu, crowd_firsts = [], [], [], [], []
    for r in range(rounds):
        cpu = time.process_time()
        one = ask(tuned[0], 400 + r, tokens)
        alone_cpu.append((time.process_time() - cpu) / one["tokens"])
        alone.append(one["tokens"] / one["seconds"])
        cpu = time.process_time()
        seconds, found = crowd(ask, tuned, range(500 + 50 * r, 500 + 50 * r + chats), tokens)
        written = sum(x["tokens"] for x in found)
        together.append(written / seconds)
        together_cpu.append((time.process_time() - cpu) / written)
        crowd_firsts += [x["first"] for x in found]
    firsts = sorted(x["first"] for x in lone)
    return {
        "prompt_tokens": lone[0]["prompt_tokens"],
        "tokens": tokens,
        "chats": chats,
        "adapters": len(tuned) if models > 1 else 0,
        "first_token_seconds": {"p50": statistics.median(firsts), "p95": firsts[int(0.95 * (len(firsts) - 1))]},
        "first_token_seconds_in_crowd": {"p50": statistics.median(crowd_firsts), "worst": max(crowd_firsts)},
        "tokens_per_second": {"engine_alone": statistics.median(alone), "engine_crowd": statistics.median(together)},
        "cpu_seconds_per_token": {"engine_alone": statistics.median(alone_cpu), "engine_crowd": statistics.median(together_cpu)},
        "crowd_over_alone": statistics.median(together) / statistics.median(alone),
    }


def of_engine(folder: Path, tokens: int, chats: int, adapters: int, rounds: int) -> dict[str, Any]:
    """The engine of this process, and plain `generate` beside it."""
    os.environ.setdefault("LUTHIER_DATA_DIR", str(folder.parent))
    import torch
    from transformers import AutoTokenizer

    from worker.inference.engine import Engine
    from worker.inference.model_pool import ModelPool

    bias = {AutoTokenizer.from_pretrained(folder).eos_token_id: -100.0}
    with tempfile.TemporaryDirectory() as scratch:
        refs = references(folder, make_adapters(Path(scratch), folder, adapters))
        engine = Engine(ModelPool())
        found = measure(lambda model, i, n: run_engine(engine, refs[model], i, n, bias), len(refs), tokens, chats, rounds)
        device, dtype = str(engine.shelf.device), str(engine.shelf.dtype).removeprefix("torch.")
        engine.close()
        beside = plain(folder, chats, tokens, device)
    found["tokens_per_second"] |= {"generate_alone": beside["alone"], "generate_padded_batch": beside["batch"]}
    found["cpu_seconds_per_token"] |= {"generate_alone": beside["alone_cpu"], "generate_padded_batch": beside["batch_cpu"]}
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"device": f"{where}, {dtype}", "model": folder.name, **found}


class _Llama:
    """The studio's llama.cpp servers with the face of its engine."""

    def __init__(self, kind: str) -> None:
        from worker.inference.llama_cpp import LlamaServers
        from worker.inference.model_pool import ModelPool

        self.servers, self.kind = LlamaServers(ModelPool()), kind

    def answer(self, request: Any) -> Any:
        from app.inference import llama_cpp
        from worker.inference.request import rendered

        asked = request.model_copy(update={"engine": llama_cpp.engine(self.kind)})
        return self.servers.answer(asked, rendered(asked, self.servers.shelf))


def of_llama(folder: Path, kind: str, tokens: int, chats: int, rounds: int) -> dict[str, float]:
    """llama.cpp as the studio runs it, and a bare server that is asked over HTTP with the same tokens and the same sampling, in turn:
    tokens per second of one chat and of several, and seconds to the first token."""
    import httpx
    import xllamacpp
    from transformers import AutoTokenizer

    from app.settings import get_settings

    tokenizer, (ref,) = AutoTokenizer.from_pretrained(folder), references(folder, [])
    bias, studio = {tokenizer.eos_token_id: -100.0}, _Llama(kind)
    run_engine(studio, ref, 0, 4, bias)
    ((key, server),) = studio.servers.running.items()
    params = xllamacpp.CommonParams()
    params.model.path = str(next(get_settings().folder("cache", "gguf").glob(f"*-{kind}.gguf")))
    params.n_parallel, params.n_ctx, params.warmup, params.verbosity = chats, chats * 2048, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    bare = xllamacpp.Server(params)
    client = httpx.Client(base_url=bare.listening_address, timeout=300)

    def ask_bare(_: int, i: int, n: int) -> dict[str, float]:
        ids = tokenizer.apply_chat_template(prompt(i), add_generation_prompt=True, return_dict=False)
        body = {
            "prompt": ids, "n_predict": n, "temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "seed": i, "stream": True,
            "ignore_eos": True, "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        }  # fmt: skip
        began, first, timings = time.perf_counter(), None, {}
        with client.stream("POST", "/completion", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    said = json.loads(line.removeprefix("data: "))
                    first = first or time.perf_counter() - began
                    timings = said.get("timings") or timings
        return {"first": first or 0.0, "seconds": time.perf_counter() - began, "tokens": timings["predicted_n"], "prompt_tokens": len(ids)}

    found: dict[str, list[float]] = {}
    asks: dict[str, Ask] = {"studio": lambda _, i, n: run_engine(studio, ref, i, n, bias), "bare": ask_bare}
    for turn in range(rounds + 1):  # the first warms up
        for name, ask in asks.items():
            one = ask(0, 700 + turn, tokens)
            seconds, several = crowd(ask, [0], range(800 + 50 * turn, 800 + 50 * turn + chats), tokens)
            if turn:
                found.setdefault(f"{name}_first", []).append(one["first"])
                found.setdefault(f"{name}_alone", []).append(one["tokens"] / one["seconds"])
                found.setdefault(f"{name}_crowd", []).append(sum(x["tokens"] for x in several) / seconds)
    studio.servers._drop(key, server)
    return {name: statistics.median(values) for name, values in found.items()}


def of_studio(address: str, names: list[str], tokens: int, chats: int, rounds: int) -> dict[str, Any]:
    """A running studio, through its REST API, as one client of it sees it."""
    import httpx

    key = os.environ.get("LUTHIER_API_KEY")
    if not key:
        raise SystemExit("LUTHIER_API_KEY is not set. `luthier keys create NAME` prints one.")
    with httpx.Client(base_url=f"{address.rstrip('/')}/v1", headers={"authorization": f"Bearer {key}"}, timeout=300) as client:
        names = names or _names(client)
        found = measure(lambda model, i, n: _over_http(client, names[model], i, n), len(names), tokens, chats, rounds)
    del found["cpu_seconds_per_token"]  # of this process, which only waits
    return {"device": address, "model": ", ".join(names), **found}


def _names(client: Any) -> list[str]:
    """A dialogue model, and up to three that were tuned from it."""
    rows = client.get("/models").raise_for_status().json()["data"]
    bases = [row for row in rows if row["kind"] == "dialogue" and row["status"] == "ready" and not row["base"]]
    if not bases:
        raise SystemExit("The studio has no dialogue model. Add the starter model, or say which with --names.")
    tuned = {base["id"]: [row["id"] for row in rows if row["base"] == base["id"] and row["adapter"]] for base in bases}
    base = max(tuned, key=lambda name: len(tuned[name]))
    return [base, *tuned[base][:3]]


def _over_http(client: Any, model: str, i: int, tokens: int) -> dict[str, float]:
    body = {"model": model, "messages": prompt(i), "max_tokens": tokens, "temperature": 0.7, "top_p": 0.95, "seed": i, "stream": True}
    began, first, usage = time.perf_counter(), None, None
    with client.stream("POST", "/chat/completions", json=body | {"stream_options": {"include_usage": True}}) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{model}: {answer.read().decode()[:500]}")
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise SystemExit(f"{model}: {chunk['error']['message']}")
            usage = chunk.get("usage") or usage
            if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - began
    seconds = time.perf_counter() - began
    return {"first": first or seconds, "seconds": seconds, "tokens": usage["completion_tokens"], "prompt_tokens": usage["prompt_tokens"]}


def goals(r: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each goal with its figure and whether it was reached."""
    first, times = r["first_token_seconds"]["p50"], r["crowd_over_alone"]
    return {
        "first_token_seconds": {"goal": GOALS["first_token_seconds"], "measured": first, "reached": first <= GOALS["first_token_seconds"]},
        "crowd_over_alone": {"goal": GOALS["crowd_over_alone"], "measured": times, "reached": times >= GOALS["crowd_over_alone"]},
    }


def as_text(r: dict[str, Any]) -> str:
    speed, first, crowded = r["tokens_per_second"], r["first_token_seconds"], r["first_token_seconds_in_crowd"]
    cpu = {name: f"{seconds * 1000:7.1f} ms of processor per token" for name, seconds in r.get("cpu_seconds_per_token", {}).items()}
    told = {name: "reached" if goal["reached"] else "NOT REACHED" for name, goal in goals(r).items()}
    lines = [
        f"{r['model']} on {r['device']}; prompts of about {r['prompt_tokens']} tokens, answers of {r['tokens']}",
        f"first token, one chat            p50 {first['p50'] * 1000:6.0f} ms   p95 {first['p95'] * 1000:6.0f} ms"
        f"   goal: p50 under {GOALS['first_token_seconds'] * 1000:.0f} ms, {told['first_token_seconds']}",
        f"first token, {r['chats']} chats at once     p50 {crowded['p50'] * 1000:6.0f} ms worst {crowded['worst'] * 1000:6.0f} ms",
        f"one chat                         {speed['engine_alone']:8.1f} tokens/s {cpu.get('engine_alone', '')}",
        f"{r['chats']} chats, {r['adapters']} adapters             {speed['engine_crowd']:8.1f} tokens/s {cpu.get('engine_crowd', '')}",
        f"  over one chat                  {r['crowd_over_alone']:8.2f} times    goal: at least {GOALS['crowd_over_alone']:g}, {told['crowd_over_alone']}",
    ]
    if "generate_alone" in speed:
        lines += [
            f"model.generate, one by one       {speed['generate_alone']:8.1f} tokens/s {cpu['generate_alone']}",
            f"model.generate, padded batch     {speed['generate_padded_batch']:8.1f} tokens/s {cpu['generate_padded_batch']}  (base alone)",
        ]
    for kind, llama in r.get("llama_cpp", {}).items():
        for name, title in (("studio", f"llama.cpp {kind}, in the studio"), ("bare", f"llama.cpp {kind}, bare server")):
            alone, several, first = llama[f"{name}_alone"], llama[f"{name}_crowd"], llama[f"{name}_first"] * 1000
            lines.append(f"{title:32} {alone:8.1f} tokens/s one chat, {several:8.1f} {r['chats']} chats, first token {first:.0f} ms")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a dialogue model; the studio's starter model when left out")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--studio", metavar="URL", help="address of a running studio, which is asked in place of an engine of this process")
    parser.add_argument("--names", default="", help="with --studio: the base and what was tuned from it, with commas")
    parser.add_argument("--llama", default="", metavar="TYPE,…", help="GGUF types in which llama.cpp answers beside the engine")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.studio:
        result = of_studio(given.studio, [n for n in given.names.split(",") if n], given.tokens, given.chats, given.rounds)
    else:
        folder = (given.model or _starter()).resolve()
        result = of_engine(folder, given.tokens, given.chats, given.adapters, given.rounds)
        kinds = [kind for kind in given.llama.split(",") if kind]
        result["llama_cpp"] = {kind: of_llama(folder, kind, given.tokens, given.chats, given.rounds) for kind in kinds}
    result["goals"] = goals(result)
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
