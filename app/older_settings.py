"""Run settings of older versions, under their current names."""

from __future__ import annotations

from typing import Any

from app.languages import mark

RENAMED = {
    "accumulation": (
        "micro_batches",
        mark(
            "It is called micro_batches now: passes that a batch is split over. To add up the gradients of several batches, which makes a "
            "step larger, send gradient_accumulation_steps."
        ),
    )
}
"""Settings of older jobs: the current name, and the message for a request that uses them."""


def renamed(run: dict[str, Any]) -> dict[str, Any]:
    """Run settings of older versions, under their current names."""
    return {RENAMED[name][0] if name in RENAMED else name: value for name, value in run.items()}
