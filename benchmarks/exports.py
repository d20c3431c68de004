"""A model in every GGUF type: seconds to write it, its size, and how it answers in llama.cpp next to the studio.

    python -m benchmarks.exports FOLDER [--types Q8_0,Q4_K_M] [--kind dialogue] [--json FILE]

FOLDER holds a model as the studio keeps it, as `.data/models/<id>`. The rows are general texts, so a base and its fine-tunes are
compared on the same ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from app.export_formats import FORMATS
from worker import exporters
from worker.exporters import _parity
from worker.exporters._base import ExportOptions

ROWS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", default=",".join(FORMATS["gguf"].types))
    parser.add_argument("--kind", default="dialogue", help="generic, instruction or dialogue")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    expected = studio(given.folder, given.kind)
    print("type     MB    seconds  prompts  KL        top-1   loss   tokens/s  faults", flush=True)
    lines = []
    for name in given.types.split(","):
        with tempfile.TemporaryDirectory() as work:
            lines.append(one(given.folder, name, expected, Path(work)))
        print(shown(lines[-1]), flush=True)
    print(f"loss in the studio {lines[0]['loss_here']:.4f}; smallest that keeps it: {_parity.smallest(lines)}")
    if given.json:
        given.json.write_text(json.dumps(lines, indent=1))


def studio(folder: Path, kind: str) -> _parity.Reference:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from worker.scoring.forgetting import probe_rows

    rows = probe_rows()
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()  # noqa: E731
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return _parity.reference(load, tokenizer, kind, rows[:: len(rows) // ROWS][:ROWS])


def one(folder: Path, name: str, expected: _parity.Reference, work: Path) -> dict:
    began = time.monotonic()
    (made,) = exporters.get("gguf").write(folder, work, ExportOptions(name=folder.name, types=(name,)), lambda *_: None)
    seconds = time.monotonic() - began
    line = _parity.report(name, work / made.name, expected, _parity.run(work / made.name, expected, work))
    return {**line, "seconds": seconds, "notes": list(made.notes)}


def shown(x: dict) -> str:
    faults = "; ".join(fault["message"] for fault in x["faults"]) or "-"
    return (
        f"{x['type']:7}{x['bytes'] / 1e6:7.1f}{x['seconds']:8.1f}   {x['identical']:3}/{x['prompts']:<3} {x['kl']:9.2e} {x['top1']:7.1%}"
        f" {x['loss']:7.4f}{x['tokens_per_second']:9.1f}  {faults}"
    )


if __name__ == "__main__":
    main()
