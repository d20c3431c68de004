"""The rows of a dataset made of others: concatenated, mixed, drawn, thinned or converted. Runs in a limited child of the data worker.

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

from app import formats
from app.datasets.row_store import read_rows, verify_rows
from app.errors import BadData
from app.formats._base import Row
from app.formats._conversions import Conversion, as_it_is
from app.formats._rows import with_rest

OPERATIONS = ("concatenate", "mix", "sample", "deduplicate", "convert")
Rows = Iterator[tuple[int, Row]]


# From one shape to another ----------------------------------------------------------------------------------------------


CONVERSIONS: dict[tuple[str, str], Conversion] = {
    (shape, wanted): how for shape, entry in formats.FORMATS.items() if shape == entry.shape for wanted, how in entry.conversions.items()
}
"""(from, to) → how. A pair that is not here cannot be converted."""


def conversion(shape: str, wanted: str) -> Conversion | None:
    return Conversion("", True, as_it_is) if shape == wanted else CONVERSIONS.get((shape, wanted))


def common_shape(shapes: Sequence[str]) -> str | None:
    """The shape that all of these convert to without a loss; None where there is none. One of their own shapes is preferred."""
    able = [wanted for wanted in (*shapes, "chat", "rated") if all((c := conversion(shape, wanted)) and c.lossless for shape in shapes)]
    return able[0] if able else None


def file_row(row: Row, shape: str) -> Row:
    """A normalised row as a row of a file: `normalise` of the format gives it back. Metadata become columns of their own."""
    made = formats.FORMATS[shape].file_row(row)
    rest = {f"{key}_" if key in made or key == "tools" else key: value for key, value in row.get("metadata", {}).items()}
    return rest | made


MAPPINGS: dict[str, dict[str, str]] = {entry.shape: formats.FORMATS[entry.shape].file_mapping for entry in formats.FORMATS.values()}
"""Shape → the mapping that reads such a file."""


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
    """Every row whose texts were not there before; with `near`, also not nearly the same ones."""
    from app.datasets.rules._base import seen as as_seen
    from app.datasets.rules.near_duplicates import NearDuplicates

    dropped: set[int | None] = set()
    if near:
        rule = NearDuplicates(lambda place, finding: dropped.add(place), formats.FORMATS["chat"], {})
        for place, (_, _, row) in enumerate(_all(sources)):
            rule.see(as_seen(place, row))
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
            yield source, line, with_rest(row, {"messages": row["messages"], "chosen": good["answer"], "rejected": bad["answer"]})
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
            raise BadData(f"The rows of {source.name} are gone: it was deleted.", hint="Combine again without it.")
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
        raise BadData("No row is left.", hint="Choose other datasets, or another operation.")
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
    first = next(rows, None)
    rows = itertools.chain([first] if first else [], rows)
    if first and (how := conversion(first[0].shape, shape)) and how.paired:
        yield from _paired(rows, counts)
        return
    for source, line, row in rows:
        how = conversion(source.shape, shape)
        assert how is not None, "checked before the order was taken"
        made = how.turn(row)
        counts["left_out"] += not made
        for one in made:
            yield source, line, one
