"""Writes the rows of a combined dataset: concatenated, mixed, sampled, deduplicated or converted. Runs in a limited child of the
data worker.

Sources are streamed from their Parquet files as often as needed; only row numbers and fingerprints are kept in memory. The result
is a JSON Lines file that its format parses back row for row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from app.datasets.row_store import read_rows, verify_rows
from app.errors import BadData
from app.formats import Row

OPERATIONS = ("concatenate", "mix", "sample", "deduplicate", "convert")
Rows = Iterator[tuple[int, Row]]


# From one shape to another ----------------------------------------------------------------------------------------------


class Conversion(NamedTuple):
    """How rows of one shape become rows of another, in words, and whether the conversion is lossless.

    `turn` returns no row for one that cannot be converted, several where one holds several.
    """

    words: str
    lossless: bool
    turn: Callable[[Row], list[Row]]


def _as_it_is(row: Row) -> list[Row]:
    return [row]


def _turns(row: Row) -> list[Row]:
    asked = [{"role": "user", "content": row["prompt"]}] if row["prompt"].strip() else []
    return [_with_rest(row, {"messages": [*asked, {"role": "assistant", "content": row["completion"]}]})]


def _single(row: Row) -> list[Row]:
    """The row when it is one question and one answer, possibly after a system message."""
    roles = [message["role"] for message in row["messages"]]
    plain = roles in (["user", "assistant"], ["system", "user", "assistant"])
    learnt = all(message.keys() == {"role", "content"} for message in row["messages"])  # no tool is called, no weight is given
    return [row] if plain and learnt and not row.get("tools") else []


def _prompt_and_completion(row: Row) -> list[Row]:
    if not _single(row):
        return []
    prompt = "\n\n".join(message["content"] for message in row["messages"][:-1])
    return [_with_rest(row, {"prompt": prompt, "completion": row["messages"][-1]["content"]})]


def _answer_of(row: Row, key: str) -> list[Row]:
    """The conversation up to an answer; earlier answers have no loss, as in the pair it comes from."""
    before = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in row["messages"]]
    return [_with_rest(row, {"messages": [*before, *row[key]]})]


def _ratings(row: Row) -> list[Row]:
    return [_with_rest(row, {"messages": row["messages"], "answer": row[key], "good": key == "chosen"}) for key in ("chosen", "rejected")]


def _with_rest(row: Row, made: Row) -> Row:
    return made | {key: row[key] for key in ("tools", "metadata") if row.get(key)}


_TURNS = Conversion("each prompt becomes the user's turn and its completion the assistant's", True, _turns)
CONVERSIONS: dict[tuple[str, str], Conversion] = {
    ("instruction", "chat"): Conversion("an instruction is a conversation of one turn, so nothing changes", True, _as_it_is),
    ("chat", "instruction"): Conversion("conversations of more than one turn, or with tools or weights, are excluded", False, _single),
    ("completion", "chat"): _TURNS,
    ("completion", "instruction"): Conversion(
        f"{_TURNS.words}; rows without a prompt are excluded", False, lambda row: [made for one in _turns(row) for made in _single(one)]
    ),
    ("chat", "completion"): Conversion(
        "the system's and the user's text become the prompt; conversations of more than one turn are excluded", False, _prompt_and_completion
    ),
    ("instruction", "completion"): Conversion(
        "the system's and the user's text become the prompt; earlier turns are excluded with their rows", False, _prompt_and_completion
    ),
    ("preference", "chat"): Conversion(
        "the better answer is kept and the worse one goes", False, lambda row: _answer_of(row, "chosen")
    ),
    ("preference", "rated"): Conversion("each pair becomes two rows, one rated good and one rated bad", True, _ratings),
    ("rated", "chat"): Conversion(
        "answers rated good are kept, the others go", False, lambda row: _answer_of(row, "answer") if row["good"] else []
    ),
    ("rated", "preference"): Conversion(
        "a good and a bad answer to the same prompt become a pair; answers without a counterpart go", False, _as_it_is
    ),
    ("classification", "completion"): Conversion(
        "the text becomes the prompt and the label its completion", True,
        lambda row: [_with_rest(row, {"prompt": row["text"], "completion": row["label"]})],
    ),
}  # fmt: skip
"""(from, to) → conversion. A pair that is not here cannot be converted. `rated → preference` is made by `_paired`, from many rows."""


def conversion(shape: str, wanted: str) -> Conversion | None:
    return Conversion("", True, _as_it_is) if shape == wanted else CONVERSIONS.get((shape, wanted))


def common_shape(shapes: Sequence[str]) -> str | None:
    """The shape that all of these convert to without a loss; None where there is none. One of their own shapes is preferred."""
    able = [wanted for wanted in (*shapes, "chat", "rated") if all((c := conversion(shape, wanted)) and c.lossless for shape in shapes)]
    return able[0] if able else None


def file_row(row: Row, shape: str) -> Row:
    """A normalized row as a row of a file: `normalise` of the format restores it. Metadata become columns."""
    keys = {
        "completion": ("prompt", "completion"),
        "plain_text": ("text",),
        "classification": ("text", "label"),
    }.get(shape, ("messages", "tools"))
    if shape == "preference":  # OpenAI's own keys, which have a place for tools
        asked = {"messages": row["messages"]} | ({"tools": row["tools"]} if row.get("tools") else {})
        made: Row = {"input": asked, "preferred_output": row["chosen"], "non_preferred_output": row["rejected"]}
    elif shape == "instruction":
        *before, asked, answer = row["messages"]
        system = before.pop(0)["content"] if before and before[0]["role"] == "system" else None
        history = [[one["content"], two["content"]] for one, two in zip(before[::2], before[1::2], strict=True)]
        made = {"instruction": asked["content"], "output": answer["content"], "system": system, "history": history}
        made = {key: value for key, value in made.items() if value}
    elif shape == "rated":
        made = {"prompt": row["messages"], "completion": row["answer"], "label": row["good"]}
        made |= {"tools": row["tools"]} if row.get("tools") else {}
    else:
        made = {key: row[key] for key in keys if key in row}
    rest = {f"{key}_" if key in made or key == "tools" else key: value for key, value in row.get("metadata", {}).items()}
    return rest | made


_NOT_GUESSED = {"input": "", "system": "", "history": ""}
MAPPINGS: dict[str, dict[str, str]] = {
    "chat": {"messages": "messages", "system": ""},
    "instruction": {"instruction": "instruction", "output": "output", "input": ""},
    "completion": {"prompt": "prompt", "completion": "completion"},
    "plain_text": {"text": "text"},
    "classification": {"text": "text", "label": "label"},
    "preference": {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output", "tools": "", **_NOT_GUESSED},
    "rated": {"prompt": "prompt", "completion": "completion", "label": "label", **_NOT_GUESSED},
}
"""Shape → the mapping that reads such a file; an empty name keeps a field from being detected among the metadata."""


# Which rows -------------------------------------------------------------------------------------------------------------


def shares(weights: Sequence[float], rows: int) -> list[int]:
    """Rows from each source, by the largest remainder method, so that they add up to `rows`."""
    total = sum(Fraction(weight).limit_denominator(10**6) for weight in weights)
    exact = [Fraction(weight).limit_denominator(10**6) * rows / total for weight in weights]
    counts = [int(part) for part in exact]
    by_rest = sorted(range(len(counts)), key=lambda place: counts[place] - exact[place])
    for place in by_rest[: rows - sum(counts)]:
        counts[place] += 1
    return counts


def most_rows(weights: Sequence[float], sizes: Sequence[int]) -> int:
    """The largest mixture without repeated rows."""
    total = sum(weights)
    most = int(min(size * total / weight for weight, size in zip(weights, sizes, strict=True)))
    while any(count > size for count, size in zip(shares(weights, most), sizes, strict=True)):
        most -= 1
    return most


def _drawn(read: Callable[[], Rows], size: int, count: int, draw: random.Random) -> Rows:
    """`count` rows of a source of `size`, in its order; repeated when more are requested than there are."""
    for _ in range(count // size if size else 0):
        yield from read()
    chosen = array("q", sorted(draw.sample(range(size), count % size))) if count % size else array("q")
    wanted = iter(chosen)
    following = next(wanted, None)
    for place, item in enumerate(read()) if chosen else ():
        if place == following:
            yield item
            following = next(wanted, None)


def _mixed(sources: Sequence[Source], rows: int, seed: int) -> Iterator[tuple[Source, int, Row]]:
    """Rows of every source in its share, in a random order given by the seed."""
    counts = shares([source.weight for source in sources], rows)
    turns = array("H", itertools.chain.from_iterable(itertools.repeat(place, count) for place, count in enumerate(counts)))
    random.Random(f"{seed} order").shuffle(turns)
    streams = [
        _drawn(source.rows, source.size, count, random.Random(f"{seed} {place}"))
        for place, (source, count) in enumerate(zip(sources, counts, strict=True))
    ]
    for place in turns:
        line, row = next(streams[place])
        yield sources[place], line, row


def _thinned(sources: Sequence[Source], near: bool, counts: Counter[str]) -> Iterator[tuple[Source, int, Row]]:
    """Every row whose texts did not occur before; with `near`, near duplicates are dropped too."""
    from app.datasets.report import texts
    from app.datasets.rules._base import seen as as_seen
    from app.datasets.rules.near_duplicates import NearDuplicates

    dropped: set[int | None] = set()
    if near:
        rule = NearDuplicates(lambda place, finding: dropped.add(place), "generation")
        for place, (_, _, row) in enumerate(_all(sources)):
            rule.see(as_seen(place, row, list(texts(row))))
        rule.finish()
    seen: set[int] = set()
    for place, (source, line, row) in enumerate(_all(sources)):
        print_ = _fingerprint(row)
        if print_ in seen or place in dropped:
            counts["near_duplicates" if print_ not in seen else "duplicates"] += 1
            continue
        seen.add(print_)
        yield source, line, row


def _fingerprint(row: Row) -> int:
    content = {key: value for key, value in row.items() if key != "metadata"}
    return int.from_bytes(hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).digest(), "big")


def _paired(rows: Iterator[tuple[Source, int, Row]], counts: Counter[str]) -> Iterator[tuple[Source, int, Row]]:
    """Pairs of a good and a bad answer to the same prompt, each answer in one pair at most."""
    waiting: dict[tuple[int, bool], deque[Row]] = {}
    for source, line, row in rows:
        asked = _fingerprint({"messages": row["messages"], "tools": row.get("tools")})
        others = waiting.get((asked, not row["good"]))
        if not others:
            waiting.setdefault((asked, row["good"]), deque()).append(row)
            continue
        good, bad = (row, others.popleft()) if row["good"] else (others.popleft(), row)
        if good["answer"] != bad["answer"]:
            yield source, line, _with_rest(row, {"messages": row["messages"], "chosen": good["answer"], "rejected": bad["answer"]})
    counts["left_out"] += sum(map(len, waiting.values()))


def _all(sources: Sequence[Source]) -> Iterator[tuple[Source, int, Row]]:
    for source in sources:
        for line, row in source.rows():
            yield source, line, row


# Writing them -----------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """One dataset that rows come from, as the child sees it."""

    path: Path
    name: str
    sha256: str
    shape: str
    size: int
    weight: float

    def rows(self) -> Rows:
        for line, text in read_rows(self.path, self.name):
            yield line, json.loads(text)


def write(payload: dict[str, Any], say: Any) -> dict[str, Any]:
    """Write the file of a combined dataset. `payload`: operation, sources, shape, rows, seed, near, and `out`.

    Sends `{"progress": fraction}`. Returns `sha256`, `bytes`, `rows`, and the number of excluded rows by reason.
    """
    sources = [Source(Path(s["path"]), s["name"], s["sha256"], s["shape"], s["size"], s.get("weight") or 1.0) for s in payload["sources"]]
    for source in sources:
        if not source.path.is_file():
            raise BadData(f"The rows of {source.name} are gone: it was deleted.", hint="Join again without it.")
        verify_rows(source.path, source.sha256, source.name)
    counts: Counter[str] = Counter()
    expected = payload.get("rows") or sum(source.size for source in sources)
    digest, size, rows = hashlib.sha256(), 0, 0
    with Path(payload["out"]).open("wb") as out:
        for source, line, row in _converted(_chosen(payload, sources, counts), payload["shape"], counts):
            row = {**row, "metadata": row.get("metadata", {}) | {"source_dataset": source.name, "source_line": line}}
            data = json.dumps(file_row(row, payload["shape"]), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
            out.write(data)
            digest.update(data)
            size, rows = size + len(data), rows + 1
            if rows % 4096 == 0:
                say({"progress": min(0.99, rows / max(1, expected))})
    if not rows:
        raise BadData("No row is left.", hint="Choose other datasets, or another way of joining them.")
    return {"sha256": digest.hexdigest(), "bytes": size, "rows": rows, "left_out": dict(+counts)}


def _chosen(payload: dict[str, Any], sources: list[Source], counts: Counter[str]) -> Iterator[tuple[Source, int, Row]]:
    operation, seed = payload["operation"], payload.get("seed") or 0
    if operation == "mix":
        return _mixed(sources, payload["rows"], seed)
    if operation == "sample":
        (source,) = sources
        drawn = _drawn(source.rows, source.size, payload["rows"], random.Random(f"{seed} 0"))
        return ((source, line, row) for line, row in drawn)
    if operation == "deduplicate":
        return _thinned(sources, payload.get("near", False), counts)
    return _all(sources)


def _converted(rows: Iterator[tuple[Source, int, Row]], shape: str, counts: Counter[str]) -> Iterator[tuple[Source, int, Row]]:
    if shape == "preference":
        first = next(rows, None)
        rows = itertools.chain([first] if first else [], rows)
        if first and first[0].shape == "rated":
            yield from _paired(rows, counts)
            return
    for source, line, row in rows:
        how = conversion(source.shape, shape)
        assert how is not None, "checked before the order was taken"
        made = how.turn(row)
        counts["left_out"] += not made
        for one in made:
            yield source, line, one
