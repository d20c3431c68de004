"""Write one export and compare it with its model: `python -m worker.exporters._process ORDER INTO ANSWER`, in a confined child.

ORDER is an `app.models.exports.ExportSpec`. The progress is written to `progress.json` beside INTO; the answer names the files, the
parity table and the fault that keeps the files from being handed out, or an error.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import DiskFull, StudioError
from app.kit.manifest import sha256_of
from app.models.exports import LINES, ExportSpec
from app.models.model_card import export_card
from app.spec import JobSpec, ModelRef
from app.strategies._files import NEW_TOKENS
from worker import exporters
from worker.exporters._base import Exporter, ExportOptions, Progress, WrittenFile
from worker.runtime.fast_import import importing

ROWS, CARD = 256, "README.md"
MERGED, MEASURED, WRITTEN = 0.15, 0.25, 0.7
"""Shares of the work that are done when the weights are merged, when their importance is measured, and when the files are written."""


def main(arguments: list[str]) -> None:
    order, into, answer = (Path(a) for a in arguments)
    try:
        found = export(ExportSpec.model_validate_json(order.read_text()), into, Reporter(into.parent / "progress.json"))
    except StudioError as error:
        found = {"error": error.message, "hint": error.hint, "code": error.code}
    except ModuleNotFoundError as error:
        message = f"The package {error.name} is not installed with this worker."
        found = {"error": message, "hint": "Install the extra `export`: pip install luthier[export].", "code": "not_installed"}
    except OSError as error:
        if error.errno == errno.ENOSPC:
            full = DiskFull("The disk of the data folder is full; nothing was saved.")
            found = {"error": full.message, "hint": full.hint, "code": full.code}
        else:
            found = {"error": f"The export cannot be written: {error}", "hint": "Look at the disk of the data folder, then try again."}
    except Exception as error:  # whatever a library raises, a person must read it
        found = {"error": f"The model cannot be exported: {type(error).__name__}: {str(error)[:400]}", "hint": "Choose another format."}
    answer.write_text(json.dumps(found))


class Reporter:
    """Writes the progress, at most twice a second and atomically."""

    def __init__(self, path: Path) -> None:
        self.path, self.at, self.stage = path, 0.0, ""

    def __call__(self, share: float, stage: str) -> None:
        if stage == self.stage and time.monotonic() - self.at < 0.5:
            return
        self.at, self.stage = time.monotonic(), stage
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps({"progress": round(min(share, 1.0), 4), "stage": stage}))
        os.replace(fresh, self.path)

    def part(self, first: float, last: float) -> Progress:
        """A reporter of one step, which begins and ends at these shares of the whole."""
        return lambda share, stage: self(first + (last - first) * share, stage)


def export(spec: ExportSpec, into: Path, report: Reporter) -> dict[str, Any]:
    """Merge where that is needed, write the files, compare them: `{"files", "parity", "fault"}`. Raises StudioError."""
    with importing():
        from worker.modeling.loading import folder_of
    exporter = exporters.get(spec.format)
    source = folder_of(spec.model.path) if not spec.model.adapters else None
    if source is None and exporter.format.merged:
        from worker.conversion.merge import merge

        report(0.0, "Merging the adapter")
        source = into.parent / "merged"
        shutil.rmtree(source, ignore_errors=True)
        merge(spec.model, source)
        gc.collect()
    source = source or folder_of(spec.model.adapters[-1].path)
    into.mkdir(exist_ok=True)
    generates = spec.model.kind != "encoder" and not spec.model.labels
    options = ExportOptions(
        name=spec.model.name,
        title=spec.title,
        types=spec.types,
        license=spec.license,
        base=spec.upstream,
        system=spec.system,
        base_folder=str(folder_of(spec.model.path)),
        importance=importance(spec, exporter, source, into.parent / "importance.npz", report),
        generates=generates,
    )
    written = exporter.write(source, into, options, report.part(MEASURED, WRITTEN))
    shutil.rmtree(into.parent / "merged", ignore_errors=True)
    files = [_about(into, one) for one in written if one.name != CARD]
    parity = prove(spec, exporter, into, written, options, report.part(WRITTEN, 1.0)) if exporter.format.proves and generates else None
    if fault := fault_of(parity):
        return {"files": [], "parity": parity, "fault": fault}
    (into / CARD).write_text(export_card(spec.card, spec.format, files, parity, encodes=spec.model.shape.encodes))
    return {"files": [*files, _about(into, WrittenFile(CARD, ""))], "parity": parity, "fault": None}


def importance(spec: ExportSpec, exporter: Exporter, source: Path, path: Path, report: Reporter) -> str:
    """Measure the importance matrix into `path`; "" where no type is quantized by one or the training rows are not there."""
    rows = sides(spec)[0] if set(spec.types) & set(exporter.format.weighted) else []
    if not rows:
        return ""
    import numpy as np

    from worker.exporters import _importance

    stage = "Measuring which weights matter"
    found = _importance.measure(source, spec.model.kind, rows, lambda share: report(MERGED + (MEASURED - MERGED) * share, stage))
    np.savez(path, allow_pickle=False, **found)
    return str(path) if found else ""


def _about(into: Path, one: WrittenFile) -> dict[str, Any]:
    path = into / one.name
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"name": one.name, "type": one.type, "bytes": path.stat().st_size, "sha256": sha256_of(path), "notes": list(one.notes)}


# Parity ---------------------------------------------------------------------------------------------------------------


def prove(
    spec: ExportSpec, exporter: Exporter, into: Path, written: Sequence[WrittenFile], options: ExportOptions, progress: Progress
) -> dict[str, Any]:
    """Run each file in the program that it is for, on held-out rows."""
    from worker.exporters import _parity
    from worker.modeling.loading import folder_of, load_model, load_tokenizer

    began, held = time.monotonic(), held_out(spec)
    found: dict[str, Any] = {"program": exporter.program, "rows": held.where, "smallest": None, "answers": [], "lines": []}
    found |= {"seconds": 0.0, "skipped": None}
    if spec.model.shape.encodes:
        return {
            **found,
            "skipped": "An encoder–decoder's files are not run: its merged weights were compared with the model when they were made.",
        }
    if exporter.program == "llama.cpp" and find_spec("xllamacpp") is None:
        return {**found, "skipped": "The package xllamacpp is not installed with this worker, so the files were not run."}
    progress(0.0, "Answering in the studio")

    def load(ref: ModelRef) -> Callable[[], Any]:
        return lambda: load_model(ref)

    # A base has no rows of the tokens that its adapter came with, so it cannot read the same ids.
    reads = spec.base and not (folder_of(spec.model.adapters[-1].path) / NEW_TOKENS).is_file()
    base, tokenizer = load(spec.base) if spec.base and reads else None, load_tokenizer(spec.model)
    ours = _parity.reference(load(spec.model), tokenizer, spec.model.kind, held.rows, base, held.questions)
    found["answers"] = ours.told
    known = into.parent / LINES
    lines: dict[str, Any] = json.loads(known.read_text()) if known.is_file() else {}
    for place, one in enumerate(written):
        progress((place + 0.5) / (len(written) + 0.5), f"Comparing {one.type} in {exporter.program}")
        if (what := exporter.run(into, one, into.parent, options)) is None:
            continue
        if one.name not in lines:
            heard = _parity.run_folder(what.file, ours) if what.file.is_dir() else _parity.run(what.file, ours, into.parent, what.lora)
            lines[one.name] = _parity.report(one.type, what.lora or what.file, ours, heard)
            fresh = known.with_suffix(".new")
            fresh.write_text(json.dumps(lines))
            os.replace(fresh, known)
        found["lines"].append(lines[one.name])
    return {**found, "smallest": _parity.smallest(found["lines"]), "seconds": time.monotonic() - began}


class HeldOut(NamedTuple):
    """What both are asked: rows, which these are, and prompts for whole answers, where those are not the rows' own."""

    rows: list[dict[str, Any]]
    where: str
    questions: Sequence[str | list[dict[str, Any]]]


def held_out(spec: ExportSpec) -> HeldOut:
    """Rows of the validation split of the job that made the model, else general texts and, for a model of conversations, questions."""
    from worker.data.chat_template import CHAT_KINDS
    from worker.exporters import _answers, _score
    from worker.scoring.forgetting import probe_rows

    if rows := [row for row in sides(spec)[1] if {"messages", "prompt", "text"} & row.keys()]:
        return HeldOut(_score.spread(rows, ROWS), "rows of the validation split of its job", ())
    asked = [[{"role": "user", "content": text}] for text in _answers.QUESTIONS] if spec.model.kind in CHAT_KINDS else []
    return HeldOut(probe_rows(), "general texts", asked)


def sides(spec: ExportSpec) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation rows of the job that made the model; none where there was no job or its dataset was deleted."""
    from worker.data import batching

    if spec.job is None:
        return [], []
    try:
        train, held = batching.sides(JobSpec.model_validate(spec.job))[:2]
    except (StudioError, OSError, ValueError):
        return [], []
    return [row.row for row in train], [row.row for row in held]


def fault_of(parity: dict[str, Any] | None) -> dict[str, Any] | None:
    """The first fault that makes a file useless; a type that is only too coarse for the model is left to the reader of the table."""
    from worker.exporters._parity import EXACT

    for line in (parity or {}).get("lines", []):
        for fault in line["faults"]:
            if fault["cause"] != "weights" or line["type"] in EXACT:
                message = f"The {line['type']} file does not answer as the model does. {fault['message']}"
                return {
                    "code": f"parity_{fault['cause']}",
                    "message": message,
                    "hint": "Its files were not kept. Report this, with the table.",
                }
    return None


if __name__ == "__main__":
    os.nice(5)
    main(sys.argv[1:])
