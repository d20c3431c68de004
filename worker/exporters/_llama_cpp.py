"""Run a GGUF file in llama.cpp and write down what it does: `python -m worker.exporters._llama_cpp ORDER ANSWER`, both JSON files.

A process of its own, because llama.cpp ends its process when a file is not as it expects. It imports nothing of ours and no torch.
The server of llama.cpp answers on the loopback; its own tokenizer and its own reading of the chat template are asked there.

    order   {"file", "lora"?, "threads", "top", "cache", "rows": [{"messages"? | "text"?, "probes": [[id, …], …]}, …], "ends": [id, …], "speed": [id, …],
             "answers": [{"ids", "most"}, …], "scored": [{"ids", "places"}, …]}
    answer  {"rows": [{"text", "tokens", "probes": [[[id, logprob], …], …]}, …], "ends": {id: bool}, "bos", "tokens_per_second", "load_seconds",
             "answers": [{"tokens", "text", "ended", "withheld"}, …], "scored": [[nats, …], …]}
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

CONTEXT = 2048
SPEED_TOKENS = 32


def main(arguments: list[str]) -> None:
    order, answer = (Path(a) for a in arguments)
    asked = json.loads(order.read_text())
    began = time.monotonic()
    server = load(asked)
    heard = {"load_seconds": time.monotonic() - began, **look(server, asked)}
    answer.write_text(json.dumps(heard))


def load(asked: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = asked["file"]
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = CONTEXT, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    if asked.get("lora"):
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["lora"], 1.0)]
    return xllamacpp.Server(params)


def look(server: Any, asked: dict[str, Any]) -> dict[str, Any]:
    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310
            return json.load(answer)

    def next_token(ids: list[int], **more: Any) -> Any:
        return post("/completion", {"prompt": ids, "n_predict": 1, "temperature": 0, "cache_prompt": False, **more})

    # Where the next token is an end or half a character nothing is answered, so a letter is forced. The probabilities are those before.
    letter = [[post("/tokenize", {"content": "a"})["tokens"][-1], 1000.0]]

    def likeliest(ids: list[int], count: int) -> list[list[Any]]:
        found = next_token(ids, n_probs=count, logit_bias=letter, cache_prompt=asked["cache"])["completion_probabilities"][0]
        return [[one["id"], one["logprob"]] for one in found["top_logprobs"]]

    def loss(ids: list[int], token: int) -> float | None:
        # A token that is forced comes with its probability, however small; an end and half a character come with nothing.
        forced = next_token(ids, n_probs=1, logit_bias=[[token, 1000.0]], cache_prompt=asked["cache"]).get("completion_probabilities")
        if forced and forced[0]["id"] == token:
            return None if forced[0]["logprob"] is None else -forced[0]["logprob"]
        pairs = likeliest(ids, asked["top"])
        if any(value is None for _, value in pairs):
            return None
        return -dict(map(tuple, pairs)).get(token, pairs[-1][1])

    rows: list[dict[str, Any]] = []
    for row in asked["rows"]:
        try:
            text = row["text"] if "text" in row else post("/apply-template", {"messages": row["messages"]})["prompt"]
        except urllib.error.HTTPError as error:
            rows.append({"text": None, "error": error.read().decode("utf-8", "replace")[:400], "tokens": [], "probes": []})
            continue
        tokens = post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        rows.append({"text": text, "tokens": tokens, "probes": [likeliest(ids, asked["top"]) for ids in row["probes"]]})
    ends = {}
    for token in asked["ends"]:
        done = next_token(asked["speed"], logit_bias=[[token, 1000.0]], n_predict=2)
        ends[str(token)] = done["stop_type"] == "eos"
    answers = []
    for one in asked["answers"]:
        made = next_token(one["ids"], n_predict=one["most"], return_tokens=True)
        ended = made["stop_type"] == "eos"
        withheld = not ended and made["tokens_predicted"] > len(made["tokens"])
        answers.append({"tokens": made["tokens"], "text": made["content"], "ended": ended, "withheld": withheld})
    scored = [[loss(row["ids"][:place], row["ids"][place]) for place in row["places"]] for row in asked["scored"]]
    speed = next_token(asked["speed"], n_predict=SPEED_TOKENS, ignore_eos=True)["timings"]
    first = post("/tokenize", {"content": "", "add_special": True})["tokens"]
    found = {"rows": rows, "ends": ends, "answers": answers, "scored": scored}
    return found | {"bos": first[:1], "tokens_per_second": speed["predicted_per_second"]}


if __name__ == "__main__":
    main(sys.argv[1:])
