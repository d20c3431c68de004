"""The advice for one model and one dataset on this machine: facts collected, each strategy's cost estimated, all ranked.

Facts that need the model itself (how far the data is from general text, what a prompt alone reaches) are measured by an
evaluation of the kind `advice` on request, and used here from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from app import metrics, objectives
from app.datasets import inspections
from app.datasets import service as datasets
from app.errors import Conflict
from app.evaluation import experience, train_queue
from app.evaluation import service as evaluations
from app.evaluation.advice_cards import AdviceStep, Card, OtherModel, WholeRun, cards, longer, steps
from app.jobs.defaults import usual_run
from app.kit import ids
from app.kit.humanize import human_bytes, human_count, human_number
from app.languages import gettext, lowered
from app.machines import heartbeats
from app.models import from_nothing
from app.models import service as models
from app.planning import advisor, duration, feasibility
from app.planning.advisor import Advice, AdviceDetail, AdviceGroup, AdviceRule, CostEstimate
from app.run_settings import RunSettings
from app.shapes import Shape
from app.spec import JobSpec, ModelRef
from app.strategies import STRATEGIES, _advice
from app.strategies._advice import Facts
from app.tables import JSON, Dataset, Evaluation, Model, User


class ShownFact(BaseModel):
    """One fact as the page shows it."""

    name: str
    value: str
    note: str = ""


class Tune(BaseModel):
    """Whether to fine-tune at all, in words, with the scores of a prompt alone on validation rows that the words are based on.

    Scores are shares, 0 to 1, of `metric`; `chance` is what always giving the commonest label reaches.
    """

    answer: str
    worth_it: bool | None = None
    measured: bool = False
    metric: str | None = None
    zero_shot: float | None = None
    few_shot: float | None = None
    shots: int = 0
    chance: float | None = None
    rows: int = 0
    how: str | None = None
    changed: str | None = None  # what the test changed in the ranking


class Advised(BaseModel):
    model: str
    dataset: str
    dataset_id: str
    facts: Facts
    shown: list[ShownFact]
    tune: Tune
    cards: list[Card]
    steps: list[AdviceStep]
    details: list[AdviceDetail] = Field(description="The first places in full; no sentence comes twice.")
    groups: list[AdviceGroup] = Field(description="The places behind them, by family.")
    ranking: list[Advice]
    rules: list[AdviceRule]
    evaluation: JSON | None = None
    how_to_measure: str | None = None

    @property
    def further(self) -> list[AdviceRule]:
        """The rules that neither a card nor a detail has said."""
        said = {card.sentence for card in self.cards} | {r.text for d in self.details for r in (*d.speaks_for, *d.against)}
        return [rule for rule in self.rules if rule.text not in said]


HOW_TO_MEASURE = "Send the same request with measure set to true: the base model is then tested on validation rows, zero-shot and few-shot."


class _Judged(NamedTuple):
    """The methods in their order, and what that follows from."""

    resolved: models.Resolved
    settings: RunSettings
    measured: Evaluation | None
    facts: Facts
    tune: Tune
    ranking: list[Advice]


def rank(session: Session, user: User, model: str, dataset: Dataset, run: Mapping[str, Any] | None = None) -> dict[str, Advice]:
    """Every method by its name, the best first. Raises as `advise` does."""
    return {one.strategy: one for one in _judge(session, user, model, dataset, run).ranking}


def _judge(session: Session, user: User, model: str, dataset: Dataset, run: Mapping[str, Any] | None) -> _Judged:
    asked = dict(run or {})
    settings = RunSettings.model_validate(usual_run(dataset, asked) | asked)
    feasibility.refuse_device(settings, heartbeats.training_machine(device=settings.device))
    resolved = models.resolve(session, user, model)
    if dataset.status != "ready":
        raise Conflict(
            gettext("The dataset %(name)s is %(status)s.", name=dataset.name, status=gettext(dataset.status)),
            hint=gettext("Ask again when it has been read."),
            param="dataset_id",
        )
    measured = evaluations.latest(session, user, resolved.model.id, "advice", dataset.id)
    result = result_of(measured)
    facts = facts_of(dataset, result, settings.device)
    why_not = feasibility.why_not_tuned(resolved.ref, facts.task)
    costs = {} if why_not else costs_of(session, resolved.ref, dataset, facts, settings)
    past = experience.reasons(session, user, resolved.model.id, dataset, facts.task)
    ranking = advisor.advise(facts, resolved.ref.shape, costs, why_not, past)
    tune = should_tune(facts, result)
    if result and not why_not:
        untested = facts_of(dataset, None, settings.device)
        tune.changed = changed(ranking, advisor.advise(untested, resolved.ref.shape, costs, past=past))
    return _Judged(resolved, settings, measured, facts, tune, ranking)


def advise(session: Session, user: User, model: str, dataset: Dataset, run: Mapping[str, Any] | None = None) -> Advised:
    """The advice, also about other models. Raises NotFound for the model, Conflict while the dataset is being parsed, BadField for
    run settings that are not supported here."""
    resolved, settings, measured, facts, tune, ranking = _judge(session, user, model, dataset, run)
    offered = models.offered(session, user)
    whole = WholeRun(
        resolved.model, resolved.ref.shape.parameters(), settings, longer(resolved.ref.shape, dataset, settings),
        _others(session, resolved.model, offered, dataset, facts, settings),
    )  # fmt: skip
    chosen = cards(ranking, facts, resolved.model.name, ids.public(ids.DATASET, dataset.id), whole)
    return Advised(
        model=resolved.model.name,
        dataset=dataset.name,
        dataset_id=ids.public(ids.DATASET, dataset.id),
        facts=facts,
        shown=show(facts, resolved.ref.shape),
        tune=tune,
        cards=chosen,
        steps=steps(resolved.model, resolved.ref.shape, dataset, facts, settings, offered),
        details=advisor.details(ranking),
        groups=advisor.groups(ranking),
        ranking=ranking,
        rules=advisor.rules(ranking),
        evaluation=train_queue.evaluation_json(session, measured) if measured else None,
        how_to_measure=HOW_TO_MEASURE if measured is None or measured.status == "failed" else None,
    )


def _others(session: Session, model: Model, offered: list[Model], dataset: Dataset, facts: Facts, run: RunSettings) -> list[OtherModel]:
    """The next smaller and the next larger base model of the same kind, each with the ranking for it."""
    sized = [
        (Shape.model_validate(one.shape).parameters(), one)
        for one in offered
        if one.status == "ready" and one.kind == model.kind and one.job_id is None and one.shape and one.id != model.id
        and not one.answered_elsewhere and not from_nothing.is_blank(one)
    ]  # fmt: skip
    own = Shape.model_validate(model.shape).parameters()
    smaller = max((one for one in sized if one[0] < own), key=lambda one: one[0], default=None)
    larger = min((one for one in sized if one[0] > own), key=lambda one: one[0], default=None)
    found = []
    for parameters, one in filter(None, (smaller, larger)):
        ref = models.reference(session, one)
        if feasibility.why_not_tuned(ref, facts.task) is None:
            found.append(OtherModel(one, parameters, advisor.advise(facts, ref.shape, costs_of(session, ref, dataset, facts, run))))
    return found


def changed(ranking: list[Advice], before: list[Advice]) -> str:
    """How the test of the base model changed the ranking, in a sentence: the first place, else the largest move."""
    places = {a.strategy: n for n, a in enumerate(before, 1)}
    first = ranking[0]
    if places[first.strategy] != 1:
        return gettext(
            "The test moved %(method)s from place %(place)s to the top.", method=gettext(first.title), place=places[first.strategy]
        )
    moves = {a.strategy: places[a.strategy] - n for n, a in enumerate(ranking, 1) if a.available}
    most = max(moves, key=lambda name: abs(moves[name]), default="")
    if not most or not moves[most]:
        return gettext("The test changed no rank: %(method)s stays first.", method=gettext(first.title))
    return gettext(
        "The test moved %(method)s from place %(before)s to %(now)s; %(first)s stays first.",
        method=gettext(STRATEGIES[most].title),
        before=places[most],
        now=places[most] - moves[most],
        first=gettext(first.title),
    )


def measure(session: Session, user: User, model: str, dataset: Dataset) -> Evaluation:
    """The measurement for this model and data; created where there is none yet."""
    resolved = models.resolve(session, user, model)
    found = evaluations.latest(session, user, resolved.model.id, "advice", dataset.id)
    if found is not None and found.status != "failed":
        return found
    named = {"model": model, "dataset_id": ids.public(ids.DATASET, dataset.id), "kind": "advice"}
    return evaluations.create(session, user, evaluations.read_order(named))


def result_of(measured: Evaluation | None) -> JSON:
    return (measured.result if measured is not None and measured.status == "succeeded" else None) or {}


def facts_of(dataset: Dataset, result: Mapping[str, Any] | None = None, device: str = "auto") -> Facts:
    """The facts of the data and of the machine that computes on `device`, and the results of an evaluation of the kind `advice`."""
    metric, zero, few = prompted(result or {})
    stats, here = datasets.stats(dataset), heartbeats.training_machine(device=device).on(device)
    report = dataset.report or {}
    counts = list(report.get("labels", {}).values()) if objectives.get(dataset.task).classifies else []
    return Facts(
        task=datasets.usual_task(dataset) or objectives.DEFAULT,
        rows=dataset.good_rows or 0,
        tokens=stats.tokens,
        classes=(report.get("label_count") or len(counts)) if counts else None,
        smallest_class=min(counts) if counts else None,
        largest_class=max(counts) if counts else None,
        distance=(result or {}).get("distance"),
        metric=metric,
        prompted=max((score for score in (zero, few) if score is not None), default=None),
        chance=(result or {}).get("chance"),
        how=(result or {}).get("how"),
        memory_bytes=here.training_memory_bytes,
        cuda=here.cuda,
    )


def costs_of(session: Session, ref: ModelRef, dataset: Dataset, facts: Facts, run: RunSettings) -> dict[str, CostEstimate]:
    """The estimate of each strategy with these run settings, without those that cannot run here."""
    here, reference = heartbeats.training_machine(), datasets.reference(dataset)
    stats = inspections.stats_for(session, dataset, ref)
    found = {}
    for name, cls in STRATEGIES.items():
        strategy = cls()
        if strategy.unavailable(ref.shape, task=facts.task, cuda=facts.cuda) is not None:
            continue
        spec = JobSpec(name="advice", task=facts.task, model=ref, dataset=reference, run=run, strategy=strategy)
        cost = duration.estimate(spec, stats, here)
        found[name] = CostEstimate(
            memory_bytes=cost.memory_bytes,
            seconds=cost.seconds,
            trainable_parameters=cost.trainable_parameters,
            learning_bytes=cost.memory.gradients + cost.memory.optimizer + cost.memory.activations,
            recomputed_layers=cost.recomputed_layers,
            tokens=cost.tokens,
        )
    return found


def show(facts: Facts, shape: Shape) -> list[ShownFact]:
    """The facts in words, in the order of their importance."""
    task = lowered(gettext(objectives.get(facts.task).title))
    found = [ShownFact(name=gettext("Rows"), value=human_number(facts.rows), note=task)]
    if facts.tokens is not None:
        each = gettext("%(tokens)s a row", tokens=human_number(facts.tokens / max(facts.rows, 1), 0))
        found.append(ShownFact(name=gettext("Tokens"), value=human_number(facts.tokens), note=each))
    if facts.classes:
        least, most = human_number(facts.smallest_class), human_number(facts.largest_class)
        note = "" if facts.smallest_class is None else gettext("%(least)s to %(most)s rows each", least=least, most=most)
        found.append(ShownFact(name=gettext("Classes"), value=human_number(facts.classes), note=note))
        if facts.smallest_class is not None:
            uneven = _advice.balance(facts)
            bad = uneven >= _advice.UNEVEN
            even = gettext("imbalanced: judge by macro F1, not accuracy") if bad else gettext("largest class to smallest")
            found.append(ShownFact(name=gettext("Balance"), value=f"{human_number(uneven, 1)} : 1", note=even))
    kind = gettext("parameters, %(architecture)s", architecture=gettext(shape.architecture))
    found.append(ShownFact(name=gettext("Model"), value=human_count(shape.parameters()), note=kind))
    found.append(ShownFact(name=gettext("Available memory"), value=human_bytes(facts.memory_bytes), note="GPU" if facts.cuda else "CPU"))
    found.append(_domain(facts))
    return found


def _domain(facts: Facts) -> ShownFact:
    name = gettext("Domain distance")
    if facts.distance is None:
        why = gettext("not applicable to encoders") if facts.how == "vectors" else gettext("not measured")
        return ShownFact(name=name, value="–", note=why)
    return ShownFact(name=name, value=f"{human_number(facts.distance, 2)} ×", note=closeness(facts.distance))


def closeness(distance: float) -> str:
    if distance <= _advice.CLOSE:
        return gettext("close to general text")
    return gettext("far from general text") if distance >= _advice.FAR else gettext("somewhat new to the model")


# Should you fine-tune at all? ----------------------------------------------------------------------------------------------

PROMPTED = [name for name in metrics.TILES if metrics.METRICS[name].enough is not None]
"""Metrics of a prompt alone: exact match is useless for long answers."""


def prompted(result: Mapping[str, Any]) -> tuple[str | None, float | None, float | None]:
    """(metric, zero-shot, few-shot) of a prompt alone, with the most informative metric for these rows."""
    zero, few = result.get("zero_shot") or {}, result.get("few_shot") or {}
    metric = next((name for name in PROMPTED if name in zero or name in few), None)
    return (metric, zero.get(metric), few.get(metric)) if metric else (None, None, None)


def should_tune(facts: Facts, result: Mapping[str, Any]) -> Tune:
    """From the scores of a prompt alone on validation rows, zero-shot and few-shot."""
    if not result:
        return Tune(answer=gettext("Not measured yet. Test the base model first: if a prompt is good enough, there is nothing to train."))
    metric, zero, few = prompted(result)
    if metric is None or facts.prompted is None:
        reason = result.get("reason") or gettext("No prompt could be tried on these rows.")
        return Tune(answer=gettext("%(reason)s A short job shows whether fine-tuning is worth it.", reason=reason), measured=True)
    return Tune(
        answer=_answer(facts, zero, few) + _foreseen(result),
        worth_it=_advice.worth_tuning(facts),
        measured=True,
        metric=metrics.in_text(metric),
        zero_shot=zero,
        few_shot=few,
        shots=int(result.get("shots") or 0),
        chance=facts.chance,
        rows=int(result.get("prompted_rows") or 0),
        how=facts.how,
    )


def _answer(facts: Facts, zero: float | None, few: float | None) -> str:
    metric = facts.metric or PROMPTED[0]
    said = {
        "by": _by(facts, examples=few is not None and (zero is None or few > zero)),
        "metric": metrics.in_text(metric),
        "score": metrics.figure(facts.prompted, metric, 2),
    }
    if not _advice.worth_tuning(facts):
        return gettext(
            "Perhaps not. %(by)s the base model reaches %(metric)s %(score)s on the validation set: a prompt may be sufficient.", **said
        )
    if facts.chance is not None and (facts.prompted or 0) <= facts.chance + 0.05:
        return gettext(
            "Yes. %(by)s the base model reaches %(metric)s %(score)s, no more than the majority baseline (%(chance)s): much headroom.",
            **said,
            chance=metrics.figure(facts.chance, metric),
        )
    return gettext("Yes. %(by)s the base model reaches %(metric)s %(score)s on the validation set: headroom for fine-tuning.", **said)


def _by(facts: Facts, *, examples: bool) -> str:
    """How a prompt was tried, at the beginning of a sentence."""
    if facts.how == "vectors":
        return gettext("By nearest neighbor among a few examples") if examples else gettext("By the label name with the nearest vector")
    return gettext("Few-shot") if examples else gettext("Zero-shot")


def _foreseen(result: Mapping[str, Any]) -> str:
    """The effect of few-shot examples on the likelihood of the references, which is less noisy than a few generated answers."""
    before, after = ((result.get(name) or {}).get("bits_per_byte") for name in ("zero_shot", "few_shot"))
    if not before or not after:
        return ""
    return " " + gettext(
        "Bits per byte of the references: %(before)s zero-shot, %(after)s few-shot.",
        before=human_number(before, 2),
        after=human_number(after, 2),
    )
