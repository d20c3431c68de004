"""The share of the training rows that a learning curve's jobs learn from."""

from __future__ import annotations

from collections import Counter

import pytest

from worker.batches import Row, share, split

ROWS = [Row(n, {"text": f"text {n}"}) for n in range(1, 201)]
LABELLED = [Row(n, {"text": f"text {n}", "label": "rare" if n % 50 == 0 else "even" if n % 2 == 0 else "odd"}) for n in range(1, 201)]


def test_a_smaller_share_lies_within_a_larger_one_and_keeps_the_order():
    train, held = split(ROWS, 0.1, 7)
    quarter, half = share(train, 0.25, 7), share(train, 0.5, 7)
    assert (len(train), len(held), len(quarter), len(half)) == (180, 20, 45, 90)
    assert {row.line for row in quarter} < {row.line for row in half} < {row.line for row in train}
    assert [row.line for row in half] == sorted(row.line for row in half)
    assert share(train, 1.0, 7) == train


def test_the_seed_and_the_content_decide_not_the_order_of_the_rows():
    again = share(ROWS[::-1], 0.3, 7)
    assert sorted(row.line for row in again) == [row.line for row in share(ROWS, 0.3, 7)]
    assert share(ROWS, 0.3, 8) != share(ROWS, 0.3, 7)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_every_class_gives_its_share_and_at_least_one_row(fraction):
    whole, found = Counter(row.row["label"] for row in LABELLED), Counter(row.row["label"] for row in share(LABELLED, fraction, 1))
    assert found == {label: max(1, round(fraction * count)) for label, count in whole.items()}


def test_equal_rows_are_counted_as_rows():
    assert len(share([Row(n, {"text": "same"}) for n in range(100)], 0.5, 3)) == 50


def test_one_row_is_left_of_the_smallest_share():
    assert len(share(ROWS[:3], 0.01, 1)) == 1
