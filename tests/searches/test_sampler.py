"""What is tried next, by optuna on a study that is rebuilt from the trials so far."""

from __future__ import annotations

import math

from app.searches import sampler
from app.searches.sampler import PastTrial
from app.searches.space import PlannedMethod, SearchOrder

LORA = PlannedMethod(title="LoRA", strategy={"name": "lora"}, run={"epochs": 3}, usual_rate=2e-4, steps=90, seconds=60)
IA3 = PlannedMethod(title="(IA)³", strategy={"name": "ia3"}, run={"epochs": 3}, usual_rate=3e-3, steps=90, seconds=60)


def loss_of(params) -> float:
    """Best for LoRA of rank 16 at 4e-4 for six epochs."""
    method = 0.5 * params["method"]
    rank = 0.1 * abs(math.log2(params.get("rank", 4) / 16))
    return method + rank + abs(math.log(params["learning_rate"] / 4e-4)) + 0.05 * abs(params["epochs"] - 6)


def run(methods, count, seed=1, **order):
    asked, past = SearchOrder(model="m", **order), []
    for _ in range(count):
        params = sampler.propose(asked, methods, past, seed)
        past.append(PastTrial(params, {1: loss_of(params)}))
    return past


def test_each_methods_own_settings_come_first_and_all_are_within_the_range():
    past = run([LORA, IA3], 20)
    assert past[0].params == {"method": 0, "learning_rate": 2e-4, "epochs": 3, "rank": 8}
    assert past[1].params == {"method": 1, "learning_rate": 3e-3, "epochs": 3}, "(IA)³ has no rank"
    for one in past:
        method = (LORA, IA3)[one.params["method"]]
        assert method.usual_rate / 5.01 <= one.params["learning_rate"] <= method.usual_rate * 5.01
        assert one.params["epochs"] in (2, 3, 6) and one.params.get("rank", 8) in (4, 8, 16, 32)
        assert ("rank" in one.params) == (method is LORA)


def test_the_same_past_gives_the_same_proposal_and_another_seed_another():
    past = run([LORA], 9)
    asked = SearchOrder(model="m")
    assert sampler.propose(asked, [LORA], past, 1) == sampler.propose(asked, [LORA], list(past), 1)
    assert len({str(sampler.propose(asked, [LORA], past, seed)) for seed in range(5)}) > 1


def test_later_trials_are_better_than_the_first_ones():
    """A sampler that learned nothing from the past would not be."""
    gains = []
    for seed in range(6):
        losses = [one.scores[1] for one in run([LORA], 24, seed)]
        gains.append(sum(losses[:6]) / 6 - sum(losses[-6:]) / 6)
    assert sum(gains) / len(gains) > 0.2, gains


def test_trials_of_every_state_are_read():
    order = SearchOrder(model="m", learning_rate=[1e-4, 1e-3], rank=[4], epochs=[2])
    params = {"method": 0, "learning_rate": 2e-4, "epochs": 2.0, "rank": 4}
    past = [
        PastTrial(params, {1: 1.0, 3: 0.5}, ended=True), PastTrial(params, {}, moving=True), PastTrial(params, {}), PastTrial(params, {1: 2.0}),
    ]  # fmt: skip
    found = sampler.propose(order, [LORA], past * 3, 1)
    assert 1e-4 <= found.pop("learning_rate") <= 1e-3 and found == {"method": 0, "epochs": 2.0, "rank": 4}
    fixed = sampler.propose(order.model_copy(update={"learning_rate": [1e-4]}), [LORA], [], 1)
    assert fixed["learning_rate"] == 1e-4, "one value is fixed"
