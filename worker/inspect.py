"""Rows as the trainer sees them, in a limited child of the data worker: which tokens are learnt, masked or cut off.

The rows go through `worker/prompts.py`, as in training. `lengths` looks at every row, `rows` shows some of them.
By hand: `python -m worker.inspect ROWS.parquet MODEL_FOLDER [--kind dialogue] [--cutoff 1024]`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.errors import BadData
from worker.light import LightTokenizer
from worker.pack import plan
from worker.prompts import prepare_tokenizer, render_row

CUTOFFS = (128, 256, 512, 1024, 2048, 4096, 8192)
ALL = 1 << 30
MOST_TOKENS_SHOWN = 3000
MOST_FINDINGS = 2000
Say = Callable[[dict[str, Any]], None]


def open_tokenizer(folder: Path) -> Any:
    """The light one where the folder has a tokenizer.json, else transformers' own."""
    if (folder / "tokenizer.json").is_file():
        tokenizer: Any = LightTokenizer(folder)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    prepare_tokenizer(tokenizer)
    return tokenizer


def read(path: Path) -> Iterator[tuple[int, str]]:
    """(line, row as JSON) of a dataset's Parquet file, in its order."""
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(batch_size=1000, columns=["line", "row"], use_threads=False):
        yield from zip(batch["line"].to_pylist(), batch["row"].to_pylist(), strict=True)


def learnable(row: dict[str, Any]) -> dict[str, Any]:
    """The row a text model would learn: of two answers the better one; of a labelled text the text."""
    if "chosen" in row:
        return {**row, "messages": [*row["messages"], *row["chosen"]]}
    if "answer" in row and "messages" in row:
        return {**row, "messages": [*row["messages"], *row["answer"]]}
    return row


# Every row ------------------------------------------------------------------------------------------------------------


def lengths(payload: dict[str, Any], say: Say) -> dict[str, Any]:
    """Tokens of every row of `rows` as the model in `tokenizer` takes them. `payload`: rows, tokenizer, kind, count, cutoff.

    Says findings about rows that are cut, that have nothing left to learn, or that the model's template refuses.
    """
    tokenizer = open_tokenizer(Path(payload["tokenizer"]))
    total, trained, first = array("q"), array("q"), array("q")
    cutoff = int(payload.get("cutoff") or 1024)
    report = _Findings(say, cutoff)
    told = time.monotonic()
    for line, text in read(Path(payload["rows"])):
        if time.monotonic() - told > 0.5:
            told = time.monotonic()
            say({"progress": len(total) / max(1, payload.get("count") or 1)})
        try:
            rendered = render_row(tokenizer, learnable(json.loads(text)), payload["kind"], ALL)
        except BadData as error:
            report.refused(line, error.message)
            continue
        total.append(len(rendered.ids))
        trained.append(sum(rendered.trained))
        first.append(rendered.trained.index(True) if any(rendered.trained) else ALL)
        report.look(line, total[-1], first[-1])
    return {
        "rows": len(total),
        "tokens": sum(total),
        "trained_tokens": sum(trained),
        "longest": max(total, default=0),
        "histogram": _histogram(total),
        "cutoffs": [_at(cutoff, total, first) for cutoff in sorted({*CUTOFFS, cutoff})],
        "refused": report.counts["template_refuses"],
        "counts": report.counts,
    }


class _Findings:
    def __init__(self, say: Say, cutoff: int) -> None:
        self.say, self.cutoff = say, cutoff
        self.counts = {"over_long": 0, "nothing_left": 0, "template_refuses": 0}

    def look(self, line: int, tokens: int, first: int) -> None:
        if first >= self.cutoff:
            why = "no token of it is an answer" if first >= ALL else f"its answer begins at token {first + 1:,}"
            self._add(line, "nothing_left", f"Nothing is left to learn within {self.cutoff:,} tokens: {why}.", "warning", tokens)
        elif tokens > self.cutoff:
            cut = tokens - self.cutoff
            message = f"The row has {tokens:,} tokens; {cut:,} of them ({cut / tokens:.0%}) are cut at {self.cutoff:,}."
            self._add(line, "over_long", message, "note", tokens)

    def refused(self, line: int, message: str) -> None:
        self._add(line, "template_refuses", f"{message} Training would stop here.", "warning", None)

    def _add(self, line: int, rule: str, message: str, severity: str, tokens: int | None) -> None:
        self.counts[rule] += 1
        if self.counts[rule] <= MOST_FINDINGS:
            fix = {"label": "Drop the row", "operation": "drop_row", "arguments": {}}
            value = None if tokens is None else f"{tokens:,} tokens"
            finding = {
                "line": line,
                "column": None,
                "rule": rule,
                "severity": severity,
                "value": value,
                "message": message[:600],
                "fix": fix,
            }
            self.say({"finding": finding})


def _histogram(total: array[int]) -> list[list[int]]:
    """[lowest, highest, rows] of up to 24 bars of equal width from 0 to the longest row."""
    longest = max(total, default=0)
    width = max(8, -(-longest // 24 // 8) * 8)
    counts = [0] * (longest // width + 1)
    for tokens in total:
        counts[tokens // width] += 1
    return [[place * width, (place + 1) * width - 1, count] for place, count in enumerate(counts)]


def _at(cutoff: int, total: array[int], first: array[int]) -> dict[str, Any]:
    """What a longest length of `cutoff` tokens does: rows and tokens cut, and how well packs of as many tokens are filled."""
    kept = [min(tokens, cutoff) for tokens, at in zip(total, first, strict=True) if at < cutoff]
    budget = max(2048, cutoff)
    packs = plan(kept, budget, seed=42, epoch=0) if kept else []
    return {
        "cutoff": cutoff,
        "rows_cut": sum(tokens > cutoff for tokens in total),
        "tokens_cut": sum(max(0, tokens - cutoff) for tokens in total),
        "nothing_left": sum(at >= cutoff for at in first),
        "budget": budget,
        "packs": len(packs),
        "fill": sum(kept) / (len(packs) * budget) if packs else 0.0,
        "padded_fill": sum(kept) / (len(kept) * max(kept)) if kept else 0.0,
    }


# Some rows ------------------------------------------------------------------------------------------------------------


def rows(payload: dict[str, Any], say: Say) -> dict[str, Any]:
    """A few rows to look at, token by token when there is a `tokenizer`. `payload`: rows, count, cutoff, kind, and which
    rows: `lines` (in this order), or those from number `skip` on that hold the text `search`."""
    tokenizer = open_tokenizer(Path(payload["tokenizer"])) if payload.get("tokenizer") else None
    found, matches = _choose(payload)
    shown = []
    for line, text in found:
        row = json.loads(text)
        shown.append({"line": line, "row": row, **(_look(tokenizer, row, payload) if tokenizer else {})})
    return {"rows": shown, "matches": matches}


def _choose(payload: dict[str, Any]) -> tuple[list[tuple[int, str]], int]:
    path, count = Path(payload["rows"]), int(payload["count"])
    if payload.get("lines") is not None:
        wanted = set(payload["lines"])
        by_line = {line: text for line, text in read(path) if line in wanted}
        return [(line, by_line[line]) for line in payload["lines"] if line in by_line], len(wanted)
    needle = json.dumps(payload.get("search") or "", ensure_ascii=False)[1:-1].lower()
    found, matches = [], 0
    for line, text in read(path):
        if needle and needle not in text.lower():
            continue
        if matches >= payload.get("skip", 0) and len(found) < count:
            found.append((line, text))
        matches += 1
    return found, matches


def _look(tokenizer: Any, row: dict[str, Any], payload: dict[str, Any]) -> dict[str, Any]:
    """The tokens of a row: [text, state] with 1 for learnt, 0 for masked and 2 for cut off."""
    try:
        rendered = render_row(tokenizer, learnable(row), payload["kind"], ALL)
    except BadData as error:
        return {"refused": error.message}
    cutoff = payload["cutoff"]
    ids = rendered.ids[:MOST_TOKENS_SHOWN]
    texts = tokenizer.pieces(ids) if hasattr(tokenizer, "pieces") else [tokenizer.decode([key]) for key in ids]
    states = [2 if place >= cutoff else int(learnt) for place, learnt in enumerate(rendered.trained)]
    return {
        "tokens": [list(pair) for pair in zip(texts, states, strict=False)],
        "total": len(rendered.ids),
        "trained": sum(state == 1 for state in states),
        "cut": max(0, len(rendered.ids) - cutoff),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.inspect", description="Count the tokens of a dataset's rows.")
    parser.add_argument("rows", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--kind", default="dialogue")
    parser.add_argument("--cutoff", type=int, default=1024)
    options = parser.parse_args()
    result = lengths(vars(options) | {"rows": options.rows, "tokenizer": options.tokenizer}, lambda message: None)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
