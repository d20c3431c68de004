"""A model in every GGUF type: seconds to write it, its size, and how it answers in llama.cpp next to the studio.

    python -m benchmarks.exports FOLDER [--types Q8_0,Q4_K_M] [--kind dialogue] [--json FILE]

FOLDER holds a model as the studio keeps it, as `.data/models/<id>`. The rows are general texts, so a base and its fine-tunes are
compared on the same ones, and asked the same questions.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from app.export_formats import FORMATS
from worker import exporters
from worker.exporters import _answers, _parity
from worker.exporters._base import ExportOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", default=",".join(FORMATS["gguf"].types))
    parser.add_argument("--kind", default="dialogue", help="generic, instruction or dialogue")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    expected = studio(given.folder, given.kind)
    print("type     MB    seconds  prompts  KL        top-1   loss    change, 95% interval   tokens/s  answers, faults", flush=True)
    lines = []
    for name in given.types.split(","):
        with tempfile.TemporaryDirectory() as work:
            lines.append(one(given.folder, name, expected, Path(work)))
        print(shown(lines[-1]), flush=True)
    print(f"loss in the studio {lines[0]['score']['here']:.4f}; smallest that keeps it: {_parity.smallest(lines)}")
    if given.json:
        given.json.write_text(json.dumps({"answers": expected.told, "lines": lines}, indent=1, ensure_ascii=False))


def studio(folder: Path, kind: str) -> _parity.Reference:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from worker.data.chat_template import CHAT_KINDS
    from worker.scoring.forgetting import probe_rows

    asked = [[{"role": "user", "content": text}] for text in _answers.QUESTIONS] if kind in CHAT_KINDS else []
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()  # noqa: E731
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return _parity.reference(load, tokenizer, kind, probe_rows(), None, asked)


def one(folder: Path, name: str, expected: _parity.Reference, work: Path) -> dict:
    began = time.monotonic()
    (made,) = exporters.get("gguf").write(folder, work, ExportOptions(name=folder.name, types=(name,)), lambda *_: None)
    seconds = time.monotonic() - began
    line = _parity.report(name, work / made.name, expected, _parity.run(work / made.name, expected, work))
    return {**line, "seconds": seconds, "notes": list(made.notes)}


def shown(x: dict) -> str:
    result = "; ".join(fault["message"] for fault in x["faults"]) or x["verdict"]
    score = x["score"] or {"there": float("nan"), "interval": [float("nan")] * 2}
    low, high = score["interval"]
    return (
        f"{x['type']:7}{x['bytes'] / 1e6:7.1f}{x['seconds']:8.1f}   {x['identical']:3}/{x['prompts']:<3} {x['kl']:9.2e} {x['top1']:7.1%}"
        f" {score['there']:7.4f} {low:+.4f} to {high:+.4f} {x['tokens_per_second']:9.1f}  {result}"
    )


if __name__ == "__main__":
    main()
