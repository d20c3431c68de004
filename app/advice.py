"""The advice for one model and one dataset on this machine: facts gathered, each strategy's cost estimated, all ranked.

What would need the model itself (how unlike the data is to general text) is not measured here, so the ranking stands on
the rows, the labels, the model's shape and the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from sqlalchemy.orm import Session

from app import advisor, datasets, estimate, ids, machine, models
from app.advisor import Advice, Cost, Facts
from app.errors import Conflict
from app.shapes import Shape
from app.spec import JobSpec, ModelRef, RunSettings
from app.strategies import STRATEGIES
from app.tables import Dataset, User
from app.web import human_bytes, human_number


class Shown(BaseModel):
    """One fact as the page shows it."""

    name: str
    value: str
    note: str = ""


class Advised(BaseModel):
    model: str
    dataset: str
    dataset_id: str
    facts: Facts
    shown: list[Shown]
    ranking: list[Advice]


def advise(session: Session, user: User, model: str, dataset: Dataset, run: Mapping[str, Any] | None = None) -> Advised:
    """Raises NotFound for the model, Conflict while the dataset is being read."""
    resolved = models.resolve(session, user, model)
    if dataset.status != "ready":
        raise Conflict(f"The dataset {dataset.name} is {dataset.status}.", way_out="Ask again when it has been read.", param="dataset_id")
    facts = facts_of(dataset)
    costs = costs_of(resolved.ref, dataset, facts, RunSettings.model_validate(dict(run or {})))
    return Advised(
        model=resolved.model.name,
        dataset=dataset.name,
        dataset_id=ids.public(ids.DATASET, dataset.id),
        facts=facts,
        shown=show(facts, resolved.ref.shape),
        ranking=advisor.advise(facts, resolved.ref.shape, costs),
    )


def facts_of(dataset: Dataset) -> Facts:
    """What is known of the data and the machine."""
    stats, here = datasets.stats(dataset), machine.this_machine()
    report = dataset.report or {}
    counts = list(report.get("labels", {}).values()) if dataset.task == "classification" else []
    return Facts(
        task=dataset.task or "generation",  # type: ignore[arg-type]
        rows=dataset.good_rows or 0,
        tokens=stats.tokens,
        classes=(report.get("label_count") or len(counts)) if counts else None,
        smallest_class=min(counts) if counts else None,
        largest_class=max(counts) if counts else None,
        memory_bytes=here.training_memory_bytes,
        cuda=here.cuda,
    )


def costs_of(ref: ModelRef, dataset: Dataset, facts: Facts, run: RunSettings) -> dict[str, Cost]:
    """What each strategy would take with these run settings; those that cannot run here are left out."""
    here, stats, reference = machine.this_machine(), datasets.stats(dataset), datasets.reference(dataset)
    found = {}
    for name, cls in STRATEGIES.items():
        strategy = cls()
        if strategy.unavailable(ref.shape, task=facts.task, cuda=facts.cuda) is not None:
            continue
        spec = JobSpec(name="advice", task=facts.task, model=ref, dataset=reference, run=run, strategy=strategy)
        cost = estimate.estimate(spec, stats, here)
        learns = strategy.learns(ref.shape, task=facts.task, labels=facts.classes or 0)
        found[name] = Cost(memory_bytes=cost.memory_bytes, seconds=cost.seconds, trainable_parameters=learns)
    return found


def show(facts: Facts, shape: Shape) -> list[Shown]:
    """The facts in words, in the order in which they matter."""
    found = [Shown(name="Rows", value=human_number(facts.rows), note=facts.task)]
    if facts.tokens is not None:
        found.append(Shown(name="Tokens", value=human_number(facts.tokens)))
    if facts.classes:
        note = (
            "" if facts.smallest_class is None else f"{human_number(facts.smallest_class)} to {human_number(facts.largest_class)} rows each"
        )
        found.append(Shown(name="Classes", value=human_number(facts.classes), note=note))
    found.append(Shown(name="Model", value=f"{human_number(shape.parameters() / 1e6, 1)} M", note=f"parameters, {shape.architecture}"))
    found.append(Shown(name="Memory here", value=human_bytes(facts.memory_bytes), note="of the GPU" if facts.cuda else "of the machine"))
    return found
