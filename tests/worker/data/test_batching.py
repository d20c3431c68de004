"""The share of the training rows that a learning curve's jobs learn from, and the shapes of packs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from app.spec import Split
from tests.worker.orders import chat_rows
from worker.data.batching import Row, make_batch, share, split, tokenise
from worker.modeling import cross_entropy, packed_attention, token_logprobs

ROWS = [Row(n, {"text": f"text {n}"}) for n in range(1, 201)]
LABELLED = [Row(n, {"text": f"text {n}", "label": "rare" if n % 50 == 0 else "even" if n % 2 == 0 else "odd"}) for n in range(1, 201)]


def test_a_smaller_share_lies_within_a_larger_one_and_keeps_the_order():
    train, held = split(ROWS, 0.1, 7)
    quarter, half = share(train, 0.25, 7), share(train, 0.5, 7)
    assert (len(train), len(held), len(quarter), len(half)) == (180, 20, 45, 90)
    assert {row.line for row in quarter} < {row.line for row in half} < {row.line for row in train}
    assert [row.line for row in half] == sorted(row.line for row in half)
    assert share(train, 1.0, 7) == train


def test_a_split_with_a_seed_of_its_own_is_the_same_for_runs_with_other_seeds():
    held = [split(ROWS, 0.1, seed, Split(seed=5))[1] for seed in (7, 8)]
    assert held[0] == held[1] == split(ROWS, 0.1, 5)[1] != split(ROWS, 0.1, 7)[1]
    assert Split(method="stratified", column="label").model_dump(exclude_none=True) == {"method": "stratified", "column": "label"}


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


@pytest.mark.parametrize("count", [3, 7])
def test_packs_on_a_processor_have_few_lengths(tokenizer, count: int) -> None:
    """A processor's library keeps a program for each shape, so packs are filled up; nothing of the filling is counted or learnt."""
    data = tokenise(tokenizer, [Row(i, row) for i, row in enumerate(chat_rows(count), 1)], "dialogue", 64)
    batch = make_batch(data, range(count), torch.device("cpu"))
    filled = batch.input_ids.shape[1]
    assert filled % packed_attention.MULTIPLE == 0 and 0 <= filled - data.tokens < packed_attention.MULTIPLE
    assert batch.tokens == data.tokens == sum(data.lengths) and batch.trained == int(data.trained.sum()) == len(batch.targets)
    assert int(batch.sources.max()) < data.tokens and sum(batch.arguments["sequence_lengths"]) == filled
    assert batch.position_ids[0, : data.tokens].tolist() == [place for n in data.lengths for place in range(n)]


@pytest.mark.parametrize("count", [1, 31, 32, 45])
def test_products_are_filled_up_without_a_trace(count: int) -> None:
    """In bf16 the head reads a multiple of rows; losses, hits and gradients are those of the rows that are there."""
    draw = torch.Generator().manual_seed(count)
    weight = torch.randn(50, 16, generator=draw).bfloat16()
    targets = torch.randint(0, 50, (count,), generator=draw)
    given = torch.randn(count, 16, generator=draw).bfloat16()
    wanted = given.float().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(wanted @ weight.float().t(), targets, reduction="none")
    theirs.sum().backward()
    for made in (
        lambda hidden: cross_entropy.linear_cross_entropy(hidden, cross_entropy.Head(weight, None), targets, torch.bfloat16),
        lambda hidden: token_logprobs.token_nats(hidden, cross_entropy.Head(weight, None), targets, torch.bfloat16),
    ):
        hidden = given.clone().requires_grad_()
        found = made(hidden)
        assert found.shape in ((), (count,))
        torch.testing.assert_close(found.sum(), theirs.sum().detach(), atol=0.05, rtol=0.02)
        found.sum().backward()
        torch.testing.assert_close(hidden.grad.float(), wanted.grad, atol=0.1, rtol=0.05)
    losses, hits = cross_entropy.score(given, cross_entropy.Head(weight, None), targets, torch.bfloat16)
    torch.testing.assert_close(losses, theirs.detach(), atol=0.1, rtol=0.05)
    assert hits.shape == (count,)
