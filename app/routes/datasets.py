"""Pages of datasets: the list, the upload, and a dataset with its report."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from app import formats, ownership, schemas
from app.datasets import compose, compose_rows, ingest_task, pasting, readers, samples
from app.datasets import hub as hub_datasets
from app.datasets import service as datasets
from app.db import Db, transaction
from app.errors import BadField, StudioError
from app.kit import ids
from app.languages import gettext, mark
from app.routes.files import report_json
from app.routes.versions import to_json
from app.schemas.openapi import answers
from app.settings import get_settings
from app.storage import files
from app.tables import Dataset, User
from app.views import dataset as dataset_view
from app.views import lists
from app.web import pagination as cursor
from app.web.auth import CurrentUser
from app.web.multipart import Form as StreamedForm
from app.web.multipart import read_form
from app.web.navigation import MenuPage
from app.web.renamed import deprecated_path, page_moved
from app.web.templates import flash, render

pages = APIRouter()
MENU = (MenuPage(mark("Datasets"), "/datasets", "start", 20),)
api = APIRouter(prefix="/v1")
MAX_FORM_BYTES = 32 << 20
"""Maximum bytes of one form field: a pasted table, in which a character may be URL-encoded as up to nine bytes."""


@pages.get("/datasets")
def list_(request: Request, user: CurrentUser, session: Db, wish: Annotated[lists.ListQuery, Query()]) -> Response:
    bar = lists.datasets_bar(session, user, wish)
    found = session.scalars(lists.datasets(user, bar).limit(wish.shown + 1)).all()
    shown, bar.more = found[: wish.shown], len(found) > wish.shown
    return render(
        request,
        "datasets.html",
        bar=bar,
        some=bool(shown) or bar.narrowed,
        datasets=shown,
        tokens=lists.tokens(session, shown),
        public_id=lists.public_id,
        twins=lists.twins(session, user, shown),
        samples=_samples(samples.parsed(session, user)),
        titles=_titles(),
    )


def _samples(rows: list[Dataset]) -> list[dict[str, Any]]:
    found = [(sample, samples.added(rows, sample)) for sample in samples.list_()]
    return [{**sample, "format_title": formats.get(sample["format"]).title, "added": here and _path(here)} for sample, here in found]


def _titles() -> dict[str, str]:
    return {name: entry.title for name, entry in formats.FORMATS.items()}


@pages.get("/datasets/new")
def new(request: Request, user: CurrentUser, session: Db) -> Response:
    return render(
        request,
        "upload.html",
        accepted=readers.ACCEPTED,
        extensions=[*readers.EXTENSIONS, ".gz", ".zip"],
        offline=get_settings().offline,
        limit=get_settings().upload_limit_bytes,
        formats=list(formats.FORMATS.values()),
        samples=_samples(samples.parsed(session, user)),
    )


@pages.post("/datasets")
async def upload(request: Request, user: CurrentUser) -> Response:
    """The upload form. With JavaScript the response is JSON with the URL to go to; without, a redirect."""
    form = await read_form(request, get_settings().upload_limit_bytes)
    path = await run_in_threadpool(_create, user, form)
    if "application/json" in request.headers.get("accept", ""):
        return JSONResponse({"location": path}, status_code=201)
    return RedirectResponse(path, 303)


def _create(user: User, form: StreamedForm) -> str:
    upload = form.upload
    if upload is None or not upload.filename:
        raise BadField(gettext("No file was chosen."), hint=gettext("Choose a file and send the form again."), param="file")
    try:
        if upload.blob.bytes == 0:
            message = gettext("The file “%(file)s” is empty.", file=upload.filename)
            raise BadField(message, hint=gettext("Choose a file with at least one row."), param="file")
        with transaction() as session:
            readers.kind_of(upload.filename)
            file = files.create(session, user, upload.blob, upload.filename, "fine-tune")
            dataset = datasets.create(session, user, file, form.fields.get("name") or None, form.fields.get("format") or None)
            return _path(dataset)
    except StudioError:
        with transaction() as session:
            files.discard_if_unused(session, upload.blob)
        raise


def _path(dataset: Dataset) -> str:
    return f"/datasets/{ids.public(ids.DATASET, dataset.id)}"


@pages.post("/datasets/paste")
async def paste(request: Request, user: CurrentUser) -> Response:
    """A table pasted instead of uploaded: `text`, and an optional `name`."""
    form = await request.form(max_part_size=MAX_FORM_BYTES)
    return RedirectResponse(await run_in_threadpool(_paste, user, str(form.get("text", "")), str(form.get("name", ""))), 303)


def _paste(user: User, text: str, name: str) -> str:
    with transaction() as session:
        return _path(pasting.paste(session, user, text, name))


@pages.post("/datasets/samples/{name}")
def add_sample(request: Request, user: CurrentUser, session: Db, name: str) -> Response:
    return RedirectResponse(_path(samples.add(session, user, name)), 303)


# Combining ----------------------------------------------------------------------------------------------------------------

OPERATIONS = {
    "concatenate": (mark("Concatenate"), mark("All rows of each dataset, one after the other.")),
    "mix": (mark("Mix (weighted)"), mark("Rows of each dataset in proportion to its weight, shuffled by the seed.")),
    "sample": (mark("Sample"), mark("A random sample of one dataset's rows, drawn by the seed.")),
    "deduplicate": (mark("Deduplicate"), mark("Each row once: the first of those with the same content.")),
    "convert": (mark("Convert"), mark("The rows of one dataset in another format.")),
}


page_moved(pages, "/datasets/join", "/datasets/combine")


@pages.get("/datasets/combine")
def combine_form(request: Request, user: CurrentUser, session: Db, first: str = "", operation: str = "concatenate") -> Response:
    """The form, with one dataset selected."""
    return _combine_page(
        request, user, session, {"operation": operation, "seed": "42", "first": first, **({f"use.{first}": "on"} if first else {})}, None
    )


def _combine_page(request: Request, user: User, session: Db, typed: dict[str, str], problem: StudioError | None) -> Response:
    named = [name.removeprefix("use.") for name in typed if name.startswith("use.")]
    able = [dataset for dataset in datasets.with_rows(session, user, typed.get("first"), *named) if dataset.rows_path]
    targets = sorted(
        {wanted for dataset in able for wanted in compose_rows.MAPPINGS if (compose.shape_of(dataset), wanted) in compose_rows.CONVERSIONS}
    )
    return render(
        request,
        "combine.html",
        status_code=problem.status if problem else 200,
        able=[(dataset, ids.public(ids.DATASET, dataset.id)) for dataset in able],
        titles=_titles(),
        operations=OPERATIONS,
        targets=targets,
        typed=typed,
        problem=problem,
    )


@pages.post("/datasets/combine")
async def combine(request: Request, user: CurrentUser) -> Response:
    """Form fields: `use.KEY` and `weight.KEY` for each dataset; the rest as in `CombineRequest`."""
    form = await request.form()
    return await run_in_threadpool(_combine, request, user, {name: value for name, value in form.items() if isinstance(value, str)})


def _combine(request: Request, user: User, typed: dict[str, str]) -> Response:
    try:
        with transaction() as session:
            return RedirectResponse(_path(compose.order(session, user, _combine_request(typed))), 303)
    except StudioError as error:
        with transaction() as session:
            return _combine_page(request, user, session, typed, error)


def _combine_request(typed: dict[str, str]) -> compose.CombineRequest:
    """The form's fields as a request; fields that the operation does not use are ignored."""
    operation = typed.get("operation", "")
    used = {"mix": ("rows", "seed", "repeat"), "sample": ("rows", "seed"), "deduplicate": ("near",), "convert": ("format",)}.get(
        operation, ()
    )
    values: dict[str, Any] = {name: typed[name] for name in (*used, "name") if typed.get(name)}
    parts = [
        {"dataset": key, **({"weight": typed[f"weight.{key}"]} if operation == "mix" and typed.get(f"weight.{key}") else {})}
        for key in sorted(
            (name.removeprefix("use.") for name in typed if name.startswith("use.")), key=lambda key: key != typed.get("first")
        )
    ]
    if not parts:
        raise BadField(gettext("No dataset was chosen."), hint=gettext("Select at least one."), param="datasets")
    try:
        return compose.CombineRequest.model_validate({"operation": operation, "datasets": parts, **values})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        raise BadField(f"“{name}”: {first['msg']}.", hint=gettext("Change it and send the form again."), param=name) from None


@pages.post("/datasets/hub")
def from_hub(
    user: CurrentUser, session: Db, repo: Annotated[str, Form(max_length=200)], split: Annotated[str, Form(max_length=60)] = "train",
    file: Annotated[str, Form(max_length=300)] = "", subset: Annotated[str, Form(max_length=100)] = "",
) -> Response:  # fmt: skip
    """A dataset of the Hugging Face hub, by its name."""
    wish = hub_datasets.HubOrder(
        repo=repo.strip(), subset=subset.strip() or None, split=split.strip() or "train", file=file.strip() or None
    )
    return RedirectResponse(_path(hub_datasets.order(session, user, wish)), 303)


@pages.get("/datasets/{key}")
def show(
    request: Request,
    user: CurrentUser,
    key: str,
    tab: Literal["report", "issues", "rows", "split", "versions"] = "report",
    rule: str = "",
    severity: str = "",
    sort: str = "line",
    page: cursor.PageNumber = 1,
) -> Response:
    """One tab of the page; rows and split have pages of their own."""
    with transaction() as session:
        dataset = _get(session, user, key)
        if tab in ("rows", "split"):
            return RedirectResponse(f"{_path(dataset)}/{tab}", 303)
        values = dataset_view.context(session, dataset, dataset_view.Chosen(tab, rule, severity, sort, page))
        found = dataset_view.changed(session, dataset) if tab == "versions" else None
    if found is not None:
        values["changed"] = dataset_view.with_answer(found)
    return render(request, "dataset.html", **values)


@pages.get("/datasets/{key}/state")
def state(user: CurrentUser, session: Db, key: str) -> dict[str, Any]:
    """The parse status, which the page polls once a second."""
    dataset = _get(session, user, key)
    return {"status": dataset.status, "progress": dataset.progress, "so_far": dataset_view.so_far(dataset)}


@pages.post("/datasets/{key}/read")
async def read_as(request: Request, user: CurrentUser, key: str) -> Response:
    """Parse the file again with the chosen format and mapping: `format`, and `map.FIELD` for each field of it."""
    form = await request.form()
    typed = {name: value for name, value in form.items() if isinstance(value, str)}
    return RedirectResponse(await run_in_threadpool(_read_as, user, key, typed), 303)


def _read_as(user: User, key: str, typed: dict[str, str]) -> str:
    name = typed.get("format", "")
    entry = formats.get(name)
    mapping = {field.name: typed[f"map.{name}.{field.name}"] for field in entry.fields if f"map.{name}.{field.name}" in typed}
    with transaction() as session:
        return _path(datasets.read_as(session, user, _get(session, user, key), name, mapping))


@pages.post("/datasets/{key}/retry")
def retry(user: CurrentUser, session: Db, key: str) -> Response:
    """Parse the file again unchanged, after a failure such as a full disk."""
    dataset = _get(session, user, key)
    ingest_task.read_again(session, dataset)
    return RedirectResponse(_path(dataset), 303)


@pages.post("/datasets/{key}/delete")
def delete(request: Request, user: CurrentUser, session: Db, key: str) -> Response:
    dataset = _get(session, user, key)
    datasets.delete(session, user, dataset)
    flash(request, gettext("The dataset “%(name)s” is deleted.", name=dataset.name))
    return RedirectResponse("/datasets", 303)


def _get(session: Db, user: User, key: str) -> Dataset:
    return datasets.get(session, user, ids.parse(ids.DATASET, key))


# The same for programs --------------------------------------------------------------------------------------------------


@api.get("/datasets", operation_id="list_datasets", responses=answers(schemas.page_of(schemas.Dataset)))
def list_datasets(
    user: CurrentUser, session: Db, after: cursor.After = None, limit: cursor.Limit = 20, order: cursor.Order = "desc"
) -> dict[str, Any]:
    """All datasets, in all versions."""
    own = ownership.mine(Dataset, user)
    return cursor.page(own, after, limit, order, to_json, session=session, key=lambda key: ids.parse(ids.DATASET, key))


@api.get("/datasets/{key}", operation_id="retrieve_dataset", responses=answers(schemas.DatasetWithVersions))
def retrieve_dataset(user: CurrentUser, session: Db, key: str) -> dict[str, Any]:
    """One version of a dataset, with the ids of all its versions."""
    dataset = _get(session, user, key)
    return to_json(dataset) | {"versions": [ids.public(ids.DATASET, version.id) for version in datasets.versions(session, dataset)]}


@api.post("/datasets/{key}/retry", operation_id="retry_dataset", responses=answers(schemas.Dataset, 409))
def retry_dataset(user: CurrentUser, session: Db, key: str) -> dict[str, Any]:
    """Parse the file again unchanged, after a failure such as a full disk, or where its stored rows are damaged or missing."""
    dataset = _get(session, user, key)
    ingest_task.read_again(session, dataset)
    return to_json(dataset)


deprecated_path(api, "/datasets/{key}/again", retry_dataset)


@api.delete("/datasets/{key}", operation_id="delete_dataset", responses=answers(schemas.Deleted, 409))
def delete_dataset(user: CurrentUser, session: Db, key: str) -> dict[str, Any]:
    """Delete one version. Refused while something depends on it."""
    datasets.delete(session, user, _get(session, user, key))
    return {"id": key, "object": "dataset", "deleted": True}


@api.get("/datasets/{key}/report", operation_id="retrieve_dataset_report", responses=answers(schemas.DatasetReport))
def retrieve_report(
    user: CurrentUser,
    session: Db,
    key: str,
    after: Annotated[int, Query(ge=0, le=cursor.MAX_NUMBER, description="Findings before the first one wanted.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    rule: str | None = None,
    severity: Literal["error", "warning", "note"] | None = None,
    sort: str = "line",
) -> dict[str, Any]:
    """The report of this version, with one page of its issues."""
    dataset = _get(session, user, key)
    found, more = datasets.findings(session, dataset, rule, severity, sort, after, limit)
    return report_json(dataset, found, more)
