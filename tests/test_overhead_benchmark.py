"""The benchmark of what a studio adds to a job says truly whether its goals were reached."""

from __future__ import annotations

from benchmarks.overhead import as_text, step_seconds


def figures(first: float, share: float) -> dict:
    studio = {"first_step_seconds": first, "step_seconds": 2.0, "job_seconds": 70.0, "share": share}
    return {"steps": 30, "studio": [studio], "here": [{"first_step_seconds": 5.0, "step_seconds": 1.0, "job_seconds": 40.0}]}


def test_a_goal_is_reached_or_missed() -> None:
    assert as_text(figures(9.9, 0.009)).count("reached") == 2
    assert as_text(figures(10.1, 0.011)).count("MISSED") == 2
    assert "A step took +100.0% in the studio" in as_text(figures(1, 0))


def test_a_steps_length_is_the_median_of_the_gaps_in_any_order() -> None:
    assert step_seconds([7.0, 1.0, 2.0, 3.0]) == 1.0
