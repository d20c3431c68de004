"""The advice for one model and one dataset on this machine: facts gathered, each strategy's cost estimated, all ranked.

What needs the model itself (how unlike the data is to general text, what a prompt alone reaches) is measured by an
evaluation of the kind `advice` when somebody asks for it, and used here from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from sqlalchemy.orm import Session

from app import advisor, datasets, estimate, evaluations, ids, inspections, models, order_checks, workers
from app.advisor import Advice, Cost, Facts
from app.errors import Conflict
from app.shapes import Shape
from app.spec import JobSpec, ModelRef, RunSettings
from app.strategies import STRATEGIES
from app.tables import JSON, Dataset, Evaluation, User
from app.web import human_bytes, human_number


class Shown(BaseModel):
    """One fact as the page shows it."""

    name: str
    value: str
    note: str = ""


class Tune(BaseModel):
    """Whether to tune at all, in words, with the scores of a prompt alone on held-out rows that the words stand on.

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


class Advised(BaseModel):
    model: str
    dataset: str
    dataset_id: str
    facts: Facts
    shown: list[Shown]
    tune: Tune
    ranking: list[Advice]
    evaluation: JSON | None = None
    how_to_measure: str | None = None


HOW_TO_MEASURE = "Send the same request with measure set to true: the model then reads some rows and tries held-out ones by a prompt alone."


def advise(session: Session, user: User, model: str, dataset: Dataset, run: Mapping[str, Any] | None = None) -> Advised:
    """Raises NotFound for the model, Conflict while the dataset is being read, BadField for run settings that cannot be had here."""
    settings = RunSettings.model_validate(dict(run or {}))
    order_checks.refuse_optimizer(settings, workers.training_machine())
    resolved = models.resolve(session, user, model)
    if dataset.status != "ready":
        raise Conflict(f"The dataset {dataset.name} is {dataset.status}.", way_out="Ask again when it has been read.", param="dataset_id")
    measured = evaluations.latest(session, user, resolved.model.id, "advice", dataset.id)
    result = result_of(measured)
    facts = facts_of(dataset, result)
    why_not = order_checks.why_not_tuned(resolved.ref, facts.task)
    costs = {} if why_not else costs_of(session, resolved.ref, dataset, facts, settings)
    return Advised(
        model=resolved.model.name,
        dataset=dataset.name,
        dataset_id=ids.public(ids.DATASET, dataset.id),
        facts=facts,
        shown=show(facts, resolved.ref.shape),
        tune=should_tune(facts, result),
        ranking=advisor.advise(facts, resolved.ref.shape, costs, why_not),
        evaluation=evaluations.to_json(measured) if measured else None,
        how_to_measure=HOW_TO_MEASURE if measured is None or measured.status == "failed" else None,
    )


def measure(session: Session, user: User, model: str, dataset: Dataset) -> Evaluation:
    """What was measured for this model and data, or is being measured; ordered where there is nothing of the kind yet."""
    resolved = models.resolve(session, user, model)
    found = evaluations.latest(session, user, resolved.model.id, "advice", dataset.id)
    if found is not None and found.status != "failed":
        return found
    named = {"model": model, "dataset_id": ids.public(ids.DATASET, dataset.id), "kind": "advice"}
    return evaluations.create(session, user, evaluations.read_order(named))


def result_of(measured: Evaluation | None) -> JSON:
    return (measured.result if measured is not None and measured.status == "succeeded" else None) or {}


def facts_of(dataset: Dataset, result: Mapping[str, Any] | None = None) -> Facts:
    """What is known of the data and the machine, and what an evaluation of the kind `advice` found."""
    metric, zero, few = prompted(result or {})
    stats, here = datasets.stats(dataset), workers.training_machine()
    report = dataset.report or {}
    counts = list(report.get("labels", {}).values()) if dataset.task == "classification" else []
    return Facts(
        task=dataset.task or "generation",  # type: ignore[arg-type]
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


def costs_of(session: Session, ref: ModelRef, dataset: Dataset, facts: Facts, run: RunSettings) -> dict[str, Cost]:
    """What each strategy would take with these run settings; those that cannot run here are left out."""
    here, reference = workers.training_machine(), datasets.reference(dataset)
    stats = inspections.stats_for(session, dataset, ref)
    found = {}
    for name, cls in STRATEGIES.items():
        strategy = cls()
        if strategy.unavailable(ref.shape, task=facts.task, cuda=facts.cuda) is not None:
            continue
        spec = JobSpec(name="advice", task=facts.task, model=ref, dataset=reference, run=run, strategy=strategy)
        cost = estimate.estimate(spec, stats, here)
        found[name] = Cost(
            memory_bytes=cost.memory_bytes,
            seconds=cost.seconds,
            trainable_parameters=cost.trainable_parameters,
            learning_bytes=cost.memory.gradients + cost.memory.optimizer + cost.memory.activations,
            recomputed_layers=cost.recomputed_layers,
            tokens=cost.tokens,
        )
    return found


def show(facts: Facts, shape: Shape) -> list[Shown]:
    """The facts in words, in the order in which they matter."""
    found = [Shown(name="Rows", value=human_number(facts.rows), note=facts.task)]
    if facts.tokens is not None:
        each = f"{facts.tokens / max(facts.rows, 1):,.0f} a row"
        found.append(Shown(name="Tokens", value=human_number(facts.tokens), note=f"{each}; what a job reads stands beside each strategy"))
    if facts.classes:
        note = (
            "" if facts.smallest_class is None else f"{human_number(facts.smallest_class)} to {human_number(facts.largest_class)} rows each"
        )
        found.append(Shown(name="Classes", value=human_number(facts.classes), note=note))
        if facts.smallest_class is not None:
            uneven = advisor.balance(facts)
            even = "uneven: judge by macro F1, not by accuracy" if uneven >= advisor.UNEVEN else "largest class to smallest"
            found.append(Shown(name="Balance", value=f"{uneven:,.1f} : 1", note=even))
    found.append(Shown(name="Model", value=f"{human_number(shape.parameters() / 1e6, 1)} M", note=f"parameters, {shape.architecture}"))
    found.append(Shown(name="Memory here", value=human_bytes(facts.memory_bytes), note="of the GPU" if facts.cuda else "of the machine"))
    found.append(_unlike(facts))
    return found


def _unlike(facts: Facts) -> Shown:
    if facts.distance is None:
        return Shown(
            name="Unlike general text", value="–", note="an encoder foresees no text" if facts.how == "vectors" else "not measured"
        )
    return Shown(name="Unlike general text", value=f"{facts.distance:.2f} ×", note=closeness(facts.distance))


def closeness(distance: float) -> str:
    if distance <= advisor.CLOSE:
        return "close to what the model knows"
    return "far from what the model knows" if distance >= advisor.FAR else "somewhat new to the model"


# Should you tune at all? ----------------------------------------------------------------------------------------------

NAMES = {"accuracy": "accuracy", "rouge_l": "ROUGE-L"}


def prompted(result: Mapping[str, Any]) -> tuple[str | None, float | None, float | None]:
    """(metric, zero-shot, few-shot) of a prompt alone: the metric that says most about these rows."""
    zero, few = result.get("zero_shot") or {}, result.get("few_shot") or {}
    metric = next((name for name in NAMES if name in zero or name in few), None)  # long answers hardly ever agree to the letter
    return (metric, zero.get(metric), few.get(metric)) if metric else (None, None, None)


def should_tune(facts: Facts, result: Mapping[str, Any]) -> Tune:
    """From the scores of a prompt alone on held-out rows: zero-shot, and with solved examples before the question."""
    if not result:
        return Tune(
            answer="Nobody knows yet. Let the model try some held-out rows by a prompt alone first: if that is good enough, there is nothing to tune."
        )
    metric, zero, few = prompted(result)
    if metric is None or facts.prompted is None:
        reason = result.get("reason") or "No prompt could be tried on these rows."
        return Tune(answer=f"{reason} Whether tuning is worth it shows after a short job.", measured=True)
    return Tune(
        answer=_answer(facts, zero, few) + _foreseen(result),
        worth_it=advisor.worth_tuning(facts),
        measured=True,
        metric=NAMES[metric],
        zero_shot=zero,
        few_shot=few,
        shots=int(result.get("shots") or 0),
        chance=facts.chance,
        rows=int(result.get("prompted_rows") or 0),
        how=facts.how,
    )


def _answer(facts: Facts, zero: float | None, few: float | None) -> str:
    reached = f"{NAMES[facts.metric or 'accuracy']} {facts.prompted:.2f}"
    by = _by(facts, examples=few is not None and (zero is None or few > zero))
    if not advisor.worth_tuning(facts):
        return f"Perhaps not. {by} it reaches {reached} on held-out rows already: try a good prompt first, in the prompt lab."
    if facts.chance is not None and (facts.prompted or 0) <= facts.chance + 0.05:
        return f"Yes. {by} it reaches {reached}, no more than always giving the commonest label ({facts.chance:.2f}): there is everything to learn."
    return f"Yes. {by} it reaches {reached} on held-out rows, which leaves much to learn."


def _by(facts: Facts, *, examples: bool) -> str:
    if facts.how == "vectors":
        return "By the nearest vectors of a few examples" if examples else "By the vector nearest to a label's name"
    return "With a few examples in the prompt" if examples else "With the bare question"


def _foreseen(result: Mapping[str, Any]) -> str:
    """What examples do to how well the right answers are foreseen, which is steadier than a few written answers."""
    before, after = ((result.get(name) or {}).get("bits_per_byte") for name in ("zero_shot", "few_shot"))
    return (
        f" The right answers take {before:.2f} bits a byte after the bare question, {after:.2f} after examples." if before and after else ""
    )
