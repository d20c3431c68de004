"""Frozen weights in fp8: torch's own scaled product, on the processor, against the same numbers in float64."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM

from app.errors import BadField, DoesNotFit
from app.machines.hardware import Machine
from app.planning import feasibility
from app.spec import RunSettings
from app.strategies import STRATEGIES
from tests.worker.modeling.test_fused_lora import build, cosine, run
from worker.kernels.gpu import fp8
from worker.modeling import fused_layers
from worker.modeling.fused_lora import Fused, fuse
from worker.runtime import device
from worker.runtime.device import Compute

CPU = torch.device("cpu")
one_scale_a_tensor = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="torch before 2.13 takes one scale a tensor on a CPU; on a GPU it takes one a row"
)


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The length of the difference as a share of the length of what was wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@one_scale_a_tensor
def test_products_are_those_of_the_squeezed_numbers_and_near_those_of_the_whole_ones() -> None:
    torch.manual_seed(0)
    spread = torch.logspace(-3, 3, 48)[:, None]  # rows of very different size, which one scale for all would lose
    x, dy, whole = torch.randn(40, 64).bfloat16(), torch.randn(40, 48).bfloat16(), (torch.randn(48, 64) * spread).bfloat16()
    weight, scale = fp8.quantize(whole)
    assert weight.dtype == torch.float8_e4m3fn and scale.shape == (48, 1)
    dense = weight.double() * scale.double()
    assert float(((dense - whole.double()).norm(dim=1) / whole.double().norm(dim=1)).max()) < 0.04
    rows, own = fp8.quantize(x)
    assert far(fp8.product(x, weight, scale), (rows.double() * own.double()) @ dense.t()) < 4e-3, "bf16's own rounding"
    back, size = fp8.quantize(dy.float() * scale.t())
    assert far(fp8.product_back(dy, weight, scale), (back.double() * size.double()) @ weight.double()) < 4e-3
    assert far(fp8.product(x, weight, scale), x.double() @ whole.double().t()) < 0.05
    assert far(fp8.product_back(dy, weight, scale), dy.double() @ whole.double()) < 0.05
    assert bool((fp8.product(torch.zeros_like(x), weight, scale) == 0).all())


def squeezed(folder, way: str):
    model = build(folder, torch.bfloat16, fused=False)
    assert fp8.patch_fp8(fused_layers.blocks_of(model)) == 14
    if way != "peft":
        assert fuse(model, grouped=way == "grouped") == 14
        groups = [m for m in model.modules() if isinstance(m, Fused) and m.group is not None]
        assert len(groups) == (10 if way == "grouped" else 0)
    return model


@one_scale_a_tensor
@pytest.mark.parametrize("way", ["grouped", "alone", "peft"])
def test_lora_learns_beside_it(tiny_model, way: str) -> None:
    """Fused and joined, fused alone, and in peft's own layers: near the loss and the gradient of a base in float32."""
    loss, gradient = run(build(tiny_model))
    ours, own = run(squeezed(tiny_model, way), torch.bfloat16)
    assert abs(loss - ours) < 0.02 * loss and cosine(gradient, own) > 0.98
    assert abs(float(own.norm() / gradient.norm()) - 1) < 0.05


@one_scale_a_tensor
@pytest.mark.long
def test_thirty_steps_end_where_bf16_ends(tiny_model) -> None:
    ends = []
    for model in (build(tiny_model, torch.bfloat16, young=True), None):
        if model is None:
            model = build(tiny_model, torch.bfloat16, fused=False, young=True)
            fp8.patch_fp8(fused_layers.blocks_of(model))
            fuse(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(30):
            losses.append(run(model, torch.bfloat16)[0])
            optimizer.step()
        ends.append(losses)
    assert ends[0][-1] < ends[0][0] - 0.3
    assert abs(sum(ends[0][-5:]) - sum(ends[1][-5:])) / 5 < 0.05


@one_scale_a_tensor
def test_the_job_squeezes_what_is_frozen_and_saves_what_peft_saves(tiny_model, tmp_path) -> None:
    strategy = STRATEGIES["lora"]()
    model = strategy.attach(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16))
    before = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    done = fused_layers.speed_up(model, Compute(CPU, "cpu", "bf16", torch.bfloat16, 1, fp8=True), 0.0)
    assert done["fp8_layers"] == done["fused_lora"] == 14
    assert {name: p.dtype for name, p in model.named_parameters() if p.requires_grad} == before
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    strategy.save(model, tmp_path)
    again = strategy.load(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path)
    assert sum(p.numel() for n, p in again.named_parameters() if "lora_" in n) == sum(
        p.numel() for n, p in model.named_parameters() if "lora_" in n
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), model.disable_adapter():
        bare = model(input_ids=torch.arange(3, 40)[None]).logits  # peft's own way, without the fused product
    assert bool(torch.isfinite(bare).all())


def test_without_a_gpu_the_trainer_refuses_it() -> None:
    with pytest.raises(DoesNotFit, match="NVIDIA") as caught:
        device.choose(RunSettings(frozen_weights="fp8"), STRATEGIES["lora"]())
    assert caught.value.param == "frozen_weights" and "auto" in caught.value.hint
    assert fp8.why_not(CPU)


def test_an_order_for_it_is_refused_early_with_the_reason() -> None:
    run, plain = RunSettings(frozen_weights="fp8"), Machine(cores=2, memory_bytes=2**34)
    cards = {
        kind: plain.model_copy(update={"gpu_name": "a card", "gpu_memory_bytes": 2**36, "gpu_capability": kind})
        for kind in (8.0, 8.9, None)
    }
    lora, dora = STRATEGIES["lora"](), STRATEGIES["dora"]()
    for kind in (8.9, None):  # an old driver does not tell; the trainer asks the card itself
        feasibility.refuse_without_gpu(lora, run, "generation", cards[kind])
    for strategy, task, machine, words in (
        (lora, "generation", plain, "shows none"),
        (lora, "generation", cards[8.0], "capability 8.9 or later; a card has 8.0"),
        (dora, "generation", cards[8.9], "DoRA"),
        (lora, "preference", cards[8.9], "generation jobs"),
    ):
        with pytest.raises(BadField, match=words) as caught:
            feasibility.refuse_without_gpu(strategy, run, task, machine)
        assert caught.value.param == "run.frozen_weights" and caught.value.hint
    with pytest.raises(BadField, match="8-bit optimizer"):
        feasibility.refuse_without_gpu(lora, RunSettings(optimizer="adamw_8bit"), "generation", plain)
    assert "frozen_weights" not in RunSettings().model_dump() and run.model_dump()["frozen_weights"] == "fp8"
