"""Kernels compiled for this processor give what torch gives in double precision, rounded once, and stand aside where they cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.conftest import PROJECT
from worker.kernels.cpu import cross_entropy as cpu_cross_entropy
from worker.kernels.cpu import gated_mlp, jit, rms_norm, rotary, warmup
from worker.modeling.cross_entropy import Head, linear_cross_entropy

DIGIT = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""How far a rounded number may lie from what it stands for, as a share of it."""


def near(ours: torch.Tensor, wanted: torch.Tensor, kind: torch.dtype) -> None:
    """Rounded once: within the last digit of each number, beside what float32 leaves of sums that cancel."""
    assert ((ours.double() - wanted).abs() <= DIGIT[kind] * wanted.abs() + 1e-6 * wanted.abs().max()).all()


@pytest.mark.parametrize("kind", DIGIT)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 48), (7, 577)])
def test_a_norm_and_its_gradients(rows: int, width: int, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.randn(rows, 2 * width).to(kind)
    x, weight, dy = wide[:, :width], torch.rand(width) + 0.5, torch.randn(rows, width).to(kind)
    given = [x.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = given[0] * torch.rsqrt(given[0].square().mean(-1, keepdim=True) + 1e-5) * given[1]
    gradients = torch.autograd.grad(wanted, given, dy.double())
    own = [x.detach().requires_grad_(), weight.clone().requires_grad_()]
    ours = rms_norm.rms_norm(*own, 1e-5, kind)
    assert type(ours.grad_fn).__name__ == "_RmsNormBackward" and ours.dtype == kind
    found = torch.autograd.grad(ours, own, dy)
    near(ours, wanted, kind)
    near(found[0], gradients[0], kind)
    assert torch.allclose(found[1].double(), gradients[1], rtol=1e-4, atol=1e-5 * gradients[1].abs().max())


def test_a_norm_from_float32_to_bf16() -> None:
    """As full tuning has it: what passes between the layers is float32, what a product reads is not."""
    x, weight = torch.randn(5, 64, requires_grad=True), torch.ones(64)
    y = rms_norm.rms_norm(x, weight, 1e-6, torch.bfloat16)
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert (y.dtype, dx.dtype) == (torch.bfloat16, torch.float32)
    wide = rms_norm.rms_norm(x, weight, 1e-6, torch.float32)
    assert torch.equal(y, wide.bfloat16())


ACTS = {"silu": (gated_mlp.SILU, F.silu), "gelu_tanh": (gated_mlp.GELU_TANH, lambda x: F.gelu(x, approximate="tanh"))}


@pytest.mark.parametrize("kind", DIGIT)
@pytest.mark.parametrize("name", ACTS)
def test_a_gated_activation_and_its_gradients(name: str, kind: torch.dtype) -> None:
    act, plain = ACTS[name]
    torch.manual_seed(0)
    both = (torch.randn(9, 2 * 75) * 4).to(kind)
    both[0, 0], both[0, 1] = 40.0, -200.0  # where the exponential is as large, and as small, as it gets
    dy = torch.randn(9, 75).to(kind)
    gate, up = (half.double().requires_grad_() for half in both.split(75, 1))
    wanted = plain(gate) * up
    gradients = torch.autograd.grad(wanted, (gate, up), dy.double())
    halves = both.split(75, 1)
    near(gated_mlp.gated(*halves, act), wanted, kind)
    found, again = gated_mlp.gated_back(*halves, dy, act, again=True)
    for ours, theirs in zip(found.split(75, 1), gradients, strict=True):
        near(ours, theirs, kind)
    assert torch.equal(again, gated_mlp.gated(*halves, act)) and gated_mlp.gated_back(*halves, dy, act)[1] is None


def layers() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80}
    return [LlamaMLP(LlamaConfig(**sizes)), Gemma3MLP(Gemma3TextConfig(**sizes)), LlamaMLP(LlamaConfig(**sizes, hidden_act="relu"))]


@pytest.mark.parametrize("which", range(3))
def test_a_feed_forward_layer_is_what_transformers_computes(which: int) -> None:
    layer, x = layers()[which], torch.randn(2, 5, 32, requires_grad=True)
    wanted = layer(x)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    switched = gated_mlp.patch_gated_mlp(torch.nn.ModuleList([layer]))
    assert switched == (0 if which == 2 else 1)  # there is no kernel for a rectifier
    assert gated_mlp.patch_gated_mlp(torch.nn.ModuleList([layer])) == 0  # once is enough
    ours = layer(x)
    assert type(layer).__name__ in gated_mlp.GATED and torch.allclose(ours, wanted, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), x)[0], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", DIGIT)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_loss_and_its_gradient_in_the_place_of_the_logits(kind: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    logits, targets = (torch.randn(6, 1003) * 8).to(kind), torch.tensor([0, 1002, -100, 5, 5, 77])
    logits[3] = -300.0  # all alike, and far below zero
    source = (logits.double()).requires_grad_()
    wanted = F.cross_entropy(scale * source, targets, reduction="none")
    (gradient,) = torch.autograd.grad(wanted.sum(), source)
    losses, untouched = torch.empty(6), logits.clone()
    cpu_cross_entropy.softmax_loss_(untouched, targets, losses, scale, with_gradient=False)
    assert torch.equal(untouched, logits) and torch.allclose(losses.double(), wanted, rtol=1e-6, atol=2e-6)
    again = torch.empty(6)
    cpu_cross_entropy.softmax_loss_(logits, targets, again, scale)
    assert torch.equal(again, losses) and not logits[2].any()
    assert ((logits.double() - gradient).abs() <= DIGIT[kind] * gradient.abs() + 1e-7).all()


def test_what_is_no_number_is_seen() -> None:
    """A job that diverges is stopped by its loss and by its gradient's length, so a kernel must hide neither."""
    bad = torch.tensor([[1.0, float("nan"), 2.0, 3.0] * 8])
    for kind in DIGIT:
        x = bad.to(kind, copy=True)
        assert rms_norm.rms_norm(x, torch.ones(32), 1e-6, kind).isnan().all()
        assert gated_mlp.gated(x, x, gated_mlp.SILU).isnan().sum() == 8
        losses = torch.empty(1)
        cpu_cross_entropy.softmax_loss_(x, torch.tensor([0]), losses)
        assert losses.isnan().all() and x.isnan().all()
        assert simd_exp(torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0], dtype=kind)).isnan().tolist() == [
            True,
            False,
            False,
            False,
        ]


def simd_exp(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    jit._powers(*jit.addresses(x, y), jit.KINDS[x.dtype], len(x))
    return y


def test_the_exponential() -> None:
    x = torch.linspace(-86, 86, 20_001)
    assert ((simd_exp(x).double() / x.double().exp() - 1).abs() < 3e-7).all()


def test_bad_input_is_refused() -> None:
    logits, losses = torch.zeros(2, 8), torch.empty(2)
    with pytest.raises(IndexError, match="a target is 8, of 8 logits"):
        cpu_cross_entropy.softmax_loss_(logits, torch.tensor([0, 8]), losses)
    with pytest.raises(ValueError, match=r"targets in torch\.int32 for 2 rows"):
        cpu_cross_entropy.softmax_loss_(logits, torch.tensor([0, 1], dtype=torch.int32), losses)
    with pytest.raises(ValueError, match=r"3,\) targets"):
        cpu_cross_entropy.softmax_loss_(logits, torch.tensor([0, 1, 2]), losses)
    with pytest.raises(ValueError, match="a gate of"):
        gated_mlp.gated(logits, logits[:, :4], gated_mlp.SILU)
    with pytest.raises(RuntimeError):  # as torch says it
        rms_norm.rms_norm(logits, torch.ones(4), 1e-6, torch.float32)
    with pytest.raises(ValueError, match="scale"):
        cpu_cross_entropy.softmax_loss_(logits, torch.tensor([0, 1]), losses, scale=0.0)


def everything(kind: torch.dtype) -> list[torch.Tensor]:
    """What the kernels' users give, and their gradients."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 6, 16).to(kind).requires_grad_()
    angles = torch.rand(1, 6, 16) * 6
    turned = [rotary.rotate(x, x, angles.cos().to(table), angles.sin().to(table))[0] for table in (kind, torch.float32)]
    normed = sum(rms_norm.rms_norm(one.reshape(12, 16), torch.ones(16), 1e-6, kind) for one in turned)
    layer = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2)).to(kind)
    gated_mlp.patch_gated_mlp(torch.nn.ModuleList([layer]))
    head = Head(torch.randn(50, 16, requires_grad=True), None)
    loss = linear_cross_entropy(layer(normed), head, torch.randint(0, 50, (12,)), kind)
    return [loss, *torch.autograd.grad(loss, (x, head.weight, layer.gate_proj.weight))]


@pytest.mark.parametrize("kind", DIGIT)
def test_without_kernels_all_is_computed_by_torch(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with_them = everything(kind)
    monkeypatch.setattr(jit, "is_available", lambda: False)
    for name in ("rms_norm", "gated_mlp", "rotary", "cross_entropy"):
        module = sys.modules[f"worker.kernels.cpu.{name}"]
        for kernel in [found for found in vars(module).values() if hasattr(found, "py_func")]:
            monkeypatch.setattr(module, kernel.__name__, None)  # none may be called
    for ours, theirs in zip(with_them, everything(kind), strict=True):
        assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < (1e-5 if kind == torch.float32 else 0.01)


def run(code: str, **environment: str) -> str:
    """What Python says to `code`, in a process whose kernels are kept in its data folder unless it is told otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command = [sys.executable, *(["-m", code] if " " not in code else ["-c", code])]
    return subprocess.run(command, env={**inherited, **environment}, cwd=PROJECT, capture_output=True, text=True, check=True).stdout


@pytest.mark.long
def test_kernels_are_kept_in_the_data_folder_and_compiled_again_where_it_is_closed(tmp_path: Path) -> None:
    code = "from worker.kernels.cpu import jit; import numba; print(jit.is_available(), numba.config.CACHE_DIR)"
    works, folder = run(code, LUTHIER_DATA_DIR=str(tmp_path / "data")).split()
    assert works == "True" and Path(folder).is_relative_to(tmp_path / "data" / "cache" / "numba") and list(Path(folder).rglob("*.nbi"))
    (tmp_path / "file").write_text("")
    works, folder = run(code, LUTHIER_DATA_DIR=str(tmp_path / "file")).split()
    assert works == "True" and not Path(folder).is_relative_to(tmp_path)


@pytest.mark.long
def test_all_that_a_job_needs_is_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    monkeypatch.setenv("NUMBA_CACHE_DIR", kept["NUMBA_CACHE_DIR"])
    begun = warmup.begin()
    assert begun is not None and begun.wait(timeout=280) == 0
    assert warmup.begin() is None  # once is enough
    compiled = {path.name for path in (tmp_path / "kernels").rglob("*.nbc")}
    use = "import torch; from tests.worker.kernels import test_gradient_buffers, test_jit, test_lora_step; "
    use += "test_jit.everything(torch.float32); test_jit.everything(torch.bfloat16); test_lora_step.Job().go(); test_gradient_buffers.Job().go()"
    run(use, **kept)
    assert len(compiled) > 10 and {path.name for path in (tmp_path / "kernels").rglob("*.nbc")} == compiled
