"""The methods to choose from in a form: every strategy, why it cannot run here, and which one the advisor recommends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.errors import StudioError
from app.jobs import spec_builder
from app.machines.placement import Resources
from app.planning import feasibility
from app.planning.advisor import Advice
from app.spec import ModelRef
from app.strategies import STRATEGIES, Strategy
from app.tables import Dataset, Model, User


@dataclass(frozen=True, slots=True)
class StrategyCard:
    """One strategy to choose. `reason` says why this model, data or machine cannot run it; `advised` marks the advisor's first choice."""

    cls: type[Strategy]
    chosen: bool
    reason: str | None
    advised: bool = False


def ranking_of(session: Session, user: User, model: Model | None, dataset: Dataset | None, device: str = "auto") -> dict[str, Advice]:
    """The advisor's result for every strategy by name; empty until there is a model and a parsed dataset."""
    from app.evaluation import advice

    if model is None or dataset is None or dataset.status != "ready" or not dataset.good_rows:
        return {}
    run = {"device": "cpu"} if device == "cpu" else None  # other input is checked where the job is built
    try:
        return advice.rank(session, user, model.name, dataset, run)
    except StudioError:
        return {}  # the form itself reports errors of the model or the data


def cards_of(
    wanted: str | None, task: str, model: ModelRef | None, ranking: Mapping[str, Advice], device: str, asked: Resources | None = None
) -> list[StrategyCard]:
    """Every strategy, with why it cannot run. Where none was named the recommended one is chosen, else the first that can run."""
    cuda = spec_builder.has_gpu(device, asked)
    whole = feasibility.why_not_tuned(model, task) if model else None
    reasons = {name: whole or (cls().unavailable(model.shape, task=task, cuda=cuda) if model else None) for name, cls in STRATEGIES.items()}
    able = [name for name, cls in STRATEGIES.items() if reasons[name] is None and cls.unsupported(task) is None]
    advised = [name for name in able if name in ranking and ranking[name].advised]
    chosen = wanted if wanted in STRATEGIES else (advised or able or list(STRATEGIES))[0]
    return [StrategyCard(cls, name == chosen, reasons[name], name in advised) for name, cls in STRATEGIES.items()]


def shown_first(cards: list[StrategyCard]) -> tuple[list[StrategyCard], list[StrategyCard]]:
    """Visible: the chosen and the recommended ones, and of each family the first that can run. The others are collapsed."""
    seen: set[str] = set()
    first = []
    for card in cards:
        if card.chosen or card.advised or (card.reason is None and card.cls.family not in seen):
            first.append(card)
        if card.reason is None:
            seen.add(card.cls.family)
    return first, [card for card in cards if card not in first]
