"""A dataset's rows as the trainer sees them: token by token, searched, sorted by loss; and the editor of one row."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from app import ids, inspections, ledger, rowedit, rowview, versions
from app.accounts import CurrentUser
from app.db import transaction
from app.errors import BadField, NotFound
from app.routes.versions import dataset_of, path_of
from app.tables import Dataset, User
from app.web import flash, render

pages = APIRouter()
api = APIRouter(prefix="/v1")


@pages.get("/datasets/{key}/rows")
def rows(
    request: Request,
    user: CurrentUser,
    key: str,
    model: str = "",
    cutoff: Annotated[int, Query(ge=8, le=131_072)] = rowview.DEFAULT_CUTOFF,
    search: Annotated[str, Query(max_length=200)] = "",
    page: Annotated[int, Query(ge=1)] = 1,
    line: Annotated[int | None, Query(ge=1)] = None,
    sort: str = "",
    job: str = "",
) -> Response:
    """No connection is held while a child of the data worker looks at the rows."""
    if sort and sort not in ledger.SORTS:
        raise BadField(f"Rows cannot be sorted by “{sort[:40]}”.", way_out=f"Use {', '.join(ledger.SORTS)}.", param="sort")
    with transaction() as session:
        dataset = dataset_of(session, user, key)
        if dataset.status != "ready":
            return RedirectResponse(path_of(dataset), 303)
        chosen = rowview.choose_model(session, user, model or None)
        able = rowview.able_models(session, user)
        judged = ledger.job_of(session, user, dataset, job or None)
        entries = ledger.read(session, judged) if judged else []
        with_ledger = ledger.jobs_of(session, dataset)
        lines, more = _lines(entries, sort, page, line)
        wish = rowview.Wish(chosen, cutoff, search, page, lines)
        asked = rowview.ask(session, dataset, wish)
    shown = rowview.look(*asked, cutoff)
    result = shown.rows.result or {"rows": [], "matches": 0}
    lengths = shown.lengths.result if shown.lengths and shown.lengths.result else None
    by_line = {entry.line: entry for entry in entries}
    return render(
        request,
        "rows.html",
        dataset=dataset,
        key=key,
        models=able,
        chosen=chosen,
        cutoff=cutoff,
        cutoffs=sorted({*rowview.CUTOFFS, cutoff}),
        search=search,
        page=page,
        line=line,
        sort=sort,
        sorts=ledger.SORTS,
        judged=judged,
        with_ledger=[(found, ids.public(ids.JOB, found.id)) for found in with_ledger],
        job_key=ids.public(ids.JOB, judged.id) if judged else "",
        losses=by_line,
        losses_summary=ledger.summary(entries) if entries else None,
        shown=shown,
        items=result["rows"],
        matches=result["matches"],
        more=more if lines is not None else page * rowview.ROWS_PER_PAGE < result["matches"],
        lengths=lengths,
        drawing=rowview.bars(lengths, cutoff) if lengths else None,
        report=dataset.report or {},
    )


def _lines(entries: list[ledger.Entry], sort: str, page: int, line: int | None) -> tuple[list[int] | None, bool]:
    """The lines to show, when they are chosen by number or by loss, and whether there are more."""
    if line is not None:
        return [line], False
    if not sort or not entries:
        return None, False
    ranked, first = ledger.ranked(entries, sort), (page - 1) * rowview.ROWS_PER_PAGE
    return [entry.line for entry in ranked[first : first + rowview.ROWS_PER_PAGE]], len(ranked) > first + rowview.ROWS_PER_PAGE


@pages.get("/datasets/{key}/rows/{line}")
def edit(request: Request, user: CurrentUser, key: str, line: int) -> Response:
    """The editor of one row."""
    dataset, row = _row(user, key, line)
    return render(request, "row_edit.html", dataset=dataset, key=key, line=line, row=row, parts=rowedit.parts(row), problem=None)


@pages.post("/datasets/{key}/rows/{line}")
async def save(request: Request, user: CurrentUser, key: str, line: int) -> Response:
    """Save one row as a new version, or leave it out there. `row` is its JSON, `text.PATH` and `role.N` what the fields hold."""
    form = await request.form(max_fields=2000, max_part_size=16 << 20)
    typed = {name: value for name, value in form.items() if isinstance(value, str)}
    return await run_in_threadpool(_save, request, user, key, line, typed)


def _save(request: Request, user: User, key: str, line: int, typed: dict[str, str]) -> Response:
    text = typed.get("row", "")
    try:
        with transaction() as session:
            dataset = dataset_of(session, user, key)
            if typed.get("do") == "drop":
                new = versions.drop_rows(session, user, dataset, [line])
            else:
                text = rowedit.merged(text, typed) if typed.get("do") != "json" else text
                new = versions.edit_row(session, user, dataset, line, text)
        flash(request, f"Version {new.version} is made with this change; version {dataset.version} stays as it is.")
        return RedirectResponse(path_of(new), 303)
    except BadField as error:
        with transaction() as session:
            dataset = dataset_of(session, user, key)
        row = rowedit.parsed(text)
        return render(
            request, "row_edit.html", status_code=400, dataset=dataset, key=key, line=line, row=row if row is not None else text,
            parts=rowedit.parts(row) if row is not None else [], problem=error,
        )  # fmt: skip


def _row(user: User, key: str, line: int) -> tuple[Dataset, dict[str, Any]]:
    with transaction() as session:
        dataset = dataset_of(session, user, key)
        asked = inspections.ask(session, dataset, "rows", {"count": 1, "cutoff": rowview.DEFAULT_CUTOFF, "lines": [line], "whole": True})
    found = inspections.wait(asked.id, 20)
    if found.status != "ready" or not found.result:
        raise NotFound("The row is not there yet: the data worker has not answered.", way_out="Load the page again in a moment.")
    if not found.result["rows"]:
        raise NotFound(
            f"Version {dataset.version} of {dataset.name} has no good row with the number {line}.",
            way_out="Look it up in the list of rows.",
        )
    return dataset, found.result["rows"][0]["row"]


@api.get("/datasets/{key}/rows")
def rows_json(
    user: CurrentUser,
    key: str,
    model: str = "",
    cutoff: Annotated[int, Query(ge=8, le=131_072)] = rowview.DEFAULT_CUTOFF,
    search: Annotated[str, Query(max_length=200)] = "",
    page: Annotated[int, Query(ge=1)] = 1,
) -> dict[str, Any]:
    """The same rows for programs; `status` is waiting until the data worker has answered."""
    with transaction() as session:
        dataset = dataset_of(session, user, key)
        chosen = rowview.choose_model(session, user, model or None)
        asked = rowview.ask(session, dataset, rowview.Wish(chosen, cutoff, search, page))
    shown = rowview.look(*asked, cutoff)
    return {
        "object": "dataset.rows",
        "dataset": ids.public(ids.DATASET, dataset.id),
        "model": chosen.name if chosen else None,
        "status": shown.rows.status,
        "data": (shown.rows.result or {}).get("rows", []),
        "matches": (shown.rows.result or {}).get("matches"),
        "lengths": shown.lengths.result if shown.lengths else None,
    }
