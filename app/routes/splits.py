"""A look at a split before it is used: both sides, their labels, and what stands on both."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from app import datasets, ids, inspections, schemas, versions
from app.accounts import CurrentUser
from app.db import transaction
from app.errors import BadField, Conflict
from app.openapi import answers
from app.pages import PageNumber
from app.routes.versions import dataset_of, path_of
from app.spec import RunSettings
from app.web import flash, render

pages = APIRouter()
api = APIRouter(prefix="/v1")
Method = Literal["random", "stratified", "grouped"]
Fraction = Annotated[float, Query(ge=0, lt=1)]
Seed = Annotated[int, Query(ge=0, le=2**31 - 1)]
WAIT_SECONDS = 3.0
PER_PAGE = 50
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
    page: PageNumber = 1,
) -> Response:
    dataset, asked, others = _ask(user, key, method, column, fraction, seed, validation)
    if asked is None:
        return RedirectResponse(path_of(dataset), 303)
    chosen = {"method": method, "column": column, "fraction": fraction, "seed": seed, "validation": validation}
    found = inspections.wait(asked.id, WAIT_SECONDS)
    columns = [name for name in (dataset.report or {}).get("columns", []) if name not in dataset.mapping.values()]
    return render(
        request,
        "split.html",
        dataset=dataset,
        key=key,
        chosen=chosen,
        query=urlencode(chosen),
        page=page,
        examples=((found.result or {}).get("examples", []))[(page - 1) * PER_PAGE : page * PER_PAGE],
        listed=len((found.result or {}).get("examples", [])),
        per_page=PER_PAGE,
        columns=columns,
        others=[(other, ids.public(ids.DATASET, other.id)) for other in others],
        found=found,
    )


@pages.post("/datasets/{key}/split/drop")
def drop(
    request: Request,
    user: CurrentUser,
    key: str,
    method: Annotated[Method, Form()] = "random",
    column: Annotated[str, Form()] = "",
    fraction: Annotated[float, Form(ge=0, lt=1)] = DEFAULTS.validation_fraction,
    seed: Annotated[int, Form(ge=0, le=2**31 - 1)] = DEFAULTS.seed,
    validation: Annotated[str, Form()] = "",
) -> Response:
    """A version that learns from none of the rows it is measured on; the answer leads to its split."""
    dataset, asked, _ = _ask(user, key, method, column, fraction, seed, validation)
    found = inspections.wait(asked.id, WAIT_SECONDS) if asked is not None else None
    if found is None or not found.result:
        raise Conflict("Both sides are not compared yet.", way_out="Load the page of the split again, and wait until its rows are shown.")
    lines = found.result["drop"]
    with transaction() as session:
        new = versions.drop_rows(session, user, dataset, lines)
    flash(request, f"Version {new.version} leaves out {len(lines):,} row{'s' if len(lines) != 1 else ''} that stood on both sides.")
    query = {"method": method, "column": column, "fraction": fraction, "seed": seed, "validation": validation}
    return RedirectResponse(f"{path_of(new)}/split?{urlencode(query)}", 303)


@api.get("/datasets/{key}/split", operation_id="preview_dataset_split", responses=answers(schemas.DatasetSplit))
def show_json(
    user: CurrentUser,
    key: str,
    method: Method = "random",
    column: str = "",
    fraction: Fraction = DEFAULTS.validation_fraction,
    seed: Seed = DEFAULTS.seed,
    validation: str = "",
) -> dict[str, Any]:
    """Both sides of a split before it is used, and what stands on both. `status` is waiting until the data worker has answered."""
    _, asked, _ = _ask(user, key, method, column, fraction, seed, validation)
    found = inspections.wait(asked.id, WAIT_SECONDS) if asked is not None else None
    return {
        "object": "dataset.split",
        "status": found.status if found else "reading",
        **((found.result or {}) if found else {}),
        "error": found.error if found else None,
    }
