"""Defaults that train: small data gets steps enough, large data keeps large steps, and what somebody chose is kept."""

from __future__ import annotations

import pytest

from app.planning.schedule import MIN_STEPS, PRESETS, held_out_share, schedule, steps


@pytest.mark.parametrize("task", ["generation", "classification", "preference"])
@pytest.mark.parametrize("mean", [20, 110, 600])
@pytest.mark.parametrize("rows", [30, 45, 100, 300, 1000, 20_000])
def test_data_of_every_size_gets_steps_enough(task, mean, rows):
    found = schedule(task, rows, mean)
    made = steps(rows * mean, found.max_tokens_per_step, found.epochs)
    assert made >= MIN_STEPS and 3 <= found.epochs <= PRESETS["balanced"].max_epochs
    assert found.epochs == 3 or made < 2 * PRESETS["balanced"].steps, "epochs rise only as far as they must"
    assert found.max_tokens_per_step <= 2048
    assert found.epochs * found.evaluations_per_epoch <= 11 or found.evaluations_per_epoch == 2


def test_thirty_seven_conversations_are_no_six_steps():
    found = schedule("generation", 33, 120)
    assert steps(33 * 120, 2048, 3) == 6
    assert 40 <= steps(33 * 120, found.max_tokens_per_step, found.epochs) <= 100


def test_large_data_is_read_as_before():
    assert schedule("generation", 10_000, 200) == (2048, 3, 2.0)
    card = 80 * 2**30
    assert schedule("generation", 100_000, 200, gpu_memory_bytes=card) == (16_384, 3, 2.0)
    assert schedule("generation", 100_000, 200, gpu_memory_bytes=card, processes=8)[0] > 7 * 16_384, "eight cards, as much for each"
    assert schedule("generation", 9000, 200, gpu_memory_bytes=card, processes=8)[0] < 6 * 16_384, "never less than 60 steps for it"
    assert schedule("generation", 100_000, 200, processes=8)[0] == 2048, "processes on one CPU share a step"
    assert schedule("classification", 9000, 18)[0] == 576, "32 texts behind each step"


def test_what_somebody_chose_is_kept_and_the_rest_fits_it():
    assert schedule("generation", 33, 120, epochs=1).epochs == 1
    found = schedule("generation", 33, 120, max_tokens_per_step=2048)
    assert found.max_tokens_per_step == 2048 and found.epochs == PRESETS["balanced"].max_epochs


@pytest.mark.parametrize(("rows", "mean"), [(33, 120), (90, 60), (200, 150)])
def test_a_preset_is_a_number_of_steps(rows, mean):
    made = {}
    for name, preset in PRESETS.items():
        found = schedule("generation", rows, mean, preset=name)
        made[name] = min(steps(rows * mean, found.max_tokens_per_step, found.epochs), preset.more.get("max_steps", 10**9))
    assert 20 <= made["quick"] <= 30 and 50 <= made["balanced"] <= 100 and 120 <= made["best"] <= 250


def test_small_data_holds_out_rows_enough_to_tell_and_large_data_a_tenth():
    assert {rows: round(rows * held_out_share(rows)) for rows in (20, 40, 48, 60, 72, 99)} == {
        20: 5,
        40: 10,
        48: 10,
        60: 10,
        72: 10,
        99: 11,
    }
    assert [held_out_share(rows) for rows in (0, 1, 8, 100, 1000, 10**6)] == [0.25, 0.25, 0.25, 0.1, 0.1, 0.1]
    assert all(rows * held_out_share(rows) >= 10 for rows in range(40, 2000))
