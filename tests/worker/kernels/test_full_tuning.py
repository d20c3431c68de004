"""Layers that learn in full on a CPU: the gradients autograd gives, at less memory, and rounded weights that follow the optimizer."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from worker.data.batching import Tokenised, make_batch
from worker.kernels.cpu import full_tuning
from worker.kernels.cpu.full_tuning import FullEmbedding, FullLinear, patch_full_tuning
from worker.modeling import fused_layers, packed_attention
from worker.modeling.cross_entropy import head_of, linear_cross_entropy
from worker.runtime.device import Compute
from worker.scoring import held_out
from worker.training import optim

CPU = torch.device("cpu")
WIDTHS = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 9000,
}
FAMILIES = {
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**WIDTHS, tie_word_embeddings=True)),
    "untied, with a token that stands for nothing": lambda: LlamaForCausalLM(LlamaConfig(**WIDTHS, tie_word_embeddings=False, pad_token_id=3)),
    "biases": lambda: Qwen2ForCausalLM(Qwen2Config(**WIDTHS, tie_word_embeddings=True)),
    "a table that scales": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**{**WIDTHS, "num_hidden_layers": 6}, head_dim=12, tie_word_embeddings=True, final_logit_softcapping=None)
    ),
}  # fmt: skip


def engine_of(precision: str, threads: int = 2) -> Compute:
    return Compute(CPU, "cpu", precision, torch.float32, threads)


def model_of(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]().train()
    model.set_attn_implementation(packed_attention.NAME)
    fused_layers.patch_layers(model)
    return model


def data_of(tokens: int) -> Tokenised:
    import numpy as np

    rows = [torch.randint(0, 9000, (tokens,), generator=torch.Generator().manual_seed(i)).int().numpy() for i in range(4)]
    rows[0][2] = 3
    starts = np.arange(5, dtype=np.int64) * tokens
    trained = np.ones(starts[-1], bool)
    trained[starts[:-1]] = False
    return Tokenised(np.concatenate(rows), trained, starts, list(range(4)), 0, [])


def gradients(model: torch.nn.Module, engine: Compute, packs: list[list[int]], tokens: int, wholes=()) -> tuple[float, dict]:
    data = data_of(tokens)

    def one(pack: list[int]) -> float:
        batch = make_batch(data, pack, CPU)
        hidden = held_out.hidden_states(model, batch, engine)
        loss = linear_cross_entropy(hidden, head_of(model), batch.targets, engine.compute) / 100
        loss.backward()
        return loss.item()

    for parameter in model.parameters():
        parameter.grad = None
    with engine.abreast.in_order(model.parameters()):
        found = sum(engine.abreast.map(one, packs))
    full_tuning.add_parts(wholes)
    return found, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [9, 60])  # few: the logits' gradients are smaller than the head's
def test_gradients_are_those_of_autograd(family: str, precision: str, tokens: int) -> None:
    model, engine, packs = model_of(family), engine_of(precision), [[0, 1], [2, 3]]
    loss, expected = gradients(model, engine, packs, tokens)
    wholes = patch_full_tuning(model, engine)
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert sum(type(m) is FullLinear for m in model.modules()) == linears - (family == "a table that scales")
    assert any(type(m) is FullEmbedding for m in model.modules()) == (family != "a table that scales")
    for _ in range(2):  # the second time gradients are put where the first ones were
        ours, found = gradients(model, engine, packs, tokens, wholes)
        assert ours == pytest.approx(loss, rel=1e-5 if precision == "fp32" else 2e-3)
        assert found.keys() == expected.keys()
        largest = max(gradient.norm() for gradient in expected.values())
        for name, gradient in expected.items():  # keys' biases have none but by rounding: a softmax does not see them
            reference = largest if name.endswith("k_proj.bias") else gradient.norm()
            assert (found[name] - gradient).norm() <= (1e-5 if precision == "fp32" else 2e-2) * reference, name
    again = gradients(model, engine, packs, tokens, wholes)[1]
    assert all(torch.equal(found[name], again[name]) for name in found), "the same to the bit"


def test_weights_that_layers_share_learn_from_all_of_them() -> None:
    model, engine, packs = model_of("tied"), engine_of("bf16"), [[0, 1], [2, 3]]
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight, second.v_proj.weight = first.q_proj.weight, first.k_proj.weight
    loss, expected = gradients(model, engine, packs, 9)
    wholes = patch_full_tuning(model, engine)
    assert first.q_proj.group is None and first.o_proj.group is None and model.model.layers[1].mlp.up_proj.group is not None
    ours, found = gradients(model, engine, packs, 9, wholes)
    assert ours == pytest.approx(loss, rel=2e-3) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 2e-2 * gradient.norm(), name


def test_rounded_weights_follow_the_optimizer_and_whatever_else_moves_them() -> None:
    model, engine = model_of("tied"), engine_of("bf16")
    wholes = patch_full_tuning(model, engine)
    names = dict(model.named_parameters())
    optimizer = optim.make_optimizer(names, 1e-2, 0.0)

    def loss_now() -> float:
        return gradients(model, engine, [[0, 1], [2, 3]], 9, wholes)[0]

    def loss_anew() -> float:
        fresh = model_of("tied")
        fresh.load_state_dict(model.state_dict())
        return gradients(fresh, engine, [[0, 1], [2, 3]], 9)[0]

    seen = [loss_now()]
    for _ in range(2):
        optim.optimizer_step(optimizer, torch.zeros(()))
        full_tuning.move(wholes, engine.abreast)
        seen.append(loss_now())
        assert seen[-1] == pytest.approx(loss_anew(), rel=1e-3)
    assert seen[2] < seen[1] < seen[0]
    with torch.no_grad():
        for parameter in names.values():
            parameter.mul_(0.5)
    assert loss_now() == pytest.approx(loss_anew(), rel=1e-3) and loss_now() != pytest.approx(seen[-1], rel=1e-2)


def test_outside_a_pass_in_its_type_a_layer_is_as_before() -> None:
    """In float32 beside a job in bf16, as what is not under autocast: the layer's own product, with autograd's gradient."""
    model, engine = model_of("tied"), engine_of("bf16")
    layer = model.model.layers[0].mlp
    x = torch.randn(3, 48)
    before = layer(x)
    patch_full_tuning(model, engine)
    after = layer(x)
    assert torch.equal(before, after)
    after.sum().backward()
    assert layer.down_proj.weight.grad is not None
    with torch.no_grad(), engine.autocast():
        assert layer(x).dtype == torch.bfloat16 and torch.allclose(layer(x).float(), before, atol=1e-2)


def test_an_encoder_learns_in_full_too() -> None:
    torch.manual_seed(0)
    widths = {k: v for k, v in WIDTHS.items() if k != "num_key_value_heads"}
    model = BertModel(BertConfig(**widths, pad_token_id=0), add_pooling_layer=False).eval()
    ids = torch.randint(0, 9000, (3, 7))
    ids[0, 5:] = 0

    def found(wholes=()) -> dict[str, torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = None
        model(input_ids=ids).last_hidden_state.pow(2).sum().backward()
        full_tuning.add_parts(wholes)
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = found()
    ours = found(patch_full_tuning(model, engine_of("fp32")))
    assert not expected["embeddings.word_embeddings.weight"][0].any()
    for name, gradient in expected.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max()), name


def test_what_is_kept_for_the_backward_pass_is_less() -> None:
    """In float32: a gated layer keeps two of its four wide tensors. `tests/worker/training/test_memory.py` counts them exactly."""
    kept: dict[str, int] = {}

    def count(key: str, tensor: torch.Tensor) -> torch.Tensor:
        kept[key] = kept.get(key, 0) + tensor.nbytes
        return tensor

    model, x = model_of("tied"), torch.randn(500, 48, requires_grad=True)
    layer = model.model.layers[0].mlp
    layer.__class__ = type(layer).plain
    for key in ("before", "after"):
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(count, key), lambda tensor: tensor):
            layer(x)
        patch_full_tuning(model, engine_of("fp32"))
    assert kept["before"] - kept["after"] >= 2 * 500 * 96 * 4
