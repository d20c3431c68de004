"""Full fine-tuning from random weights: the same shape without pre-training."""

from __future__ import annotations

import math

import pytest
import torch

from app import events
from app.spec import usual_learning_rate
from app.strategies import STRATEGIES
from app.strategies._model import draw_weights
from tests.worker.orders import chat_rows, order, put_dataset, put_model
from worker.train import train


@pytest.fixture
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def test_every_weight_is_drawn_by_the_seed_and_the_callers_draws_stay_as_they_are(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw_weights(model, 1)
    assert torch.equal(torch.rand(3), expected)
    drawn = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrices = [name for name, p in drawn.items() if p.dim() > 1]
    assert matrices and not any(torch.equal(drawn[name], before[name]) for name in matrices)
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in drawn.items() if "norm" in name)
    draw_weights(model, 1)
    assert all(torch.equal(p, drawn[name]) for name, p in model.named_parameters()), "the same seed gives the same weights"
    draw_weights(model, 2)
    assert not torch.equal(dict(model.named_parameters())[matrices[0]], drawn[matrices[0]])


@pytest.mark.usefixtures("data_dir")
def test_a_run_from_random_weights_is_compared_with_those_weights_and_has_nothing_to_forget(tiny_model, data_dir):
    base = put_model(tiny_model)
    spec = order(base, put_dataset(chat_rows(24)), "full", {"weights": "random"}, epochs=1, forgetting=True, row_losses=True)
    said = list(train(spec, data_dir / "runs" / "blank" / "a1"))
    first = next(e for e in said if isinstance(e, events.Evaluated))
    assert first.step == 0 and first.loss == pytest.approx(math.log(base.shape.vocabulary), rel=0.1), "as good as a guess"
    ended = next(e for e in said if isinstance(e, events.Finished))
    assert ended.forgetting["verdict"] == "not applicable" and "random weights" in ended.forgetting["sentence"]
    assert ended.evaluation["base"]["loss"] == pytest.approx(first.loss)
    full = STRATEGIES["full"]
    assert usual_learning_rate(full(weights="random"), "generation") == pytest.approx(30 * usual_learning_rate(full(), "generation"))
    assert full().model_dump() == {"name": "full"}, "specs of before stay as they are"
