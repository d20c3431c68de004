"""A look at a split before it is used: both sides, their labels, and what stands on both."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response

from app import datasets, ids, inspections
from app.accounts import CurrentUser
from app.db import transaction
from app.errors import BadField
from app.routes.versions import dataset_of, path_of
from app.spec import RunSettings
from app.web import render

pages = APIRouter()
api = APIRouter(prefix="/v1")
Method = Literal["random", "stratified", "grouped"]
Fraction = Annotated[float, Query(ge=0, lt=1)]
Seed = Annotated[int, Query(ge=0, le=2**31 - 1)]
WAIT_SECONDS = 3.0
DEFAULTS = RunSettings()


def _ask(user: CurrentUser, key: str, method: str, column: str, fraction: float, seed: int, validation: str) -> tuple[Any, Any, Any]:
    with transaction() as session:
        dataset = dataset_of(session, user, key)
        if dataset.status != "ready":
            return dataset, None, []
        mine = [found for found in datasets.list_(session, user) if found.status == "ready" and found.task == dataset.task]
        arguments: dict[str, Any] = {"method": method, "column": column or None, "fraction": fraction, "seed": seed}
        if validation:
            other = dataset_of(session, user, validation)
            if other.status != "ready" or not other.rows_path:
                raise BadField(f"The dataset {other.name} is not ready.", way_out="Wait until it is read.", param="validation")
            arguments = {"validation_rows": other.rows_path}
        asked = inspections.ask(session, dataset, "split", arguments)
        return dataset, asked, [found for found in mine if found.id != dataset.id]


@pages.get("/datasets/{key}/split")
def show(
    request: Request,
    user: CurrentUser,
    key: str,
    method: Method = "random",
    column: str = "",
    fraction: Fraction = DEFAULTS.validation_fraction,
    seed: Seed = DEFAULTS.seed,
    validation: str = "",
) -> Response:
    dataset, asked, others = _ask(user, key, method, column, fraction, seed, validation)
    if asked is None:
        return RedirectResponse(path_of(dataset), 303)
    found = inspections.wait(asked.id, WAIT_SECONDS)
    columns = [name for name in (dataset.report or {}).get("columns", []) if name not in dataset.mapping.values()]
    return render(
        request,
        "split.html",
        dataset=dataset,
        key=key,
        chosen={"method": method, "column": column, "fraction": fraction, "seed": seed, "validation": validation},
        columns=columns,
        others=[(other, ids.public(ids.DATASET, other.id)) for other in others],
        found=found,
    )


@api.get("/datasets/{key}/split")
def show_json(
    user: CurrentUser,
    key: str,
    method: Method = "random",
    column: str = "",
    fraction: Fraction = DEFAULTS.validation_fraction,
    seed: Seed = DEFAULTS.seed,
    validation: str = "",
) -> dict[str, Any]:
    """The same for programs; `status` is waiting until the data worker has answered."""
    _, asked, _ = _ask(user, key, method, column, fraction, seed, validation)
    found = inspections.wait(asked.id, WAIT_SECONDS) if asked is not None else None
    return {
        "object": "dataset.split",
        "status": found.status if found else "reading",
        **((found.result or {}) if found else {}),
        "error": found.error if found else None,
    }
