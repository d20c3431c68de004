"""The metrics: name, meaning, and direction. One table for pages, verdicts, comparisons and charts: a line here is a metric."""

from __future__ import annotations

from typing import Literal, NamedTuple

from app.kit.humanize import human_number, human_percent
from app.languages import SOURCE, current, gettext, localized, lowered, mark

Unit = Literal["", "share"]


class Metric(NamedTuple):
    title: str
    meaning: str
    lower_is_better: bool
    unit: Unit = ""  # fractions are shown in percent
    column: str = ""  # its title in tables of jobs, where more precise
    tile: int = 0  # order among the scores of which a job's page shows the first that was measured; 0: none of them
    base: str = mark("Base")  # name in a verdict of the score that a fine-tuned model is compared with
    beside: str = mark("of the base")  # the same in a sentence
    few_shot: str = mark("Base, few-shot")  # name of the score of an untrained model with few-shot examples
    enough: float | None = None  # where a prompt alone reaches this, fine-tuning can gain little


METRICS: dict[str, Metric] = {
    "loss": Metric(mark("Loss"), mark("mean cross-entropy (nats)"), True, column=mark("Validation loss")),
    "perplexity": Metric(mark("Perplexity"), mark("exponential of the loss"), True),
    "bits_per_byte": Metric(mark("Bits per byte"), mark("comparable across tokenizers"), True),
    "token_accuracy": Metric(mark("Token accuracy"), mark("next-token accuracy"), False, "share", tile=5),
    "exact_match": Metric(mark("Exact match"), mark("share of answers equal to the reference"), False, "share"),
    "rouge_l": Metric("ROUGE-L", mark("longest common sequence of words, 0 to 1"), False, tile=3, enough=0.8),
    "chrf": Metric("chrF", mark("common character sequences, 0 to 1"), False, tile=4),
    "accuracy": Metric(
        mark("Accuracy"),
        mark("share of correct labels"),
        False,
        "share",
        tile=1,
        base=mark("Majority baseline"),
        beside=mark("of always answering the commonest label"),
        few_shot=mark("Nearest neighbors"),
        enough=0.9,
    ),
    "macro_f1": Metric(mark("Macro F1"), mark("mean F1 over classes"), False, "share"),
    "log_loss": Metric(mark("Log loss"), mark("nats per row, of its probabilities"), True),
    "calibration_error": Metric(mark("Calibration error"), mark("mean gap between confidence and observed accuracy"), True),
    "reward": Metric(mark("Reward"), mark("mean score of the grader on validation prompts, 0 to 1"), False, tile=1),
    "kl": Metric(mark("KL divergence"), mark("from the base model, nats per token"), True),
    "reward_accuracy": Metric(
        mark("Preference accuracy"),
        mark("share of pairs whose chosen answer has the higher reward"),
        False,
        "share",
        tile=2,
        base=mark("Chance"),
        beside=mark("of a coin"),
    ),
    "ranking_accuracy": Metric(
        mark("Preference accuracy"), mark("share of pairs whose chosen answer has the higher reward, by its own likelihood"), False, "share"
    ),
    "rating_accuracy": Metric(
        mark("Rating accuracy"),
        mark("share of good answers with a reward above the KL baseline, and of bad ones below it"),
        False,
        "share",
        tile=2,
        base=mark("Chance"),
        beside=mark("of a coin"),
    ),
    "good_reward": Metric(mark("Reward of good answers"), mark("β × log-probability, less the base's"), False),
    "bad_reward": Metric(mark("Reward of bad answers"), mark("β × log-probability, less the base's"), True),
    "kl_baseline": Metric(mark("KL baseline"), mark("how far unrelated answers moved from the base, at least 0 (nats)"), True),
    "reward_margin": Metric(mark("Reward margin"), mark("reward of the chosen answer less that of the rejected one"), False),
    "chosen_reward": Metric(
        mark("Reward of chosen answers"),
        mark("β × log-probability, less the base's where the loss has a reference; of a reward model its own number"),
        False,
    ),
    "rejected_reward": Metric(
        mark("Reward of rejected answers"),
        mark("β × log-probability, less the base's where the loss has a reference; of a reward model its own number"),
        True,
    ),
}
"""In display order."""
TILES = sorted((name for name, metric in METRICS.items() if metric.tile), key=lambda name: METRICS[name].tile)
"""The most informative metric of each task, first."""


def in_text(name: str) -> str:
    """A metric inside a sentence: `accuracy`, `ROUGE-L`."""
    title = METRICS[name].title
    return title.lower() if current.get() == SOURCE and title.capitalize() == title else gettext(title)


def judged_by(name: str) -> str:
    """A metric as the column of a comparison calls it, inside a sentence: `validation loss`."""
    column = METRICS[name].column
    return lowered(gettext(column)) if column else in_text(name)


ABILITY = {
    "gained": mark("improved"),
    "within noise": mark("no significant change"),
    "forgot a little": mark("dropped a little"),
    "forgot some": mark("dropped"),
    "forgot much": mark("dropped much"),
    "nothing, by construction": mark("unchanged by design"),
}
"""Labels of the verdicts on forgetting: pages show the change of general ability, for which higher is better."""


def figure(value: float | None, name: str, digits: int = 4) -> str:
    """A score as pages show it: fractions in percent, all else with so many decimals; nothing where there is none."""
    return str(human_percent(value) if METRICS[name].unit == "share" else human_number(value, digits))


def signed(share: float, digits: int = 1) -> str:
    """A relative change as pages show it: 0.067 → `+6.7%`, −0.067 → `−6.7%`, and plain 0 for what rounds to 0."""
    text = f"{share * 100:+.{digits}f}"
    return localized(f"{text.replace('-', '−') if float(text) else text[1:]}%")


def ability(change: float, digits: int = 1) -> str:
    """The change of general ability for a relative change of bits per byte: more bits mean less ability."""
    return signed(-change, digits)
