"""Every strategy that claims to blend goes all the way to its base and all the way to its result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.strategies import STRATEGIES
from tests.strategies.test_every_strategy import WRITERS, data_for, fresh, learn, logits, runnable, shape, somewhere, tokenizer  # noqa: F401


@pytest.mark.parametrize("name", [name for name in WRITERS if STRATEGIES[name].blends])
def test_a_blend_lies_between_its_base_and_itself(name: str, tiny_model: Path, tokenizer, shape, tmp_path: Path) -> None:  # noqa: F811
    strategy = runnable(name, shape)
    data = data_for(tokenizer, strategy)
    before = logits(fresh(tiny_model), data)
    model = strategy.attach(fresh(tiny_model)).train()
    learn(strategy, model, data, 6)
    after = logits(model, data)
    assert not torch.allclose(before, after, atol=1e-3)
    strategy.save(model, tmp_path)

    shared = fresh(tiny_model)
    own = {n: p.detach().clone() for n, p in shared.named_parameters()}
    untouched = dict(shared.named_parameters())
    torch.testing.assert_close(logits(strategy.load_blended(shared, tmp_path, 0.0), data), before, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(untouched[n], value) for n, value in own.items())  # siblings may share the base's tensors

    torch.testing.assert_close(logits(strategy.load_blended(fresh(tiny_model), tmp_path, 1.0), data), after, atol=2e-5, rtol=1e-4)
    half = logits(strategy.load_blended(fresh(tiny_model), tmp_path, 0.5), data)
    whole = (after - before).norm()
    assert 0.05 * whole < (half - before).norm() < whole and 0.05 * whole < (after - half).norm() < whole


@pytest.mark.parametrize("name", [name for name, cls in STRATEGIES.items() if not cls.blends])
def test_those_that_do_not_say_why(name: str, tiny_model: Path, tmp_path: Path) -> None:
    cls = STRATEGIES[name]
    assert cls.no_blend.endswith(".") and cls.no_blend[0].islower()
    with pytest.raises(TypeError, match="cannot be blended"):
        cls().load_blended(torch.nn.Linear(1, 1), tmp_path, 0.5)
