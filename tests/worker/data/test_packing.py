"""Packs hold every row once, keep to the budget, are nearly full, and follow from the seed."""

from __future__ import annotations

import itertools
import math
import random
import statistics

from hypothesis import example, given
from hypothesis import strategies as st

from worker.data.packing import UNEVEN, divide, plan, stream, with_general

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=400)


@given(lengths=lengths, budget=st.integers(50, 600), seed=st.integers(0, 9), epoch=st.integers(0, 3), most=st.none() | st.integers(1, 5))
def test_every_row_once_within_the_budget(lengths: list[int], budget: int, seed: int, epoch: int, most: int | None) -> None:
    packs = plan(lengths, budget, seed=seed, epoch=epoch, most=most)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[r] for r in pack) <= budget or len(pack) == 1
        assert most is None or len(pack) <= most
    assert packs == plan(lengths, budget, seed=seed, epoch=epoch, most=most)


def test_packs_are_nearly_full_and_mixed() -> None:
    sizes = [60 + (i * 37) % 141 for i in range(2000)]
    packs = plan(sizes, 2048, seed=1, epoch=0)
    fill = sum(sizes) / (2048 * len(packs))
    assert fill > 0.98
    first, second = (plan(sizes, 2048, seed=1, epoch=e) for e in (0, 1))
    assert first != second
    means = [sum(sizes[r] for r in pack) / len(pack) for pack in packs]
    # Packing must not sort the data: neighbours in time are as unlike as packs far apart.
    near = sum(abs(a - b) for a, b in itertools.pairwise(means)) / (len(means) - 1)
    far = sum(abs(a - b) for a, b in itertools.combinations(means, 2)) / (len(means) * (len(means) - 1) / 2)
    assert near > 0.6 * far


def test_a_step_holds_short_and_long_rows() -> None:
    """As many rows in each step as chance would put there, within a little: no step of short rows alone."""
    draw = random.Random(0)
    sizes = [min(1024, max(16, int(180 * math.exp(draw.gauss(0, 0.8))))) for _ in range(3000)]
    packs = plan(sizes, 16_384, seed=1, epoch=0)
    assert sum(sizes) / (16_384 * len(packs)) > 0.97
    rows = [len(pack) for pack in packs]
    by_chance = statistics.pstdev(sizes) / statistics.mean(sizes) * math.sqrt(statistics.mean(rows))
    assert statistics.pstdev(rows) < 1.5 * by_chance  # longest first: 7 times


def test_a_stream_goes_on_from_any_place() -> None:
    sizes = [10 + i % 17 for i in range(50)]
    whole = list(itertools.islice(stream(sizes, 64, seed=3), 60))
    for start in (0, 1, 13, 14, 40):
        assert list(itertools.islice(stream(sizes, 64, seed=3, start=start), 60 - start)) == whole[start:]


@given(
    lengths=st.lists(st.integers(1, 300), min_size=20, max_size=60),
    share=st.floats(0.02, 0.4),
    seed=st.integers(0, 9),
    start=st.integers(0, 40),
)
def test_general_rows_have_their_share_of_the_tokens(lengths: list[int], share: float, seed: int, start: int) -> None:
    general = [20 + i % 90 for i in range(25)]
    every, budget, count = lengths + general, 400, 200

    def packs(first: int = 0, most: int | None = None):
        own = stream(lengths, budget, seed=seed)
        mixed = with_general(own, every, len(lengths), share, seed=seed, room=int(budget / (1 - share)) + 110, most=most)
        return list(itertools.islice(mixed, first, count))

    found = packs()
    assert packs(start) == found[start:]
    for (epoch, place, mixed), (*at, own) in zip(found, stream(lengths, budget, seed=seed), strict=False):
        assert [epoch, place] == at and mixed[: len(own)] == own
        assert all(row >= len(lengths) for row in mixed[len(own) :])
        assert sum(every[row] for row in mixed) <= int(budget / (1 - share)) + 110
    played = [row for _, _, pack in found for row in pack if row >= len(lengths)]
    tokens = sum(every[row] for _, _, pack in found for row in pack)
    assert abs(sum(every[row] for row in played) - share * tokens) <= 110 / 2 / (1 - share)
    often = [played.count(row) for row in range(len(lengths), len(every))]
    assert max(often) - min(often) <= 1, "each once before any comes again"
    few = packs(most=3)
    assert all(len(pack) <= max(3, sum(row < len(lengths) for row in pack)) for _, _, pack in few)


@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=11))
def test_two_parts_are_as_even_as_can_be(lengths: list[int]) -> None:
    nearest = min(abs(sum(lengths) - 2 * sum(chosen)) for n in range(len(lengths)) for chosen in itertools.combinations(lengths, n))
    found = [sum(lengths[r] for r in part) for part in divide(range(len(lengths)), lengths, 2)]
    assert found == [sum(lengths)] or abs(found[0] - found[1]) == nearest


@given(lengths=lengths, parts=st.integers(1, 8))
@example(lengths=[5, *[6] * 6], parts=6)  # in six parts one would have two rows
def test_parts_of_a_pack_are_even_or_it_stays_whole(lengths: list[int], parts: int) -> None:
    pack = list(range(len(lengths)))
    found = divide(pack, lengths, parts)
    assert sorted(itertools.chain(*found)) == pack and 1 <= len(found) <= parts and all(found)
    held = [sum(lengths[r] for r in part) for part in found]
    assert held == sorted(held, reverse=True), "the longest begins, since the others wait for its gradients"
    if len(found) > 1:
        assert held[0] <= UNEVEN * sum(held) / len(found)
    elif parts > 1:
        assert max(lengths) > sum(lengths) / 2, "only a long row keeps a pack whole"
