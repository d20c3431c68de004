"""Reasons for and against a strategy, independent of its cost: facts of the data, and sentences that several strategies share.

The rules follow what the literature agrees on; each cites its source. A strategy lists the situations that it `suits` and those
it is `unsuited` to, or adds reasons in `advice_reasons`.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, Protocol

from pydantic import BaseModel

from app.kit.humanize import human_number
from app.languages import gettext, mark
from app.metrics import METRICS, in_text
from app.objectives import OBJECTIVES, Task

Family = Literal["feature", "partial", "full", "additive", "selective", "reparametrized"]
FAMILIES: dict[Family, str] = {
    "reparametrized": mark("LoRA family"),
    "additive": mark("Adapters and soft prompts"),
    "selective": mark("Selective"),
    "partial": mark("Partial"),
    "full": mark("Full"),
    "feature": mark("Feature extraction"),
}
"""Families in the order of forms, in plain words."""
Situation = Literal["few rows", "many rows", "far data", "close data", "solved"]
"""Few or many rows; data unlike what the model was trained on, or like it; a prompt alone almost solves the task."""
FEW_ROWS, MANY_ROWS = 100, 5_000
FEW_PER_CLASS, MANY_PER_CLASS = 16, 100
UNEVEN = 10
"""Ratio of the largest to the smallest class beyond which accuracy is misleading: it looks good while the small class is never
predicted."""
CLOSE, FAR = 1.25, 2.0
"""Bits per byte of the data over those of general text: up to the first the model predicts the data like any other text; from the
second on the data is out of distribution. Measured on smollm2-135m-instruct: sums in words 1.2, answers in a house style 1.3 to
1.8, a ship's log 2.1."""
ENOUGH = 0.9
"""Where a prompt alone reaches this score, in a metric without a threshold of its own, fine-tuning can gain little."""
CLOSE_TASK, FAR_TASK = 0.6, 0.15
"""Score of few-shot examples alone between chance (0) and always right (1): above the first the frozen model separates the labels
already, below the second its embeddings hardly separate them."""


class Reason(NamedTuple):
    points: int
    text: str


class Weighed(Protocol):
    """A strategy as the rules see it."""

    family: ClassVar[Family]
    forgets: ClassVar[Literal["little", "some", "much"]]
    suits: ClassVar[tuple[Situation, ...]]
    unsuited: ClassVar[tuple[Situation, ...]]
    standing: ClassVar[Reason | None]

    def label_reasons(self, facts: Facts) -> list[Reason]: ...


class Facts(BaseModel):
    """Facts behind the advice. `distance` is the base's bits per byte on the data over those on the general probe; `prompted` is
    the best score by `metric` that a prompt alone reached on validation rows, `how` it was tried (answers, labels or vectors),
    `chance` the score of always giving the most frequent label. None while they have not been measured. Memory in bytes."""

    task: Task
    rows: int
    tokens: int | None = None
    classes: int | None = None
    smallest_class: int | None = None
    largest_class: int | None = None
    distance: float | None = None
    metric: str | None = None
    prompted: float | None = None
    chance: float | None = None
    how: str | None = None
    memory_bytes: int
    cuda: bool = False


def worth_tuning(facts: Facts) -> bool | None:
    """Whether a prompt alone leaves room for fine-tuning; None while none has been tried."""
    if facts.prompted is None or facts.metric is None:
        return None
    return facts.prompted < (METRICS[facts.metric].enough or ENOUGH)


def task_skill(facts: Facts) -> float | None:
    """The score of examples alone between chance (0) and always right (1), for labels."""
    if facts.prompted is None or facts.metric not in OBJECTIVES[facts.task].metrics:
        return None
    chance = min(facts.chance or 0.0, 0.99)
    return (facts.prompted - chance) / (1 - chance)


def by_data(strategy: Weighed, facts: Facts) -> list[Reason]:
    if OBJECTIVES[facts.task].classifies:
        return strategy.label_reasons(facts)
    rows = human_number(facts.rows)
    if facts.rows < FEW_ROWS:
        # Liu et al. 2022 (T-Few): with tens of examples the smallest methods overfit least.
        if "few rows" in strategy.suits:
            return [Reason(12, gettext("%(rows)s rows are few, and so few trainable parameters hardly overfit.", rows=rows))]
        if strategy.family == "full":
            return [Reason(-40, gettext("%(rows)s rows are too few to train every weight: it would overfit.", rows=rows))]
        return []
    if facts.rows >= MANY_ROWS:
        if strategy.family == "full":
            return [Reason(15, gettext("%(rows)s rows are enough to train every weight.", rows=rows))]
        if "many rows" in strategy.suits:
            return [Reason(8, gettext("%(rows)s rows can use the capacity beyond plain LoRA.", rows=rows))]
        if "many rows" in strategy.unsuited:
            return [Reason(-15, gettext("%(rows)s rows hold more than so few trainable parameters can take up.", rows=rows))]
    return []


def by_labels(strategy: Weighed, facts: Facts) -> list[Reason]:
    """With few labeled rows a frozen model suffices. The smallest class decides whether they are few."""
    found = []
    words, least, large = labeled(facts)
    if strategy.family == "feature":
        quick = gettext(
            "%(rows)s: a classifier on the frozen model is quick, hard to beat, and keeps the base model unchanged.", rows=words
        )
        found.append(Reason(30 if large else 35, quick))
        if facts.distance is not None and facts.distance >= FAR:
            far = gettext("The texts are far from what the model was trained on, so its frozen vectors may not separate the classes.")
            found.append(Reason(-20, far))
    elif least < FEW_PER_CLASS:
        found.append(Reason(-15, gettext("%(rows)s are few to train the model itself.", rows=rows_a_class(facts))))
    elif least >= MANY_PER_CLASS and strategy.family in ("reparametrized", "additive"):
        found.append(Reason(10, gettext("%(rows)s: enough to adapt the model itself.", rows=words)))
    return found + by_balance(strategy.family, facts)


def by_balance(family: str, facts: Facts) -> list[Reason]:
    """The effect of imbalanced classes on a model with many trainable parameters."""
    if balance(facts) >= UNEVEN and family in ("full", "partial", "reparametrized"):
        uneven = gettext(
            "The largest class has %(times)s times the rows of the smallest, so a model with many trainable parameters soon predicts only the "
            "large one. Watch macro F1, or balance the classes.",
            times=human_number(balance(facts), 0),
        )
        return [Reason(-4, uneven)]
    return []


def balance(facts: Facts) -> float:
    """Ratio of the largest class to the smallest; 1 where they were not counted."""
    return facts.largest_class / max(facts.smallest_class, 1) if facts.smallest_class is not None and facts.largest_class else 1.0


def labeled(facts: Facts) -> tuple[str, float, bool]:
    """(the labeled rows in words, rows of the smallest class, whether there are many of every class)."""
    least = _per_class(facts) if facts.smallest_class is None else facts.smallest_class
    words = gettext(
        "%(rows)s labeled rows in %(classes)s classes (%(each)s)",
        rows=human_number(facts.rows),
        classes=facts.classes,
        each=rows_a_class(facts),
    )
    return words, least, facts.rows >= MANY_ROWS and least >= MANY_PER_CLASS


def _per_class(facts: Facts) -> float:
    return facts.rows / max(facts.classes or 1, 1)


def rows_a_class(facts: Facts) -> str:
    mean = human_number(_per_class(facts), 0)
    if balance(facts) > 1.5:
        return gettext("%(rows)s rows a class, %(least)s in the smallest", rows=mean, least=human_number(facts.smallest_class))
    return gettext("%(rows)s rows a class", rows=mean)


def told_apart(facts: Facts) -> bool | None:
    """Whether the frozen model's embeddings separate the classes; None while that is unknown."""
    if facts.distance is not None and facts.distance >= FAR:
        return False
    skill = task_skill(facts)
    return None if skill is None or facts.how != "vectors" else skill > FAR_TASK


def by_distance(strategy: Weighed, facts: Facts) -> list[Reason]:
    if facts.distance is None:
        return []
    points, says = _of_distance(strategy, facts.distance)
    return [Reason(points, says % {"times": human_number(facts.distance, 2)})] if points else []


def _of_distance(strategy: Weighed, distance: float) -> tuple[int, str]:
    """(points, the reason with a place for the distance); 0 where it decides nothing."""
    if distance >= FAR:
        if strategy.family == "full":
            return 32, gettext(
                "This data is %(times)s × as hard to predict as general text for the base model: far from what it was trained on, so every "
                "weight may have to change."
            )
        if "far data" in strategy.unsuited:
            return -12, gettext(
                "This data is %(times)s × as hard to predict as general text for the base model: too far for so few trainable parameters."
            )
        if "far data" in strategy.suits:
            return 6, gettext("This data is %(times)s × as hard to predict as general text for the base model: more capacity helps.")
    if distance <= CLOSE:
        if strategy.family == "full":
            return -15, gettext(
                "This data is %(times)s × as hard to predict as general text for the base model: it predicts such text already, so training "
                "every weight mostly makes it forget."
            )
        if "close data" in strategy.suits:
            return 6, gettext("This data is %(times)s × as hard to predict as general text for the base model: a small change is enough.")
    return 0, ""


def by_prompts(strategy: Weighed, facts: Facts) -> list[Reason]:
    """The model's ability before fine-tuning: a task it can do needs little, one it cannot do needs larger changes."""
    skill = task_skill(facts)
    if skill is not None and facts.how == "vectors":
        return _by_neighbors(strategy, skill, human_number(facts.prompted, 2))
    if worth_tuning(facts) is False:
        reached = {"metric": in_text(facts.metric or ""), "score": human_number(facts.prompted, 2)}
        if strategy.family == "full":
            says = gettext(
                "A prompt alone reaches %(metric)s %(score)s on the validation set: little headroom for full fine-tuning.", **reached
            )
            return [Reason(-12, says)]
        if "solved" in strategy.suits:
            says = gettext(
                "A prompt alone reaches %(metric)s %(score)s on the validation set: little headroom, so a small change is enough.",
                **reached,
            )
            return [Reason(6, says)]
    return []


def _by_neighbors(strategy: Weighed, skill: float, accuracy: str) -> list[Reason]:
    """The same for labels that the nearest of a few examples decided."""
    if strategy.family == "feature" and skill >= CLOSE_TASK:
        says = gettext(
            "A few examples per class reach accuracy %(accuracy)s by nearest neighbor: its vectors separate these classes already.",
            accuracy=accuracy,
        )
        return [Reason(8, says)]
    if strategy.family == "feature" and skill <= FAR_TASK:
        says = gettext(
            "A few examples per class reach accuracy %(accuracy)s by nearest neighbor: its frozen vectors hardly separate these classes.",
            accuracy=accuracy,
        )
        return [Reason(-14, says)]
    if skill <= FAR_TASK and strategy.family in ("full", "reparametrized", "additive"):
        says = gettext(
            "A few examples per class reach accuracy %(accuracy)s by nearest neighbor, so the model itself has to be trained.",
            accuracy=accuracy,
        )
        return [Reason(8, says)]
    return []


PLAIN_LORA = Reason(30, mark("Matches full fine-tuning on most datasets and forgets less."))
"""LoRA on all linear layers equals full fine-tuning on most small and medium datasets, with less forgetting (Biderman et al.
2024, LoRA Learns Less and Forgets Less; Schulman et al. 2025, LoRA Without Regret)."""
LORA_VARIANT = Reason(22, mark("LoRA variant, as dependable: compare it once plain LoRA has shown what is possible."))
SMALL_PART = Reason(10, mark("Trains a small part: the base model stays unchanged and can be shared."))


def by_nature(strategy: Weighed) -> list[Reason]:
    """Reasons that apply to any data."""
    found = [_said(strategy.standing)] if strategy.standing else []
    if strategy.standing is None and strategy.family in ("reparametrized", "additive", "partial"):
        found.append(_said(SMALL_PART))
    if strategy.forgets == "much":
        found.append(Reason(-8, gettext("Trains every weight, so it forgets most: watch general ability.")))
    return found


def _said(reason: Reason) -> Reason:
    """A constant reason in the reader's language."""
    return reason._replace(text=gettext(reason.text))
