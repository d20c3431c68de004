"""Reinforcement that stops by itself: too far from the base, or a reward that rises while another grader falls."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import events
from app.errors import BadField
from app.planning.reinforcement import refuse_drawn
from app.strategies import STRATEGIES
from tests.worker.training.test_reinforcement import VOWELS, drawn_order
from tests.worker.training.test_train import of, run
from worker.training.checkpoint import State
from worker.training.watch import watch_graders, watch_kl

pytestmark = pytest.mark.timeout(240)
OTHERS = {
    "type": "python",
    "name": "consonants",
    "source": "def grade(sample, item):\n    t = sample['output_text']\n    return sum([1 for c in t if c not in 'aeiou']) / (1 + len(t))",
}


def test_the_divergence_of_three_steps_stops_it() -> None:
    state = State()
    for kl in (0.3, 0.05, 0.04):
        watch_kl(state, kl, 0.2)
    assert not state.stop_reason and state.recent_kl == [0.3, 0.05, 0.04]
    for kl in (0.3, 0.3):
        watch_kl(state, kl, 0.2)
    assert "0.213 nats per token, above the bound of 0.2" in state.stop_reason


def parted(*seen: tuple[float, list[float | None]]) -> State:
    state = State()
    for step, (reward, scores) in enumerate(seen):
        state.step = step
        watch_graders(state, "held", reward, scores)
    return state


HIGH: list[float | None] = [0.9, 0.8, 0.85, 0.9, 0.7, 0.8, None, 0.9]
LOW: list[float | None] = [0.5, 0.45, 0.4, 0.5, 0.4, 0.35, 0.9, 0.5]
NOISY: list[float | None] = [0.1, 0.95, 0.9, 0.2, 0.9, 0.9, 0.9, 0.9]


def test_graders_part_beyond_chance_and_twice_in_a_row() -> None:
    reason = parted((0.2, HIGH), (0.4, LOW), (0.5, LOW)).stop_reason
    assert "since step 0 the reward went from 0.20 to 0.50" in reason and "held changed by -0.4" in reason.replace("−", "-")
    assert not parted((0.2, HIGH), (0.4, LOW)).stop_reason, "once may be chance"
    assert not parted((0.2, HIGH), (0.4, LOW), (0.5, HIGH), (0.5, LOW)).stop_reason, "not in a row"
    assert not parted((0.2, HIGH), (0.1, LOW), (0.1, LOW)).stop_reason, "the reward fell too"
    assert not parted((0.2, HIGH), (0.4, NOISY), (0.5, NOISY)).stop_reason, "the interval reaches zero"
    assert not parted((0.2, LOW), (0.4, HIGH), (0.5, HIGH)).stop_reason, "both rise"
    assert not parted((0.2, [None] * 8), (0.4, [None] * 8)).stop_reason


def test_a_job_whose_graders_part_stops_and_keeps_the_best(data_dir: Path, tiny_model: Path) -> None:
    more = {"max_steps": 24, "eval_steps": 3, "epochs": 40, "learning_rate": 1e-2, "validation_fraction": 0.4}
    spec = drawn_order(tiny_model, "full", {"group_size": 8}, **more).model_copy(update={"graders": (OTHERS,)})
    said = run(spec, data_dir)
    finished, scored = said[-1], of(said, events.Evaluated)
    assert isinstance(finished, events.Finished) and finished.reason == "early_stopped" and finished.step < 24
    assert finished.why.startswith("The reward rises and the grader consonants falls")
    assert any(f"Stopped at step {finished.step}. {finished.why}" == event.message for event in of(said, events.Log))
    best = max((e for e in scored if e.step), key=lambda e: e.metrics["grader_consonants"])
    assert finished.best_step == best.step < finished.step
    assert finished.evaluation["tuned"]["grader_consonants"] == best.metrics["grader_consonants"]
    ignored = spec.model_copy(update={"preference": spec.preference.model_copy(update={"stop_when_parted": False})})
    assert run(ignored, data_dir, "on")[-1].step == 24


def test_a_job_beyond_its_bound_stops_there_and_is_judged_there(data_dir: Path, tiny_model: Path) -> None:
    said = run(drawn_order(tiny_model, own={"max_kl": 1e-4, "grader": VOWELS}, max_steps=12, eval_steps=100, learning_rate=3e-2), data_dir)
    finished, steps = said[-1], of(said, events.Step)
    assert isinstance(finished, events.Finished) and (finished.reason, finished.step) == ("early_stopped", len(steps)) and len(steps) < 12
    kls = [step.metrics["kl"] for step in steps]
    assert sum(kls[-3:]) / 3 > 1e-4 and all(sum(kls[at : at + 3]) / 3 <= 1e-4 for at in range(len(kls) - 3))
    assert "above the bound of 0.0001" in finished.why and [e.step for e in of(said, events.Evaluated)] == [0, finished.step]


def test_a_bound_needs_an_adapter(tiny_model: Path, data_dir: Path) -> None:
    spec = drawn_order(tiny_model, "full", {"max_kl": 0.1})
    with pytest.raises(
        BadField, match="max_kl compares with the base by switching an adapter off, and Full fine-tuning has none"
    ) as caught:
        refuse_drawn(STRATEGIES["full"](), spec.run, spec.preference, spec.model.shape)
    assert caught.value.param == "preference.max_kl"
