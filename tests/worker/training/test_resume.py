"""A trainer that is killed goes on as if nothing had happened: every loss and the final weights are equal to the bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from app import events
from app.kit import manifest
from app.settings import get_settings
from tests.worker.orders import Trainer, WarmTrainer, chat_rows, killed_at_random, order, put_dataset, put_model

pytestmark = pytest.mark.timeout(240)


def losses(said: list) -> dict[int, tuple[float, float]]:
    """Loss and gradient length by step; a step said twice has to say the same."""
    found: dict[int, tuple[float, float]] = {}
    for event in said:
        if isinstance(event, events.Step):
            assert found.setdefault(event.step, (event.loss, event.grad_norm)) == (event.loss, event.grad_norm)
    return found


def weights(finished: events.Finished) -> dict[str, str]:
    made = manifest.verify(get_settings().data_dir / finished.path)
    return {name: entry["sha256"] for name, entry in made["files"].items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [("lora", {"dropout": 0.2}), pytest.param("full", {}, marks=pytest.mark.long), pytest.param("pissa", {}, marks=pytest.mark.fault)],
)
@pytest.mark.parametrize(("seed", "kills"), [(5, 3), *(pytest.param(seed, 5, marks=pytest.mark.fault) for seed in range(6))])
def test_killed_at_random_moments(data_dir: Path, tiny_model: Path, strategy: str, settings: dict, seed: int, kills: int) -> None:
    model, data = put_model(tiny_model), put_dataset(chat_rows())
    spec = order(model, data, strategy, settings, micro_batches=2, evaluations_per_epoch=3, epochs=3)
    whole, code = WarmTrainer(spec, "whole", 1).run()
    assert code == 0 and isinstance(whole[-1], events.Finished)

    said, last = killed_at_random(spec, seed, kills, 9)
    assert losses([*said, *last]) == losses(whole)
    evaluated = {e.step: e.loss for e in whole if isinstance(e, events.Evaluated)}
    assert {e.step: e.loss for e in [*said, *last] if isinstance(e, events.Evaluated)} == evaluated
    assert weights(last[-1]) == weights(whole[-1])


@pytest.mark.long
def test_killed_while_saving(data_dir: Path, tiny_model: Path) -> None:
    """Killed at the k-th file system call of a save, for several k: never a torn checkpoint, never a different result."""
    spec = order(put_model(tiny_model), put_dataset(chat_rows()), evaluations_per_epoch=2)
    whole, _ = WarmTrainer(spec, "whole", 1).run()
    said = []
    for attempt, moment in enumerate((1, 7, 15, 16, 18), start=1):
        some, code = WarmTrainer(spec, "torn", attempt, die_at=moment).run()
        assert code == -signal.SIGKILL
        said += some
    last, code = WarmTrainer(spec, "torn", 6).run()
    assert code == 0
    assert losses([*said, *last]) == losses(whole)
    assert weights(last[-1]) == weights(whole[-1])
    assert not list((data_dir / "runs" / "torn").glob("a*/.*.tmp"))


@pytest.mark.long
def test_stop_saves_and_leaves(data_dir: Path, tiny_model: Path) -> None:
    spec = order(put_model(tiny_model), put_dataset(chat_rows()), epochs=200, evaluations_per_epoch=0)
    trainer = Trainer(spec, "stopped", 1)
    said = []
    for event in trainer:
        said.append(event)
        if isinstance(event, events.Step) and event.step == 3:
            trainer.process.send_signal(signal.SIGUSR1)
        if isinstance(event, events.Step) and len([e for e in said if isinstance(e, events.Saved)]) == 1:
            trainer.process.send_signal(signal.SIGTERM)  # a step after the save it was asked for
    assert trainer.wait() == 75
    saved = [e for e in said if isinstance(e, events.Saved)]
    assert len(saved) == 2 and saved[0].step < saved[1].step == said[-1].step
    kept = get_settings().data_dir / saved[1].path
    assert manifest.verify(kept)["step"] == saved[1].step
    assert json.loads((kept / "trainer" / "state.json").read_text())["step"] == saved[1].step
    assert (kept / "weights" / "adapter_config.json").is_file()


@pytest.mark.long
def test_a_changed_machine_is_said(data_dir: Path, tiny_model: Path) -> None:
    spec = order(put_model(tiny_model), put_dataset(chat_rows()), max_steps=4)
    WarmTrainer(spec, "moved", 1).run()
    state = next((data_dir / "runs" / "moved").glob("a1/checkpoint-*/trainer/state.json"))
    folder = state.parent.parent
    found = json.loads(state.read_text())
    found["facts"]["torch"] = "1.0"
    state.write_text(json.dumps(found))
    manifest.write(folder, step=found["step"])
    for other in folder.parent.glob("checkpoint-*"):
        if other != folder:
            os.rename(other, other.with_name("gone"))
    said, code = WarmTrainer(spec, "moved", 2).run()
    started = next(e for e in said if isinstance(e, events.Started))
    assert code == 0 and started.resumed_from == found["step"] and not started.exact
    assert any(isinstance(e, events.Log) and "torch: 1.0" in e.message for e in said)
