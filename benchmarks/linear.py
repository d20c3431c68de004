"""Whether everything a row passes takes a time that grows with the row and no faster, whatever the row holds.

    python -m benchmarks.linear [--tokenizer FOLDER] [SUBJECT …]

Each subject (every rule, format, reader and edit of the registries, and what works on rows besides) is given hostile texts of
n, 2n and 4n characters. The table names, for each subject, the text whose time grew most per doubling, and the slowest one.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from app import formats
from app.datasets import compose_rows, edits, readers, rules, splits
from app.datasets.readers._repair import repaired
from app.datasets.readers._tables import read_parquet
from app.datasets.report import Report
from app.datasets.rules._base import seen
from app.formats._base import parsed
from app.kit.json_safe import shortened

FIRST_CHARACTERS, CHARACTERS = 1 << 14, 1 << 18
ENOUGH_SECONDS = 0.002
"""A text is made longer until it takes half of this, or has CHARACTERS."""
MAX_RATIO = 2.5
CLEAR_RATIO = 2.25
CERTAIN_RATIO = 3.0
"""Where the least of REPEATS runs grew by this at each of two doublings no noise explains it, and longer texts need not be measured."""
REPEATS, LONGER = 6, 3

Run = Callable[[], object]
Prepare = Callable[[str], Run]


# Hostile texts --------------------------------------------------------------------------------------------------------

FRAGMENTS = (
    "00111-", "00 11 ", "1", "1234-", "4111 1111 ", "DE89 3704 ", "+1111111111111111111111x", "tel: 0", "07700 900 ",
    "ab@cd.ee ", "ab@cd.", "a.", "://a:bcde@", "eyJ-", "eyJ-a.", "secret=", "api_key ", "password ", 'password="', "pwd:\t", "sk-a", "_",
    "-----BEGIN PRIVATE KEY-----", "-----BEGIN A PRIVATE KEY-----\n", "[INST]", "<|im_", "<|im_end|>", "<s>", "<s>a</s>", "<", "\x1b[0", "\x00",
    "\\", '\\"', '"', '""', "'", "`", "[", "{", "}", "[{(", '{"a":', ", }", ",", ";", "NaN,", '"a":1,', "\\u0041", "\\ud800",
    " ", "\t", "\n", "\r\n", " \n", "a", "a ", "the ", "word, ", "é", "\u0300\u0316", "\u00b5", "中", "\u3042\u3099", "\U0001f3bb",
)  # fmt: skip
ENDS = {"secret=": "(", "eyJ-": ".eyJ1234567890.", "1": "x", "a.": "@", "[": "]", "\\ud800": '"'}
STRUCTURES = {
    "turns": ("[", '{"role":"user","content":"a"},{"role":"assistant","content":"b"},', '{"role":"user","content":"a"}]'),
    "system messages": ("[", '{"role":"system","content":"a"},', '{"role":"user","content":"a"},{"role":"assistant","content":"b"}]'),
    "late system messages": ('[{"role":"user","content":"a"},', '{"role":"system","content":"a"},', '{"role":"assistant","content":"b"}]'),
    "wrong turns": ("[", '{"role":"x","content":[]},', "0]"),
    "turns of {from, value}": ("[", '{"from":"human","value":"a"},{"from":"gpt","value":"b"},', '{"from":"gpt","value":""}]'),
    "pairs": ("[", '["",""],', '["",""]]'),
    "text parts": ('[{"role":"user","content":[', '{"type":"text","text":"a"},', '{"type":"x"}]}]'),
    "half characters in depth": ('{"a":' * 60, "[1,2],", '"\\ud800"' + "}" * 60),
}


def hostile() -> dict[str, Callable[[int], str]]:
    """By name, what makes a text of about so many characters."""

    def filled(head: str, fragment: str, tail: str) -> Callable[[int], str]:
        return lambda count: head + fragment * (count // len(fragment)) + tail

    made = {repr(fragment): filled("", fragment, ENDS.get(fragment, "")) for fragment in FRAGMENTS}
    return made | {name: filled(*parts) for name, parts in STRUCTURES.items()}


# What is given them -----------------------------------------------------------------------------------------------------


def subjects(tokenizer: Path | None = None) -> dict[str, Prepare]:
    """By name, what is measured: everything in the registries, and what else goes through a row."""
    found: dict[str, Prepare] = {f"rule {rule.__name__}": _rule(rule) for rule in rules.RULES}
    found |= {f"format {name}": _format(entry) for name, entry in formats.FORMATS.items()}
    found |= {f"reader {kind}": _reader(reader) for kind, reader in readers.READERS.items()} | {"reader parquet": _parquet}
    found |= {f"edit {name}": _text_edit(change) for name, change in edits.TEXT_EDITS.items()}
    found |= {"edit mend": _mend, "repair of a line": lambda text: lambda: repaired(text), "report": _report, "overlap": _overlap}
    found |= {"conversions": _conversions, "rows to show": _shown}
    return found | ({"tokens": _tokens(tokenizer)} if tokenizer else {})


def _normalised(text: str) -> list[dict[str, Any]]:
    """Good rows of several shapes with this text, or with the messages that it spells."""
    said = parsed(text)
    told = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    if isinstance(said, list) and all(isinstance(one, dict) and one.get("role") in ("system", "user", "assistant") for one in said):
        told = [{"role": one["role"], "content": str(one.get("content"))} for one in said] if said else told
    return [{"messages": told}, {"text": text, "label": "a"}, {"prompt": text, "completion": text}]


def _rule(rule: type[rules.Rule]) -> Prepare:
    def prepare(text: str) -> Run:
        rows = _normalised(text)

        def run() -> None:
            for name, shown in (("chat", rows), ("classification", rows[1:2])):
                made = rule(lambda line, finding: None, formats.FORMATS[name], {})
                for line, row in enumerate(shown, 1):
                    made.see(seen(line, row))
                made.finish()

        return run

    return prepare


def _format(entry: formats.Format) -> Prepare:
    def prepare(text: str) -> Run:
        columns = list(entry.example)
        rows = [_with_texts(entry.example, text), {f"{name}{text}": "a" for name in columns}]
        rows += [{**entry.example, field.synonyms[0]: text} for field in entry.fields]

        def run() -> None:
            for row in rows:
                guess = entry.recognise([row])
                mapping = guess.mapping if guess else {}
                found = entry.check(row, mapping)
                if guess and not any(finding.severity == "error" for finding in found):
                    entry.normalise(row, mapping)
                    entry.metadata(row, mapping)

        return run

    return prepare


def _with_texts(value: Any, text: str) -> Any:
    """An example with this text in the place of each of its own; who speaks is left."""
    if isinstance(value, dict):
        return {key: item if key in ("role", "from") else _with_texts(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_texts(item, text) for item in value]
    return text if isinstance(value, str) else value


def _reader(reader: Callable[[Iterator[bytes]], Iterator[readers.Raw]]) -> Prepare:
    def prepare(text: str) -> Run:
        quoted = '"' + text.replace('"', '""') + '"'
        row = json.dumps({"text": text})
        whole = [text, row, f"[{row},{row}]", f"text,label\n{quoted},a\n{text},b\n", f'{{"text": {text}}}\n', f'{{"data": [{row}']
        files = [_chunks(file.encode("utf-8", "surrogatepass")) for file in whole]
        return lambda: [_drained(reader, chunks) for chunks in files]

    return prepare


def _chunks(data: bytes) -> list[bytes]:
    return [data[at : at + (1 << 20)] for at in range(0, len(data), 1 << 20)]


def _drained(reader: Callable[[Iterator[bytes]], Iterator[readers.Raw]], chunks: list[bytes]) -> None:
    from app.errors import BadData

    try:
        for _ in reader(iter(chunks)):
            pass
    except BadData:
        pass


def _parquet(text: str) -> Run:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.NamedTemporaryFile(suffix=".parquet", delete=False) as file:
        path = Path(file.name)
    pq.write_table(pa.table({"text": [text.encode("utf-8", "replace").decode()], "list": [list(text[:500])]}), path)

    def run() -> None:
        for _ in read_parquet(path):
            pass

    return run


def _text_edit(change: Callable[[str], str]) -> Prepare:
    return lambda text: lambda: change(text)


def _mend(text: str) -> Run:
    entry = formats.FORMATS["chat"]
    row, mapping = {"messages": text}, {"messages": "messages"}
    return lambda: [edits.mend(row, rule, entry, mapping) for rule in ("wrong_role_order", "empty_answer")]


def _report(text: str) -> Run:
    rows = _normalised(text)

    def run() -> None:
        report = Report(formats.FORMATS["chat"], {"messages": "messages"}, lambda message: None)
        for line, row in enumerate(rows, 1):
            report.check(readers.Raw(line, row))
            report.take(line, row)
            report.count(row, json.dumps(row, ensure_ascii=False), line)
        report.finish()
        report.result()

    return run


def _overlap(text: str) -> Run:
    rows = [splits.NumberedRow(line, row) for line, row in enumerate(_normalised(text), 1)]
    return lambda: (splits.overlap(rows, rows), [splits.split_hash(row.row, "0") for row in rows])


def _conversions(text: str) -> Run:
    rows = _normalised(text)
    by_shape = {"chat": rows[0], "classification": rows[1], "completion": rows[2]}
    by_shape |= {"preference": {**rows[0], "chosen": rows[0]["messages"], "rejected": []}, "instruction": rows[0]}

    def run() -> None:
        for (shape, wanted), how in compose_rows.CONVERSIONS.items():
            for made in how.turn(by_shape[shape]) if shape in by_shape else ():
                if wanted in by_shape:
                    compose_rows.file_row(made, wanted)

    return run


def _shown(text: str) -> Run:
    return lambda: [shortened(row, 1 << 15) for row in [{"text": text}, {"text": parsed(text)}]]


def _tokens(folder: Path) -> Prepare:
    def prepare(text: str) -> Run:
        from worker.data.inspection import TokenCounter, open_tokenizer

        _, labelled, pair = _normalised(text)  # the cost of a conversation's turns is the template's, which has bounds of its own

        def run() -> None:
            for task, shown in (("generation", [pair]), ("classification", [labelled])):
                counter = TokenCounter(open_tokenizer(folder, task), {"kind": "dialogue"}, task, lambda line, finding: None)
                for line, row in enumerate(shown, 1):
                    counter.add(row, line)
                counter.result()

        return run

    return prepare


# Measuring --------------------------------------------------------------------------------------------------------------


class Growth(NamedTuple):
    """Processor seconds at n, 2n and 4n characters."""

    characters: int
    seconds: tuple[float, float, float]

    @property
    def ratio(self) -> float:
        """The most that one doubling cost. What stays below half of ENOUGH_SECONDS grows by the machine's noise alone."""
        pairs = [(after, before) for before, after in zip(self.seconds, self.seconds[1:], strict=False) if after > ENOUGH_SECONDS / 2]
        return max((after / before for after, before in pairs), default=1.0)

    @property
    def is_certain(self) -> bool:
        """Whether each doubling cost so much that the machine is not to blame."""
        n, twice, four_times = self.seconds
        return n > ENOUGH_SECONDS / 2 and min(twice / n, four_times / twice) > CERTAIN_RATIO


def growth(prepare: Prepare, text: Callable[[int], str], first: int = FIRST_CHARACTERS, most: int = CHARACTERS) -> Growth:
    """The growth from the first length that takes long enough, or from `most`.

    Where it looks too fast the least of REPEATS runs counts; where it still does, longer texts are measured: a busy machine or a
    cache that overflows spoils one doubling, and what grows with the square spoils each, after which nothing longer is measured.
    """
    count, _ = _long_enough(prepare, text, first, most)
    for doubled in range(LONGER + 1):
        found = _measured(prepare, text, count << doubled)
        if found.ratio <= MAX_RATIO or found.is_certain:
            break
    return found


def too_fast(prepare: Prepare, first: int, most: int) -> dict[str, Growth]:
    """The hostile texts whose time grows too fast. One run each at n and 4n clears nearly all of them; the others are measured."""
    prepare("a")()  # tables that are made once
    found = {}
    for name, text in hostile().items():
        count, took = _long_enough(prepare, text, first, most)
        longer = _seconds(prepare(text(4 * count)))
        if longer > max(ENOUGH_SECONDS, took * CLEAR_RATIO**2) and (one := growth(prepare, text, count, most)).ratio > MAX_RATIO:
            found[name] = one
    return found


def _long_enough(prepare: Prepare, text: Callable[[int], str], first: int, most: int) -> tuple[int, float]:
    """A number of characters that can be measured, and the seconds they took."""
    count = first
    while (took := _seconds(prepare(text(count)))) < ENOUGH_SECONDS / 2 and count < most:
        count = min(most, 4 * count)
    return count, took


def _measured(prepare: Prepare, text: Callable[[int], str], count: int) -> Growth:
    runs = [prepare(text(count << doubling)) for doubling in range(3)]
    least = [_seconds(run) for run in runs]
    for _ in range(REPEATS):
        found = Growth(count, (least[0], least[1], least[2]))
        if found.ratio <= MAX_RATIO:
            break
        least = [min(before, _seconds(run)) for before, run in zip(least, runs, strict=True)]
    return found


def _seconds(run: Run) -> float:
    gc.disable()
    try:
        began = time.process_time()
        run()
        return time.process_time() - began
    finally:
        gc.enable()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("subject", nargs="*", help="only these; all by default")
    parser.add_argument("--tokenizer", type=Path, help="a model's folder, to count tokens too")
    parser.add_argument("--all", action="store_true", help="a line for each text, not only for the worst")
    options = parser.parse_args(arguments)
    print(f"{'subject':24} {'text':32} {'characters':>10} {'n':>9} {'2n':>9} {'4n':>9} {'ratio':>6}")
    worst = 0.0
    for name, prepare in subjects(options.tokenizer).items():
        if options.subject and name not in options.subject:
            continue
        found = [(text, growth(prepare, make)) for text, make in hostile().items()]
        worst = max(worst, *(one.ratio for _, one in found))
        steepest, slowest = max(found, key=lambda pair: pair[1].ratio), max(found, key=lambda pair: pair[1].seconds[2] / pair[1].characters)
        for text, one in found if options.all else dict([steepest, slowest]).items():
            print(
                f"{name:24} {text:32} {one.characters:10,} " + " ".join(f"{s:9.4f}" for s in one.seconds) + f" {one.ratio:6.2f}", flush=True
            )
    print(f"The most that a doubling cost: {worst:.2f} times.")
    return int(worst > MAX_RATIO)


if __name__ == "__main__":
    sys.exit(main())
