"""The fused LoRA layers against peft's own, and bf16 against float32."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.strategies import STRATEGIES
from app.strategies.pissa import whole_correction
from worker.modeling import fused_layers, packed_attention
from worker.modeling.cross_entropy import head_of, linear_cross_entropy
from worker.modeling.fused_lora import Fused, _Product, fuse

IDS = torch.arange(3, 99)[None] * 7 % 512
PLACES = torch.cat([torch.arange(40), torch.arange(56)])[None]


def bare(folder, dtype=torch.float32):
    """The small model before anything is attached."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=packed_attention.NAME)
    fused_layers.patch_layers(model)
    return model


def build(folder, dtype=torch.float32, fused=True, grouped=True, young=False, **config):
    """The small model with LoRA of a correction that is not zero; `young` makes it a thousandth of that."""
    model = bare(folder, dtype)
    torch.manual_seed(1)
    model = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config})
    )
    draw = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=draw) * (0.0003 if young and "lora_B" in name else 0.05)
    if fused:
        fuse(model, grouped)
    return model.train()


def run(model, dtype=torch.float32):
    """Loss and the gradient of all that learns."""
    inner = model.get_base_model()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        out = inner.get_decoder()(input_ids=IDS, position_ids=PLACES, use_cache=False, sequence_lengths=[40, 56])
    hidden = out.last_hidden_state[0]
    loss = linear_cross_entropy(hidden[:-1], head_of(inner), IDS[0, 1:], dtype) / (IDS.shape[1] - 1)
    model.zero_grad()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("config", [{}, {"target_modules": ["q_proj", "up_proj"]}, {"use_rslora": True}])
def test_fused_equals_peft(tiny_model, grouped, config):
    loss, gradient = run(build(tiny_model, fused=False, **config))
    ours, own = run(build(tiny_model, grouped=grouped, **config))
    assert abs(loss - ours) < 1e-6
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-7)


def test_bf16_follows_float32(tiny_model):
    loss, gradient = run(build(tiny_model))
    ours, own = run(build(tiny_model, torch.bfloat16), torch.bfloat16)
    assert abs(loss - ours) < 5e-3
    assert cosine(gradient, own) > 0.999


def test_a_young_correction_survives_rounding():
    """Far below the last digit of what it is added to, it still shows in the mean; added after rounding it is lost."""
    torch.manual_seed(0)
    x, weight = torch.randn(512, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    down, up = torch.randn(4, 64), torch.randn(32, 4) * 1e-4
    wanted = x.float() @ down.t() @ up.t()
    plain = (x @ weight.t()).float()
    ours = _Product.apply(x, None, (1.0,), (None,), None, weight, None, down, up).float() - plain
    after = ((x @ weight.t()) + wanted.bfloat16()).float() - plain
    share = lambda moved: float((moved * wanted).sum() / wanted.square().sum())  # noqa: E731
    assert 0.7 < share(ours) < 1.3
    assert share(after) < 0.5


def test_thirty_steps_learn_alike(tiny_model):
    """Float32 with peft's layers and bf16 with ours end at the same loss, which has fallen."""
    ends = []
    for dtype, fused in ((torch.float32, False), (torch.bfloat16, True)):
        model = build(tiny_model, dtype, fused, young=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(35):
            losses.append(run(model, dtype)[0])
            optimizer.step()
        ends.append(losses)
    assert ends[0][-1] < ends[0][0] - 0.3
    assert abs(sum(ends[0][-5:]) - sum(ends[1][-5:])) / 5 < 0.02


def test_what_is_saved_is_what_peft_saves(tiny_model, tmp_path):
    strategy = STRATEGIES["lora"]()
    torch.manual_seed(4)
    plain = strategy.attach(AutoModelForCausalLM.from_pretrained(tiny_model))
    ours = copy.deepcopy(plain)
    assert fuse(ours) == 14
    for name, model in (("plain", plain), ("ours", ours)):
        (tmp_path / name).mkdir()
        strategy.save(model, tmp_path / name)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("plain", "ours")]
    assert files[0].keys() == files[1].keys()
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "ours")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])


def test_copies_switched_off_and_merged(tiny_model):
    model = build(tiny_model).eval()
    with torch.no_grad():
        with_it = model(input_ids=IDS).logits
        again = copy.deepcopy(model)(input_ids=IDS).logits
        with model.disable_adapter():
            without = model(input_ids=IDS).logits
        merged = model.merge_and_unload()(input_ids=IDS).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_model)(input_ids=IDS).logits
    assert torch.equal(with_it, again)
    torch.testing.assert_close(without, base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, with_it, rtol=1e-4, atol=1e-5)
    assert float((with_it - without).abs().max()) > 1e-3


def test_dropout_leaves_layers_to_peft(tiny_model):
    model = build(tiny_model, lora_dropout=0.1)
    assert not any(isinstance(m, Fused) for m in model.modules())


def test_no_gradient_below_the_lowest_layer_that_learns(tiny_model):
    """Where the input needs no gradient, none is made: the product back through the frozen weight is not run."""
    model = build(tiny_model, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    seen = []
    hook = model.get_base_model().model.layers[0].register_full_backward_hook(lambda *_: seen.append(1))
    run(model)
    hook.remove()
    assert seen == []
    x = torch.randn(5, 8)
    parts = torch.randn(6, 8), None, torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    _Product.apply(x, None, (1.0,), (None,), None, *parts).sum().backward()
    assert x.grad is None and parts[2].grad is not None


# PiSSA ----------------------------------------------------------------------------------------------------------------


def pissa(folder, dtype=torch.float32, fused=True, grouped=True, seed=1, moved=0.0, **settings):
    """The small model with PiSSA attached, and what learns moved from its start by noise of that size."""
    model = bare(folder, dtype)
    torch.manual_seed(seed)
    model = STRATEGIES["pissa"](**{"rank": 4, **settings}).attach(model)
    draw = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=draw) * moved
    if fused:
        assert fuse(model, grouped) == 14
    return model.train()


def logits(model, dtype=torch.float32):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        return model.eval()(input_ids=IDS).logits.float()


def test_pissa_begins_as_its_base(tiny_model):
    """To the bit, beside weights in bf16: as a LoRA that adds nothing yet."""
    model = pissa(tiny_model, torch.bfloat16)
    inner = dict(model.get_base_model().named_parameters())
    for name, weight in bare(tiny_model, torch.bfloat16).named_parameters():
        assert torch.equal(inner[name] if name in inner else inner[name.replace(".weight", ".base_layer.weight")], weight), name
    unlearnt = STRATEGIES["lora"]().attach(bare(tiny_model, torch.bfloat16))
    fuse(unlearnt)
    assert torch.equal(logits(model, torch.bfloat16), logits(unlearnt, torch.bfloat16))
    for layer in (module for module in model.modules() if isinstance(module, Fused)):
        assert float((layer.scaling["default"] * layer.first_up @ layer.first_down).norm() / layer.base_layer.weight.float().norm()) > 0.2


def test_pissa_in_bf16_is_loaded_as_it_was_trained(tiny_model, tmp_path):
    """While W − s B₀ A₀ was rounded to bf16 for the training, the largest difference was 6e-3 of the largest logit."""
    model = pissa(tiny_model, torch.bfloat16)
    before = logits(model, torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(12):
        losses.append(run(model.train(), torch.bfloat16)[0])
        optimizer.step()
    after = logits(model, torch.bfloat16)
    assert losses[-1] < losses[0] - 0.03 and float((after - before).abs().max()) > 0.05 * float(before.abs().max())
    strategy = STRATEGIES["pissa"](rank=4)
    strategy.save(model, tmp_path)
    again = strategy.load(bare(tiny_model, torch.bfloat16), tmp_path)
    assert fuse(again) == 14
    assert float((logits(again, torch.bfloat16) - after).abs().max()) < 1e-3 * float(after.abs().max())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("fused", [False, True])
def test_pissa_is_its_formula(tiny_model, dropout, fused):
    """A layer's output and gradients; what is dropped is dropped from what learns alone."""
    model = pissa(tiny_model, fused=False, moved=0.02, dropout=dropout)
    if fused:
        assert fuse(model, grouped=False) == (0 if dropout else 14)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    down, up, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    x, dy = torch.randn(3, 7, layer.in_features, requires_grad=True), torch.randn(3, 7, layer.out_features)
    torch.manual_seed(6)
    found = layer(x)
    own = torch.autograd.grad(found, (x, down, up), dy)
    torch.manual_seed(6)
    dropped = torch.nn.functional.dropout(x, dropout)
    frozen = layer.base_layer.weight - s * layer.first_up @ layer.first_down
    wanted = x @ frozen.t() + s * (dropped @ down.t()) @ up.t()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(own, torch.autograd.grad(wanted, (x, down, up), dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
def test_pissa_fused_equals_peft(tiny_model, grouped):
    loss, gradient = run(pissa(tiny_model, fused=False, moved=0.02))
    ours, own = run(pissa(tiny_model, grouped=grouped, moved=0.02))
    assert abs(loss - ours) < 1e-6
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-6)


def test_what_pissa_learnt_first_survives_rounding(tiny_model):
    """A change far below the last digit in bf16 of what it changes; as [A; A₀] and [B, −B₀] next to nothing of it would be left."""
    layer = pissa(tiny_model, fused=False).get_base_model().model.layers[0].mlp.down_proj
    down, up = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    for part in (down, up):
        part += 1e-4 * part.abs().mean() * torch.randn_like(part)
    wanted = up.double() @ down.double() - layer.first_up.double() @ layer.first_down.double()
    whole = [factor.detach() for factor in whole_correction(layer)]
    plain = torch.cat([down, layer.first_down]), torch.cat([up, -layer.first_up], 1)
    far = [float((b.bfloat16().double() @ a.bfloat16().double() - wanted).norm() / wanted.norm()) for a, b in (whole, plain)]
    assert far[0] < 0.01 and far[1] > 0.5, far


def test_pissa_copied_switched_off_and_resumed(tiny_model):
    """Another seed gives other random projections, and a start that is other in its last digits."""
    strategy, model = STRATEGIES["pissa"](rank=4), pissa(tiny_model, fused=False, moved=0.02)
    assert not [name for name in model.state_dict() if "first_" in name]
    learnt, wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}, logits(model)
    copied = copy.deepcopy(model)
    assert fuse(copied) == 14
    torch.testing.assert_close(logits(copied), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), wanted)  # a copy that is fused leaves its model as it was
    for one in (model, copied):
        with one.disable_adapter():
            torch.testing.assert_close(logits(one), logits(bare(tiny_model)), rtol=1e-4, atol=1e-5)
    again = pissa(tiny_model, seed=5)
    for name, p in again.named_parameters():
        if p.requires_grad:
            p.data = learnt[name].data
    assert not torch.equal(logits(again), logits(copied))
    strategy.restore(again, {name: value.clone() for name, value in strategy.extra_state(model).items()})
    assert torch.equal(logits(again), logits(copied))
