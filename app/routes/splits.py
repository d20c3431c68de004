"""A preview of a split: the rows and labels of both sides, and the rows that are on both."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from app import schemas
from app.datasets import inspections, row_editor, versions
from app.datasets import service as datasets
from app.db import transaction
from app.errors import BadField, Conflict, problem_json
from app.kit import ids
from app.languages import gettext, ngettext
from app.planning.schedule import held_out_share
from app.routes.versions import dataset_of, path_of
from app.run_settings import RunSettings
from app.schemas.openapi import answers
from app.tables import Dataset, Inspection
from app.web.auth import CurrentUser
from app.web.pagination import PageNumber
from app.web.templates import flash, render

pages = APIRouter()
api = APIRouter(prefix="/v1")
Method = Literal["random", "stratified", "grouped"]
Fraction = Annotated[float, Query(ge=0, lt=1)]
Seed = Annotated[int, Query(ge=0, le=2**31 - 1)]
WAIT_SECONDS = 3.0
PER_PAGE, ROWS_PER_PAGE = 50, 20
SIDES = ("validation", "train")
DEFAULTS = RunSettings()


class SplitView(NamedTuple):
    """A dataset, the requested split, the rows of one side, and other datasets that could be the validation set."""

    dataset: Dataset
    split: Inspection | None
    rows: Inspection | None
    others: list[Dataset]
    fraction: float


def _ask(
    user: CurrentUser, key: str, method: str, column: str, fraction: float | None, seed: int, validation: str, side: str = "", page: int = 1
) -> SplitView:
    with transaction() as session:
        dataset = dataset_of(session, user, key)
        if dataset.status != "ready":
            return SplitView(dataset, None, None, [], fraction or 0)
        if fraction is None:
            fraction = held_out_share(dataset.good_rows or 0)
        mine = [found for found in datasets.offered(session, user, validation) if found.status == "ready" and found.task == dataset.task]
        arguments: dict[str, Any] = {"method": method, "column": column or None, "fraction": fraction, "seed": seed}
        if validation:
            other = dataset_of(session, user, validation)
            if other.status != "ready" or not other.rows_path:
                message = gettext("The dataset %(name)s is not ready.", name=other.name)
                raise BadField(message, hint=gettext("Wait until it is ready."), param="validation")
            arguments = {"validation_rows": other.rows_path}
        asked = inspections.ask(session, dataset, "split", arguments)
        rows = None
        if side in SIDES:
            wanted = {"side": side, "skip": (page - 1) * ROWS_PER_PAGE, "count": ROWS_PER_PAGE}
            rows = inspections.ask(session, dataset, "side", arguments | wanted)
        return SplitView(dataset, asked, rows, [found for found in mine if found.id != dataset.id], fraction)


@pages.get("/datasets/{key}/split")
def show(
    request: Request,
    user: CurrentUser,
    key: str,
    method: Method = "random",
    column: str = "",
    fraction: Fraction | None = None,
    seed: Seed = DEFAULTS.seed,
    validation: str = "",
    side: Literal["validation", "train", "overlap"] = "validation",
    page: PageNumber = 1,
) -> Response:
    look = _ask(user, key, method, column, fraction, seed, validation, side, page)
    if look.split is None:
        return RedirectResponse(path_of(look.dataset), 303)
    chosen = {"method": method, "column": column, "fraction": look.fraction, "seed": seed, "validation": validation}
    found = inspections.wait(look.split.id, WAIT_SECONDS)
    rows = inspections.wait(look.rows.id, WAIT_SECONDS) if look.rows is not None else None
    examples = (found.result or {}).get("examples", [])
    listed, per_page = ((rows.result or {}).get("matches", 0), ROWS_PER_PAGE) if rows is not None else (len(examples), PER_PAGE)
    return render(
        request,
        "split.html",
        dataset=look.dataset,
        key=key,
        chosen=chosen,
        query=urlencode(chosen),
        side=side,
        rows=rows,
        parts_of=row_editor.parts,
        page=page,
        pages=-(-listed // per_page),
        examples=examples[(page - 1) * PER_PAGE : page * PER_PAGE],
        listed=len(examples),
        columns=[name for name in (look.dataset.report or {}).get("columns", []) if name not in look.dataset.mapping.values()],
        others=[(other, ids.public(ids.DATASET, other.id)) for other in look.others],
        found=found,
    )


@pages.post("/datasets/{key}/split/drop")
def drop(
    request: Request,
    user: CurrentUser,
    key: str,
    method: Annotated[Method, Form()] = "random",
    column: Annotated[str, Form()] = "",
    fraction: Annotated[float | None, Form(ge=0, lt=1)] = None,
    seed: Annotated[int, Form(ge=0, le=2**31 - 1)] = DEFAULTS.seed,
    validation: Annotated[str, Form()] = "",
) -> Response:
    """Create a version without the training rows that are in the validation set, then redirect to its split."""
    dataset, asked, *_, share = _ask(user, key, method, column, fraction, seed, validation)
    found = inspections.wait(asked.id, WAIT_SECONDS) if asked is not None else None
    if found is None or not found.result:
        hint = gettext("Reload the split page and wait until its rows are shown.")
        raise Conflict(gettext("The two sides are not compared yet."), hint=hint)
    lines = found.result["drop"]
    with transaction() as session:
        new = versions.drop_rows(session, user, dataset, lines)
    said = ngettext(
        "Version %(version)s removes %(num)s row from the training set that leaked into validation.",
        "Version %(version)s removes %(num)s rows from the training set that leaked into validation.",
        len(lines),
        version=new.version,
    )
    flash(request, said)
    query = {"method": method, "column": column, "fraction": share, "seed": seed, "validation": validation}
    return RedirectResponse(f"{path_of(new)}/split?{urlencode(query)}", 303)


@api.get("/datasets/{key}/split", operation_id="preview_dataset_split", responses=answers(schemas.DatasetSplit))
def show_json(
    user: CurrentUser,
    key: str,
    method: Method = "random",
    column: str = "",
    fraction: Fraction | None = None,
    seed: Seed = DEFAULTS.seed,
    validation: str = "",
    side: Annotated[Literal["validation", "train"] | None, Query(description="The side whose rows are listed.")] = None,
    page: PageNumber = 1,
) -> dict[str, Any]:
    """A preview of a split: both sides, rows that are on both, and the rows of one side. `status` is waiting until the data
    worker has answered."""
    look = _ask(user, key, method, column, fraction, seed, validation, side or "", page)
    found = inspections.wait(look.split.id, WAIT_SECONDS) if look.split is not None else None
    rows = inspections.wait(look.rows.id, WAIT_SECONDS) if look.rows is not None else None
    unready = next((one for one in (found, rows) if one is not None and one.status != "ready"), None)
    return {
        "object": "dataset.split",
        "status": unready.status if unready else found.status if found else "reading",
        **((found.result or {}) if found else {}),
        **({"rows": (rows.result or {}).get("rows", [])} if rows else {}),
        "error": problem_json(unready.error) if unready else None,
    }
