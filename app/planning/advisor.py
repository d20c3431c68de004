"""Ranks all strategies from stated facts, with reasons in plain words. Pure.

The rules follow what the literature agrees on; each cites its source. A score is only an order: it is the sum of the points of
each reason, so a reader can follow how the order came about.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, Field, PrivateAttr

from app.kit.humanize import human_bytes, human_count, human_number, human_seconds
from app.languages import gettext, localized, ngettext
from app.shapes import Shape
from app.strategies import STRATEGIES, Strategy
from app.strategies._advice import FAMILIES, Facts, Reason, by_nature

ROOMY, TIGHT = 0.5, 0.9
"""Shares of the machine's memory: a plan below the first leaves room; one above the second leaves none."""
MANY_A_TOKEN, FEW_A_TOKEN = 100.0, 0.5
"""Trained parameters for each token of the data: from the first on it may be learned by heart, up to the second it can hardly be."""
NEAR_LEAST = 1.1
"""What needs up to this many times the minimum memory counts as needing as little."""


class CostEstimate(BaseModel):
    """What `app/planning/duration.py` says of one strategy on this machine."""

    memory_bytes: int
    seconds: float | None = None
    trainable_parameters: int
    learning_bytes: int = Field(0, description="of the memory, what learning adds to the weights: gradients, optimizer and activations")
    recomputed_layers: int = Field(0, description="layers whose activations are computed twice, so that the job fits")
    tokens: int | None = Field(None, description="tokens read in all steps, a soft prompt's own among them")


class AdviceRule(BaseModel):
    """A sentence that holds for several methods, once, with what it adds to the score of each."""

    text: str
    points: int
    strategies: list[str]


class Advice(BaseModel):
    """One strategy's place. `reasons` speak for it alone, `warnings` against it alone (see `rules`); `reason` says why it cannot run."""

    strategy: str
    title: str
    family: str
    available: bool
    reason: str | None = None
    score: int = 0
    advised: bool = False
    reasons: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    difference: str | None = Field(None, description="from the first place, by numbers; null for the first and without estimates")
    cost: CostEstimate | None = None
    _weighed: list[Reason] = PrivateAttr(default_factory=list)

    def decisive(self, *, speaks_for: bool = False) -> str | None:
        """The weightiest sentence of its own; one in its favor, where only those are wanted, else a shared one."""
        found = [r for r in self._weighed if r.points > 0] if speaks_for else self._weighed
        own = [r for r in found if r.text in (*self.reasons, *self.warnings)]
        most = max(own or (found if speaks_for else []), key=lambda r: abs(r.points), default=None)
        return most.text if most else None


class AdviceDetail(BaseModel):
    """One of the first places in full: everything that speaks for and against it, in the order of its weight, each with all methods that it
    holds for."""

    strategy: str
    title: str
    score: int
    above: int = Field(description="of the score, the points of reasons that were said of an earlier one")
    speaks_for: list[AdviceRule]
    against: list[AdviceRule]
    difference: str | None


class AdviceGroup(BaseModel):
    """Strategies of one family behind the first places, and how they differ from the first in one line."""

    title: str
    strategies: list[str]
    difference: str


FIRST = 3
"""So many places are explained in full."""


def advise(
    facts: Facts, shape: Shape, costs: dict[str, CostEstimate], why_not: str | None = None, past: Mapping[str, Reason] | None = None
) -> list[Advice]:
    """Every strategy, best first; those that cannot run come last, with the reason. `why_not` is one that holds for all; `past` is what runs
    before measured, by strategy."""
    found = [_one(cls(), facts, shape, costs, why_not, past or {}) for name, cls in STRATEGIES.items()]
    found.sort(key=lambda a: (not a.available, -a.score, STRATEGIES[a.strategy].place))
    if found and found[0].available:
        found[0].advised = True
    for advice in found[1:]:
        advice.difference = _difference(advice, found[0]) if advice.available else None
    shared = {rule.text for rule in rules(found)}
    for advice in found:
        own = [r for r in advice._weighed if r.text not in shared]
        advice.reasons = [r.text for r in own if r.points > 0]
        advice.warnings = [r.text for r in own if r.points < 0]
    return found


def rules(ranking: list[Advice]) -> list[AdviceRule]:
    """The reasons that apply to more than one strategy, the weightiest first."""
    found: dict[Reason, list[str]] = {}
    for advice in ranking:
        for reason in advice._weighed:
            found.setdefault(reason, []).append(advice.strategy)
    shared = [AdviceRule(text=r.text, points=r.points, strategies=names) for r, names in found.items() if len(names) > 1]
    return sorted(shared, key=lambda rule: -abs(rule.points))


def details(ranking: list[Advice]) -> list[AdviceDetail]:
    """The first places in full. A sentence that holds for several is said once, of the first of them."""
    said, found, holds = set[str](), [], dict[Reason, list[str]]()
    for advice in ranking:
        for reason in advice._weighed:
            holds.setdefault(reason, []).append(advice.strategy)
    for advice in [a for a in ranking if a.available][:FIRST]:
        fresh = [r for r in sorted(advice._weighed, key=lambda r: -abs(r.points)) if r.text not in said]
        said |= {r.text for r in fresh}
        every = [AdviceRule(text=r.text, points=r.points, strategies=holds[r]) for r in fresh]
        found.append(
            AdviceDetail(
                strategy=advice.strategy, title=advice.title, score=advice.score, difference=advice.difference,
                above=advice.score - sum(r.points for r in fresh),
                speaks_for=[r for r in every if r.points > 0], against=[r for r in every if r.points < 0],
            )
        )  # fmt: skip
    return found


def groups(ranking: list[Advice]) -> list[AdviceGroup]:
    """What comes behind the first places, by family in the order of its best."""
    usable = [a for a in ranking if a.available]
    if not usable:
        return []
    families: dict[str, list[Advice]] = {}
    for advice in usable[FIRST:]:
        families.setdefault(advice.family, []).append(advice)
    return [
        AdviceGroup(
            title=gettext(FAMILIES[family]),  # type: ignore[index]
            strategies=[a.strategy for a in members],
            difference=_spread(members, usable[0]),
        )
        for family, members in families.items()
    ]


def _ratios(cost: CostEstimate, best: CostEstimate) -> tuple[float, float, float]:
    """Trained parameters, memory and time as multiples of those of the first place."""
    seconds = (cost.seconds or 0.0) / best.seconds if best.seconds else 1.0
    return cost.trainable_parameters / max(best.trainable_parameters, 1), cost.memory_bytes / max(best.memory_bytes, 1), seconds


def _difference(advice: Advice, best: Advice) -> str | None:
    if advice.cost is None or best.cost is None:
        return None
    trained, memory, seconds = map(_times, _ratios(advice.cost, best.cost))
    return gettext(
        "%(method)s trains %(trained)s as many parameters as %(best)s, in %(memory)s its memory and %(seconds)s its time.",
        method=gettext(advice.title), best=gettext(best.title), trained=trained, memory=memory, seconds=seconds,
    )  # fmt: skip


def _spread(members: list[Advice], best: Advice) -> str:
    every = [_ratios(a.cost, best.cost) for a in members if a.cost and best.cost]
    points = best.score - members[0].score
    if not every:
        return ngettext(
            "Behind %(best)s by %(num)s points or more.", "Behind %(best)s by %(num)s points or more.", points, best=gettext(best.title)
        )
    trained, memory, seconds = (_range(min(values), max(values)) for values in zip(*every, strict=True))
    return ngettext(
        "%(trained)s the trained parameters of %(best)s, %(memory)s its memory, %(seconds)s its time; %(num)s points behind.",
        "%(trained)s the trained parameters of %(best)s, %(memory)s its memory, %(seconds)s its time; %(num)s points behind.",
        points, best=gettext(best.title), trained=trained, memory=memory, seconds=seconds,
    )  # fmt: skip


def _times(ratio: float) -> str:
    return localized(f"{ratio:.2g} ×" if ratio < 10 else f"{ratio:,.0f} ×")


def _range(low: float, high: float) -> str:
    if _times(low) == _times(high):
        return _times(low)
    return gettext("%(low)s to %(high)s", low=_times(low).removesuffix(" ×"), high=_times(high))


def _one(
    strategy: Strategy, facts: Facts, shape: Shape, costs: dict[str, CostEstimate], why_not: str | None, past: Mapping[str, Reason]
) -> Advice:
    cost = costs.get(strategy.name)
    why_not = why_not or strategy.unavailable(shape, task=facts.task, cuda=facts.cuda)
    if why_not is None and cost is not None and cost.memory_bytes > facts.memory_bytes:
        why_not = gettext(
            "It needs %(needed)s and this machine has %(there)s. Lower the max length or the tokens per batch, or choose another method.",
            needed=_gb(cost.memory_bytes),
            there=_gb(facts.memory_bytes),
        )
    advice = Advice(
        strategy=strategy.name, title=strategy.title, family=strategy.family, available=why_not is None, reason=why_not, cost=cost
    )
    if why_not is None:
        advice._weighed = strategy.advice_reasons(facts)
        advice._weighed += [*_by_cost(strategy, facts, cost), *_by_tight_memory(strategy, facts, costs), *by_nature(strategy)]
        advice._weighed += [*_by_size(facts, cost), *([past[strategy.name]] if strategy.name in past else [])]
        advice.score = sum(r.points for r in advice._weighed)
    return advice


def _by_cost(strategy: Strategy, facts: Facts, cost: CostEstimate | None) -> list[Reason]:
    if cost is None:
        return []
    return [*_by_room(strategy, facts, cost), *_by_time(cost)]


def _by_time(cost: CostEstimate) -> list[Reason]:
    if cost.seconds is None:
        return []
    took = {"time": human_seconds(cost.seconds), "memory": human_bytes(cost.memory_bytes)}
    return [Reason(1, gettext("It takes about %(time)s and %(memory)s here.", **took))]


def _by_room(strategy: Strategy, facts: Facts, cost: CostEstimate) -> list[Reason]:
    share = cost.memory_bytes / facts.memory_bytes
    memory = {"needed": _gb(cost.memory_bytes), "there": _gb(facts.memory_bytes)}
    if share > TIGHT:
        return [Reason(-10, gettext("It needs %(needed)s of %(there)s of memory: it may just fit.", **memory))]
    if strategy.base_bits and share < ROOMY:
        enough = gettext("There is enough memory for the base model in full precision, which is faster and slightly better.")
        return [Reason(-12, enough)]
    if strategy.family == "full" and share < ROOMY:
        return [Reason(4, gettext("It needs %(needed)s of %(there)s of memory, so there is room for it.", **memory))]
    return []


def _by_size(facts: Facts, cost: CostEstimate | None) -> list[Reason]:
    """How many parameters are trained for each token of the data: many more than there are tokens can learn them by heart."""
    if cost is None or not facts.tokens or not cost.trainable_parameters:
        return []
    sizes = {"trained": human_count(cost.trainable_parameters), "tokens": human_count(facts.tokens)}
    each = cost.trainable_parameters / facts.tokens
    if each >= MANY_A_TOKEN:
        says = gettext(
            "It trains %(trained)s parameters on %(tokens)s tokens, %(each)s for each: watch the validation loss.",
            each=human_number(each, 0),
            **sizes,
        )
        return [Reason(-3, says)]
    if each <= FEW_A_TOKEN:
        says = gettext(
            "It trains %(trained)s parameters on %(tokens)s tokens, %(each)s tokens for each.", each=human_number(1 / each, 0), **sizes
        )
        return [Reason(1, says)]
    return [Reason(1, gettext("It trains %(trained)s parameters on %(tokens)s tokens.", **sizes))]


def _by_tight_memory(strategy: Strategy, facts: Facts, costs: dict[str, CostEstimate]) -> list[Reason]:
    """Where re-training every weight has no room: of the parameter-efficient strategies those that need the least."""
    cost, full = costs.get(strategy.name), next((c for n, c in costs.items() if STRATEGIES[n].family == "full"), None)
    if cost is None or full is None or (full.memory_bytes <= TIGHT * facts.memory_bytes and not full.recomputed_layers):
        return []
    found = []
    if cost.recomputed_layers:
        says = ngettext(
            "It fits only because %(num)s layers are recomputed in the backward pass, which takes time.",
            "It fits only because %(num)s layers are recomputed in the backward pass, which takes time.",
            cost.recomputed_layers,
        )
        found.append(Reason(-10, says))
    small = {n: c for n, c in costs.items() if STRATEGIES[n].family in ("reparametrized", "additive", "selective")}
    if strategy.name in small:
        least = min(small.values(), key=lambda c: (c.recomputed_layers, c.memory_bytes))
        near = cost.recomputed_layers <= least.recomputed_layers and cost.memory_bytes <= NEAR_LEAST * least.memory_bytes
        if cost is least or near:
            found.append(_short(cost, cost is least))
    return found


def _short(cost: CostEstimate, least: bool) -> Reason:
    """Memory is short, and it needs the least or hardly more."""
    memory = {"memory": _gb(cost.memory_bytes), "learning": _gb(cost.learning_bytes)}
    if least:
        says = gettext(
            "Memory is short, and of all parameter-efficient methods this needs the least: %(memory)s, of which gradients and activations are "
            "%(learning)s.",
            **memory,
        )
        return Reason(25, says)
    says = gettext(
        "Memory is short, and this needs hardly more than the least: %(memory)s, of which gradients and activations are %(learning)s.",
        **memory,
    )
    return Reason(18, says)


def _gb(size: int) -> str:
    return localized(f"{size / 1e9:.1f} GB")
