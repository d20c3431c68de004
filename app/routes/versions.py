"""What creates a new version of a dataset: automatic fixes, edited and removed rows, combination; and the export of issues."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.concurrency import run_in_threadpool

from app import schemas
from app.datasets import changes, compose, findings_export, inspections, versions
from app.datasets import hub as hub_datasets
from app.datasets import service as datasets
from app.db import Db, transaction
from app.errors import BadField, Conflict, problem_json
from app.kit import ids
from app.languages import gettext, ngettext
from app.schemas.openapi import answers
from app.tables import Dataset, User
from app.views import dataset as dataset_view
from app.web.auth import CurrentUser
from app.web.pagination import MAX_NUMBER
from app.web.renamed import deprecated_path
from app.web.templates import flash, render

pages = APIRouter()
api = APIRouter(prefix="/v1")
Key = str
Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]


def to_json(dataset: Dataset) -> dict[str, Any]:
    """A dataset as JSON. `origin` says how this version was created, and from what."""
    stats = datasets.stats(dataset)
    origin = dict(dataset.origin or {})
    if "sources" in origin:  # the path of the rows is internal
        origin["sources"] = [{key: value for key, value in source.items() if key != "path"} for source in origin["sources"]]
    return {
        "id": ids.public(ids.DATASET, dataset.id),
        "object": "dataset",
        "created_at": int(dataset.created_at.timestamp()),
        "name": dataset.name,
        "tags": dataset.tags,
        "version": dataset.version,
        "status": dataset.status,
        "progress": dataset.progress,
        "error": problem_json(dataset.error),
        "format": dataset.format,
        "task": dataset.task,
        "mapping": dataset.mapping,
        "rows": dataset.rows,
        "good_rows": dataset.good_rows,
        "tokens": stats.tokens,
        "trained_tokens": stats.trained_tokens,
        "longest": stats.longest,
        "file_id": ids.public(ids.FILE, dataset.file_id) if dataset.file_id else None,
        "parent": ids.public(ids.DATASET, dataset.parent_id) if dataset.parent_id else None,
        "origin": origin,
    }


def dataset_of(session: Db, user: User, key: str) -> Dataset:
    return datasets.get(session, user, ids.parse(ids.DATASET, key))


def path_of(dataset: Dataset) -> str:
    return f"/datasets/{ids.public(ids.DATASET, dataset.id)}"


@pages.post("/datasets/{key}/fix")
def fix(
    request: Request,
    user: CurrentUser,
    session: Db,
    key: Key,
    finding: Annotated[list[Number] | None, Form()] = None,
    all_of: Annotated[str | None, Form(description="Fix all issues of this rule.")] = None,
    do: Annotated[Literal["fix", "drop"], Form()] = "fix",
    rule: Annotated[str, Form()] = "",
    severity: Annotated[str, Form()] = "",
    sort: Annotated[str, Form()] = "line",
    page: Annotated[int, Form(ge=1, le=MAX_NUMBER)] = 1,
) -> Response:
    """Apply the fixes of some issues, remove their rows, or fix all issues of a rule, then redirect to the new version. The other
    fields are the state of the list, so that after an error it is shown with the same rows selected."""
    dataset = dataset_of(session, user, key)
    try:
        if finding and do == "drop":
            new = versions.drop_found(session, user, dataset, finding)
            told = gettext("Version %(new)s is created; version %(old)s is kept.", new=new.version, old=dataset.version)
        elif finding or all_of:
            fixed = (
                versions.fix_some(session, user, dataset, finding) if finding else versions.fix_all(session, user, dataset, all_of or "")
            )
            new = fixed.dataset
            told = _fixed_in_words(fixed, dataset)
        else:
            raise BadField(gettext("No issue was selected."), hint=gettext("Select at least one."), param="finding")
    except (BadField, Conflict) as error:
        chosen = dataset_view.Chosen("issues", rule, severity, sort if sort in datasets.ORDERS else "line", page)
        values = dataset_view.context(session, dataset, chosen, error, finding or ())
        return render(request, "dataset.html", status_code=error.status, **values)
    flash(request, told)
    return RedirectResponse(path_of(new), 303)


def _fixed_in_words(fixed: versions.Fixed, dataset: Dataset) -> str:
    said = ngettext(
        "Version %(new)s is created with %(num)s row fixed; version %(old)s is kept.",
        "Version %(new)s is created with %(num)s rows fixed; version %(old)s is kept.",
        fixed.rows,
        new=fixed.dataset.version,
        old=dataset.version,
    )
    if not fixed.unfixed:
        return said
    left = ngettext(
        "%(num)s issue has no automatic fix: see below.", "%(num)s issues have no automatic fix: see below.", len(fixed.unfixed)
    )
    return f"{said} {left}"


@pages.post("/datasets/{key}/repair")
def repair(request: Request, user: CurrentUser, session: Db, key: Key) -> Response:
    """Parse a file without a single valid line, with each line repaired."""
    new = versions.repair(session, user, dataset_of(session, user, key))
    said = gettext(
        "Version %(version)s reads the lines as they were probably meant. Check its rows before you fine-tune on them.", version=new.version
    )
    flash(request, said)
    return RedirectResponse(path_of(new), 303)


@pages.post("/datasets/{key}/roles")
async def change_roles(request: Request, user: CurrentUser, key: Key) -> Response:
    """Assign roles to messages of unknown roles: `role.NAME` for each, empty to leave it."""
    form = await request.form()
    roles = {
        name.removeprefix("role."): value for name, value in form.items() if name.startswith("role.") and isinstance(value, str) and value
    }
    return RedirectResponse(await run_in_threadpool(_change_roles, user, key, roles), 303)


def _change_roles(user: User, key: str, roles: dict[str, str]) -> str:
    with transaction() as session:
        return path_of(versions.change_roles(session, user, dataset_of(session, user, key), roles))


@pages.post("/datasets/{key}/drop")
def drop(request: Request, user: CurrentUser, session: Db, key: Key, line: Annotated[list[Number], Form()]) -> Response:
    dataset = dataset_of(session, user, key)
    new = versions.drop_rows(session, user, dataset, line)
    said = ngettext(
        "Version %(new)s is created without %(num)s row; version %(old)s is kept.",
        "Version %(new)s is created without %(num)s rows; version %(old)s is kept.",
        len(set(line)),
        new=new.version,
        old=dataset.version,
    )
    flash(request, said)
    return RedirectResponse(path_of(new), 303)


@pages.get("/datasets/{key}/findings.{kind}")
def download(user: CurrentUser, session: Db, key: Key, kind: Literal["csv", "jsonl"]) -> Response:
    dataset = dataset_of(session, user, key)
    media = {"csv": "text/csv; charset=utf-8", "jsonl": "application/x-ndjson"}[kind]
    name = f"findings-{ids.public(ids.DATASET, dataset.id)}.{kind}"
    return StreamingResponse(
        findings_export.download(dataset.id, kind), media_type=media, headers={"content-disposition": f'attachment; filename="{name}"'}
    )


# The same for programs --------------------------------------------------------------------------------------------------


class Fix(BaseModel):
    """One issue by its id, several, all of a rule, or a role for messages of unknown roles."""

    model_config = ConfigDict(extra="forbid")
    finding: int | None = None
    findings: list[int] = Field(default_factory=list, max_length=versions.MAX_FINDINGS)
    rule: str | None = None
    roles: dict[str, str] = Field(
        default_factory=dict, description="Of a report's unknown roles: user, assistant, system or tool for each."
    )
    repair: bool = Field(default=False, description="Of a file none of whose lines could be read: take them as they were meant.")


class Edit(BaseModel):
    """A row that replaces a line, a label for some lines, or lines to remove."""

    model_config = ConfigDict(extra="forbid")
    line: int | None = Field(default=None, ge=1)
    row: dict[str, Any] | None = Field(default=None, description="A row of the report's shape, as `rows` shows it.")
    raw: dict[str, Any] | None = Field(default=None, description="Or the line of the file, with the file's own columns.")
    label: str | None = Field(default=None, description="The label that `lines` get.")
    lines: list[Number] = Field(default_factory=list)
    drop: list[int] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_change(self) -> Edit:
        """The one change that a request describes. Raises BadField where it describes none or several."""
        row, typed, labeled = self.row is not None, self.raw is not None, self.label is not None
        if row + typed + labeled + bool(self.drop) != 1:
            raise ValueError("Send one of row, raw, label and drop.")
        if (row or typed) != (self.line is not None) or labeled != bool(self.lines):
            raise ValueError("row and raw need line, label needs lines.")
        return self


class ParseRequest(BaseModel):
    """How to parse the file again. An empty column name means that a field has no column."""

    model_config = ConfigDict(extra="forbid")
    format: str
    mapping: dict[str, str] = Field(default_factory=dict)


@api.post("/datasets", operation_id="create_dataset", responses=answers(schemas.Dataset, 404, 409))
def create_dataset(user: CurrentUser, session: Db, order: compose.CombineRequest) -> dict[str, Any]:
    """Create a dataset from others: concatenated, mixed by weight, sampled, deduplicated, or converted."""
    return to_json(compose.order(session, user, order))


@api.post("/datasets/hub", operation_id="import_hub_dataset", responses=answers(schemas.Dataset))
def import_hub_dataset(user: CurrentUser, session: Db, order: hub_datasets.HubOrder) -> dict[str, Any]:
    """Import a split of a dataset from the Hugging Face hub."""
    return to_json(hub_datasets.order(session, user, order))


@api.post("/datasets/{key}/fixes", operation_id="fix_dataset", responses=answers(schemas.FixedDataset, 409))
def fix_dataset(user: CurrentUser, session: Db, key: Key, order: Fix) -> dict[str, Any]:
    """Create the next version, with the fixes of some issues or of all issues of a rule. Issues without an automatic fix are
    listed under `unfixed`; it is an error only if nothing can be fixed."""
    dataset = dataset_of(session, user, key)
    wanted = order.findings + ([order.finding] if order.finding is not None else [])
    if wanted:
        return _fixed_json(versions.fix_some(session, user, dataset, wanted))
    if order.rule:
        return _fixed_json(versions.fix_all(session, user, dataset, order.rule))
    if order.roles:
        return to_json(versions.change_roles(session, user, dataset, order.roles)) | {"fixed": None, "unfixed": []}
    if order.repair:
        return to_json(versions.repair(session, user, dataset)) | {"fixed": None, "unfixed": []}
    raise BadField("Nothing to fix was named.", hint="Send finding, findings, rule, roles or repair.", param="finding")


def _fixed_json(fixed: versions.Fixed) -> dict[str, Any]:
    left = [
        {"finding": one.id, "line": one.line, "rule": one.rule, "message": one.message, "why": versions.why_unfixed(one)}
        for one in fixed.unfixed
    ]
    return to_json(fixed.dataset) | {"fixed": fixed.rows, "unfixed": left}


@api.post("/datasets/{key}/edits", operation_id="edit_dataset", responses=answers(schemas.Dataset, 409))
def edit_dataset(user: CurrentUser, session: Db, key: Key, order: Edit) -> dict[str, Any]:
    """Create the next version, with one row replaced, or rows relabeled or removed."""
    dataset = dataset_of(session, user, key)
    if order.row is not None and order.line is not None:
        return to_json(versions.edit_row(session, user, dataset, order.line, json.dumps(order.row)))
    if order.raw is not None and order.line is not None:
        return to_json(versions.retype_line(session, user, dataset, order.line, json.dumps(order.raw)))
    if order.label is not None:
        return to_json(versions.relabel(session, user, dataset, order.lines, order.label))
    return to_json(versions.drop_rows(session, user, dataset, order.drop))


@api.get("/datasets/{key}/changes", operation_id="retrieve_dataset_changes", responses=answers(schemas.DatasetChanges, 409))
def retrieve_changes(user: CurrentUser, key: Key) -> dict[str, Any]:
    """The changes of this version against its parent: counts, and the first rows of each kind of change."""
    with transaction() as session:
        dataset = dataset_of(session, user, key)
        if dataset.status != "ready":
            raise Conflict(f"The dataset {dataset.name} is {dataset.status}.", hint="Wait until it is ready.")
        parent, asked = changes.parent_of(session, dataset), changes.ask(session, dataset)
    found = inspections.wait(asked.id, dataset_view.WAIT_SECONDS) if asked is not None else None
    return {
        "object": "dataset.changes",
        "dataset": key,
        "parent": ids.public(ids.DATASET, parent.id) if parent is not None else None,
        "status": found.status if found else "ready",
        "error": problem_json(found.error) if found else None,
        **((found.result or {}) if found else {}),
    }


@api.post("/datasets/{key}/reparse", operation_id="reparse_dataset", responses=answers(schemas.Dataset, 409))
def reparse_dataset(user: CurrentUser, session: Db, key: Key, order: ParseRequest) -> dict[str, Any]:
    """Create the next version: the same file, parsed as another format or with another column mapping."""
    return to_json(datasets.read_as(session, user, dataset_of(session, user, key), order.format, order.mapping))


deprecated_path(api, "/datasets/{key}/readings", reparse_dataset)
