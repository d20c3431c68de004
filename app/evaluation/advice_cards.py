"""Condenses the advice to two or three cards, each a choice with one sentence, and to first steps for the data and the model.
Pure: a function of the ranking, the facts and the report of the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple
from urllib.parse import urlencode

from pydantic import BaseModel, Field

from app import languages
from app.kit import ids
from app.kit.forms import as_text
from app.kit.humanize import human_bytes, human_count, human_number, human_percent, human_seconds
from app.languages import gettext, ngettext
from app.metrics import in_text
from app.objectives import OBJECTIVES
from app.planning.advisor import Advice, CostEstimate
from app.run_settings import RunSettings
from app.shapes import Shape
from app.spec import SILENT, usual_learning_rate
from app.strategies import STRATEGIES, _advice
from app.strategies._advice import Facts
from app.tables import Dataset, Model

Kind = Literal["recommended", "cheaper", "stronger"]
CHEAPER = 0.9
"""A cheaper choice needs at most this share of the memory or the time of the recommended one, and no more of the other."""
STRONGER = 1.5
"""A stronger choice has at least this many times its trainable parameters."""
KEPT = 0.97
"""The recommended max sequence length truncates at most the remaining share of the rows."""
ENOUGH_ROWS, SHOWN_CLASSES = 300, 3
"""Rows to aim at where there are few; small classes that are named."""
ENCODER = ("all-minilm-l6-v2", "all-MiniLM-L6-v2")


class CardSetting(BaseModel):
    """One setting of a run that a card recommends."""

    name: str
    value: str


class Card(BaseModel):
    """One choice: a whole run, or a prompt alone where that was tested and is enough (`strategy` is null then)."""

    kind: Kind
    model: str = Field(description="The base model.")
    strategy: str | None
    title: str
    sentence: str
    settings: list[CardSetting] = Field(default_factory=list)
    memory_bytes: int | None = None
    seconds: float | None = None
    label: str
    url: str


class OtherModel(NamedTuple):
    """A base model that could be taken instead, with the ranking for it."""

    model: Model
    parameters: int
    ranking: list[Advice]

    @property
    def best(self) -> Advice | None:
        return next((a for a in self.ranking if a.available and a.cost), None)


class WholeRun(NamedTuple):
    """What a card says besides its method: the model that was asked about, its settings, and other models that suit the data."""

    model: Model
    parameters: int
    run: RunSettings
    length: int | None = None  # the recommended max length, where it is not the run's
    others: Sequence[OtherModel] = ()  # by parameters


class AdviceStep(BaseModel):
    """One thing to do about the data or the model before a job is started, and the page where it is done."""

    about: Literal["model", "rows", "length", "classes"]
    text: str
    label: str
    url: str


# Cards ----------------------------------------------------------------------------------------------------------------


def cards(ranking: Sequence[Advice], facts: Facts, model: str, dataset_id: str, whole: WholeRun | None = None) -> list[Card]:
    """The recommended run first; a cheaper and a stronger one where there are such: by another method, else by another model."""
    usable = [a for a in ranking if a.available]
    if not usable:
        return []
    best = usable[0]

    def card(kind: Kind, a: Advice, sentence: str, other: OtherModel | None = None) -> Card:
        named = other.model.name if other else model
        asked = {"model": named, "dataset": dataset_id, "strategy": a.strategy}
        if whole and whole.length and a.strategy == best.strategy and other is None:
            asked["run.max_length"] = str(whole.length)
        return Card(
            kind=kind, model=named, strategy=a.strategy, title=gettext(a.title), sentence=sentence, label=gettext("Use this method"), url=f"/jobs/new?{urlencode(asked)}",
            settings=_settings(a, facts, whole, "run.max_length" in asked) if whole else [],
            memory_bytes=a.cost.memory_bytes if a.cost else None, seconds=a.cost.seconds if a.cost else None,
        )  # fmt: skip

    if _advice.worth_tuning(facts) is False and facts.how != "vectors":
        return [
            _prompt(facts, model, dataset_id),
            card("stronger", best, gettext("The best method if that is not good enough: %(why)s", why=_lower(_why(best)))),
        ]
    found = [card("recommended", best, _why(best))]
    if cheaper := next((a for a in usable[1:] if _is_cheaper(a.cost, best.cost)), None):
        found.append(card("cheaper", cheaper, _less(cheaper, best)))
    elif whole and (smaller := _other(whole, larger=False)) and smaller.best:
        found.append(card("cheaper", smaller.best, _other_size(smaller, whole, best), smaller))
    if stronger := next((a for a in usable[1:] if _is_stronger(a.cost, best.cost)), None):
        found.append(card("stronger", stronger, _more(stronger, best)))
    elif whole and (larger := _other(whole, larger=True)) and larger.best:
        found.append(card("stronger", larger.best, _other_size(larger, whole, best), larger))
    return found


def _settings(a: Advice, facts: Facts, whole: WholeRun, longer: bool) -> list[CardSetting]:
    """The settings of the run as its form has them; a classifier that is fitted on vectors has none of these but the length."""
    run, strategy = whole.run, STRATEGIES[a.strategy]
    length = whole.length if longer and whole.length else run.max_length
    found = [(gettext("Max length"), ngettext("%(num)s token", "%(num)s tokens", length))]
    if strategy.recipe != "features":
        rate = usual_learning_rate(strategy, facts.task, run.optimizer)
        most = run.max_tokens_per_step
        step = ngettext("%(num)s token", "%(num)s tokens", most) if most else ngettext("%(num)s row", "%(num)s rows", run.batch_size or 1)
        found = [
            (gettext("Epochs"), as_text(run.epochs)),
            (gettext("Learning rate"), as_text(run.learning_rate or rate)),
            (gettext("A step"), step),
            *found,
        ]
    return [CardSetting(name=name, value=str(value)) for name, value in found]


def _other(whole: WholeRun, *, larger: bool) -> OtherModel | None:
    """The next larger or smaller model that suits the data and fits."""
    found = [
        one for one in whole.others if one.best and (one.parameters > whole.parameters) is larger and one.parameters != whole.parameters
    ]
    return (found[0] if larger else found[-1]) if found else None


def _other_size(other: OtherModel, whole: WholeRun, best: Advice) -> str:
    """Why the other model: its size, and what it costs instead."""
    sizes = {"model": other.model.title, "size": human_count(other.parameters), "own_size": human_count(whole.parameters)}
    if other.best is None or other.best.cost is None or best.cost is None:
        return gettext("%(model)s has %(size)s parameters instead of %(own_size)s.", **sizes)
    cost, own = other.best.cost, best.cost
    return gettext(
        "%(model)s has %(size)s parameters instead of %(own_size)s: %(memory)s instead of %(own_memory)s, %(time)s instead of %(own_time)s.",
        **sizes,
        memory=human_bytes(cost.memory_bytes),
        own_memory=human_bytes(own.memory_bytes),
        time=human_seconds(cost.seconds),
        own_time=human_seconds(own.seconds),
    )


def _prompt(facts: Facts, model: str, dataset_id: str) -> Card:
    metric = in_text(facts.metric or "")
    return Card(
        kind="recommended",
        model=model,
        strategy=None,
        title=gettext("A prompt, no training"),
        sentence=gettext(
            "The base model reaches %(metric)s %(score)s on the validation set with a prompt alone.",
            metric=metric,
            score=human_number(facts.prompted or 0.0, 2),
        ),
        label=gettext("Open in the prompt lab"),
        url=f"/playground/prompts/new?{urlencode({'builder': 'few_shot', 'dataset': dataset_id})}",
    )


def _why(best: Advice) -> str:
    return best.decisive(speaks_for=True) or gettext("It has the best ratio of capacity to cost here.")


def _lower(text: str) -> str:
    """A sentence after a colon, which English begins with a small letter."""
    return text[0].lower() + text[1:] if languages.current.get() == languages.SOURCE else text


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
    memory, own_memory = human_bytes(a.cost.memory_bytes), human_bytes(best.cost.memory_bytes)
    time, own_time = human_seconds(a.cost.seconds), human_seconds(best.cost.seconds)
    smaller, quicker = a.cost.memory_bytes <= CHEAPER * best.cost.memory_bytes, a.cost.seconds <= CHEAPER * best.cost.seconds
    if smaller and quicker:
        return gettext(
            "Takes %(memory)s instead of %(own_memory)s and %(time)s instead of %(own_time)s, for somewhat less capacity than %(method)s.",
            memory=memory, own_memory=own_memory, time=time, own_time=own_time, method=gettext(best.title),
        )  # fmt: skip
    return gettext(
        "Takes %(amount)s instead of %(own_amount)s, for somewhat less capacity than %(method)s.",
        amount=memory if smaller else time,
        own_amount=own_memory if smaller else own_time,
        method=gettext(best.title),
    )


def _more(a: Advice, best: Advice) -> str:
    assert a.cost and best.cost
    trains = human_number(a.cost.trainable_parameters)
    title = gettext(best.title)
    if not best.cost.trainable_parameters:
        return gettext(
            "Trains %(count)s parameters where nothing was trained: for when %(method)s stops improving too early.",
            count=trains,
            method=title,
        )
    return gettext(
        "Trains %(count)s parameters instead of %(own_count)s: for when %(method)s stops improving too early.",
        count=trains,
        own_count=human_number(best.cost.trainable_parameters),
        method=title,
    )


# What to do about the data and the model ------------------------------------------------------------------------------


def steps(model: Model, shape: Shape, dataset: Dataset, facts: Facts, run: RunSettings, others: Sequence[Model]) -> list[AdviceStep]:
    """What would help more than another method: a model for the task, more rows, a larger max sequence length, balanced classes."""
    found = [_other_model(model, shape, dataset, facts, others), _more_rows(dataset, facts), _length(model, shape, dataset, run)]
    if _advice.balance(facts) >= _advice.UNEVEN:
        text = gettext(
            "Balance the classes: the largest has %(times)s times the rows of the smallest.", times=human_number(_advice.balance(facts), 0)
        )
        found.append(AdviceStep(about="classes", text=text, label=gettext("Combine & transform"), url="/datasets/combine"))
    return [step for step in found if step is not None]


def _other_model(model: Model, shape: Shape, dataset: Dataset, facts: Facts, others: Sequence[Model]) -> AdviceStep | None:
    """An encoder for labels, where the model is a larger generative one; a generative one, where an encoder was chosen for text."""
    ready = [m for m in others if m.status == "ready" and not m.answered_elsewhere and m.shape]
    classifies = OBJECTIVES[facts.task].classifies
    if classifies and model.kind in ("generic", "instruction", "dialogue"):
        encoder = next((m for m in ready if m.kind == "encoder"), None)
        if encoder is None:
            text = gettext("Use an encoder for labels: %(model)s is small, and its vectors are made to be compared.", model=ENCODER[1])
            return AdviceStep(about="model", text=text, label=gettext("Add a model"), url="/models#add")
        small, large = Shape.model_validate(encoder.shape).parameters(), shape.parameters()
        if small < large:
            text = gettext(
                "Use the encoder %(model)s for labels: %(size)s parameters instead of %(own_size)s.",
                model=encoder.title,
                size=human_count(small),
                own_size=human_count(large),
            )
            return _take(encoder, dataset, text)
    if not classifies and model.kind in SILENT:
        writer = next((m for m in ready if m.kind in ("dialogue", "instruction", "generic")), None)
        kind = gettext(SILENT[model.kind])
        text = gettext("Use a model that generates text: %(model)s is %(kind)s.", model=model.title, kind=kind)
        return (
            _take(writer, dataset, text)
            if writer
            else AdviceStep(about="model", text=text, label=gettext("Add a model"), url="/models#add")
        )
    return None


def _take(model: Model, dataset: Dataset, text: str) -> AdviceStep:
    asked = urlencode({"model": model.name, "dataset": ids.public(ids.DATASET, dataset.id)})
    label = gettext("Advice for %(model)s", model=model.title)
    return AdviceStep(about="model", text=text, label=label, url=f"/jobs/advice?{asked}")


def _more_rows(dataset: Dataset, facts: Facts) -> AdviceStep | None:
    """How many rows to get, and of which classes."""
    if facts.smallest_class is not None and facts.smallest_class < _advice.FEW_PER_CLASS:
        least = _advice.FEW_PER_CLASS
        small = sorted((count, label) for label, count in (dataset.report or {}).get("labels", {}).items() if count < least)
        wanted = [
            gettext("%(count)s more rows of “%(label)s”", count=human_number(least - count), label=str(label)[:40])
            for count, label in small[:SHOWN_CLASSES]
        ]
        asked = ", ".join(wanted) or gettext("more rows")
        if (further := len(small) - SHOWN_CLASSES) > 0:
            asked = ngettext(
                "%(wanted)s, and rows of %(num)s further class", "%(wanted)s, and rows of %(num)s further classes", further, wanted=asked
            )
        text = gettext(
            "Get %(wanted)s: the smallest class has %(smallest)s; %(least)s or more per class train more reliably.",
            wanted=asked,
            smallest=human_number(facts.smallest_class),
            least=least,
        )
    elif facts.rows < _advice.FEW_ROWS:
        text = gettext(
            "Add rows: %(rows)s are few; %(more)s more, %(enough)s in all, train more reliably.",
            rows=human_number(facts.rows),
            more=human_number(ENOUGH_ROWS - facts.rows),
            enough=ENOUGH_ROWS,
        )
    else:
        return None
    return AdviceStep(about="rows", text=text, label=gettext("Add a dataset"), url="/datasets")


def _kept(dataset: Dataset, length: int) -> float | None:
    """The share of the rows that are no longer than this; None where lengths were not counted. They are counted in buckets that begin at a
    power of two, and by one tokenizer, so shares are rounded."""
    buckets = (dataset.report or {}).get("token_lengths", [])
    rows = sum(count for _, count in buckets)
    share: float = sum(count for start, count in buckets if start < length) / rows if rows else 0.0
    return share if rows else None


def longer(shape: Shape, dataset: Dataset, run: RunSettings) -> int | None:
    """The smallest doubling of the max length that truncates hardly any row, or as far as the model reads; None where the run's does, or the
    model reads no more."""
    limit = found = min(run.max_length, shape.positions)
    share = _kept(dataset, limit)
    while share is not None and share < KEPT and found * 2 <= shape.positions:
        found *= 2
        share = _kept(dataset, found)
    return found if found > limit else None


def _length(model: Model, shape: Shape, dataset: Dataset, run: RunSettings) -> AdviceStep | None:
    limit = min(run.max_length, shape.positions)
    share = _kept(dataset, limit)
    if share is None or share >= KEPT:
        return None
    raised = longer(shape, dataset, run)
    if raised is None:
        text = gettext(
            "Split long texts: %(model)s reads %(limit)s tokens at once, which truncates %(share)s of the rows.",
            model=model.title,
            limit=human_number(limit),
            share=human_percent(1 - share, 0),
        )
        return AdviceStep(
            about="length", text=text, label=gettext("Browse rows"), url=f"/datasets/{ids.public(ids.DATASET, dataset.id)}/rows"
        )
    asked = urlencode({"model": model.name, "dataset": ids.public(ids.DATASET, dataset.id), "run.max_length": raised})
    keeps = human_percent(_kept(dataset, raised) or 0.0, 0)
    text = gettext(
        "Raise max length to %(length)s: it keeps %(keeps)s of the rows whole instead of %(share)s.",
        length=human_number(raised),
        keeps=keeps,
        share=human_percent(share, 0),
    )
    return AdviceStep(about="length", text=text, label=gettext("Use this length"), url=f"/jobs/new?{asked}")
