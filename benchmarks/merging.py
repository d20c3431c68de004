"""What merging an adapter holds in memory: a layer at a time, as exports do, next to the whole model in float32.

    python -m benchmarks.merging [--shape 0.5b] [--strategy lora] [--work FOLDER]

A model of random weights in bf16 with an adapter of random weights is merged by each way in a process of its own. Held is the most
anonymous memory at once, which the kernel cannot drop, less what the process held when it had imported everything; pages of mapped
files, which it can, are in no figure. Both results are compared to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WAYS = ("whole", "layers")
EVERY_SECONDS = 0.002


def held_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class Peak:
    """The most that this process held at once while inside, in a thread that looks every EVERY_SECONDS."""

    def __enter__(self) -> Peak:
        self.before = self.most = held_bytes()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.over.wait(EVERY_SECONDS):
            self.most = max(self.most, held_bytes())

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def bytes(self) -> int:
        return self.most - self.before


def prepare(shape: str, strategy: str, work: Path) -> str:
    """Write the model and the adapter. Returns the reference to both as JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    from app.shapes import shape_of
    from app.spec import Adapter, ModelRef
    from app.strategies import STRATEGIES
    from benchmarks.shapes import write_model
    from worker.modeling.loading import STRATEGY_FILE

    base, adapter, made = write_model(shape, work / "base", "cpu"), work / "adapter", STRATEGIES[strategy]()
    adapter.mkdir(exist_ok=True)
    model = made.attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=1e-3)
    made.save(model, adapter)
    (adapter / STRATEGY_FILE).write_text(made.model_dump_json())
    found = shape_of(json.loads((base / "config.json").read_text()))
    ref = ModelRef(id="0" * 32, name=shape, kind="generic", path="base", revision="0" * 64, shape=found)
    return ref.model_copy(update={"adapters": (Adapter(strategy=strategy, path="adapter", sha256="0" * 64),)}).model_dump_json()


def whole(ref: Any, into: Path) -> None:
    """The model in float32 with its adapter, and again with that merged, to compare their answers."""
    import torch

    from worker.conversion.merge import answers, trial_ids
    from worker.modeling.loading import load_model, load_plain, load_tokenizer

    ids = trial_ids(ref, load_tokenizer(ref))
    answers(load_model(ref), ids)
    model: Any = load_plain(ref)
    for weight in model.parameters():
        weight.data = weight.data.to(torch.float16)
    model.save_pretrained(into)
    answers(model.float(), ids)


def measure(way: str, ref: Path, into: Path) -> dict[str, Any]:
    """Merge in this process."""
    from app.spec import ModelRef
    from worker.conversion.merge import merge

    given = ModelRef.model_validate_json(ref.read_text())
    began = time.monotonic()
    with Peak() as peak:
        (whole if way == "whole" else merge)(given, into)
    return {"bytes": peak.bytes(), "seconds": time.monotonic() - began}


def same(first: Path, second: Path) -> bool:
    from safetensors import safe_open

    with safe_open(first / "model.safetensors", "pt") as a, safe_open(second / "model.safetensors", "pt") as b:
        return set(a.keys()) == set(b.keys()) and all(a.get_tensor(name).equal(b.get_tensor(name)) for name in a.keys())  # noqa: SIM118


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--strategy", default="lora")
    parser.add_argument("--work", type=Path, help="where model, adapter and results are written; a temporary folder by default")
    parser.add_argument("--way", choices=("prepare", *WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if args.way == "prepare":
            (work / "ref.json").write_text(prepare(args.shape, args.strategy, work))
            return 0
        if args.way:
            print(json.dumps(measure(args.way, work / "ref.json", work / args.way)))
            return 0
        return compare(args.shape, args.strategy, work)


def compare(shape: str, strategy: str, work: Path) -> int:
    command = [sys.executable, "-m", "benchmarks.merging", "--shape", shape, "--strategy", strategy, "--work", str(work), "--way"]
    environment = {**os.environ, "LUTHIER_DATA_DIR": str(work), "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, "prepare"], env=environment, check=True)
    size = (work / "base" / "model.safetensors").stat().st_size
    print(f"{shape}, {strategy}: {size / 2**30:.2f} GiB of weights")
    for way in WAYS:
        said = subprocess.run([*command, way], env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(said.splitlines()[-1])
        print(f"{way:8} {found['bytes'] / 2**30:6.2f} GiB held {found['seconds']:7.1f} s")
    equal = same(*(work / way for way in WAYS))
    print("The results are equal to the bit." if equal else "The results DIFFER.")
    return not equal


if __name__ == "__main__":
    sys.exit(main())
