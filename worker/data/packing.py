"""Packs rows into steps: each into the fullest pack that still takes it, in an order given by the seed.

Rows are packed in shuffled order, in windows of a few dozen packs; rows of badly filled packs wait for the next window. Packs are
then shuffled too. Longest first, the usual order, would fill packs no better here and sort the data: on lengths like those of
instructions (median 180, 16,384 tokens per pack) both orders fill 98.9 %, but longest first puts 16 rows into one step and 307
into another, shuffled order 32 to 89. Steps of short rows and steps of long ones have different gradients.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator, Sequence

WINDOW_PACKS = 32
WELL_FILLED = 0.97
UNEVEN = 1.6
"""The largest part of a pack may have this many times its even share: what parallel parts gain on two cores."""


def plan(
    lengths: Sequence[int], budget: int, *, seed: int, epoch: int, most: int | None = None, rows: int | None = None, padded: bool = False
) -> list[list[int]]:
    """Packs of row numbers for one epoch; each row once. No pack holds more than `budget` tokens, unless a single row does, nor
    more than `most` rows. With `rows` each has that many, whatever their tokens, and only the last may have fewer; with `padded`,
    all rows of a pack count as its longest."""
    # The draw depends on seed and epoch only, so a resumed job plans the same packs.
    draw = random.Random(f"luthier/{seed}/{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    if rows:
        return [order[at : at + rows] for at in range(0, len(order), rows)]
    if padded:
        apart = _padded(order, lengths, budget)
        draw.shuffle(apart)
        return apart
    packs: list[list[int]] = []
    window: list[int] = []
    held = 0
    for row in order:
        window.append(row)
        held += lengths[row]
        if held >= WINDOW_PACKS * budget:
            good, window = _fill_packs(fit(window, lengths, budget, most), lengths, budget, most)
            packs += good
            held = sum(lengths[r] for r in window)
    packs += fit(window, lengths, budget, most)
    draw.shuffle(packs)
    return packs


def with_general(
    packs: Iterator[tuple[int, int, list[int]]], lengths: Sequence[int], own: int, share: float, *, seed: int, room: int, most: int | None
) -> Iterator[tuple[int, int, list[int]]]:
    """The packs of a `stream` from its beginning, with general rows behind their own: `share` of all tokens so far, as nearly as whole rows
    give it. The first `own` of `lengths` are the stream's rows; the others are played in, each once before any comes again, in an order
    given by the seed. No pack grows beyond `room` tokens or `most` rows for them; what did not fit is owed to the next."""
    queue, owed = _again_and_again(range(own, len(lengths)), seed), 0.0
    row = next(queue)
    for epoch, place, pack in packs:
        pack, held = list(pack), sum(lengths[r] for r in pack)
        owed += held * share / (1 - share)
        while owed >= lengths[row] / 2 and held + lengths[row] <= room and (most is None or len(pack) < most):
            pack.append(row)
            held, owed = held + lengths[row], owed - lengths[row]
            row = next(queue)
        yield epoch, place, pack


def _again_and_again(rows: Sequence[int], seed: int) -> Iterator[int]:
    """All rows in one order after another, without end."""
    for turn in itertools.count():
        order = list(rows)
        random.Random(f"luthier/general/{seed}/{turn}").shuffle(order)
        yield from order


def _padded(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows in order, with a new pack where one more row would make longest × number exceed the budget."""
    packs: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if packs and longest * (len(packs[-1]) + 1) <= budget:
            packs[-1].append(row)
        else:
            packs.append([row])
            longest = lengths[row]
    return packs


def best_fit(rows: Sequence[int], lengths: Sequence[int], budget: int, most: int | None = None) -> list[list[int]]:
    """Best-fit decreasing, for rows that are only scored: the longest row first."""
    return fit(sorted(rows, key=lambda r: (-lengths[r], r)), lengths, budget, most)


def fit(rows: Sequence[int], lengths: Sequence[int], budget: int, most: int | None = None) -> list[list[int]]:
    """Best fit: each row, in order, into the fullest pack that still takes it."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted; packs that take no more rows are dropped
    for row in rows:
        # `room` is sorted, so the first pack with enough tokens left is the fullest that takes the row.
        at = bisect.bisect_left(room, (lengths[row], -1))
        if at == len(room):
            packs.append([row])
            left, pack = budget - lengths[row], len(packs) - 1
        else:
            left, pack = room.pop(at)
            packs[pack].append(row)
            left -= lengths[row]
        if left > 0 and (most is None or len(packs[pack]) < most):
            bisect.insort(room, (left, pack))
    return packs


def divide(pack: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Divide the rows of a pack into at most `parts` parts of about equal numbers of tokens, the longest part first. Few rows
    give fewer parts, and a pack dominated by one row stays whole, because the other threads would wait for that row."""
    rows = sorted(pack, key=lambda r: -lengths[r])
    for count in range(parts, 1, -1):
        found = _halves(rows, lengths) if count == 2 else _evenly(rows, lengths, count)
        held = [sum(lengths[row] for row in part) for part in found]
        if count * max(held) <= UNEVEN * sum(held):
            return [found[i] for i in sorted(range(count), key=lambda i: -held[i]) if found[i]]
    return [list(pack)]


def _halves(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Rows in two parts whose lengths are as equal as possible: subset sum by dynamic programming (Bellman 1957), with the
    reachable sums as bits of an integer. A greedy choice left one of two threads waiting for a twenty-fifth of each step."""
    # Bit n of sums[i] says whether some of the first i rows have n tokens together.
    sums = [1]
    for row in rows:
        sums.append(sums[-1] | sums[-1] << lengths[row])
    half = sum(lengths[row] for row in rows) // 2
    # The highest reachable sum that is not above half.
    left = (sums[-1] & ((1 << half + 1) - 1)).bit_length() - 1
    found: list[list[int]] = [[], []]
    # Backwards from that sum: a row is not part of it where the sum was reachable without the row.
    for row, before in zip(reversed(rows), reversed(sums[:-1]), strict=True):
        without = before >> left & 1
        found[without].append(row)
        left -= 0 if without else lengths[row]
    return [part[::-1] for part in found]


def _evenly(rows: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Greedy: each row, longest first, into the part with the fewest tokens."""
    found: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    for row in rows:
        place = held.index(min(held))
        found[place].append(row)
        held[place] += lengths[row]
    return found


def _fill_packs(packs: list[list[int]], lengths: Sequence[int], budget: int, most: int | None) -> tuple[list[list[int]], list[int]]:
    """The packs filled well enough to keep, and the rows of the others."""
    keep: list[list[int]] = []
    wait: list[int] = []
    for pack in packs:
        full = sum(lengths[r] for r in pack) >= WELL_FILLED * budget or len(pack) == most
        (keep.append if full else wait.extend)(pack)
    # Where none is filled well, all are kept, or the window would grow forever.
    return (keep, wait) if keep else (packs, [])


def stream(
    lengths: Sequence[int],
    budget: int,
    *,
    seed: int,
    start: int = 0,
    most: int | None = None,
    rows: int | None = None,
    padded: bool = False,
) -> Iterator[tuple[int, int, list[int]]]:
    """Packs without end, epoch after epoch, as (epoch, index in the epoch, rows), beginning at pack number `start`.

    The number of packs may differ between epochs, so the index is found by planning the epochs before it.
    """
    epoch = 0
    while True:
        packs = plan(lengths, budget, seed=seed, epoch=epoch, most=most, rows=rows, padded=padded)
        if start < len(packs):
            for place in range(start, len(packs)):
                yield epoch, place, packs[place]
            start = 0
        else:
            start -= len(packs)
        epoch += 1
