"""A dataset's rows as the trainer sees them: tokenized, searchable, sortable by loss; and the editor of one row."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from app import formats, objectives, schemas
from app.datasets import inspections, row_editor, versions
from app.datasets import service as datasets
from app.db import transaction
from app.errors import BadField, NotFound, problem_json
from app.jobs import row_losses
from app.kit import ids
from app.languages import gettext
from app.routes.versions import dataset_of, path_of
from app.run_settings import TRAIN_ON, TrainOn
from app.schemas.openapi import answers
from app.tables import Dataset, Job, Model, User
from app.views import rows as row_view
from app.web.auth import CurrentUser
from app.web.pagination import MAX_NUMBER, PageNumber
from app.web.templates import flash, render

pages = APIRouter()
api = APIRouter(prefix="/v1")


class RowsQuery(NamedTuple):
    """Query parameters of the page and of its JSON: filter, order, and the model whose tokenizer is used."""

    model: str
    cutoff: int | None
    search: str
    page: int
    line: int | None
    sort: str
    job: str
    train_on: TrainOn | None


class RowsResult(NamedTuple):
    """The result of a query."""

    dataset: Dataset
    model: Model | None
    cutoff: int
    judged: Job | None
    entries: list[row_losses.Entry]
    shown: row_view.RowsShown
    more: bool
    train_on: TrainOn

    @property
    def items(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (self.shown.rows.result or {}).get("rows", [])
        return found

    @property
    def lengths(self) -> dict[str, Any] | None:
        return self.shown.lengths.result if self.shown.lengths and self.shown.lengths.result else None


def asked(
    model: str = "",
    cutoff: Annotated[int | None, Query(ge=8, le=131_072, description="Max sequence length in tokens; without it, that of a job.")] = None,
    search: Annotated[str, Query(max_length=200)] = "",
    page: PageNumber = 1,
    line: PageNumber | None = None,
    sort: Annotated[str, Query(description="longest, or by a job's losses: after, before, gain.")] = "",
    job: Annotated[str, Query(description="The job whose losses are meant; without it, the newest.")] = "",
    train_on: Annotated[
        TrainOn | None, Query(description="Turns that carry a loss; without it, those of the job named, else assistant.")
    ] = None,
) -> RowsQuery:
    if sort and sort not in row_view.SORTS:
        message = gettext("Rows cannot be sorted by “%(sort)s”.", sort=sort[:40])
        raise BadField(message, hint=gettext("Use %(names)s.", names=", ".join(row_view.SORTS)), param="sort")
    return RowsQuery(model, cutoff, search, page, line, sort, job, train_on)


Line = Annotated[int, Path(ge=1, le=MAX_NUMBER)]
Wanted = Annotated[RowsQuery, Depends(asked)]


def _find(user: User, key: str, want: RowsQuery, judges: list[Job] | None = None) -> RowsResult:
    """Find the rows; `judges` are the jobs with row losses, where they are known. No database connection is held while a child of the data worker tokenizes them."""
    with transaction() as session:
        dataset = dataset_of(session, user, key)
        chosen = row_view.choose_model(session, user, dataset, want.model or None)
        cutoff = min(want.cutoff or row_view.DEFAULT_CUTOFF, row_view.window(chosen))
        asks = want.job or judges is None
        judged = row_losses.job_of(session, user, dataset, want.job or None) if asks else next(iter(judges or ()), None)
        entries = row_losses.read(session, judged) if judged else []
        turns = want.train_on or (judged.spec["run"].get("train_on") if judged and want.job else None) or "assistant"
        lengths = row_view.ask_lengths(session, dataset, chosen, cutoff, turns)
    if want.sort == "longest" and lengths is not None:
        lengths = inspections.wait(lengths.id, row_view.WAIT_SECONDS)
    lines, more = [want.line] if want.line else None, None
    if lines is None and (ordered := row_view.order(want.sort, entries, lengths)) is not None:
        first = (want.page - 1) * row_view.ROWS_PER_PAGE
        lines, more = ordered[first : first + row_view.ROWS_PER_PAGE], len(ordered) > first + row_view.ROWS_PER_PAGE
    with transaction() as session:
        rows = row_view.ask_rows(session, dataset, row_view.RowQuery(chosen, cutoff, want.search, want.page, lines, turns))
    shown = row_view.look(rows, lengths, cutoff)
    if more is None:
        more = lines is None and want.page * row_view.ROWS_PER_PAGE < (shown.rows.result or {}).get("matches", 0)
    return RowsResult(dataset, chosen, cutoff, judged, entries, shown, more, turns)


@pages.get("/datasets/{key}/rows")
def rows(request: Request, user: CurrentUser, key: str, want: Wanted) -> Response:
    with transaction() as session:
        dataset = dataset_of(session, user, key)
        if dataset.status != "ready":
            return RedirectResponse(path_of(dataset), 303)
        able = row_view.able_models(session, user, dataset, want.model)
        with_ledger = [(job, ids.public(ids.JOB, job.id)) for job in row_losses.jobs_of(session, dataset)]
    found = _find(user, key, want, [job for job, _ in with_ledger])
    sorts = {name: title for name, title in row_view.SORTS.items() if (with_ledger if name in row_losses.SORTS else found.model)}
    return render(
        request,
        "rows.html",
        dataset=dataset,
        key=key,
        models=able,
        found=found,
        chosen=found.model,
        cutoff=found.cutoff,
        train_on=found.train_on,
        turns=TRAIN_ON if objectives.get(dataset.task).turns and formats.asks(dataset.format) else {},
        cutoffs=row_view.cutoffs(found.model, found.cutoff),
        search=want.search,
        page=want.page,
        line=want.line,
        sort=want.sort,
        sorts=sorts,
        judged=found.judged,
        with_ledger=with_ledger,
        job_key=ids.public(ids.JOB, found.judged.id) if found.judged else "",
        losses={entry.line: entry for entry in found.entries},
        losses_summary=row_losses.summary(found.entries) if found.entries else None,
        shown=found.shown,
        items=found.items,
        matches=(found.shown.rows.result or {}).get("matches", 0),
        more=found.more,
        lengths=found.lengths,
        drawing=row_view.bars(found.lengths, found.cutoff) if found.lengths else None,
        report=dataset.report or {},
    )


@pages.get("/datasets/{key}/rows/{line}")
def edit(request: Request, user: CurrentUser, key: str, line: Line) -> Response:
    """The editor of one row, or of the raw line of an invalid one."""
    dataset, found = _row(user, key, line)
    if found is not None:
        return render(request, "row_edit.html", dataset=dataset, key=key, line=line, row=found, parts=row_editor.parts(found), problem=None)
    return _raw_line(request, user, key, line)


def _raw_line(request: Request, user: User, key: str, line: int, text: str | None = None, problem: BadField | None = None) -> Response:
    """The line as it is in the file, or as it was typed where that cannot be saved."""
    with transaction() as session:
        dataset = dataset_of(session, user, key)
        asked = inspections.ask(session, dataset, "line", {"line": line})
        fixes = [found for found in datasets.at_line(session, dataset, line) if found.fix]
    answer = inspections.wait(asked.id, 20)
    if answer.status == "error":
        raise NotFound((answer.error or {}).get("message", ""), hint=(answer.error or {}).get("hint") or "")
    if answer.status != "ready" or not answer.result:
        raise _not_yet()
    if not answer.result["problems"] and answer.result["text"] is None:
        told = {"version": dataset.version, "name": dataset.name, "line": line}
        message = gettext("Version %(version)s of %(name)s has no row with the number %(line)s.", **told)
        raise NotFound(message, hint=gettext("Look it up in the list of rows."))
    return render(
        request,
        "row_raw.html",
        status_code=400 if problem else 200,
        dataset=dataset,
        key=key,
        line=line,
        text=answer.result["text"] if text is None else text,
        problems=answer.result["problems"],
        fixes=fixes,
        problem=problem,
    )


@pages.post("/datasets/{key}/rows/{line}")
async def save(request: Request, user: CurrentUser, key: str, line: Line) -> Response:
    """Save one row in a new version, or remove it there. `row` is its JSON; `text.PATH` and `role.N` are the form's fields."""
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
            elif typed.get("do") == "raw":
                new = versions.retype_line(session, user, dataset, line, text)
            else:
                text = row_editor.merged(text, typed) if typed.get("do") != "json" else text
                new = versions.edit_row(session, user, dataset, line, text)
        told = {"new": new.version, "old": dataset.version}
        flash(request, gettext("Version %(new)s is created with this change; version %(old)s is kept.", **told))
        return RedirectResponse(path_of(new), 303)
    except BadField as error:
        if typed.get("do") == "raw":
            return _raw_line(request, user, key, line, text, error)
        with transaction() as session:
            dataset = dataset_of(session, user, key)
        row = row_editor.parsed(text)
        return render(
            request, "row_edit.html", status_code=400, dataset=dataset, key=key, line=line, row=row if row is not None else text,
            parts=row_editor.parts(row) if row is not None else [], problem=error,
        )  # fmt: skip


def _not_yet() -> NotFound:
    message = gettext("The row is not loaded yet: the data worker has not answered.")
    return NotFound(message, hint=gettext("Reload the page in a moment."))


def _row(user: User, key: str, line: int) -> tuple[Dataset, dict[str, Any] | None]:
    """The valid row of a line; None where there is none."""
    with transaction() as session:
        dataset = dataset_of(session, user, key)
        asked = inspections.ask(session, dataset, "rows", {"count": 1, "cutoff": row_view.DEFAULT_CUTOFF, "lines": [line], "whole": True})
    found = inspections.wait(asked.id, 20)
    if found.status != "ready" or not found.result:
        raise _not_yet()
    return dataset, found.result["rows"][0]["row"] if found.result["rows"] else None


@api.get("/datasets/{key}/lines/{line}", operation_id="retrieve_dataset_line", responses=answers(schemas.DatasetLine, 409))
def line_json(user: CurrentUser, key: str, line: Line) -> dict[str, Any]:
    """One line as it is in the file, with its issues; `status` is waiting until the data worker has answered."""
    with transaction() as session:
        asked = inspections.ask(session, dataset_of(session, user, key), "line", {"line": line})
    answer = inspections.wait(asked.id, row_view.WAIT_SECONDS)
    return {
        "object": "dataset.line",
        "line": line,
        "status": answer.status,
        "error": problem_json(answer.error),
        **(answer.result or {"text": None, "problems": []}),
    }


@api.get("/datasets/{key}/rows", operation_id="list_dataset_rows", responses=answers(schemas.DatasetRows, 409))
def rows_json(user: CurrentUser, key: str, want: Wanted) -> dict[str, Any]:
    """The rows as JSON, with their losses where a job recorded them; `status` is waiting until the data worker has answered."""
    found = _find(user, key, want)
    losses = {entry.line: entry for entry in found.entries}
    return {
        "object": "dataset.rows",
        "dataset": ids.public(ids.DATASET, found.dataset.id),
        "model": found.model.name if found.model else None,
        "cutoff": found.cutoff,
        "job": ids.public(ids.JOB, found.judged.id) if found.judged else None,
        "status": found.shown.rows.status,
        "data": [item | {"loss": losses[item["line"]]._asdict() if item["line"] in losses else None} for item in found.items],
        "matches": (found.shown.rows.result or {}).get("matches"),
        "has_more": found.more,
        "lengths": found.lengths,
    }
