"""The fold behind the job page, checked against a slow rule that keeps only what the last word on each step was."""

from __future__ import annotations

import copy
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import events
from app.jobs.progress import JobProgress, downsample, fold, progress
from app.web.charts import charts


def started(total: int = 100, resumed_from: int | None = None, **rest: object) -> events.Started:
    return events.Started(
        device="cpu", precision="fp32", total_steps=total, train_rows=90, validation_rows=10, train_tokens=5000,
        trainable_parameters=100, parameters=1000, resumed_from=resumed_from, **rest,
    )  # fmt: skip


def step(n: int, loss: float | None = None, seconds: float | None = None) -> events.Step:
    return events.Step(
        step=n, epoch=n / 40, loss=3 / n if loss is None else loss, learning_rate=1e-3, grad_norm=1.0, tokens=n * 100,
        trained_tokens=n * 50, tokens_per_second=200.0, memory_bytes=1000 + n, seconds=n * 0.5 if seconds is None else seconds,
    )  # fmt: skip


def saved(n: int) -> events.Saved:
    return events.Saved(step=n, path=f"runs/j/a1/checkpoint-{n}", bytes=10, manifest_sha256="0" * 64)


def finished(n: int) -> events.Finished:
    measured = events.Measured(
        peak_memory_bytes=5000, seconds=50, tokens_per_second=210, tokens=n * 100, trained_tokens=n * 50, steps=n, device="cpu"
    )
    return events.Finished(
        reason="completed", step=n, path="runs/j/a1/final", bytes=10, revision="0" * 64, adapter_sha256=None, kind="dialogue",
        measured=measured,
    )  # fmt: skip


def test_a_straight_run_ends_with_every_point_and_nothing_left_to_do():
    seen = progress([events.Queued(), events.Claimed(attempt=1, worker="w1"), started(20), *map(step, range(1, 21)), finished(20)])
    assert [x for x, _ in seen.curves["loss"]] == list(range(1, 21))
    assert (seen.status, seen.share, seen.seconds_left) == ("succeeded", 1.0, None)
    assert (seen.first_loss, seen.loss) == (3.0, 0.15)
    assert (seen.peak_memory_bytes, seen.tokens_per_second) == (5000, 210)


def test_what_a_recipe_measures_is_drawn_for_training_and_validation():
    margins = [step(n).model_copy(update={"metrics": {"reward_margin": n / 10}}) for n in range(1, 6)]
    told = [started(), *margins, events.Evaluated(step=5, loss=0.6, metrics={"reward_margin": 0.4, "perplexity": 2.0})]
    seen = progress([*told, started(resumed_from=3)])
    assert seen.step_metrics == {"reward_margin": [(1, 0.1), (2, 0.2), (3, 0.3)]}, "steps after the resume are said again"
    drawn = charts(progress(told))
    assert [chart.name for chart in drawn][:3] == ["loss", "reward_margin", "learning_rate"] and drawn[-1].name == "perplexity"
    assert drawn[1].data() == {"training": [[1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5]], "reward_margin": [[5], [0.4]]}
    assert drawn[1].rows()[-1] == (5, [0.5, 0.4])


def test_what_is_done_besides_steps_is_shown_until_something_else_is_said():
    doing = events.TaskProgress(what="Comparing base and result", share=0.4)
    said = [started(2), step(1), step(2), events.Log(message="…"), doing, events.Log(message="…")]
    seen = progress(said)
    assert seen.task == doing and seen.seconds_left is None, "no step is left to estimate the time from"
    assert len(seen.log) == 3, "it leaves no line"
    assert progress([*said, events.Lost(attempt=1, message="gone")]).task is None


def test_a_resume_forgets_the_steps_that_are_said_again():
    lost = [
        started(),
        *map(step, range(1, 48)),
        events.Evaluated(step=45, loss=1.0),
        saved(40),
        saved(45),
        events.Lost(attempt=1, message="gone"),
    ]
    again = [events.Queued(reason="worker_lost"), events.Claimed(attempt=2, worker="w2"), started(resumed_from=40)]
    first = progress([events.Claimed(attempt=1, worker="w1"), *lost])
    assert first.seconds_left is None and first.seconds_to_train is not None and not first.starting
    loading = progress([events.Claimed(attempt=1, worker="w1"), *lost, *again[:2]])
    assert loading.starting and loading.step == 47 and loading.resumed == "after the worker was lost" and loading.seconds_left is None
    seen = progress([events.Claimed(attempt=1, worker="w1"), *lost, *again])
    assert seen.starting and not seen.loading
    assert seen.step == 40
    assert seen.curves["loss"][-1][0] == 40
    assert not seen.evaluations and not seen.curves["validation"]
    assert [c.step for c in seen.checkpoints] == [40]
    assert seen.resumed == "resumed at step 40 after the worker was lost"
    for n in range(41, 101):
        fold(seen, step(n))
    assert seen.curves == progress([started(), *map(step, range(1, 101))]).curves


def test_a_second_attempt_without_a_checkpoint_starts_over():
    seen = progress(
        [events.Claimed(attempt=1, worker="w"), started(), step(1), events.Lost(attempt=1, message="gone"),
         events.Claimed(attempt=2, worker="w"), started()]
    )  # fmt: skip
    assert seen.curves["loss"] == [] and seen.step == 0 and seen.loss is None
    assert seen.resumed == "started over after the worker was lost"


def test_a_resume_that_is_not_exact_says_so():
    seen = progress([events.Queued(reason="resumed"), started(resumed_from=8, exact=False)])
    assert seen.resumed == "resumed at step 8 after a pause, not bit for bit"


def test_the_time_left_is_the_median_step_and_a_slow_one_does_not_move_it():
    seconds = [n * 2.0 for n in range(1, 11)]
    seconds[5:] = [s + 300 for s in seconds[5:]]  # one pause of five minutes between steps 5 and 6
    seen = progress([started(30), *(step(n, seconds=s) for n, s in enumerate(seconds, 1))])
    assert seen.seconds_left == pytest.approx(20 * 2.0)


def test_the_time_left_counts_the_evaluations_to_come():
    steps = [step(n, seconds=float(n)) for n in range(1, 11)]
    seen = progress([started(20), *steps, events.Evaluated(step=10, loss=1.0, seconds=5.0)])
    assert seen.seconds_left == pytest.approx(10 * 1.5)


@pytest.mark.parametrize("status", ["paused", "cancelled"])
def test_nothing_is_left_to_wait_for_when_nothing_runs(status: str):
    seen = progress([started(), step(1), step(2), events.Stopped(status=status, step=2)])
    assert seen.status == status and seen.seconds_left is None


def test_the_best_validation_loss_is_never_one_that_is_not_a_number():
    seen = progress([started(), *(events.Evaluated(step=n, loss=x) for n, x in enumerate((2.0, 1.5, math.nan), 1))])
    assert seen.best_evaluation.step == 2
    assert progress([events.Evaluated(step=1, loss=math.nan)]).best_evaluation is None


def test_a_failure_stays_until_the_job_is_queued_again():
    failure = events.Failed(kind="diverged", message="The loss is not a number.", hint="Lower the learning rate.")
    seen = progress([started(), failure])
    assert seen.status == "failed" and seen.failure is failure
    assert seen.log[-1].level == "error" and "Lower the learning rate." in seen.log[-1].message
    assert fold(seen, events.Queued(reason="retry")).failure is None


def test_every_event_of_the_closed_list_can_be_folded():
    from typing import get_args

    kinds = get_args(get_args(events.JobEvent)[0])
    from app.jobs.progress import _FOLDS

    assert set(_FOLDS) == set(kinds)


# Properties ----------------------------------------------------------------------------------------------------------

runs = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=1, max_size=5)
"""Attempts of one job, each as (checkpoint it resumes from, steps it manages)."""


def as_events(attempts: list[tuple[int, int]]) -> list[events.JobEvent]:
    said: list[events.JobEvent] = [events.Queued()]
    reached = 0
    for number, (resume, count) in enumerate(attempts, 1):
        resume = min(resume, reached)
        said += [events.Claimed(attempt=number, worker="w"), started(resumed_from=resume or None)]
        for n in range(resume + 1, resume + count + 1):
            said.append(step(n, loss=n + number / 10))
            if n % 5 == 0:
                said += [events.Evaluated(step=n, loss=float(n), best=True), saved(n)]
        reached = resume + count
        said.append(events.Lost(attempt=number, message="gone"))
    return said


@given(runs, st.data())
def test_folding_in_pieces_equals_folding_at_once(attempts, data):
    said = as_events(attempts)
    cut = data.draw(st.integers(0, len(said)))
    later = progress(said[:cut])
    seen_then, before = later.snapshot(), copy.deepcopy(later)
    for event in said[cut:]:
        fold(later, event)
    assert later == progress(said)
    assert seen_then == before  # what a page took before is not changed by folding on


@given(runs)
def test_the_curve_is_what_the_surviving_attempts_said(attempts):
    kept: dict[int, float] = {}
    for event in (said := as_events(attempts)):
        if event.type == "started":
            kept = {n: x for n, x in kept.items() if n <= (event.resumed_from or 0)}
        if event.type == "step":
            kept[event.step] = event.loss
    assert dict(progress(said).curves["loss"]) == kept


@given(runs)
def test_a_line_recorded_twice_draws_nothing_twice(attempts):
    said = as_events(attempts)
    doubled = [event for one in said for event in ((one, one) if one.type in ("step", "evaluated", "saved") else (one,))]
    assert progress(doubled).curves == progress(said).curves
    assert progress(doubled).checkpoints == progress(said).checkpoints


finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(finite, max_size=400), st.integers(3, 60))
def test_downsampling_keeps_the_ends_the_order_and_the_budget(values, budget):
    points = list(enumerate(values))
    fewer = downsample(points, budget)
    assert len(fewer) == min(budget, len(points))
    assert fewer == sorted(set(fewer)) and set(fewer) <= set(points)
    if points:
        assert (fewer[0], fewer[-1]) == (points[0], points[-1])


def test_downsampling_keeps_a_spike_that_every_tenth_point_would_miss():
    rng = random.Random(0)
    points = [(n, rng.random() * 0.01) for n in range(10_000)]
    points[4321] = (4321, 9.0)
    assert (4321, 9.0) in downsample(points, 200)
    assert (4321, 9.0) not in points[:: 10_000 // 200]


def test_downsampling_leaves_out_what_has_no_place_on_an_axis():
    assert downsample([(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)], 10) == [(1, 1.0), (4, 2.0)]


def test_a_new_progress_is_empty_and_asks_nothing_of_anyone():
    seen = JobProgress()
    assert (seen.loss, seen.first_loss, seen.peak_memory_bytes, seen.tokens_per_second, seen.share) == (None, None, None, None, 0.0)
