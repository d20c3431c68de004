"""Rows as the trainer sees them, in a limited child process of the data worker: which tokens are trained, masked or truncated.

The rows are rendered by `worker/data/chat_template.py`, as in training. `read_file` parses an upload and counts every row of it
on the way, `lengths` counts every row of a dataset parsed before, `rows` shows some of them. By hand: `python -m
worker.data.inspection ROWS.parquet MODEL_FOLDER [--kind dialogue] [--cutoff 1024]`.
"""

from __future__ import annotations

import argparse
import collections
import heapq
import json
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app import formats, objectives
from app.datasets.row_store import read_rows
from app.errors import BadData
from app.formats import RowFinding
from app.formats._base import Severity, fix
from app.kit.json_safe import shortened
from app.objectives import OBJECTIVES
from worker.data.batch_rendering import BATCH_ROWS, Length, Renderer, counts_of, length_of
from worker.data.chat_template import prepare_tokenizer, render_row
from worker.data.light_tokenizer import LightTokenizer
from worker.data.packing import plan
from worker.data.token_suggestions import StringCounter

CUTOFFS = (128, 256, 512, 1024, 2048, 4096, 8192)
ALL = 1 << 30
MAX_TOKENS_SHOWN = 3000
SHOWN_ROW_BYTES = 64 << 10
MAX_FINDINGS = 2000
MAX_ROWS = 1000
"""Rows listed as the longest: those that any max sequence length truncates, unless it truncates more of them."""
Say = Callable[[dict[str, Any]], None]
AddFinding = Callable[[int, RowFinding], None]


def open_tokenizer(folder: Path, task: str | None = None) -> Any:
    """The light tokenizer where the folder has a tokenizer.json, else transformers' own. A classifier's needs no end-of-text token."""
    if (folder / "tokenizer.json").is_file():
        tokenizer: Any = LightTokenizer(folder)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not objectives.get(task).classifies:
        prepare_tokenizer(tokenizer)
    return tokenizer


# Every row ------------------------------------------------------------------------------------------------------------


def read_file(payload: dict[str, Any], say: Say) -> dict[str, Any]:
    """`app.datasets.ingest.read`, with every row counted by the trainer's own renderer on the way. `payload` also has `counters`:
    by task the tokenizer, kind and cutoff of the model that counts. A tokenizer that cannot be opened costs the counts, not the
    dataset."""
    from app.datasets import ingest

    faults: list[str] = []

    def counter(task: str, add: AddFinding) -> TokenCounter | None:
        used = payload["counters"].get(task)
        try:
            return TokenCounter(open_tokenizer(Path(used["tokenizer"]), task), used, task, add) if used else None
        except Exception as error:  # whatever is wrong with a model's files, the dataset is still valid
            faults.append(f"{type(error).__name__}: {error}"[:500])
            return None

    result = ingest.read(payload, say, counter)
    if faults:
        result["report"]["uncountable"] = faults[0]
    return result


def lengths(payload: dict[str, Any], say: Say) -> dict[str, Any]:
    """Number of tokens of every row of `rows` under the model of `tokenizer`. `payload`: rows, tokenizer, kind, task, count,
    cutoff.

    Reports rows that are truncated, have no trained token left, or are refused by the model's template.
    """

    def add(line: int, finding: RowFinding) -> None:
        if counter.counts[finding.rule] <= MAX_FINDINGS:
            say({"finding": {"line": line, **finding._asdict()}})

    task = payload.get("task") or objectives.DEFAULT
    counter = TokenCounter(open_tokenizer(Path(payload["tokenizer"]), task), payload, task, add)
    told = time.monotonic()
    for number, (line, text) in enumerate(read_rows(Path(payload["rows"]))):
        if time.monotonic() - told > 0.5:
            told = time.monotonic()
            say({"progress": number / max(1, payload.get("count") or 1)})
        counter.add(json.loads(text), line)
    return counter.result()["lengths"]


class TokenCounter:
    """Counts each row's tokens and trained tokens for a model's trainer, and the effect of a max sequence length of `cutoff`.

    A pair of answers is two sequences, each with the prompt, as in training. A labeled text has no trained token: it is counted
    as a classifier reads it, with the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, payload: dict[str, Any], task: str, add: AddFinding) -> None:
        self.task, self.cutoff, self._add, self._name = task, int(payload.get("cutoff") or 1024), add, payload.get("tokenizer_name")
        self._kind = payload["kind"]
        self.counts = {"over_long": 0, "nothing_left": 0, "template_refuses": 0}
        self.rows, self._last = 0, -1
        self._told: dict[str, int] = {}
        self.lines, self.total, self.trained, self.first = array("q"), array("q"), array("q"), array("q")
        self._tokenizer, self._texts = tokenizer, list[tuple[int, str]]()
        self._frame = len(tokenizer("")["input_ids"]) if OBJECTIVES[task].classifies else 0
        self._strings = StringCounter() if OBJECTIVES[task].adds_tokens else None
        self._renderer = Renderer(tokenizer, self._kind, counts_of, length_of, self._done, payload.get("train_on", "assistant"))

    def add(self, row: dict[str, Any], line: int) -> None:
        if OBJECTIVES[self.task].classifies:
            self._texts.append((line, row["text"]))
            if len(self._texts) >= BATCH_ROWS:
                self._count_texts()
            return
        if self._strings:
            self._strings.add(row)
        for one in formats.of(row).sequences(row, self._kind):
            self._renderer.add(line, one)

    def _count_texts(self) -> None:
        counts = counts_of(self._tokenizer, [text for _, text in self._texts])
        for (line, _), count in zip(self._texts, counts, strict=True):
            self._done(line, Length(count + self._frame, 0, 0))
        self._texts.clear()

    def _done(self, line: int, found: Length | BadData) -> None:
        if isinstance(found, BadData):
            self._say(line, "template_refuses", f"{found.message} Training would stop here.", "warning", None)
            return
        self.rows += line != self._last
        self._last = line
        first = ALL if found.first is None else found.first
        for column, value in ((self.lines, line), (self.total, found.tokens), (self.trained, found.learnt), (self.first, first)):
            column.append(value)
        self._look(line, found.tokens, first)

    def _look(self, line: int, tokens: int, first: int) -> None:
        if first >= self.cutoff:
            why = "no token of it is an answer" if first >= ALL else f"its answer begins at token {first + 1:,}"
            self._say(line, "nothing_left", f"No trainable tokens within {self.cutoff:,} tokens: {why}.", "warning", tokens)
        elif tokens > self.cutoff:
            cut = tokens - self.cutoff
            of = f" of {self._name}" if self._name else ""
            message = f"The row has {tokens:,} tokens{of}; {cut:,} of them ({cut / tokens:.0%}) are truncated at {self.cutoff:,}."
            self._say(line, "over_long", message, "note", tokens)

    def _say(self, line: int, rule: str, message: str, severity: Severity, tokens: int | None) -> None:
        if self._told.get(rule) == line:  # the other answer of a pair
            return
        self._told[rule] = line
        self.counts[rule] += 1
        value = None if tokens is None else f"{tokens:,} tokens"
        self._add(line, RowFinding(rule, message[:600], None, value, severity, fix("Remove row", "drop_row")))

    def result(self) -> dict[str, Any]:
        """`report`: the columns of a dataset's report; `lengths`: what the page of rows shows."""
        self._count_texts()
        self._renderer.finish()
        longest = self._by_row(self.total)
        first = self._by_row(self.first)
        cutoffs = sorted({*CUTOFFS, self.cutoff})
        found: dict[str, Any] = {
            "rows": self.rows,
            "tokens": sum(self.total),
            "trained_tokens": sum(self.trained),
            "longest": max(self.total, default=0),
            "histogram": _histogram(longest),
            "cutoffs": [
                _at(cutoff, self.total, self.first)
                | {"rows_cut": sum(tokens > cutoff for tokens in longest), "nothing_left": sum(at >= cutoff for at in first)}
                for cutoff in cutoffs
            ],
            "refused": self.counts["template_refuses"],
            "counts": self.counts,
            "longest_rows": self._longest(),
        }
        doubling = collections.Counter(tokens.bit_length() for tokens in longest)
        bins = [[0 if bits == 0 else 1 << (bits - 1), count] for bits, count in sorted(doubling.items())]
        report: dict[str, Any] = {name: found[name] for name in ("tokens", "trained_tokens", "longest")} | {
            "token_lengths": bins,
            "tokenizer": self._name,
        }
        report["cutoff"] = self.cutoff
        if self._strings:
            report["new_tokens"] = [[one.text, one.count, one.saved] for one in self._strings.suggestions(self._tokenizer)]
        report["rows_cut"] = [[at["cutoff"], at["rows_cut"]] for at in found["cutoffs"]]
        return {"report": report, "lengths": found | {"report": report}}

    def _by_row(self, values: array[int]) -> array[int]:
        """One value for each row: of a pair, the higher one of its two sequences."""
        found, last = array("q"), -1
        for line, value in zip(self.lines, values, strict=True):
            if line == last:
                found[-1] = max(found[-1], value)
            else:
                found.append(value)
            last = line
        return found

    def _longest(self) -> list[list[int]]:
        """[line, tokens] of the longest rows, longest first; of a pair its longer sequence."""
        found: dict[int, int] = {}
        for tokens, line in heapq.nlargest(2 * MAX_ROWS, zip(self.total, self.lines, strict=True)):
            found.setdefault(line, tokens)
        return [[line, tokens] for line, tokens in found.items()][:MAX_ROWS]


def _histogram(total: array[int]) -> list[list[int]]:
    """[lowest, highest, rows] of up to 24 bars of equal width from 0 to the longest row."""
    longest = max(total, default=0)
    width = max(8, -(-longest // 24 // 8) * 8)
    counts = [0] * (longest // width + 1)
    for tokens in total:
        counts[tokens // width] += 1
    return [[place * width, (place + 1) * width - 1, count] for place, count in enumerate(counts)]


def _at(cutoff: int, total: array[int], first: array[int]) -> dict[str, Any]:
    """The effect of a max sequence length of `cutoff` tokens on the sequences: tokens truncated, and how well packs of as many
    tokens are filled."""
    kept = [min(tokens, cutoff) for tokens, at in zip(total, first, strict=True) if at < cutoff]
    budget = max(2048, cutoff)
    packs = plan(kept, budget, seed=42, epoch=0) if kept else []
    return {
        "cutoff": cutoff,
        "tokens_cut": sum(max(0, tokens - cutoff) for tokens in total),
        "budget": budget,
        "packs": len(packs),
        "fill": sum(kept) / (len(packs) * budget) if packs else 0.0,
        "padded_fill": sum(kept) / (len(kept) * max(kept)) if kept else 0.0,
    }


# Some rows ------------------------------------------------------------------------------------------------------------


def rows(payload: dict[str, Any], say: Say) -> dict[str, Any]:
    """A few rows to show, token by token when there is a `tokenizer`. `payload`: rows, count, cutoff, kind, and which rows:
    `lines` (in this order), or those from number `skip` on that contain the text `search`. A long row is shortened, and marked
    with `cut_for_show`, unless `whole` asks for all of it."""
    tokenizer = open_tokenizer(Path(payload["tokenizer"]), payload.get("task")) if payload.get("tokenizer") else None
    found, matches = _choose(payload)
    shown = []
    for line, text in found:
        row = json.loads(text)
        short, cut = (row, False) if payload.get("whole") else shortened(row, SHOWN_ROW_BYTES)
        said = {"cut_for_show": True} if cut else {}
        shown.append({"line": line, "row": short, **said, **(_look(tokenizer, row, payload) if tokenizer else {})})
    return {"rows": shown, "matches": matches}


def _choose(payload: dict[str, Any]) -> tuple[list[tuple[int, str]], int]:
    path, count = Path(payload["rows"]), int(payload["count"])
    if payload.get("lines") is not None:
        wanted = set(payload["lines"])
        by_line = {line: text for line, text in read_rows(path) if line in wanted}
        return [(line, by_line[line]) for line in payload["lines"] if line in by_line], len(wanted)
    needle = json.dumps(payload.get("search") or "", ensure_ascii=False)[1:-1].lower()
    found: list[tuple[int, str]] = []
    matches = 0
    for line, text in read_rows(path):
        if needle and needle not in text.lower():
            continue
        if matches >= payload.get("skip", 0) and len(found) < count:
            found.append((line, text))
        matches += 1
    return found, matches


def _look(tokenizer: Any, row: dict[str, Any], payload: dict[str, Any]) -> dict[str, Any]:
    """The tokens of a row: [text, state] with 1 for trained, 0 for masked, 2 for truncated and 3 for a rejected answer. A pair of
    answers is two sequences, the rejected one under `worse`."""
    try:
        if objectives.get(payload.get("task")).classifies and "label" in row:
            return _framed(tokenizer, row["text"], payload["cutoff"])
        first, *others = (_sequence(tokenizer, one, payload) for one in formats.of(row).sequences(row, payload["kind"]))
        if not others:
            return first
        (worse,) = others
        return {**first, "worse": {**worse, "tokens": [[text, 3 if state == 1 else state] for text, state in worse["tokens"]]}}
    except BadData as error:
        return {"refused": error.message}


def _sequence(tokenizer: Any, row: dict[str, Any], payload: dict[str, Any]) -> dict[str, Any]:
    rendered = render_row(tokenizer, row, payload["kind"], ALL, payload.get("train_on", "assistant"))
    ids = rendered.ids[:MAX_TOKENS_SHOWN]
    texts = tokenizer.pieces(ids) if hasattr(tokenizer, "pieces") else [tokenizer.decode([key]) for key in ids]
    return _told(texts, [2 if place >= payload["cutoff"] else int(learnt) for place, learnt in enumerate(rendered.trained)])


def _framed(tokenizer: Any, text: str, cutoff: int) -> dict[str, Any]:
    """A text as a classifier reads it. The closing special token stays when the text is truncated."""
    ids = tokenizer(text)["input_ids"]
    texts = tokenizer.spans(text) if hasattr(tokenizer, "spans") else [tokenizer.decode([key]) for key in ids]
    frame = tokenizer("")["input_ids"]
    closing = len(frame) - sum(one == other for one, other in zip(frame, ids[: len(frame) - 1] or ids, strict=False))
    kept, end = cutoff - closing, len(ids) - closing
    return _told(texts, [2 if kept <= place < end and len(ids) > cutoff else 0 for place in range(len(ids))])


def _told(texts: list[str], states: list[int]) -> dict[str, Any]:
    """`texts` may be fewer than `states`: no more than is shown."""
    return {
        "tokens": [list(pair) for pair in zip(texts[:MAX_TOKENS_SHOWN], states, strict=False)],
        "total": len(states),
        "trained": states.count(1),
        "cut": states.count(2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.data.inspection", description="Count the tokens of a dataset's rows.")
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
