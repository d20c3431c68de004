"""Turning queries and keys in fewer passes: the same numbers and gradients, where the family's formula is the same."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from worker.kernels.cpu import rotary


def angles(tokens: int, width: int, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    turns = torch.outer(torch.arange(tokens).float(), 10_000 ** -(torch.arange(0, width, 2) / width))
    turns = torch.cat((turns, turns), -1)[None]
    return turns.cos().to(kind), turns.sin().to(kind)


@pytest.fixture
def plain():
    """The function as transformers has it, whatever an earlier test has put there."""
    return getattr(modeling_llama.apply_rotary_pos_emb, "plain", modeling_llama.apply_rotary_pos_emb)


@pytest.mark.parametrize(
    ("kind", "table", "close"), [("float64", "float64", 1e-12), ("float32", "float32", 1e-6), ("bfloat16", "float32", 1e-2)]
)
def test_numbers_and_gradients_are_those_of_the_plain_formula(plain, kind, table, close):
    kind, table = getattr(torch, kind), getattr(torch, table)
    cos, sin = angles(11, 8, table)
    draw = torch.Generator().manual_seed(1)
    given = [torch.randn(1, 11, heads * 8, generator=draw).to(kind) for heads in (4, 2)]

    def through(turn):
        leaves = [x.clone().requires_grad_() for x in given]
        q, k = turn(*(x.view(1, 11, -1, 8).transpose(1, 2) for x in leaves), cos, sin)
        ((q**2).sum() + (q.sum(1) * k.sum(1)).sum()).backward()
        return [q, k, *(x.grad for x in leaves)]

    for theirs, ours in zip(through(plain), through(rotary.rotate), strict=True):
        assert theirs.dtype == ours.dtype
        torch.testing.assert_close(ours, theirs, atol=close, rtol=close)


def test_gradients_are_right_to_second_differences():
    cos, sin = angles(3, 4, torch.float64)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotary.rotate(x, x, cos, sin), (x,))


def test_only_a_function_that_does_the_same_is_taken_the_place_of(plain):
    for module, same in ((modeling_llama, True), (modeling_qwen3, True), (modeling_glm, False)):
        own = getattr(module.apply_rotary_pos_emb, "plain", module.apply_rotary_pos_emb)
        home = types.SimpleNamespace(apply_rotary_pos_emb=own)
        assert rotary._patch(home) is same and (home.apply_rotary_pos_emb is own) is not same
    home = types.SimpleNamespace(apply_rotary_pos_emb=plain)
    assert rotary._patch(home) and rotary._patch(home) and home.apply_rotary_pos_emb.plain is plain, "it is settled once"
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    part = angles(3, 4, torch.float32)
    with pytest.raises(RuntimeError):
        home.apply_rotary_pos_emb(q, k, *part)  # as the plain function says: a part of each head is not its business


def test_a_model_says_the_same_with_it(tiny_model, monkeypatch, plain):
    monkeypatch.setattr(modeling_llama, rotary.NAME, plain)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(20)[None]
    before = model(ids).logits
    assert rotary.patch_rotary(model, torch.device("cuda")) == 0 and modeling_llama.apply_rotary_pos_emb is plain
    assert rotary.patch_rotary(model, torch.device("cpu")) == 1 and modeling_llama.apply_rotary_pos_emb is not plain
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-4)
