"""Ranks all strategies from stated facts, with reasons in plain words. Pure.

The rules follow what the literature agrees on; each cites its source. A score is only an order: it is the sum of the points of
each reason, so a reader can follow how the order came about.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, Field, PrivateAttr

from app.shapes import Shape
from app.strategies import STRATEGIES, Strategy

FEW_ROWS, MANY_ROWS = 100, 5_000
FEW_PER_CLASS, MANY_PER_CLASS = 16, 100
UNEVEN = 10
"""A class with this many times the rows of another dominates it: accuracy looks good while the small one is never predicted."""
CLOSE, FAR = 1.25, 2.0
"""Bits per byte of the data over those of general text: up to the first value the model predicts the data like any other text;
from the second on the data is foreign to it. Measured on smollm2-135m-instruct: sums in words 1.2, answers in a house style 1.3
to 1.8, a ship's log 2.1."""
ROOMY, TIGHT = 0.5, 0.9
"""Shares of the machine's memory: a plan below the first leaves room; one above the second leaves none."""
NEAR_LEAST = 1.1
"""What needs up to this many times the minimum memory counts as needing as little."""

ENOUGH = {"accuracy": 0.9, "rouge_l": 0.8}
"""Where a prompt alone reaches this, fine-tuning has little to add."""
CLOSE_TASK, FAR_TASK = 0.6, 0.15
"""Accuracy of a few examples alone, rescaled from chance (0) to always right (1): beyond the first value the model separates the
labels already, below the second its embeddings hardly do."""


class Facts(BaseModel):
    """What the advice is based on. `distance` is the base's bits per byte on the data over those on the general probe;
    `prompted` is the best score by `metric` that a prompt alone reached on held-out rows, `how` it was tried (answers,
    labels or vectors), `chance` what always giving the commonest label reaches. None while they have not been measured.
    Memory in bytes."""

    task: Literal["generation", "classification", "preference"]
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
    """Whether a prompt alone leaves enough to learn; None while nobody has tried one."""
    if facts.prompted is None or facts.metric is None:
        return None
    return facts.prompted < ENOUGH.get(facts.metric, 0.9)


def task_skill(facts: Facts) -> float | None:
    """Accuracy of examples alone, rescaled from chance (0) to always right (1), for labels."""
    if facts.prompted is None or facts.metric != "accuracy":
        return None
    chance = min(facts.chance or 0.0, 0.99)
    return (facts.prompted - chance) / (1 - chance)


class Cost(BaseModel):
    """What `app/planning/duration.py` says of one strategy on this machine."""

    memory_bytes: int
    seconds: float | None = None
    trainable_parameters: int
    learning_bytes: int = Field(0, description="of the memory, what learning adds to the weights: gradients, optimizer and activations")
    recomputed_layers: int = Field(0, description="layers whose activations are computed twice, so that the job fits")
    tokens: int | None = Field(None, description="tokens read in all steps, a soft prompt's own among them")


class Reason(NamedTuple):
    points: int
    text: str


class Rule(BaseModel):
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
    cost: Cost | None = None
    _weighed: list[Reason] = PrivateAttr(default_factory=list)

    def decisive(self, *, speaks_for: bool = False) -> str | None:
        """The weightiest sentence of its own; one in its favor, where only those are wanted, else a shared one."""
        found = [r for r in self._weighed if r.points > 0] if speaks_for else self._weighed
        own = [r for r in found if r.text in (*self.reasons, *self.warnings)]
        most = max(own or (found if speaks_for else []), key=lambda r: abs(r.points), default=None)
        return most.text if most else None


def advise(facts: Facts, shape: Shape, costs: dict[str, Cost], why_not: str | None = None) -> list[Advice]:
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


def rules(ranking: list[Advice]) -> list[Rule]:
    """The reasons that apply to more than one strategy, the weightiest first."""
    found: dict[Reason, list[str]] = {}
    for advice in ranking:
        for reason in advice._weighed:
            found.setdefault(reason, []).append(advice.strategy)
    shared = [Rule(text=r.text, points=r.points, strategies=names) for r, names in found.items() if len(names) > 1]
    return sorted(shared, key=lambda rule: -abs(rule.points))


def _one(strategy: Strategy, facts: Facts, shape: Shape, costs: dict[str, Cost], why_not: str | None) -> Advice:
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
        advice._weighed = [*_by_data(strategy, facts), *_by_distance(strategy, facts), *_by_prompts(strategy, facts)]
        advice._weighed += [*_by_cost(strategy, facts, cost), *_by_tight_memory(strategy, facts, costs), *_by_nature(strategy)]
        advice.score = sum(r.points for r in advice._weighed)
    return advice


def _by_data(strategy: Strategy, facts: Facts) -> list[Reason]:
    if facts.task == "classification":
        return _by_labels(strategy, facts)
    rows = f"{facts.rows:,} rows"
    if facts.rows < FEW_ROWS:
        # Liu et al. 2022 (T-Few, https://arxiv.org/abs/2205.05638): with tens of examples the smallest methods overfit least.
        if strategy.name in ("ia3", "prompt_tuning", "layer_norm"):
            return [Reason(12, f"{rows} are few, and so few trainable parameters hardly overfit.")]
        if strategy.family == "full":
            return [Reason(-40, f"{rows} are too few to train every weight: it would overfit.")]
        return []
    if facts.rows >= MANY_ROWS:
        if strategy.family == "full":
            return [Reason(15, f"{rows} are enough to train every weight.")]
        if strategy.name in ("rslora", "dora", "bottleneck_adapter"):
            return [Reason(8, f"{rows} can use the capacity beyond plain LoRA.")]
        if strategy.name in ("ia3", "prompt_tuning", "layer_norm", "bitfit"):
            return [Reason(-15, f"{rows} hold more than so few trainable parameters can take up.")]
    return []


def _by_labels(strategy: Strategy, facts: Facts) -> list[Reason]:
    """A frozen model is enough for few labels; many justify layers of their own on it (dense head), unless its embeddings do not
    separate the classes. The smallest class says how many examples there are of what is hardest to learn."""
    found = []
    per_class = facts.rows / max(facts.classes or 1, 1)
    least = per_class if facts.smallest_class is None else facts.smallest_class
    words = f"{facts.rows:,} labeled rows in {facts.classes} classes ({_rows_a_class(facts, per_class)})"
    large = facts.rows >= MANY_ROWS and least >= MANY_PER_CLASS
    if strategy.family == "feature":
        quick = "a classifier on the frozen model is quick, hard to beat, and keeps the base model unchanged."
        found.append(Reason(30 if large else 35, f"{words}: {quick}"))
        if facts.distance is not None and facts.distance >= FAR:
            found.append(
                Reason(-20, "The texts are far from what the model was trained on, so its frozen vectors may not separate the classes.")
            )
    elif strategy.name == "dense_head":
        if _told_apart(facts) is False:
            found.append(Reason(-14, "The frozen vectors hardly separate these classes, and new layers on top see nothing else."))
        elif large:
            found.append(Reason(55, f"{words}: enough to train new layers on top, while the model itself stays unchanged."))
        elif least >= MANY_PER_CLASS:
            found.append(Reason(28, f"{words}: enough to train new layers on the frozen model."))
        else:
            found.append(Reason(-5, f"{_rows_a_class(facts, per_class)} are few for new layers; feature extraction overfits less."))
    elif least < FEW_PER_CLASS:
        found.append(Reason(-15, f"{_rows_a_class(facts, per_class)} are few to train the model itself."))
    elif least >= MANY_PER_CLASS and strategy.family in ("reparametrized", "additive"):
        found.append(Reason(10, f"{words}: enough to adapt the model itself."))
    if balance(facts) >= UNEVEN and strategy.family in ("full", "partial", "reparametrized"):
        uneven = f"The largest class has {balance(facts):,.0f} times the rows of the smallest"
        found.append(
            Reason(
                -4,
                f"{uneven}, so a model with many trainable parameters soon predicts only the large one. Watch macro F1, or balance the classes.",
            )
        )
    return found


def balance(facts: Facts) -> float:
    """Rows of the largest class over those of the smallest; 1 where nobody counted."""
    return facts.largest_class / max(facts.smallest_class, 1) if facts.smallest_class is not None and facts.largest_class else 1.0


def _rows_a_class(facts: Facts, mean: float) -> str:
    return f"{mean:,.0f} rows a class" + (f", {facts.smallest_class:,} in the smallest" if balance(facts) > 1.5 else "")


def _told_apart(facts: Facts) -> bool | None:
    """Whether the frozen model's embeddings separate the classes; None without evidence."""
    if facts.distance is not None and facts.distance >= FAR:
        return False
    skill = task_skill(facts)
    return None if skill is None or facts.how != "vectors" else skill > FAR_TASK


def _by_distance(strategy: Strategy, facts: Facts) -> list[Reason]:
    if facts.distance is None:
        return []
    says = f"This data is {facts.distance:.2f} × as hard to predict as general text for the base model"
    if facts.distance >= FAR:
        if strategy.family == "full":
            return [Reason(32, f"{says}: far from what it was trained on, so every weight may have to change.")]
        if strategy.family in ("selective",) or strategy.name in ("prompt_tuning", "ia3"):
            return [Reason(-12, f"{says}: too far for so few trainable parameters.")]
        if strategy.name in ("rslora", "bottleneck_adapter", "top_layers"):
            return [Reason(6, f"{says}: more capacity helps.")]
    if facts.distance <= CLOSE:
        if strategy.family == "full":
            return [Reason(-15, f"{says}: it predicts such text already, so training every weight mostly makes it forget.")]
        if strategy.name in ("lora", "prefix_tuning", "prompt_tuning", "ia3", "layer_norm", "feature_extraction"):
            return [Reason(6, f"{says}: a small change is enough.")]
    return []


def _by_prompts(strategy: Strategy, facts: Facts) -> list[Reason]:
    """The model's ability before fine-tuning: a task it knows needs little, one it does not know needs its weights to change."""
    skill = task_skill(facts)
    if skill is not None and facts.how == "vectors":
        says = f"A few examples per class reach accuracy {facts.prompted:.2f} by nearest neighbor"
        if strategy.family == "feature" and skill >= CLOSE_TASK:
            return [Reason(8, f"{says}: its vectors separate these classes already.")]
        if strategy.family == "feature" and skill <= FAR_TASK:
            return [Reason(-14, f"{says}: its frozen vectors hardly separate these classes.")]
        if skill <= FAR_TASK and strategy.family in ("full", "reparametrized", "additive"):
            return [Reason(8, f"{says}, so the model itself has to be trained.")]
        return []
    if worth_tuning(facts) is False:
        words = "ROUGE-L" if facts.metric == "rouge_l" else facts.metric
        says = f"A prompt alone reaches {words} {facts.prompted:.2f} on the validation set"
        if strategy.family == "full":
            return [Reason(-12, f"{says}: little headroom for full fine-tuning.")]
        if strategy.name in ("ia3", "prompt_tuning", "layer_norm", "feature_extraction"):
            return [Reason(6, f"{says}: little headroom, so a small change is enough.")]
    return []


def _by_cost(strategy: Strategy, facts: Facts, cost: Cost | None) -> list[Reason]:
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


def _by_tight_memory(strategy: Strategy, facts: Facts, costs: dict[str, Cost]) -> list[Reason]:
    """Where full fine-tuning does not fit: of the parameter-efficient strategies those that need the least memory."""
    cost, full = costs.get(strategy.name), costs.get("full")
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


def _by_nature(strategy: Strategy) -> list[Reason]:
    """Reasons that hold on any data. LoRA on all linear layers equals full fine-tuning on most small and medium-sized datasets
    and forgets less (Biderman et al. 2024, LoRA Learns Less and Forgets Less, https://arxiv.org/abs/2405.09673; Schulman et al.
    2025, LoRA Without Regret)."""
    found = []
    if strategy.name == "lora":
        found.append(Reason(30, "Matches full fine-tuning on most datasets and forgets less."))
    elif strategy.name in ("dora", "rslora", "pissa"):
        found.append(Reason(22, "LoRA variant, as dependable: compare it once plain LoRA has shown what is possible."))
    elif strategy.family in ("reparametrized", "additive", "partial"):
        found.append(Reason(10, "Trains a small part: the base model stays unchanged and can be shared."))
    if strategy.forgets == "much":
        found.append(Reason(-8, "Trains every weight, so it forgets most: watch general ability."))
    return found


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
