"""Scores of models interpolated between a fine-tuned model and its base, on validation rows and on the general probe (WiSE-FT,
Wortsman et al. 2022, https://arxiv.org/abs/2109.01903)."""

from __future__ import annotations

from typing import Any

from app.errors import BadData
from app.evaluation.forgetting import TextScore, compare
from app.evaluation.service import EvaluationSpec
from app.models import interpolation as blends
from app.spec import ModelRef
from worker.evaluation.scoring import Reader, Say, choose_rows, part, same_rows, score
from worker.modeling.loading import folder_of, load_strategy
from worker.runtime.device import Compute


def blend(spec: EvaluationSpec, engine: Compute, say: Say) -> dict[str, Any]:
    """`points`: for each interpolation point its `score` (loss in nats per token), other `scores`, and the change of general
    ability relative to the base, with its interval."""
    if spec.base is None:
        raise BadData(f"{spec.model.name} was not fine-tuned here.", hint="Take a fine-tuned model.")
    rows, _ = choose_rows(spec)
    rows, skipped = same_rows([Reader(spec.model, engine)], rows, spec.max_length)
    points: list[dict[str, Any]] = []
    general: list[TextScore] | None = None
    for place, share in enumerate(spec.points):
        reader = Reader(blends.blended(spec.model, spec.base, strategy_of(spec.model), share), engine)
        say(place / len(spec.points), f"Reading {len(rows)} rows at blend {share:g}")
        with reader.loaded():
            found = score(spec, reader, rows, part(say, place, len(spec.points)))
        general = general or found.general
        forgot = compare(general, found.general) if general and found.general else None
        points.append(
            {
                "blend": share,
                "score": found.scores["loss"],
                "scores": found.scores,
                "forgetting": forgot.change if forgot else None,
                "interval": list(forgot.interval) if forgot else None,
                "verdict": forgot.verdict if forgot and place else None,
            }
        )
    best, advice = blends.advise(points)
    return {"rows": len(rows), "skipped": skipped, "metric": "loss", "points": points, "best": best, "advice": advice}


def strategy_of(ref: ModelRef) -> str:
    """The strategy that trained a model, by the settings saved with its weights."""
    return ref.adapters[-1].strategy if ref.adapters else load_strategy(folder_of(ref.path)).name
