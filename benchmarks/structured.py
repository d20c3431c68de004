"""Answers of a JSON schema: how many follow it, and what the masks cost.

    python -m benchmarks.structured [--model FOLDER] [--answers 1000] [--tokens 48] [--rounds 3] [--json FILE]

Ten schemas are asked in turn of the starter model, sixteen answers at once, at temperature 1; each answer is parsed and validated by
jsonschema. Then eight chats write the same number of tokens with a schema and without, in turn, and a mask is timed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.generation import _starter, crowd, prompt, references, run_engine

AT_ONCE = 16
MOST_TOKENS = 400
TEXT = {"type": "string", "maxLength": 40}
COUNT = {"type": "integer", "minimum": 0, "maximum": 1000}


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "label": {"enum": ["positive", "negative", "neutral"]},
    "flag": {"type": "boolean"},
    "person": record(name=TEXT, age=COUNT),
    "order": record(items={"type": "array", "items": record(product=TEXT, count=COUNT), "minItems": 1, "maxItems": 3}, express={"type": "boolean"}),
    "numbers": {"type": "array", "items": {"type": "integer", "minimum": -1000, "maximum": 1000}, "minItems": 2, "maxItems": 5},
    "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
    "either": {"anyOf": [record(error=TEXT), record(answer=TEXT, sure={"type": "boolean"})]},
    "date": record(day={"type": "string", "format": "date"}, place=TEXT),
    "nested": {"$defs": {"leaf": record(value=COUNT)}, **record(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"})},
    "optional": {"type": "object", "properties": {"note": TEXT, "tags": {"type": "array", "items": TEXT, "maxItems": 2}}, "additionalProperties": False},
}  # fmt: skip
ENDLESS = {"type": "array", "items": {"type": "string", "maxLength": 60}, "minItems": 10_000}
"""It cannot end before the tokens are used up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a dialogue model; the studio's starter model when left out")
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = given.model or _starter()
    os.environ.setdefault("LUTHIER_DATA_DIR", str(folder.parent))
    from worker.inference.engine import Engine
    from worker.inference.model_pool import ModelPool

    engine, (ref,) = Engine(ModelPool()), references(folder, [])
    found = {
        "answers": follow(engine, ref, given.answers),
        "speed": speed(engine, ref, given.tokens, given.rounds),
        "mask": mask(engine, ref),
    }
    engine.close()
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def follow(engine: Any, ref: Any, answers: int) -> dict[str, dict[str, int]]:
    """By schema: answers, those that parse and follow it, and those cut at the most tokens."""
    found = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, schema in SCHEMAS.items():
            told = list(pool.map(lambda i, schema=schema: one(engine, ref, i, schema), range(answers // len(SCHEMAS))))
            found[name] = {"answers": len(told), "follow": told.count("follows"), "cut": told.count("cut")}
            print(f"{name:10} {found[name]['follow']} of {len(told)} follow the schema, {found[name]['cut']} cut", flush=True)
    return found


def one(engine: Any, ref: Any, i: int, schema: dict[str, Any]) -> str:
    import jsonschema

    from app.inference.protocol import Sampling
    from worker.inference.engine import quick_request

    sampling = Sampling(temperature=1, top_p=1, max_tokens=MOST_TOKENS, json_schema=schema)
    text, reason = "", ""
    for entries in engine.answer(quick_request(ref, sampling, messages=prompt(i), seed=i).model_copy(update={"bulk": True})):
        text += "".join(entry.text for entry in entries if entry.type == "text")
        reason = next((entry.reason for entry in entries if entry.type == "finished"), reason)
    if reason == "length":
        return "cut"
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError) as error:
        print(f"  {text[:200]!r}: {error}", flush=True)
        return "does not follow"
    return "follows"


def speed(engine: Any, ref: Any, tokens: int, rounds: int, chats: int = 8) -> dict[str, float]:
    """Tokens per second of several chats with a schema and without, in turn."""
    from transformers import AutoTokenizer

    bias = {AutoTokenizer.from_pretrained(ref.path).eos_token_id: -100.0}
    asks = {
        "free": lambda _, i, n: run_engine(engine, ref, i, n, bias),
        "schema": lambda _, i, n: run_engine(engine, ref, i, n, {}, ENDLESS),
    }
    seen: dict[str, list[float]] = {name: [] for name in asks}
    for turn in range(rounds + 1):  # the first warms up
        for name, ask in asks.items():
            seconds, told = crowd(ask, [0], range(50 * turn, 50 * turn + chats), tokens)
            seen[name] += [sum(x["tokens"] for x in told) / seconds] if turn else []
    found = {name: statistics.median(values) for name, values in seen.items()}
    ratio = statistics.median(b / a for a, b in zip(seen["free"], seen["schema"], strict=True))
    print(f"{chats} chats: {found['free']:.1f} tokens/s of free text, {found['schema']:.1f} with a schema, {ratio:.3f} of it")
    return {**found, "ratio": ratio}


def mask(engine: Any, ref: Any) -> float:
    """Seconds of the median mask, applied to logits, over an answer of the schema `order`."""
    import torch

    from worker.inference import constraint

    place = engine.shelf.place(ref)
    state = constraint.of(SCHEMAS["order"], place.tokenizer, place.stop_ids)
    assert state is not None
    text = json.dumps({"items": [{"product": "a cello of spruce and maple", "count": 3}], "express": True})
    taken = []
    logits = torch.randn(ref.shape.vocabulary)
    for token in place.tokenizer(text, add_special_tokens=False)["input_ids"]:
        began = time.perf_counter()
        state.masked(logits)
        state.take(token)
        taken.append(time.perf_counter() - began)
    engine.shelf.release(place.lane)
    found = statistics.median(taken)
    print(f"a mask over {ref.shape.vocabulary:,} tokens: {found * 1e6:.0f} µs, the slowest {max(taken) * 1e6:.0f}")
    return found


if __name__ == "__main__":
    main()
