"""Condenses the advice to two or three cards, each a choice with one sentence, and to first steps for the data and the model.
Pure: a function of the ranking, the facts and the report of the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlencode

from pydantic import BaseModel

from app.kit import ids
from app.kit.humanize import human_bytes, human_count, human_number, human_percent, human_seconds
from app.metrics import in_text
from app.objectives import OBJECTIVES
from app.planning.advisor import Advice, CostEstimate
from app.run_settings import RunSettings
from app.shapes import Shape
from app.spec import SILENT
from app.strategies import _advice
from app.strategies._advice import Facts
from app.tables import Dataset, Model

CHEAPER = 0.9
"""A cheaper choice needs at most this share of the memory or the time of the recommended one, and no more of the other."""
STRONGER = 1.5
"""A stronger choice has at least this many times its trainable parameters."""
KEPT = 0.97
"""The recommended max sequence length truncates at most the remaining share of the rows."""
ENCODER = ("all-minilm-l6-v2", "all-MiniLM-L6-v2")


class Card(BaseModel):
    """One choice: a method, or a prompt alone where that was tested and is enough (`strategy` is null then)."""

    kind: Literal["recommended", "cheaper", "stronger"]
    strategy: str | None
    title: str
    sentence: str
    label: str
    url: str


class AdviceStep(BaseModel):
    """One thing to do about the data or the model before a job is started, and the page where it is done."""

    about: Literal["model", "rows", "length", "classes"]
    text: str
    label: str
    url: str


# Cards ----------------------------------------------------------------------------------------------------------------


def cards(ranking: Sequence[Advice], facts: Facts, model: str, dataset_id: str) -> list[Card]:
    """The recommended choice first; a cheaper and a stronger one where there are such."""
    usable = [a for a in ranking if a.available]
    if not usable:
        return []
    best = usable[0]

    def card(kind: Literal["recommended", "cheaper", "stronger"], a: Advice, sentence: str) -> Card:
        url = f"/jobs/new?{urlencode({'model': model, 'dataset': dataset_id, 'strategy': a.strategy})}"
        return Card(kind=kind, strategy=a.strategy, title=a.title, sentence=sentence, label="Use this method", url=url)

    if _advice.worth_tuning(facts) is False and facts.how != "vectors":
        return [_prompt(facts, dataset_id), card("stronger", best, "The best method if that is not good enough: " + _lower(_why(best)))]
    found = [card("recommended", best, _why(best))]
    if cheaper := next((a for a in usable[1:] if _is_cheaper(a.cost, best.cost)), None):
        found.append(card("cheaper", cheaper, _less(cheaper, best)))
    if stronger := next((a for a in usable[1:] if _is_stronger(a.cost, best.cost)), None):
        found.append(card("stronger", stronger, _more(stronger, best)))
    return found


def _prompt(facts: Facts, dataset_id: str) -> Card:
    metric = in_text(facts.metric or "")
    return Card(
        kind="recommended",
        strategy=None,
        title="A prompt, no training",
        sentence=f"The base model reaches {metric} {facts.prompted or 0:.2f} on the validation set with a prompt alone.",
        label="Open in the prompt lab",
        url=f"/playground/prompts/new?{urlencode({'builder': 'few_shot', 'dataset': dataset_id})}",
    )


def _why(best: Advice) -> str:
    return best.decisive(speaks_for=True) or "It has the best ratio of capacity to cost here."


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _is_cheaper(cost: CostEstimate | None, best: CostEstimate | None) -> bool:
    if cost is None or best is None or cost.seconds is None or best.seconds is None:
        return False
    memory, seconds = cost.memory_bytes / best.memory_bytes, cost.seconds / max(best.seconds, 1e-9)
    return min(memory, seconds) <= CHEAPER and max(memory, seconds) <= 1


def _is_stronger(cost: CostEstimate | None, best: CostEstimate | None) -> bool:
    return cost is not None and best is not None and cost.trainable_parameters > STRONGER * max(best.trainable_parameters, 1)


def _less(a: Advice, best: Advice) -> str:
    assert a.cost and best.cost
    assert a.cost.seconds is not None and best.cost.seconds is not None
    said = []
    if a.cost.memory_bytes <= CHEAPER * best.cost.memory_bytes:
        said.append(f"{human_bytes(a.cost.memory_bytes)} instead of {human_bytes(best.cost.memory_bytes)}")
    if a.cost.seconds <= CHEAPER * best.cost.seconds:
        said.append(f"{human_seconds(a.cost.seconds)} instead of {human_seconds(best.cost.seconds)}")
    return f"Takes {' and '.join(said)}, for somewhat less capacity than {best.title}."


def _more(a: Advice, best: Advice) -> str:
    assert a.cost and best.cost
    trains = human_number(a.cost.trainable_parameters)
    than = f"instead of {human_number(best.cost.trainable_parameters)}" if best.cost.trainable_parameters else "where nothing was trained"
    return f"Trains {trains} parameters {than}: for when {best.title} stops improving too early."


# What to do about the data and the model ------------------------------------------------------------------------------


def steps(model: Model, shape: Shape, dataset: Dataset, facts: Facts, run: RunSettings, others: Sequence[Model]) -> list[AdviceStep]:
    """What would help more than another method: a model for the task, more rows, a larger max sequence length, balanced classes."""
    found = [_other_model(model, shape, dataset, facts, others), _more_rows(dataset, facts), _length(model, shape, dataset, run)]
    if _advice.balance(facts) >= _advice.UNEVEN:
        text = f"Balance the classes: the largest has {_advice.balance(facts):,.0f} times the rows of the smallest."
        found.append(AdviceStep(about="classes", text=text, label="Combine & transform", url="/datasets/combine"))
    return [step for step in found if step is not None]


def _other_model(model: Model, shape: Shape, dataset: Dataset, facts: Facts, others: Sequence[Model]) -> AdviceStep | None:
    """An encoder for labels, where the model is a larger generative one; a generative one, where an encoder was chosen for text."""
    ready = [m for m in others if m.status == "ready" and not m.answered_elsewhere and m.shape]
    classifies = OBJECTIVES[facts.task].classifies
    if classifies and model.kind in ("generic", "instruction", "dialogue"):
        encoder = next((m for m in ready if m.kind == "encoder"), None)
        if encoder is None:
            text = f"Use an encoder for labels: {ENCODER[1]} is small, and its vectors are made to be compared."
            return AdviceStep(about="model", text=text, label="Add a model", url="/models#add")
        small, large = Shape.model_validate(encoder.shape).parameters(), shape.parameters()
        if small < large:
            text = f"Use the encoder {encoder.title} for labels: {human_count(small)} parameters instead of {human_count(large)}."
            return _take(encoder, dataset, text)
    if not classifies and model.kind in SILENT:
        writer = next((m for m in ready if m.kind in ("dialogue", "instruction", "generic")), None)
        text = f"Use a model that generates text: {model.title} is {SILENT[model.kind]}."
        return _take(writer, dataset, text) if writer else AdviceStep(about="model", text=text, label="Add a model", url="/models#add")
    return None


def _take(model: Model, dataset: Dataset, text: str) -> AdviceStep:
    asked = urlencode({"model": model.name, "dataset": ids.public(ids.DATASET, dataset.id)})
    return AdviceStep(about="model", text=text, label=f"Advice for {model.title}", url=f"/jobs/advice?{asked}")


def _more_rows(dataset: Dataset, facts: Facts) -> AdviceStep | None:
    if facts.smallest_class is not None and facts.smallest_class < _advice.FEW_PER_CLASS:
        text = f"Add rows: the smallest class has {facts.smallest_class:,}; {_advice.FEW_PER_CLASS} or more per class train more reliably."
    elif facts.rows < _advice.FEW_ROWS:
        text = f"Add rows: {facts.rows:,} are few; a few hundred train more reliably."
    else:
        return None
    return AdviceStep(about="rows", text=text, label="Add a dataset", url="/datasets")


def _length(model: Model, shape: Shape, dataset: Dataset, run: RunSettings) -> AdviceStep | None:
    """The smallest power of two that truncates hardly any row. Lengths are counted in buckets that begin at a power of two, and
    by one tokenizer, so shares are rounded."""
    buckets = (dataset.report or {}).get("token_lengths", [])
    rows = sum(count for _, count in buckets)
    limit = min(run.max_length, shape.positions)

    def kept(length: int) -> float:
        share: float = sum(count for start, count in buckets if start < length) / rows
        return share

    if not rows or kept(limit) >= KEPT:
        return None
    longer = limit
    while longer * 2 <= shape.positions and kept(longer) < KEPT:
        longer *= 2
    if longer == limit:
        text = f"Split long texts: {model.title} reads {limit:,} tokens at once, which truncates {human_percent(1 - kept(limit), 0)} of the rows."
        return AdviceStep(about="length", text=text, label="Browse rows", url=f"/datasets/{ids.public(ids.DATASET, dataset.id)}/rows")
    asked = urlencode({"model": model.name, "dataset": ids.public(ids.DATASET, dataset.id), "run.max_length": longer})
    text = f"Raise max length to {longer:,}: it keeps {human_percent(kept(longer), 0)} of the rows whole instead of {human_percent(kept(limit), 0)}."
    return AdviceStep(about="length", text=text, label="Use this length", url=f"/jobs/new?{asked}")
