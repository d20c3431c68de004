"""Recomputed blocks change no loss and no gradient, and keep little; blocks below what learns keep nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from app.strategies import STRATEGIES
from tests.worker.training.test_memory import CPU, Holding
from worker.modeling import fused_layers, packed_attention
from worker.modeling.cross_entropy import head_of, linear_cross_entropy
from worker.runtime.device import Compute
from worker.scoring import held_out

CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=200
)
IDS = torch.arange(3, 163)[None] % 200
PLACES = torch.cat([torch.arange(70), torch.arange(90)])[None]


class Passed:
    """One pass over a model of four blocks: loss, gradients, and the bytes that autograd kept."""

    def __init__(self, name: str, recompute: int, reaches: int | None = None, **settings) -> None:
        torch.manual_seed(2)
        self.model = LlamaForCausalLM(CONFIG)
        self.model.set_attn_implementation(packed_attention.NAME)
        fused_layers.patch_layers(self.model)
        body = STRATEGIES[name](**settings).attach(self.model).train()
        draw = torch.Generator().manual_seed(4)
        for part, p in body.named_parameters():
            if "lora_B" in part:
                p.data = torch.randn(p.shape, generator=draw) * 0.05
        self.count = fused_layers.recompute_layers(self.model, recompute, reaches)
        fused_layers.speed_up(body, Compute(CPU, "cpu", "fp32", torch.float32, 1), 0.0)
        self.blocks = [block.gradient_checkpointing for block in fused_layers.blocks_of(self.model)]
        self.given: list[bool] = []
        for block in fused_layers.blocks_of(self.model):
            block.register_forward_pre_hook(lambda block, given: self.given.append(given[0].requires_grad))
        held = Holding(self.model)
        with held:
            out = held_out.plain_model(body).get_decoder()(input_ids=IDS, position_ids=PLACES, use_cache=False, sequence_lengths=[70, 90])
            loss = linear_cross_entropy(out.last_hidden_state[0, :-1], head_of(self.model), IDS[0, 1:])
        self.kept = held.bytes
        loss.backward()
        self.loss = loss.item()
        self.gradients = {n: p.grad for n, p in body.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "settings", "reaches"), [("lora", {}, None), ("top_layers", {"layers": 2}, 2), ("full", {}, 4)])
def test_the_same_loss_and_gradients(name: str, settings: dict, reaches: int | None) -> None:
    plain = Passed(name, 0, **settings)
    again = Passed(name, 1, reaches, **settings)
    assert again.loss == plain.loss
    assert again.gradients.keys() == plain.gradients.keys() and all(g is not None for g in again.gradients.values())
    for part, gradient in again.gradients.items():
        torch.testing.assert_close(gradient, plain.gradients[part], rtol=1e-5, atol=1e-7, msg=part)
    assert again.kept < plain.kept
    if name == "lora":  # below the lowest block there is nothing to learn, recomputed or not
        assert again.given[0] is plain.given[0] is False


def test_only_blocks_that_gradients_reach_recompute() -> None:
    one, all_ = Passed("top_layers", 1, 2, layers=2), Passed("top_layers", 4, 2, layers=2)
    assert (one.count, one.blocks) == (1, [False, False, True, False])
    assert (all_.count, all_.blocks) == (2, [False, False, True, True])
    assert one.given[:3] == [False] * 3  # nothing is kept of the frozen blocks
    assert Passed("top_layers", 2, 0, layers=2).count == 0
