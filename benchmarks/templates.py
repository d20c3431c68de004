"""What the bounds on chat templates cost: `python -m benchmarks.templates --model FOLDER [--rows 20000]`.

Milliseconds of one plain chat's prompt as the playground renders it, rows per second as a dataset is looked at and as a trainer
reads it, and the seconds and memory that a prompt of 20 MB takes until it is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import uuid
from pathlib import Path
from typing import Any

from benchmarks.report import rows


def measure(folder: Path, count: int) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from worker.data.batch_rendering import Renderer, counts_of, length_of
    from worker.data.batching import Row, tokenise
    from worker.data.chat_template import prepare_tokenizer, render_prompt
    from worker.data.light_tokenizer import LightTokenizer

    real, light = AutoTokenizer.from_pretrained(folder), LightTokenizer(folder)
    for tokenizer in (real, light):
        prepare_tokenizer(tokenizer)
    given = [json.loads(line) for line in rows(count).splitlines()]
    data = [{"prompt": f"{row['instruction']}\n{row['input']}", "completion": row["output"]} for row in given]

    times = []
    for turns in range(300):
        talk = [{"role": role, "content": f"Turn {turns} of a plain talk."} for role in ("user", "assistant", "user")]
        began = time.perf_counter()
        render_prompt(real, "dialogue", talk)
        times.append(1000 * (time.perf_counter() - began))
    cuts = statistics.quantiles(times[1:], n=20)

    began, found = time.perf_counter(), []
    renderer = Renderer(light, "dialogue", counts_of, length_of, lambda tag, length: found.append(length))
    for row in data:
        renderer.add(None, row)
    renderer.finish()
    looked = time.perf_counter() - began

    few = data[: count // 4]
    began = time.perf_counter()
    tokenise(real, [Row(n, row) for n, row in enumerate(few)], "dialogue", 1024)
    trained = time.perf_counter() - began
    return {
        "first_chat_ms": round(times[0], 2),
        "chat_ms": {"p50": round(cuts[9], 3), "p95": round(cuts[18], 3)},
        "looked_at_rows_per_second": round(len(found) / looked),
        "trained_rows_per_second": round(len(few) / trained),
        **huge(folder, real),
    }


def huge(folder: Path, tokenizer: Any, size: int = 20_000_000) -> dict[str, Any]:
    """A prompt of `size` characters, asked as the playground asks."""
    from app.errors import BadRequest
    from app.inference.protocol import GenerateRequest, Sampling
    from app.shapes import shape_of
    from app.spec import ModelRef
    from worker.inference.request import rendered

    class Shelf:
        def tokenizer(self, ref: ModelRef) -> tuple[Any, frozenset[int]]:
            return tokenizer, frozenset()

    shape = shape_of(json.loads((folder / "config.json").read_text()))
    ref = ModelRef(id=uuid.uuid4(), name="model", kind="dialogue", path=".", revision="0" * 64, shape=shape)
    text = ("The luthier bends the ribs of the violin over a hot iron. " * (size // 58 + 1))[:size]
    asked = GenerateRequest(
        id=uuid.uuid4(), owner=uuid.uuid4(), model=ref, messages=[{"role": "user", "content": text}], sampling=Sampling(), seed=1
    )
    before, began = peak_bytes(), time.perf_counter()
    try:
        rendered(asked, Shelf())  # type: ignore[arg-type]
    except BadRequest as error:
        return {
            "huge_prompt": {
                "seconds": round(time.perf_counter() - began, 3),
                "grown_mb": round((peak_bytes() - before) / 2**20),
                "code": error.code,
            }
        }
    raise AssertionError("it was taken")


def peak_bytes() -> int:
    """The largest memory this process has held so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.rows) | {"load_average": os.getloadavg()[0]}, indent=2))
