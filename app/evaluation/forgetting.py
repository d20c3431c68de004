"""Forgetting: what a fine-tuned model lost on general text compared with its base, and whether that is more than noise.

Both models are scored on the same probe (`worker/scoring/probe/general.yaml`), text by text, in bits per byte. The change is
relative: +2% means that general text takes 2% more bits than before. Its interval is a paired bootstrap over the texts (Efron
1979; Koehn 2004 for the paired form), so a change that depends on a few texts is not called forgetting. Where nothing can be
measured, `without_measuring` says why, and what is known all the same.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel

from app.languages import mark
from app.objectives import OBJECTIVES
from app.shapes import Shape
from app.strategies import Strategy

Verdict = Literal["gained", "within noise", "forgot a little", "forgot some", "forgot much"]
Known = Literal["nothing, by construction", "not applicable"]
RESAMPLES = 2000
NEGLIGIBLE, LITTLE, SOME = 0.001, 0.02, 0.10
"""Thresholds of the relative change for none, little and some forgetting."""


class TextScore(NamedTuple):
    """One text of the probe: its skill, its loss in nats, and its size in bytes."""

    skill: str
    nats: float
    bytes: int


class SkillChange(BaseModel):
    """Bits per byte of one skill before and after, and the relative change with its 95% interval."""

    before: float
    after: float
    change: float
    interval: tuple[float, float]


class Forgetting(SkillChange):
    """The whole probe, and each skill apart."""

    verdict: Verdict
    sentence: str
    skills: dict[str, SkillChange]


class WithoutMeasuring(BaseModel):
    """What is known of forgetting although no text was scored; `change` is 0 where the model below did not move."""

    before: None = None
    after: None = None
    change: float | None
    interval: tuple[float, float] | None
    verdict: Known
    sentence: str
    skills: dict[str, SkillChange] = {}


def without_measuring(strategy: Strategy, shape: Shape, task: str, labels: int) -> WithoutMeasuring | None:
    """A head on a stack that does not learn forgets nothing; an encoder's writing cannot be scored; random weights have nothing to forget. None
    for all others."""
    if getattr(strategy, "weights", "pretrained") == "random":
        sentence = mark("It began with random weights, so there was no general ability that it could lose.")
        return WithoutMeasuring(change=None, interval=None, verdict="not applicable", sentence=sentence)
    if not OBJECTIVES[task].heads:
        return None
    if strategy.trainable_parameters(shape, task=task, labels=labels) == strategy.head_parameters(shape, labels):
        sentence = mark("Only the head on top was trained. The weights of the model below it are unchanged, and so is its general ability.")
        return WithoutMeasuring(change=0.0, interval=(0.0, 0.0), verdict="nothing, by construction", sentence=sentence)
    if shape.architecture == "encoder":
        sentence = mark(
            "An encoder writes no text, so its general ability cannot be measured in bits per byte. Its vectors did change: "
            "use the base for anything but these classes."
        )
        return WithoutMeasuring(change=None, interval=None, verdict="not applicable", sentence=sentence)
    return None


def bits_per_byte(scores: Sequence[TextScore]) -> float:
    return sum(s.nats for s in scores) / math.log(2) / sum(s.bytes for s in scores)


def compare(before: Sequence[TextScore], after: Sequence[TextScore], *, seed: int = 0) -> Forgetting:
    """The change between two scores of the same texts in the same order. Raises ValueError when they differ."""
    if [(s.skill, s.bytes) for s in before] != [(s.skill, s.bytes) for s in after] or not before:
        raise ValueError("The two scores are not of the same texts.")
    whole = _change(before, after, seed)
    places: dict[str, list[int]] = defaultdict(list)
    for place, score in enumerate(before):
        places[score.skill].append(place)
    skills = {skill: _change([before[i] for i in at], [after[i] for i in at], seed) for skill, at in places.items()}
    verdict = judge(whole.change, whole.interval)
    return Forgetting(**whole.model_dump(), verdict=verdict, sentence=_sentence(verdict, whole.change, skills, len(before)), skills=skills)


def judge(change: float, interval: tuple[float, float]) -> Verdict:
    """A change whose interval contains zero is noise, however large; so is a negligible one, however certain."""
    low, high = interval
    if not math.isfinite(change):
        return "forgot much"
    if low <= 0 <= high or abs(change) < NEGLIGIBLE:
        return "within noise"
    if change < 0:
        return "gained"
    return "forgot a little" if change <= LITTLE else "forgot some" if change <= SOME else "forgot much"


def _change(before: Sequence[TextScore], after: Sequence[TextScore], seed: int) -> SkillChange:
    old, new = bits_per_byte(before), bits_per_byte(after)
    draw = random.Random(seed)
    pairs = [(b.nats, a.nats) for b, a in zip(before, after, strict=True)]
    ratios = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(pairs, k=len(pairs))
        ratios.append(sum(a for _, a in chosen) / sum(b for b, _ in chosen) - 1)
    ratios.sort()
    interval = (ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES) - 1])
    return SkillChange(before=old, after=new, change=new / old - 1, interval=interval)


def _sentence(verdict: Verdict, change: float, skills: dict[str, SkillChange], texts: int) -> str:
    if verdict == "within noise":
        return f"On general text the fine-tuned model is as good as its base, as far as {texts} texts can tell."
    worst = max(skills, key=lambda name: skills[name].change)
    if verdict == "gained":
        return f"General text takes {-change:.1%} fewer bits than before: nothing was forgotten."
    return f"General text takes {change:.1%} more bits than before; {worst} suffered most ({skills[worst].change:+.1%})."
