"""Optimizers go on where they stopped, and a gradient that is not a number moves nothing, whichever optimizer it is."""

from __future__ import annotations

import copy
import sys
from importlib import metadata
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.errors import DoesNotFit
from app.optimizers import OPTIMIZERS, Optimizer
from worker.training import optim
from worker.training.optimizers import MAKERS


@pytest.fixture
def kind(request, monkeypatch) -> str:
    """The name of an optimizer. bitsandbytes is real where it is installed: it computes on a processor too."""
    if request.param == "adamw_8bit":
        try:
            metadata.version("bitsandbytes")
        except metadata.PackageNotFoundError:
            pytest.skip("bitsandbytes is not installed")
        monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)  # worker/modeling/loading.py hides it where there is no GPU
    return request.param


each = pytest.mark.parametrize("kind", [name for name in OPTIMIZERS if name != "paged_adamw_8bit"], indirect=True)
"""The paged one asks the card for its pages."""


class Learner:
    """A matrix large enough for 8-bit moments, a small one and a vector, whose gradients a seed decides."""

    def __init__(self, kind: str, values: dict[str, torch.Tensor] | None = None) -> None:
        draw = torch.Generator().manual_seed(1)
        shapes = {"large": (90, 64), "small": (8, 6), "bias": (7,)}
        values = values or {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        self.parameters = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
        self.optimizer = optim.make_optimizer(self.parameters, 1e-2, 0.1, kind)

    def step(self, number: int, spoilt: bool = False) -> None:
        draw = torch.Generator().manual_seed(100 + number)
        for p in self.parameters.values():
            p.grad = torch.randn(p.shape, generator=draw)
        if spoilt:
            self.parameters["large"].grad[3, 3] = float("nan")
        optim.optimizer_step(self.optimizer, optim.clip_grad_norm(self.parameters, 1.0))

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def states(self) -> dict[str, torch.Tensor]:
        return copy.deepcopy(optim.state_tensors(self.optimizer, self.parameters))


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(a.dtype == two[k].dtype and torch.equal(a, two[k]) for k, a in one.items())


@each
def test_a_resumed_optimizer_is_the_same_bit_for_bit(kind, tmp_path):
    whole = Learner(kind)
    for number in range(3):
        whole.step(number)
    save_file(whole.states(), tmp_path / "optimizer.safetensors")  # as a checkpoint holds it
    again = Learner(kind, whole.values())
    optim.load_state(again.optimizer, again.parameters, load_file(tmp_path / "optimizer.safetensors"))
    assert equal(again.states(), whole.states())
    before = whole.values()
    for number in range(3, 6):
        whole.step(number)
        again.step(number)
    assert equal(again.values(), whole.values()) and equal(again.states(), whole.states())
    assert not equal(before, whole.values())
    if kind == "adamw_8bit":
        kinds = {key: value.dtype for key, value in whole.states().items()}
        assert kinds["state1/large"] == torch.uint8 and kinds["state1/small"] == torch.float32 and kinds["step/large"] == torch.int64
        assert int(whole.states()["step/large"]) == 6


@each
def test_a_gradient_that_is_not_a_number_moves_nothing(kind):
    learner = Learner(kind)
    learner.step(0)
    values, states = learner.values(), learner.states()
    learner.step(1, spoilt=True)
    assert equal(learner.values(), values) and equal(learner.states(), states)
    learner.step(1)
    assert not equal(learner.values(), values)
    assert all(bool(torch.isfinite(value).all()) for value in learner.values().values())


@pytest.mark.parametrize("kind", ["adamw_8bit"], indirect=True)
def test_8_bit_moments_are_cut_and_joined_in_float32(kind):
    """As where several processes hold their rows: what is read out wide and put back is the same within a step of 8 bits."""
    whole = Learner(kind)
    for number in range(3):
        whole.step(number)
    plain = optim.state_tensors(whole.optimizer, whole.parameters, plain=True)
    assert plain["state2/large"].dtype == torch.float32 and not any("absmax" in key for key in plain)
    assert optim.has_scales(whole.states()) and not optim.has_scales(plain)
    assert equal(optim.widened(whole.states()), plain)  # read from a checkpoint, where the table is not kept
    again = Learner(kind, whole.values())
    optim.load_state(again.optimizer, again.parameters, plain)
    assert again.states()["state1/large"].dtype == torch.uint8 and int(again.states()["step/large"]) == 3
    for key, value in optim.state_tensors(again.optimizer, again.parameters, plain=True).items():
        assert float((value - plain[key]).abs().max()) <= 0.01 * float(plain[key].abs().max()), key


def test_without_the_package_the_order_is_refused_with_a_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DoesNotFit, match="bitsandbytes") as caught:
        Learner("adamw_8bit")
    assert caught.value.hint == "Choose adamw." and caught.value.param == "optimizer"


def moved(kind: str, **settings) -> dict[str, torch.Tensor]:
    """How far one step moves weights without decay, at a rate of 0.01."""
    learner = Learner("adamw")
    before = learner.values()
    learner.optimizer = optim.make_optimizer(learner.parameters, 1e-2, 0.0, kind, **settings)
    learner.step(0)
    return {name: value - before[name] for name, value in learner.values().items()}


def test_each_optimizer_takes_its_own_step():
    assert set(OPTIMIZERS) == set(MAKERS) == set(get_args(Optimizer))
    adam, lion, muon, factored = (moved(kind) for kind in ("adamw", "lion", "muon", "adafactor"))
    assert all(torch.allclose(value.abs(), torch.full_like(value, 1e-2), atol=1e-6) for value in lion.values())
    assert torch.equal(lion["small"].sign(), adam["small"].sign())
    # Muon turns a matrix the same length in all directions, with AdamW's mean square of 0.2; the rest is AdamW's.
    lengths = torch.linalg.svdvals(muon["large"])
    assert lengths.max() < 2 * lengths.min() and torch.linalg.svdvals(adam["large"]).max() > 3 * torch.linalg.svdvals(adam["large"]).min()
    assert float(muon["large"].square().mean().sqrt()) == pytest.approx(0.2e-2, rel=0.2)
    assert torch.allclose(muon["bias"], adam["bias"], atol=1e-7)
    assert factored["large"].square().mean().sqrt() <= 1.01e-2 and not torch.allclose(factored["large"], adam["large"], atol=1e-4)


def test_betas_and_eps_are_those_that_were_asked_for():
    learner = Learner("adamw")
    learner.step(0)
    reference = copy.deepcopy(learner)
    for one, given in ((learner, {"betas": (0.5, 0.9), "eps": 0.1}), (reference, {})):
        one.optimizer = optim.make_optimizer(one.parameters, 1e-2, 0.1, **given)
    matrices = [p for p in reference.parameters.values() if p.ndim == 2]
    vectors = [p for p in reference.parameters.values() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.5, 0.9), eps=0.1, fused=True)
    for number in range(1, 4):
        learner.step(number)
        reference.step(number)
    assert equal(learner.values(), reference.values())


def test_muon_leaves_tables_of_words_and_heads_to_adamw():
    values = {
        "model.embed_tokens.weight": torch.randn(9, 4),
        "classifier_head.weight": torch.randn(3, 4),
        "layer.weight": torch.randn(4, 4),
    }
    parameters = {name: torch.nn.Parameter(value) for name, value in values.items()}
    groups = optim.make_optimizer(parameters, 1e-2, 0.1, "muon").param_groups
    assert [p is parameters["layer.weight"] for group in groups if group["muon"] for p in group["params"]] == [True]
    assert sum(len(group["params"]) for group in groups) == 3
