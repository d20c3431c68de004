"""The metrics: name, meaning, and direction. One table for pages, verdicts, comparisons and charts: a line here is a metric."""

from __future__ import annotations

from typing import Literal, NamedTuple

from app.kit.humanize import human_number, human_percent

Unit = Literal["", "share"]


class Metric(NamedTuple):
    title: str
    meaning: str
    lower_is_better: bool
    unit: Unit = ""  # fractions are shown in percent
    column: str = ""  # its title in tables of jobs, where more precise
    tile: int = 0  # order among the scores of which a job's page shows the first that was measured; 0: none of them
    base: str = "Base"  # name in a verdict of the score that a fine-tuned model is compared with
    beside: str = "of the base"  # the same in a sentence
    few_shot: str = "Base, few-shot"  # name of the score of an untrained model with few-shot examples
    enough: float | None = None  # where a prompt alone reaches this, fine-tuning can gain little


METRICS: dict[str, Metric] = {
    "loss": Metric("Loss", "mean cross-entropy (nats)", True, column="Validation loss"),
    "perplexity": Metric("Perplexity", "exponential of the loss", True),
    "bits_per_byte": Metric("Bits per byte", "comparable across tokenizers", True),
    "token_accuracy": Metric("Token accuracy", "next-token accuracy", False, "share", tile=5),
    "exact_match": Metric("Exact match", "share of answers equal to the reference", False, "share"),
    "rouge_l": Metric("ROUGE-L", "longest common sequence of words, 0 to 1", False, tile=3, enough=0.8),
    "chrf": Metric("chrF", "common character sequences, 0 to 1", False, tile=4),
    "accuracy": Metric(
        "Accuracy",
        "share of correct labels",
        False,
        "share",
        tile=1,
        base="Majority baseline",
        beside="of always answering the commonest label",
        few_shot="Nearest neighbors",
        enough=0.9,
    ),
    "macro_f1": Metric("Macro F1", "mean F1 over classes", False, "share"),
    "log_loss": Metric("Log loss", "nats per row, of its probabilities", True),
    "calibration_error": Metric("Calibration error", "mean gap between confidence and observed accuracy", True),
    "reward": Metric("Reward", "mean score of the grader on validation prompts, 0 to 1", False, tile=1),
    "kl": Metric("KL divergence", "from the base model, nats per token", True),
    "reward_accuracy": Metric(
        "Preference accuracy",
        "share of pairs whose chosen answer has the higher reward",
        False,
        "share",
        tile=2,
        base="Chance",
        beside="of a coin",
    ),
    "ranking_accuracy": Metric(
        "Preference accuracy", "share of pairs whose chosen answer has the higher reward, by its own likelihood", False, "share"
    ),
    "rating_accuracy": Metric(
        "Rating accuracy",
        "share of good answers with a reward above the KL baseline, and of bad ones below it",
        False,
        "share",
        tile=2,
        base="Chance",
        beside="of a coin",
    ),
    "good_reward": Metric("Reward of good answers", "β × log-probability, less the base's", False),
    "bad_reward": Metric("Reward of bad answers", "β × log-probability, less the base's", True),
    "kl_baseline": Metric("KL baseline", "how far unrelated answers moved from the base, at least 0 (nats)", True),
    "reward_margin": Metric("Reward margin", "reward of the chosen answer less that of the rejected one", False),
    "chosen_reward": Metric(
        "Reward of chosen answers",
        "β × log-probability, less the base's where the loss has a reference; of a reward model its own number",
        False,
    ),
    "rejected_reward": Metric(
        "Reward of rejected answers",
        "β × log-probability, less the base's where the loss has a reference; of a reward model its own number",
        True,
    ),
}
"""In display order."""
TILES = sorted((name for name, metric in METRICS.items() if metric.tile), key=lambda name: METRICS[name].tile)
"""The most informative metric of each task, first."""


def in_text(name: str) -> str:
    """A metric inside a sentence: `accuracy`, `ROUGE-L`."""
    title = METRICS[name].title
    return title.lower() if title.capitalize() == title else title


def judged_by(name: str) -> str:
    """A metric as the column of a comparison calls it, inside a sentence: `validation loss`."""
    column = METRICS[name].column
    return column.lower() if column else in_text(name)


ABILITY = {
    "gained": "improved",
    "within noise": "no significant change",
    "forgot a little": "dropped a little",
    "forgot some": "dropped",
    "forgot much": "dropped much",
    "nothing, by construction": "unchanged by design",
}
"""Labels of the verdicts on forgetting: pages show the change of general ability, for which higher is better."""


def figure(value: float | None, name: str, digits: int = 4) -> str:
    """A score as pages show it: fractions in percent, all else with so many decimals; nothing where there is none."""
    return str(human_percent(value) if METRICS[name].unit == "share" else human_number(value, digits))


def signed(share: float, digits: int = 1) -> str:
    """A relative change as pages show it: 0.067 → `+6.7%`, −0.067 → `−6.7%`, and plain 0 for what rounds to 0."""
    text = f"{share * 100:+.{digits}f}"
    return f"{text.replace('-', '−') if float(text) else text[1:]}%"


def ability(change: float, digits: int = 1) -> str:
    """The change of general ability for a relative change of bits per byte: more bits mean less ability."""
    return signed(-change, digits)
