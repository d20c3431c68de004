"""From dataset rows to tensors: read, split, tokenize once, and concatenate into packs."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from app.datasets import row_store as stored
from app.datasets.splits import divide, split_hash
from app.errors import BadData
from app.run_settings import TrainOn
from app.spec import DatasetRef, JobSpec, Split
from app.storage import places
from worker.data.batch_rendering import Renderer, filled, ids_of
from worker.data.chat_template import RenderedRow
from worker.modeling.packed_attention import PackShape, filling, packed_arguments
from worker.runtime.transfer import sent


class Row(NamedTuple):
    """A normalized row and its line in the source."""

    line: int
    row: dict[str, Any]


class BadRow(BadData):
    """A row that cannot be trained on; `line` says which."""

    def __init__(self, line: int, error: BadData) -> None:
        super().__init__(error.message, hint=error.hint, code=error.code)
        self.line = line


def read_rows(ref: DatasetRef) -> list[Row]:
    """All rows of a dataset, in order. Raises BadData when its file is missing, empty or changed."""
    path = places.path(ref.path)
    stored.verify_rows(path, ref.sha256, ref.name)
    rows = [Row(line, json.loads(row)) for line, row in stored.read_rows(path, ref.name)]
    if not rows:
        raise BadData(f"Dataset {ref.name} has no rows to train on.", hint="Fix the rows its report lists, and upload it again.")
    return rows


def split(rows: Sequence[Row], fraction: float, seed: int, how: Split | None = None) -> tuple[list[Row], list[Row]]:
    """(train, validation). A row's side is a function of its content and the seed, whatever the order; equal rows stay together.

    At least one row is in the validation set when `fraction` is above zero and there are two different rows.
    """
    seed = how.seeded(seed) if how else seed
    out = divide(rows, fraction, seed, how.method if how else "random", how.column if how else None)
    held = [row for row, held_out in zip(rows, out, strict=True) if held_out]
    return [row for row, held_out in zip(rows, out, strict=True) if not held_out], sorted(held, key=lambda row: row.line)


def sides(spec: JobSpec) -> tuple[list[Row], list[Row]]:
    """(train, validation) rows of a job: read, split, and reduced to its share of the training rows."""
    run, rows = spec.run, read_rows(spec.dataset)
    if spec.validation:
        train, held_out = rows, read_rows(spec.validation)
    else:
        train, held_out = split(rows, run.validation_fraction, run.seed, spec.split)
    return share(train, run.data_fraction, run.seed), held_out


def share(rows: Sequence[Row], fraction: float, seed: int) -> list[Row]:
    """The part of the training rows that `run.data_fraction` asks for, in order. A smaller share is a subset of a larger one.

    Which rows is a function of their content and the seed. Of labeled rows every class gives its share and at least one row, so
    that a small share still covers all classes; of others at least one row remains.
    """
    if fraction >= 1:
        return list(rows)
    parts: dict[Any, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        parts[row.row.get("label")].append(place)
    kept: set[int] = set()
    for members in parts.values():
        drawn = sorted(members, key=lambda place: (split_hash(rows[place].row, f"{seed} share"), place))
        kept.update(drawn[: max(1, round(fraction * len(drawn)))])
    return [row for place, row in enumerate(rows) if place in kept]


@dataclass(frozen=True)
class Tokenised:
    """Tokenized rows, concatenated: row i is `ids[starts[i]:starts[i + 1]]`. Rows without a trained token are excluded."""

    ids: np.ndarray  # (tokens,) int32
    trained: np.ndarray  # (tokens,) bool
    starts: np.ndarray  # (rows + 1,) int64
    lines: list[int]
    cut: int  # rows truncated to the max sequence length
    skipped: list[int]  # lines of rows without a trained token

    @functools.cached_property  # read in every step
    def lengths(self) -> list[int]:
        return np.diff(self.starts).tolist()

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def without(self, lead: int) -> Tokenised:
        """The same rows without the `lead` virtual tokens before each, for a model without a trained soft prompt."""
        if not lead:
            return self
        kept = np.ones(len(self.ids), bool)
        for place in range(lead):
            kept[self.starts[:-1] + place] = False
        starts = self.starts - lead * np.arange(len(self.starts))
        return replace(self, ids=self.ids[kept], trained=self.trained[kept], starts=starts)

    def only(self, lines: Container[int]) -> Tokenised:
        """The rows of these lines, in their order."""
        places = [i for i, line in enumerate(self.lines) if line in lines]
        spans = [slice(self.starts[i], self.starts[i + 1]) for i in places]
        ids, trained = (np.concatenate([of[span] for span in spans]) if spans else of[:0] for of in (self.ids, self.trained))
        starts = np.cumsum([0, *(self.lengths[i] for i in places)])
        return Tokenised(ids, trained, starts, [self.lines[i] for i in places], self.cut, self.skipped)

    def with_rows(self, other: Tokenised) -> Tokenised:
        """These rows, and those of another behind them."""
        ids, trained = (np.concatenate(both) for both in ((self.ids, other.ids), (self.trained, other.trained)))
        starts = np.concatenate([self.starts, self.starts[-1] + other.starts[1:]])
        return Tokenised(ids, trained, starts, [*self.lines, *other.lines], self.cut, self.skipped)

    def trained_counts(self) -> list[int]:
        """Number of trained tokens of each row."""
        return np.diff(np.concatenate([[0], np.cumsum(self.trained)])[self.starts]).tolist()

    def __len__(self) -> int:
        return len(self.lines)


def tokenise(
    tokenizer: Any, rows: Iterable[Row], kind: str, max_length: int, lead: Sequence[int] = (), train_on: TrainOn = "assistant"
) -> Tokenised:
    """Tokenize every row once, to at most `max_length` tokens including the virtual tokens `lead` before it. Raises BadRow with
    the line of the first row that cannot be rendered."""
    ids, trained, starts, lines, skipped, cut = [], [], [0], [], [], 0

    def done(line: int, rendered: RenderedRow | BadData) -> None:
        nonlocal cut
        if isinstance(rendered, BadData):
            raise BadRow(line, rendered)
        cut += rendered.cut
        if not any(rendered.trained):
            return skipped.append(line)
        ids.append(np.asarray([*lead, *rendered.ids], dtype=np.int32))
        trained.append(np.asarray([False] * len(lead) + rendered.trained, dtype=bool))
        starts.append(starts[-1] + len(ids[-1]))
        lines.append(line)

    renderer = Renderer(tokenizer, kind, ids_of, lambda draft, encoded: filled(draft, encoded, max_length - len(lead)), done, train_on)
    for line, row in rows:
        renderer.add(line, row)
    renderer.finish()
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    mask = np.concatenate(trained) if trained else np.zeros(0, bool)
    return Tokenised(flat, mask, np.asarray(starts, np.int64), lines, cut, skipped)


@dataclass
class Batch:
    """One pack: a row of T tokens. Padding is a sequence of its own at the end, without targets; `tokens` does not count it."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T), restarting at 0 in each sequence
    sources: torch.Tensor  # (K,) positions whose next token has a loss
    targets: torch.Tensor  # (K,) those tokens
    arguments: dict[str, Any]  # for the attention
    tokens: int
    trained: int
    real: torch.Tensor | None = None  # (1, T), 1 at tokens and 0 at padding, where it was asked for


LEARNT_MULTIPLE = 256
"""With a `PackShape`, the positions with a target are padded to a multiple of this, so that the head sees few shapes."""
NOT_LEARNT = -100
"""The target of such padding."""


def make_batch(
    data: Tokenised, rows: Sequence[int], device: torch.device, frame: PackShape | None = None, padded: bool = False, mark: bool = False
) -> Batch:
    """The tensors of a pack of row numbers. With `padded`, each row is padded to the longest; the pack is padded to `frame`, or
    on a CPU by `packed_attention.filling`. `mark` adds which tokens are no padding. On CUDA they are copied asynchronously from pinned
    memory."""
    spans = [slice(data.starts[r], data.starts[r + 1]) for r in rows]
    lengths = [int(s.stop - s.start) for s in spans]
    tokens = sum(lengths)
    spare = [max(lengths) - length if padded else 0 for length in lengths]  # padding of a row is a sequence of its own behind it
    ids = _laid([data.ids[s] for s in spans], spare).astype(np.int64)
    learnt = np.flatnonzero(_laid([data.trained[s] for s in spans], spare))
    lengths = [length for pair in zip(lengths, spare, strict=True) for length in pair if length]
    sources, targets = learnt - 1, ids[learnt]
    more = frame.filling(lengths) if frame else filling(len(ids), device)
    real = _laid([np.ones(int(s.stop - s.start), np.float32) for s in spans], [*spare[:-1], spare[-1] + sum(more)]) if mark else None
    lengths, ids = lengths + more, np.concatenate([ids, np.zeros(sum(more), np.int64)])
    if frame:
        more_learnt = -len(learnt) % LEARNT_MULTIPLE
        sources = np.concatenate([sources, np.zeros(more_learnt, np.int64)])
        targets = np.concatenate([targets, np.full(more_learnt, NOT_LEARNT)])
    places = np.concatenate([np.arange(n) for n in lengths])
    flat, at, read, learn = (sent(torch.from_numpy(x), device) for x in (ids[None], places[None], sources, targets))
    marks = sent(torch.from_numpy(real[None]), device) if real is not None else None
    arguments = packed_arguments(lengths, device, frame)
    return Batch(flat, at, read, learn, arguments=arguments, tokens=tokens, trained=len(learnt), real=marks)


def _laid(pieces: Sequence[np.ndarray], spare: Sequence[int]) -> np.ndarray:
    """Pieces concatenated, each followed by its number of zeros."""
    return np.concatenate([part for piece, more in zip(pieces, spare, strict=True) for part in (piece, np.zeros(more, piece.dtype))])


def trained_in(data: Tokenised, packs: Iterable[Sequence[int]]) -> int:
    """Number of tokens with a loss in some packs, without building their tensors."""
    return int(sum(data.trained[data.starts[r] : data.starts[r + 1]].sum() for pack in packs for r in pack))


def batches(data: Tokenised, packs: Iterable[Sequence[int]], device: torch.device) -> Iterator[Batch]:
    for pack in packs:
        yield make_batch(data, pack, device)
