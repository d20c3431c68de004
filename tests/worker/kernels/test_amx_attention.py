"""Attention by the processor's matrix units: what it gives, its gradients, and what it must not do to others."""

from __future__ import annotations

import threading

import pytest
import torch

from worker.kernels.cpu import attention as amx_attention
from worker.kernels.cpu.attention import Rules
from worker.modeling import packed_attention

needs_units = pytest.mark.skipif(not amx_attention.is_available(), reason="the processor has no matrix units")

LENGTHS = [[75, 113, 40, 1, 32], [300], [5, 0, 91], [32, 64], [1]]
RULES = [
    Rules(0.125, True, 0),
    Rules(0.3, False, 0),
    Rules(0.2, True, 20),
    Rules(0.2, False, 20),
    Rules(0.2, True, 1),
    Rules(0.2, False, 70),
]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], rules: Rules) -> torch.Tensor:
    """The formula in double precision, one sequence after the other."""
    found = []
    for a, b, c in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True):
        b, c = (x.repeat_interleave(a.shape[1] // x.shape[1], 1) for x in (b, c))
        places = torch.arange(a.shape[2])
        back = places[:, None] - places[None]
        seen = torch.ones_like(back, dtype=torch.bool) if not rules.causal else back >= 0
        if rules.window:
            seen &= back.abs() < rules.window
        scores = (a @ b.transpose(2, 3) * rules.scale).masked_fill(~seen, float("-inf"))
        found.append((scores.softmax(-1) @ c).transpose(1, 2))
    return torch.cat(found, 1)


def given(tokens: int, heads: int, groups: int, dim: int) -> list[torch.Tensor]:
    """q, k and v, as parts of one product."""
    torch.manual_seed(0)
    joint = (torch.randn(tokens, (heads + 2 * groups) * dim) * 1.5).bfloat16()
    parts = joint.split([heads * dim, groups * dim, groups * dim], 1)
    return [part.view(1, tokens, -1, dim).transpose(1, 2).detach().requires_grad_() for part in parts]


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@needs_units
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(9, 3, 64), (2, 2, 32), (4, 1, 128)])
def test_it_is_the_formula_within_what_bf16_rounds(lengths: list[int], rules: Rules, heads: int, groups: int, dim: int) -> None:
    own = given(sum(lengths), heads, groups, dim)
    ours = amx_attention.attention(*own, lengths, rules)
    d_out = torch.randn(ours.shape).bfloat16()
    doubled = [x.detach().double().requires_grad_() for x in own]
    theirs = plain(*doubled, lengths, rules)
    assert ours.shape == theirs.shape and apart(ours, theirs) < 3e-3
    for name, found, wanted in zip(
        "qkv", torch.autograd.grad(ours, own, d_out), torch.autograd.grad(theirs, doubled, d_out.double()), strict=True
    ):
        assert found.shape == wanted.shape
        # A query that sees itself alone has no gradient but what rounding leaves.
        assert not wanted.norm() > 1e-9 or apart(found, wanted) < 8e-3, name


@needs_units
def test_nothing_of_a_later_token_or_another_sequence_is_seen() -> None:
    own, lengths = given(150, 4, 2, 64), [70, 80]
    before = amx_attention.attention(*own, lengths, Rules(0.125, True, 0))
    changed = [x.detach().clone() for x in own]
    for x in changed:
        x[:, :, 50:70] = 30.0  # the first sequence's end
    after = amx_attention.attention(*changed, lengths, Rules(0.125, True, 0))
    assert torch.equal(before[:, :50], after[:, :50]) and torch.equal(before[:, 70:], after[:, 70:])
    assert not torch.equal(before[:, 50:70], after[:, 50:70])


@needs_units
def test_large_scores_and_what_is_no_number() -> None:
    q, k, v = (x.detach() for x in given(40, 1, 1, 32))
    found = amx_attention.attention(100 * q, 100 * k, v, [40], Rules(1.0, True, 0))
    assert found.isfinite().all() and apart(found, plain(*(x.double() for x in (100 * q, 100 * k, v)), [40], Rules(1.0, True, 0))) < 0.02
    q[0, 0, 7] = float("nan")
    found = amx_attention.attention(q, k, v, [40], Rules(0.2, True, 0))
    assert found[0, 7].isnan().all() and found.isnan().any(-1).sum() == 1
    k[0, 0, 5] = float("nan")
    assert amx_attention.attention(q, k, v, [40], Rules(0.2, True, 0))[0, 5:].isnan().all()


@needs_units
def test_threads_beside_each_other_and_torchs_own_products_stay_right() -> None:
    """The units' state is a thread's own and is given back: torch's kernels set it up for themselves."""
    own, lengths = [x.detach() for x in given(200, 4, 2, 64)], [120, 80]
    wanted = amx_attention.attention(*own, lengths, Rules(0.125, True, 0))
    a, b = (torch.randn(256, 256).bfloat16() for _ in range(2))
    product, wrong = a @ b, []

    def work() -> None:
        for _ in range(30):
            if not torch.equal(amx_attention.attention(*own, lengths, Rules(0.125, True, 0)), wanted) or not torch.equal(a @ b, product):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_units
def test_a_models_attention_takes_it_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys that were turned in float32 as well, as full tuning has them."""
    q, k, v = given(96, 4, 2, 32)
    called = []
    own = amx_attention.attention
    monkeypatch.setattr(amx_attention, "attention", lambda *args: called.append(1) or own(*args))
    layer = torch.nn.Module()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = packed_attention.packed_attention(layer, q.float(), k.float(), v, None, sequence_lengths=[60, 36], scaling=0.2)
    assert called and found.dtype == torch.bfloat16
    assert apart(found, plain(*(x.detach().double() for x in (q, k, v)), [60, 36], Rules(0.2, True, 0))) < 3e-3
    # What it cannot do goes the other way: dropout, a soft cap, odd heads, float32.
    packed_attention.packed_attention(layer, q, k, v, None, dropout=0.1, sequence_lengths=[60, 36])
    packed_attention.packed_attention(layer, q, k, v, None, softcap=5.0, sequence_lengths=[60, 36])
    packed_attention.packed_attention(layer, q.float(), k.float(), v.float(), None, sequence_lengths=[60, 36])
    packed_attention.packed_attention(layer, *(x[..., :24] for x in (q, k, v)), None, sequence_lengths=[60, 36])
    assert len(called) == 1


@needs_units
def test_bad_input_is_refused() -> None:
    q, k, v = given(40, 2, 1, 32)
    with pytest.raises(ValueError, match="sequences of 39 tokens in a pack of 40"):
        amx_attention.attention(q, k, v, [20, 19], Rules(0.2, True, 0))
    with pytest.raises(ValueError, match="bf16"):
        amx_attention.attention(q.float(), k, v, [40], Rules(0.2, True, 0))
    with pytest.raises(ValueError, match="scale of 0"):
        amx_attention.attention(q, k, v, [40], Rules(0, True, 0))
    with pytest.raises(ValueError, match="do not fit together"):
        amx_attention.attention(q, k, v[:, :, :39], [40], Rules(0.2, True, 0))
