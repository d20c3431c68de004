"""The losses of pairs: their papers' formulas computed another way, extreme answers, and the settings they take."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from app.objectives.dpo import LOSSES, PreferenceSettings
from worker.training.objectives.dpo import losses_of, named, sums_of


def test_the_losses_are_those_of_the_papers() -> None:
    policy, reference = torch.tensor([[-10.0, -12.0], [-9.0, -9.0]]), torch.tensor([[-11.0, -11.0], [-9.0, -9.0]])
    losses, rewards = losses_of(policy, reference, PreferenceSettings(beta=0.5))
    torch.testing.assert_close(losses, torch.tensor([0.3132617, 0.6931472]))  # −log σ(1), −log σ(0)
    torch.testing.assert_close(rewards, torch.tensor([[0.5, -0.5], [0.0, 0.0]]))
    assert named(sums_of(rewards)) == {"reward_margin": 0.5, "reward_accuracy": 0.75, "chosen_reward": 0.25, "rejected_reward": -0.25}
    losses, _ = losses_of(policy, reference, PreferenceSettings(beta=0.5, loss="ipo"))
    torch.testing.assert_close(losses, torch.tensor([1.0, 1.0]))  # (2 − 1)², (0 − 1)²
    far, _ = losses_of(torch.tensor([[0.0, -9e4]]), torch.tensor([[-9e4, 0.0]]), PreferenceSettings(beta=10))
    assert float(far) == 0.0 and torch.isfinite(
        losses_of(torch.tensor([[-9e4, 0.0]]), torch.tensor([[0.0, -9e4]]), PreferenceSettings())[0]
    )


def by_the_papers(settings: PreferenceSettings, policy: list[float], reference: list[float], counts: list[int]) -> float:
    """The loss of one pair from the sums of its answers' log-probabilities (chosen, rejected), in probabilities as the papers write it."""
    beta, eps = settings.beta, settings.label_smoothing
    (w, r), (ref_w, ref_r), (n_w, n_r) = policy, reference, counts

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    match settings.loss:
        case "dpo":
            h = beta * (w - ref_w) - beta * (r - ref_r)
            return -(1 - eps) * math.log(sigma(h)) - eps * math.log(sigma(-h))
        case "ipo":
            return ((w - ref_w) / n_w - (r - ref_r) / n_r - 1 / (2 * beta)) ** 2
        case "robust_dpo":
            h = beta * (w - ref_w) - beta * (r - ref_r)
            return ((1 - eps) * -math.log(sigma(h)) - eps * -math.log(sigma(-h))) / (1 - 2 * eps)
        case "orpo":
            p_w, p_r = math.exp(w / n_w), math.exp(r / n_r)
            ratio = (p_w / (1 - p_w)) / (p_r / (1 - p_r))
            return -w / n_w + beta * -math.log(ratio / (1 + ratio))  # σ(log x) = x / (1 + x)
        case "simpo":
            return -math.log(sigma(beta / n_w * w - beta / n_r * r - settings.gamma))
    return -math.log(sigma(beta * w - beta * r)) - settings.nll_weight * w / n_w


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.7}, {"beta": 0.7, "label_smoothing": 0.2}, {"loss": "ipo", "beta": 0.7}, {"loss": "robust_dpo", "label_smoothing": 0.3},
        {"loss": "orpo", "beta": 0.4}, {"loss": "simpo"}, {"loss": "simpo", "gamma": 0.0}, {"loss": "cpo", "nll_weight": 0.6}, {"loss": "cpo"},
    ],
)  # fmt: skip
def test_each_loss_is_that_of_its_paper(settings: dict[str, Any]) -> None:
    draw, kind = random.Random(11), PreferenceSettings(**settings)
    counts = [[draw.randint(1, 30), draw.randint(1, 30)] for _ in range(40)]
    policy, reference = ([[-n * draw.uniform(0.05, 2.0) for n in pair] for pair in counts] for _ in range(2))
    wanted = [by_the_papers(kind, *pair) for pair in zip(policy, reference, counts, strict=True)]
    lengths = torch.tensor(counts, dtype=torch.float64)
    given, base = (torch.tensor(x, dtype=torch.float64) / (lengths if kind.means else 1) for x in (policy, reference))
    losses, rewards = losses_of(given, base if kind.reads_base else None, kind, lengths[:, 0])
    torch.testing.assert_close(losses, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rewards, kind.beta * (given - base if kind.reads_base else given))


def test_robust_dpo_of_exchanged_labels_is_dpo_of_the_true_ones() -> None:
    draw, eps = torch.Generator().manual_seed(2), 0.3
    policy, reference = (torch.randn(50, 2, dtype=torch.float64, generator=draw) * 20 for _ in range(2))
    robust = PreferenceSettings(loss="robust_dpo", beta=0.2, label_smoothing=eps)
    kept, exchanged = (losses_of(x, y, robust)[0] for x, y in ((policy, reference), (policy.flip(1), reference.flip(1))))
    torch.testing.assert_close((1 - eps) * kept + eps * exchanged, losses_of(policy, reference, PreferenceSettings(beta=0.2))[0])


@pytest.mark.parametrize("loss", list(LOSSES))
def test_answers_that_are_certain_or_impossible_have_a_gradient(loss: str) -> None:
    kind = PreferenceSettings(loss=loss)
    policy = torch.tensor([[0.0, -9e4], [-9e4, 0.0], [0.0, 0.0], [-9e4, -9e4]], requires_grad=True)
    losses, _ = losses_of(policy, torch.zeros(4, 2) if kind.reads_base else None, kind, torch.ones(4))
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(policy.grad).all()


def test_settings_take_the_defaults_of_their_loss_and_are_stored_as_before() -> None:
    simpo, cpo = PreferenceSettings(loss="simpo"), PreferenceSettings(loss="cpo", beta=0.3)
    assert (simpo.beta, simpo.gamma, simpo.nll_weight) == (2.0, 1.0, None) and (cpo.beta, cpo.nll_weight, cpo.gamma) == (0.3, 1.0, None)
    assert PreferenceSettings(loss="robust_dpo").label_smoothing == 0.1 and PreferenceSettings(loss="simpo", gamma=None).gamma == 1.0
    for kind in (*map(lambda loss: PreferenceSettings(loss=loss), LOSSES), PreferenceSettings(loss="simpo", gamma=0)):
        assert PreferenceSettings.model_validate_json(kind.model_dump_json()) == kind and set(kind.chosen()) <= {
            *kind.usual(),
            "loss",
            "length_normalised",
        }
    # A job that was begun before there were other losses goes on with the very same specification.
    assert PreferenceSettings().model_dump_json() == '{"beta":0.1,"loss":"dpo","label_smoothing":0.0,"length_normalised":false}'
    with pytest.raises(ValidationError, match="robust DPO is DPO where no label is wrong"):
        PreferenceSettings(loss="robust_dpo", label_smoothing=0)
