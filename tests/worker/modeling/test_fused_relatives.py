"""DoRA, AdaLoRA, VeRA and (IA)³ computed in our own layers: against peft's own layers, against their formulas, and bf16 against float32."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from app.strategies import STRATEGIES
from tests.worker.modeling.test_fused_lora import IDS, bare, cosine, logits, run
from worker.modeling import fused_dora, fused_ia3, fused_layers, fused_lora, fused_vera, packed_attention
from worker.modeling.fused_ia3 import FusedIa3
from worker.modeling.fused_lora import Fused
from worker.modeling.fused_vera import FusedVera
from worker.runtime.device import Compute

RELATIVES = {
    "dora": {"rank": 4},
    "adalora": {"rank": 3, "start_rank": 5},
    "vera": {"rank": 24},
    "ia3": {},
}
LAYERS = {name: 6 if name == "ia3" else 14 for name in RELATIVES}
each = pytest.mark.parametrize("name", RELATIVES)


def moved(model, size=0.05):
    """What learns, away from where it starts: corrections begin with nothing."""
    draw = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=draw) * size
            p.data += noise * p.abs().mean() if "magnitude" in name else noise
    return model


def fuse(model, grouped=True):
    found = fused_lora.fuse(model, grouped) or fused_vera.fuse(model, grouped) or fused_ia3.fuse(model)
    assert found == sum(isinstance(m, Fused | FusedVera | FusedIa3) for m in model.modules())
    return found


def build(folder, name, dtype=torch.float32, fused=True, grouped=True, size=0.05, **settings):
    torch.manual_seed(1)
    model = moved(STRATEGIES[name](**{**RELATIVES[name], **settings}).attach(bare(folder, dtype)), size)
    if fused:
        assert fuse(model, grouped) == (LAYERS[name] if settings.get("layers", "all-linear") == "all-linear" else 8)
    return model.train()


def answer(model):
    """Logits of a model as it stands, whether it learns or not."""
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@each
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("layers", ["all-linear", "attention"])
def test_fused_equals_peft(tiny_model, name, grouped, layers):
    chosen = {} if name == "ia3" else {"layers": layers}
    loss, gradient = run(build(tiny_model, name, fused=False, **chosen))
    ours, own = run(build(tiny_model, name, grouped=grouped, **chosen))
    assert abs(loss - ours) < 1e-6
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=2e-6 * float(gradient.abs().max()))
    assert float(gradient.abs().max()) > 1e-4


@each
def test_bf16_follows_float32(tiny_model, name):
    loss, gradient = run(build(tiny_model, name))
    ours, own = run(build(tiny_model, name, torch.bfloat16), torch.bfloat16)
    assert abs(loss - ours) < 5e-3
    assert cosine(gradient, own) > 0.999


@each
def test_what_is_saved_loads_and_answers_alike(tiny_model, tmp_path, name):
    strategy = STRATEGIES[name](**RELATIVES[name])
    plain = build(tiny_model, name, fused=False)
    ours = copy.deepcopy(plain)
    assert fuse(ours) == LAYERS[name]
    for folder, model in (("plain", plain), ("ours", ours)):
        (tmp_path / folder).mkdir()
        strategy.save(model, tmp_path / folder)
    saved = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "ours")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])
    wanted = logits(ours)
    torch.testing.assert_close(logits(strategy.load(bare(tiny_model), tmp_path / "ours")), wanted, rtol=1e-4, atol=1e-5)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(bare(tiny_model)))
    torch.testing.assert_close(logits(ours.merge_and_unload()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in RELATIVES if name != "ia3"])
def test_dropout_leaves_them_to_peft(tiny_model, name):
    strategy = STRATEGIES[name](**RELATIVES[name], dropout=0.1)
    model = strategy.attach(bare(tiny_model))
    assert fuse(model) == 0
    assert not strategy.joins() and not strategy.trains_in_bf16()


@each
def test_an_encoders_layers_have_biases(name):
    """They are added as they are, whatever becomes of the rows; and no layers are joined."""
    torch.manual_seed(3)
    config = BertConfig(hidden_size=48, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=600)
    base = BertModel(config, add_pooling_layer=False).eval()
    for layer in (m for m in base.modules() if isinstance(m, torch.nn.Linear)):
        layer.bias.data.normal_(0, 0.3)
    base.set_attn_implementation(packed_attention.NAME)
    plain = moved(STRATEGIES[name](**RELATIVES[name]).attach(base, task="classification")).eval()
    ours = copy.deepcopy(plain)
    assert fuse(ours) == (6 if name == "ia3" else 12)
    found, pull = [], torch.randn(1, IDS.shape[1], 48)
    for model in (plain, ours):
        places = torch.arange(IDS.shape[1])[None]
        states = model(input_ids=IDS, position_ids=places, sequence_lengths=[IDS.shape[1]]).last_hidden_state
        (states * pull).sum().backward()
        found.append((states.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5 * float(found[0][1].abs().max()))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_lengths_are_those_of_the_whole_matrix(kind):
    draw = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(shape, generator=draw) for shape in ((40, 64), (6, 64), (40, 6)))
    weight, up = weight.to(kind), up * 0.1
    wanted = torch.linalg.norm(weight.double() + 0.5 * up.double() @ down.double(), dim=1)
    found = fused_dora.row_norms(weight, fused_dora.squares(weight), down, up, 0.5)
    assert float((found / wanted - 1).abs().max()) < (1e-6 if kind == torch.float32 else 2e-3)
    still = fused_dora.row_norms(weight, fused_dora.squares(weight), down, torch.zeros_like(up), 0.5)
    assert torch.equal(still, torch.linalg.norm(weight.float(), dim=1)) or kind == torch.bfloat16


def test_lengths_are_made_once_while_nothing_learns(tiny_model, monkeypatch):
    """And anew when something has, also where an optimizer in one kernel leaves no mark on what it changed."""
    made, plain = [], fused_dora.row_norms
    monkeypatch.setattr(fused_dora, "row_norms", lambda *given: made.append(1) or plain(*given))
    model = build(tiny_model, "dora")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    run(model)
    assert len(made) == 14
    once, again = logits(model), answer(model)
    assert len(made) == 28 and torch.equal(once, again)
    run(model.train())
    optimizer.step()
    run(model)
    assert len(made) == 56
    wanted = logits(copy.deepcopy(model).merge_and_unload())
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    for p in (p for name, p in model.named_parameters() if "lora_B" in name):
        p.detach().copy_(2 * p)  # as weights are read from a checkpoint
    torch.testing.assert_close(answer(model), logits(copy.deepcopy(model).merge_and_unload()), rtol=1e-4, atol=1e-5)


def test_only_doras_layers_are_taken_where_answers_are_written(tiny_model):
    """At the blend they are played at, and without moving weights that other models share."""
    model = build(tiny_model, "dora", fused=False).requires_grad_(False)
    places = [p.data_ptr() for p in model.get_base_model().parameters()]
    wanted = logits(model)
    assert fused_lora.fuse_dora(model) == 14 and fused_lora.fuse_dora(build(tiny_model, "adalora", fused=False)) == 0
    assert [p.data_ptr() for p in model.get_base_model().parameters()] == places
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


def test_a_row_of_zeros_stays_one():
    """A weight with a dead row has rows of no length, which nothing can be divided by."""
    weight = torch.randn(5, 8)
    weight[2] = 0
    down, up, m = torch.randn(2, 8), torch.zeros(5, 2), torch.linalg.norm(weight, dim=1).requires_grad_()
    x = torch.randn(7, 8, requires_grad=True)
    out = fused_dora.apply_magnitude(x @ weight.t(), [m], [fused_dora.row_norms(weight, fused_dora.squares(weight), down, up, 1.0)])
    out.sum().backward()
    torch.testing.assert_close(out, x @ weight.t())
    assert torch.isfinite(x.grad).all() and torch.isfinite(m.grad).all()


@pytest.mark.long
@each
def test_thirty_steps_learn_alike(tiny_model, name):
    """Float32 with peft's layers and bf16 with ours end at the same loss, which has fallen."""
    ends = []
    for dtype, fused in ((torch.float32, False), (torch.bfloat16, True)):
        model = build(tiny_model, name, dtype, fused, size=0.0)
        if name == "adalora":
            kernels_start = torch.Generator().manual_seed(3)
            for key, p in model.named_parameters():
                if ".lora_E." in key:
                    p.data = torch.randn(p.shape, generator=kernels_start) * 0.1
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr={"vera": 2e-2, "ia3": 1e-1}.get(name, 3e-3))
        losses = []
        for _ in range(35):
            losses.append(run(model, dtype)[0])
            optimizer.step()
        ends.append(losses)
    assert ends[0][-1] < ends[0][0] - (0.1 if name == "ia3" else 0.3)  # which learns 384 numbers here
    assert abs(sum(ends[0][-5:]) - sum(ends[1][-5:])) / 5 < 0.02


def test_a_job_speeds_them_up(tiny_model):
    engine = Compute(torch.device("cpu"), "cpu", "bf16", torch.bfloat16, 1)
    for name, settings in RELATIVES.items():
        model = STRATEGIES[name](**settings).attach(bare(tiny_model))
        assert fused_layers.speed_up(model, engine, 0.0) == {"fused_lora": LAYERS[name]}
