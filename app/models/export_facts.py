"""What the formats of exports are told of a model, and which of them can hold it."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app import export_formats
from app.errors import StudioError
from app.export_formats import ExportFormat, ModelFacts
from app.models import service as models
from app.models.vocabulary import has_new_tokens
from app.spec import ModelRef
from app.strategies import STRATEGIES
from app.strategies._peft import PeftStrategy
from app.tables import Model


def facts_of(ref: ModelRef) -> ModelFacts:
    strategies = tuple(adapter.strategy for adapter in ref.adapters)
    stuck = next((STRATEGIES[name].title for name in strategies if name in STRATEGIES and not STRATEGIES[name].merges), None)
    peft = bool(strategies) and issubclass(STRATEGIES.get(strategies[-1], object), PeftStrategy)
    added = any(has_new_tokens(adapter.path) for adapter in ref.adapters)
    return ModelFacts(ref.name, ref.kind, ref.shape, tuple(ref.labels or ()), strategies, stuck, peft, added)


def facts(session: Session, model: Model) -> ModelFacts | None:
    """What the formats are told of a model; None for one whose weights are not here."""
    try:
        return None if model.answered_elsewhere else facts_of(models.reference(session, model))
    except StudioError:
        return None


def choices(facts: ModelFacts) -> list[tuple[ExportFormat, str | None]]:
    """Every format, and why this model cannot be written in it."""
    return [(kind, kind.accepts(facts)) for kind in export_formats.FORMATS.values()]
