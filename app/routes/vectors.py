"""The page “Embeddings”: a 2D map of a dataset's embeddings, with the nearest neighbors of a selected row."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from app.datasets import service as datasets
from app.db import Db
from app.errors import StudioError
from app.evaluation import predictions
from app.evaluation import service as evaluations
from app.evaluation.predictions import VECTORS
from app.kit import ids
from app.models import service as models
from app.tables import Evaluation
from app.web import templates as web_templates
from app.web.auth import CurrentUser

pages = APIRouter()
PAGE = "/playground/vectors"
COLORS = 8
"""Number of classes with a color of their own on the map; the others share one."""


@pages.get(PAGE)
def vectors_page(request: Request, session: Db, user: CurrentUser, model: str = "", dataset: str = "") -> Response:
    return _page(request, session, user, {"model": model, "dataset": dataset})


def _page(request: Request, session: Db, user: CurrentUser, typed: dict[str, str], fault: StudioError | None = None) -> Response:
    usable = [
        m
        for m in models.offered(session, user, typed.get("model"))
        if m.status == "ready" and not m.answered_elsewhere and m.kind not in ("classifier", "reward")
    ]
    found = session.scalars(evaluations.mine(user, VECTORS).order_by(Evaluation.created_at.desc()).limit(20)).all()
    return web_templates.render(
        request,
        "vectors.html",
        status_code=fault.status if fault else 200,
        models=sorted(usable, key=lambda m: m.kind != "encoder"),
        datasets=datasets.with_rows(session, user, typed.get("dataset")),
        typed=typed,
        public=ids.public,
        found=found,
        chosen=None,
        fault=fault,
    )


@pages.post(PAGE)
def start(request: Request, session: Db, user: CurrentUser, model: Annotated[str, Form()], dataset: Annotated[str, Form()]) -> Response:
    try:
        with session.begin_nested():
            made = predictions.create_vectors(session, user, model, dataset)
    except StudioError as fault:
        return _page(request, session, user, {"model": model, "dataset": dataset}, fault)
    return RedirectResponse(_url(made), status_code=303)


def _url(found: Evaluation) -> str:
    return f"{PAGE}/{ids.public(ids.EVALUATION, found.id)}"


@pages.get(PAGE + "/{key}")
def map_page(request: Request, session: Db, user: CurrentUser, key: str, row: Annotated[int | None, Query()] = None) -> Response:
    """The map, and the nearest neighbors of the row at `line`."""
    found = evaluations.get(session, user, ids.parse(ids.EVALUATION, key), VECTORS)
    points: list[dict[str, Any]] = (found.result or {}).get("points") or []
    labels = sorted({str(point["label"]) for point in points if point["label"] is not None})
    colors = {label: min(place, COLORS) + 1 for place, label in enumerate(labels)}
    chosen = next((point for point in points if point["line"] == row), None)
    near = [(points[place], share) for place, share in chosen["near"]] if chosen else []
    return web_templates.render(
        request,
        "vectors_map.html",
        e=found,
        url=_url(found),
        points=points,
        colors=colors,
        many=len(labels) > COLORS,
        chosen=chosen,
        near=near,
        nearest={point["line"] for point, _ in near},
        dataset_url=f"/datasets/{ids.public(ids.DATASET, found.dataset_id)}" if found.dataset_id else "",
    )


@pages.post(PAGE + "/{key}/cancel")
def cancel(session: Db, user: CurrentUser, key: str) -> Response:
    return RedirectResponse(_url(evaluations.cancel(session, user, ids.parse(ids.EVALUATION, key), VECTORS)), status_code=303)
