"""Ranks all strategies from stated facts, with reasons in plain words. Pure.

The rules follow what the literature agrees on; each cites its source. A score is only an order: it is the sum of the points of
each reason, so a reader can follow how the order came about.
"""

from __future__ import annotations

from pydantic import BaseModel, Field, PrivateAttr

from app.shapes import Shape
from app.strategies import STRATEGIES, Strategy
from app.strategies._advice import Facts, Reason, by_nature

ROOMY, TIGHT = 0.5, 0.9
"""Shares of the machine's memory: a plan below the first leaves room; one above the second leaves none."""
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
    cost: CostEstimate | None = None
    _weighed: list[Reason] = PrivateAttr(default_factory=list)

    def decisive(self, *, speaks_for: bool = False) -> str | None:
        """The weightiest sentence of its own; one in its favor, where only those are wanted, else a shared one."""
        found = [r for r in self._weighed if r.points > 0] if speaks_for else self._weighed
        own = [r for r in found if r.text in (*self.reasons, *self.warnings)]
        most = max(own or (found if speaks_for else []), key=lambda r: abs(r.points), default=None)
        return most.text if most else None


def advise(facts: Facts, shape: Shape, costs: dict[str, CostEstimate], why_not: str | None = None) -> list[Advice]:
    """Every strategy, best first; those that cannot run come last, with the reason. `why_not` is one that holds for all."""
    found = [_one(cls(), facts, shape, costs, why_not) for name, cls in STRATEGIES.items()]
    found.sort(key=lambda a: (not a.available, -a.score, STRATEGIES[a.strategy].place))
    if found and found[0].available:
        found[0].advised = True
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


def _one(strategy: Strategy, facts: Facts, shape: Shape, costs: dict[str, CostEstimate], why_not: str | None) -> Advice:
    cost = costs.get(strategy.name)
    why_not = why_not or strategy.unavailable(shape, task=facts.task, cuda=facts.cuda)
    if why_not is None and cost is not None and cost.memory_bytes > facts.memory_bytes:
        why_not = (
            f"It needs {_gb(cost.memory_bytes)} and this machine has {_gb(facts.memory_bytes)}. "
            "Lower the max length or the tokens per batch, or choose another method."
        )
    advice = Advice(
        strategy=strategy.name, title=strategy.title, family=strategy.family, available=why_not is None, reason=why_not, cost=cost
    )
    if why_not is None:
        advice._weighed = strategy.advice_reasons(facts)
        advice._weighed += [*_by_cost(strategy, facts, cost), *_by_tight_memory(strategy, facts, costs), *by_nature(strategy)]
        advice.score = sum(r.points for r in advice._weighed)
    return advice


def _by_cost(strategy: Strategy, facts: Facts, cost: CostEstimate | None) -> list[Reason]:
    if cost is None:
        return []
    share = cost.memory_bytes / facts.memory_bytes
    needs = f"{_gb(cost.memory_bytes)} of {_gb(facts.memory_bytes)}"
    if share > TIGHT:
        return [Reason(-10, f"It needs {needs} of memory: it may just fit.")]
    if strategy.base_bits and share < ROOMY:
        return [Reason(-12, "There is enough memory for the base model in full precision, which is faster and slightly better.")]
    if strategy.family == "full" and share < ROOMY:
        return [Reason(4, f"It needs {needs} of memory, so there is room for it.")]
    return []


def _by_tight_memory(strategy: Strategy, facts: Facts, costs: dict[str, CostEstimate]) -> list[Reason]:
    """Where re-training every weight has no room: of the parameter-efficient strategies those that need the least."""
    cost, full = costs.get(strategy.name), next((c for n, c in costs.items() if STRATEGIES[n].family == "full"), None)
    if cost is None or full is None or (full.memory_bytes <= TIGHT * facts.memory_bytes and not full.recomputed_layers):
        return []
    found = []
    if cost.recomputed_layers:
        found.append(
            Reason(-10, f"It fits only because {cost.recomputed_layers} layers are recomputed in the backward pass, which takes time.")
        )
    small = {n: c for n, c in costs.items() if STRATEGIES[n].family in ("reparametrized", "additive", "selective")}
    if strategy.name in small:
        least = min(small.values(), key=lambda c: (c.recomputed_layers, c.memory_bytes))
        near = cost.recomputed_layers <= least.recomputed_layers and cost.memory_bytes <= NEAR_LEAST * least.memory_bytes
        if cost is least or near:
            says = "Memory is short, and of all parameter-efficient methods this needs the least"
            says = says if cost is least else "Memory is short, and this needs hardly more than the least"
            found.append(
                Reason(
                    25 if cost is least else 18,
                    f"{says}: {_gb(cost.memory_bytes)}, of which gradients and activations are {_gb(cost.learning_bytes)}.",
                )
            )
    return found


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
