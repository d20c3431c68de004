"""The metrics: their names, what they mean, and which direction is better. One table for pages, verdicts and charts."""

from __future__ import annotations

from typing import NamedTuple

from app.kit.humanize import NARROW


class Metric(NamedTuple):
    title: str
    meaning: str
    lower_is_better: bool


METRICS: dict[str, Metric] = {
    "loss": Metric("Loss", "mean cross-entropy (nats)", True),
    "perplexity": Metric("Perplexity", "exponential of the loss", True),
    "bits_per_byte": Metric("Bits per byte", "comparable across tokenizers", True),
    "token_accuracy": Metric("Token accuracy", "next-token accuracy", False),
    "exact_match": Metric("Exact match", "share of answers equal to the reference", False),
    "rouge_l": Metric("ROUGE-L", "longest common sequence of words, 0 to 1", False),
    "chrf": Metric("chrF", "common character sequences, 0 to 1", False),
    "accuracy": Metric("Accuracy", "share of correct labels", False),
    "macro_f1": Metric("Macro F1", "mean F1 over classes", False),
    "log_loss": Metric("Log loss", "nats per row, of its probabilities", True),
    "calibration_error": Metric("Calibration error", "mean gap between confidence and observed accuracy", True),
    "reward_accuracy": Metric("Preference accuracy", "share of pairs whose chosen answer became likelier than the rejected one", False),
    "reward_margin": Metric("Reward margin", "how much likelier, in rewards", False),
    "chosen_reward": Metric("Reward of chosen answers", "against the base model", False),
    "rejected_reward": Metric("Reward of rejected answers", "against the base model", True),
}
"""In the order in which they are shown."""

ABILITY = {
    "gained": "improved",
    "within noise": "no significant change",
    "forgot a little": "dropped a little",
    "forgot some": "dropped",
    "forgot much": "dropped much",
    "nothing, by construction": "unchanged by design",
}
"""The words of the pages for the verdicts on forgetting: pages show the change of general ability, for which more is better."""


def signed(share: float, digits: int = 1) -> str:
    """A relative change as pages show it: 0.067 → `+6.7 %`, −0.067 → `−6.7 %`, and plain 0 for what rounds to 0."""
    text = f"{share * 100:+.{digits}f}"
    return f"{text.replace('-', '−') if float(text) else text[1:]}{NARROW}%"


def ability(change: float, digits: int = 1) -> str:
    """The change of general ability for a relative change of bits per byte: more bits are less ability."""
    return signed(-change, digits)
