"""When a job of reinforcement stops by itself: it has moved too far from the base, or its reward rises while another grader falls.

What was seen is in the state of a checkpoint, so that a resumed job stops where it would have stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from app.kit import stats
from worker.training.checkpoint import State

KL_STEPS = 3
"""Steps over which the divergence is averaged: that of one step hangs on its prompts."""
PARTED_EVALUATIONS = 2
"""Evaluations in a row at which the graders must part: of very many, one may do so by chance."""


def watch_kl(state: State, kl: float, most: float) -> None:
    """Stop where the mean divergence of the last steps, in nats per token, is above `most`."""
    state.recent_kl = [*state.recent_kl[-KL_STEPS + 1 :], kl]
    mean = fmean(state.recent_kl)
    if len(state.recent_kl) == KL_STEPS and mean > most:
        state.stop_reason = (
            f"The answers of the last {KL_STEPS} steps diverge from the base by {mean:.3g} nats per token, above the bound of {most:g}."
        )


def watch_graders(state: State, name: str, reward: float, scores: Sequence[float | None]) -> None:
    """Stop where a grader that is not the reward has fallen since its best evaluation, with the whole 95% interval of the paired difference
    below zero, while the reward has risen since (reward hacking: Gao et al. 2022, https://arxiv.org/abs/2210.10760)."""
    known = [score for score in scores if score is not None]
    if not known:
        return
    if not state.judged or fmean(known) > state.judged["mean"]:
        state.judged = {"step": state.step, "mean": fmean(known), "reward": reward, "scores": list(scores), "parted": 0}
        return
    both = [(a, b) for a, b in zip(state.judged["scores"], scores, strict=True) if a is not None and b is not None]
    low_high = stats.paired([a for a, _ in both], [b for _, b in both])
    parts = low_high is not None and low_high[1] < 0 and reward > state.judged["reward"]
    state.judged = {**state.judged, "parted": state.judged["parted"] + 1 if parts else 0}
    if state.judged["parted"] >= PARTED_EVALUATIONS and low_high is not None:
        state.stop_reason = (
            f"The reward rises and the grader {name} falls: since step {state.judged['step']} the reward went from "
            f"{state.judged['reward']:.2f} to {reward:.2f}, and {name} changed by {low_high[0]:.2f} to {low_high[1]:.2f} with 95% confidence."
        )
