"""Tokenized rated answers: each row is its prompt with its own answer, and the same prompt with an unrelated answer of another row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.errors import BadData
from app.formats.preference import conversation_with
from worker.data.batching import BadRow, Row, Tokenised
from worker.data.chat_template import RenderedRow, render_row
from worker.data.preference_pairs import PreferencePairs, join, with_lead

TRIES = 50
"""Rows after a row, in a random order, of which one has an answer that can stand after its prompt."""


@dataclass(frozen=True)
class RatedRows:
    """Row i is sequence 2i (with its own answer) and 2i + 1 (with an unrelated one) of `both.sequences`."""

    both: PreferencePairs
    good: np.ndarray  # (rows,) bool, whether the own answer is rated good

    def __len__(self) -> int:
        return len(self.good)

    def own(self) -> Tokenised:
        """The sequences with the rows' own answers."""
        s, rows = self.both.sequences, self.both.pairs
        spans = [slice(s.starts[2 * row], s.starts[2 * row + 1]) for row in range(len(self))]
        ids, trained = (np.concatenate([of[span] for span in spans]) if spans else of[:0] for of in (s.ids, s.trained))
        starts = np.cumsum([0, *(int(span.stop - span.start) for span in spans)], dtype=np.int64)
        return Tokenised(ids, trained, starts, rows.lines, rows.cut, rows.skipped)


def tokenise_rated(
    tokenizer: Any, rows: Sequence[Row], kind: str, max_length: int, lead: Sequence[int] = (), *, seed: int, more: Sequence[Row] = ()
) -> RatedRows:
    """Tokenize every row twice, each sequence to at most `max_length` tokens including its virtual tokens.

    The unrelated answer is that of the next row in an order drawn by the seed, so it is the same in every epoch and attempt; where
    all of these answers are equal, that of a row of `more`. A row is excluded when truncation removed its whole answer. Raises BadRow
    with the line of the first row that cannot be rendered, BadData where no row has an unrelated answer.
    """
    rendered = [_own(tokenizer, row, kind, max_length - len(lead)) for row in rows]
    kept = [place for place, found in enumerate(rendered) if any(found.trained)]
    order = np.random.default_rng(seed).permutation(kept).tolist()
    at = {place: position for position, place in enumerate(order)}
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    cut = 0
    for place in kept:
        others = (rows[order[(at[place] + step) % len(order)]] for step in range(1, min(len(order), TRIES)))
        unrelated = _unrelated(tokenizer, rows[place], [*others, *more[:TRIES]], kind, max_length - len(lead))
        cut += rendered[place].cut
        pieces += [with_lead(found, lead) for found in (rendered[place], unrelated)]
    both = join(pieces, [rows[place].line for place in kept], cut, _left_out(rows, kept), len(lead))
    return RatedRows(both, np.asarray([rows[place].row["good"] for place in kept], bool))


def _own(tokenizer: Any, row: Row, kind: str, longest: int) -> RenderedRow:
    line, content = row
    if not all(isinstance(content.get(key), list) and content[key] for key in ("messages", "answer")) or "good" not in content:
        found = ", ".join(sorted(content))
        raise BadRow(line, BadData(f"The row has the keys {found}.", hint="Use rows with messages, an answer and good."))
    try:
        return render_row(tokenizer, conversation_with(content, "answer", kind), kind, longest)
    except BadData as error:
        raise BadRow(line, error) from None


def _unrelated(tokenizer: Any, row: Row, others: Sequence[Row], kind: str, longest: int) -> RenderedRow:
    """A row's prompt with the first answer of `others` that is another one and can stand there."""
    own = json.dumps(row.row["answer"])
    for other in _with_another_answer(others, own):
        try:
            found = render_row(tokenizer, conversation_with({**row.row, "answer": other.row["answer"]}, "answer", kind), kind, longest)
        except BadData:  # calls of tools that this prompt does not offer
            continue
        if any(found.trained):
            return found
    raise BadData(
        f"No other row has an answer that could stand after the prompt of line {row.line}.",
        hint="KTO compares with the answers of other rows: at least two rows with different answers are needed.",
    )


def _with_another_answer(others: Sequence[Row], own: str) -> Iterator[Row]:
    return (other for other in others if json.dumps(other.row["answer"]) != own)


def _left_out(rows: Sequence[Row], kept: Sequence[int]) -> list[int]:
    places = set(kept)
    return [row.line for place, row in enumerate(rows) if place not in places]
