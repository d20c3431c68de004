"""Tokenized preference pairs: each answer is a whole sequence with its prompt, and a pair is never split over two packs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from app.errors import BadData
from app.formats.preference import conversation_with
from worker.data.batching import BadRow, Row, Tokenised
from worker.data.chat_template import RenderedRow, render_row


@dataclass(frozen=True)
class PreferencePairs:
    """The concatenated sequences of `pairs`: pair i is sequence 2i (chosen) and 2i + 1 (rejected) of `sequences`.

    Both views share their arrays. `lead` is the number of virtual tokens before every sequence.
    """

    pairs: Tokenised
    sequences: Tokenised
    lead: int

    def __len__(self) -> int:
        return len(self.pairs)

    def answer_tokens(self, sequence: int) -> int:
        """Number of tokens of a sequence's answer."""
        part = slice(self.sequences.starts[sequence], self.sequences.starts[sequence + 1])
        return int(self.sequences.trained[part].sum())

    def chosen_tokens(self) -> torch.Tensor:
        """Number of tokens of each pair's chosen answer, (pairs,) float32."""
        return torch.tensor([self.answer_tokens(2 * pair) for pair in range(len(self))], dtype=torch.float32)

    def without_lead(self) -> PreferencePairs:
        """The same without the virtual tokens, for a model without a trained soft prompt."""
        if not self.lead:
            return self
        s = self.sequences
        spans = [slice(start + self.lead, end) for start, end in zip(s.starts[:-1], s.starts[1:], strict=True)]
        return join([(s.ids[x], s.trained[x]) for x in spans], self.pairs.lines, self.pairs.cut, self.pairs.skipped, 0)


def sequences_of(pack: Sequence[int]) -> list[int]:
    """The sequences of a pack of pairs, the two of a pair next to each other."""
    return [sequence for pair in pack for sequence in (2 * pair, 2 * pair + 1)]


def tokenise_pairs(tokenizer: Any, rows: Sequence[Row], kind: str, max_length: int, lead: Sequence[int] = ()) -> PreferencePairs:
    """Tokenize both answers of every row, each sequence to at most `max_length` tokens including its virtual tokens.

    A pair is excluded when truncation removed a whole answer, or everything that distinguishes the two. Raises BadRow with the
    line of the first row that cannot be rendered.
    """
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    lines: list[int] = []
    skipped: list[int] = []
    cut = 0
    for line, row in rows:
        better, worse = _render(tokenizer, line, row, kind, max_length - len(lead))
        cut += better.cut or worse.cut
        if not any(better.trained) or not any(worse.trained) or better.ids == worse.ids:
            skipped.append(line)
            continue
        pieces += [with_lead(rendered, lead) for rendered in (better, worse)]
        lines.append(line)
    return join(pieces, lines, cut, skipped, len(lead))


def pairs_of_sides(
    tokenizer: Any, train: Sequence[Row], held_out: Sequence[Row], kind: str, max_length: int, lead: Sequence[int]
) -> dict[str, PreferencePairs]:
    """The pairs of both sides, “train” and “held_out”. Raises BadData where no training pair is left."""
    found = {name: tokenise_pairs(tokenizer, rows, kind, max_length, lead) for name, rows in (("train", train), ("held_out", held_out))}
    if not len(found["train"]):
        raise BadData(
            f"None of the {len(train)} pairs has two different answers within {max_length} tokens.",
            hint="Raise the max sequence length, or check the two answers of each row.",
        )
    return found


def _render(tokenizer: Any, line: int, row: dict[str, Any], kind: str, longest: int) -> tuple[RenderedRow, RenderedRow]:
    if not all(isinstance(row.get(key), list) and row[key] for key in ("messages", "chosen", "rejected")):
        found = ", ".join(sorted(row))
        raise BadRow(line, BadData(f"The row has the keys {found}.", hint="Use rows with messages, chosen and rejected."))
    try:
        better, worse = (render_row(tokenizer, conversation_with(row, answer, kind), kind, longest) for answer in ("chosen", "rejected"))
    except BadData as error:
        raise BadRow(line, error) from None
    return better, worse


def with_lead(rendered: RenderedRow, lead: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, whether each has a loss) of a sequence behind its virtual tokens."""
    return np.asarray([*lead, *rendered.ids], np.int32), np.asarray([False] * len(lead) + rendered.trained, bool)


def join(pieces: list[tuple[np.ndarray, np.ndarray]], lines: list[int], cut: int, skipped: list[int], lead: int) -> PreferencePairs:
    """Pairs from their sequences, the two of a pair next to each other."""
    ids = np.concatenate([p[0] for p in pieces]) if pieces else np.zeros(0, np.int32)
    trained = np.concatenate([p[1] for p in pieces]) if pieces else np.zeros(0, bool)
    starts = np.concatenate([[0], np.cumsum([len(p[0]) for p in pieces], dtype=np.int64)]).astype(np.int64)
    pairs = Tokenised(ids, trained, starts[::2], lines, cut, skipped)
    return PreferencePairs(pairs, Tokenised(ids, trained, starts, [n for n in lines for _ in range(2)], 0, []), lead)
