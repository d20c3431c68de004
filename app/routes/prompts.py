"""`/v1/prompts` and the prompt lab: prompts with versions, and their scores on validation rows."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import objectives, saved_graders, schemas
from app.datasets import service as datasets
from app.db import Db, transaction
from app.errors import BadField, StudioError
from app.inference import playground
from app.kit import forms, ids
from app.languages import gettext, mark
from app.models import first_model
from app.prompts import prompt_vs_tuning
from app.prompts import runs as prompt_runs
from app.prompts import service as prompts
from app.prompts.service import PromptBody
from app.schemas.openapi import answers, takes
from app.tables import Dataset, Prompt, PromptRun, PromptVersion, User
from app.views import prompt_lab
from app.web import templates as web_templates
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.pagination import After, Limit, Offset, PageNumber, page
from app.web.renamed import page_moved

pages = APIRouter()
MENU = (MenuPage(mark("Prompt lab"), "/playground/prompts", "evaluation", 20),)
api = APIRouter(prefix="/v1/prompts")
Json = dict[str, Any]
PREFIX = "prompt"


# The API --------------------------------------------------------------------------------------------------------------


@api.post("", operation_id="create_prompt", responses=answers(schemas.Prompt), openapi_extra=takes(schemas.CreatePrompt))
def create(session: Db, user: CurrentUser, body: Annotated[Json, Body()]) -> Json:
    """A new prompt with its first version. Body: `{"name", …PromptBody}`."""
    given = dict(body)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise BadField("name is missing.", hint="Send a text.", param="name", code="missing_required_parameter")
    return prompts.to_json(session, prompts.create(session, user, name, prompts.read_body(given))[0])


@api.get("", operation_id="list_prompts", responses=answers(schemas.page_of(schemas.Prompt)))
def list_prompts(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Prompts, newest first."""
    return page(prompts.mine(user), after, limit, "desc", lambda p: prompts.to_json(session, p), session=session, key=ids.parse_prompt)


@api.get("/runs/{run_id}", operation_id="retrieve_prompt_run", responses=answers(schemas.PromptRun))
def retrieve_run(session: Db, user: CurrentUser, run_id: str) -> Json:
    """One run, with its progress."""
    return prompt_runs.to_json(prompt_runs.get(session, user, ids.parse_prompt_run(run_id)))


@api.get("/runs/{run_id}/results", operation_id="list_prompt_run_results", responses=answers(schemas.PromptRunRows))
def results(session: Db, user: CurrentUser, run_id: str, after: Offset = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Json:
    """Results in the dataset's order; `after` is the line of the last row of the previous page."""
    run = prompt_runs.get(session, user, ids.parse_prompt_run(run_id))
    found = prompt_runs.results(session, run, after, limit + 1)
    return {"object": "list", "data": [prompt_runs.result_json(r) for r in found[:limit]], "has_more": len(found) > limit}


@api.post("/runs/{run_id}/cancel", operation_id="cancel_prompt_run", responses=answers(schemas.PromptRun))
def cancel_run(session: Db, user: CurrentUser, run_id: str) -> Json:
    """Cancel a run. Results so far are kept."""
    return prompt_runs.to_json(prompt_runs.cancel(session, user, prompt_runs.get(session, user, ids.parse_prompt_run(run_id))))


@api.get("/{prompt_id}", operation_id="retrieve_prompt", responses=answers(schemas.Prompt))
def retrieve(session: Db, user: CurrentUser, prompt_id: str) -> Json:
    """A prompt with all its versions."""
    return prompts.to_json(session, prompts.get(session, user, ids.parse_prompt(prompt_id)))


@api.post("/{prompt_id}", operation_id="revise_prompt", responses=answers(schemas.Prompt), openapi_extra=takes(schemas.RevisePrompt))
def revise(session: Db, user: CurrentUser, prompt_id: str, body: Annotated[Json, Body()]) -> Json:
    """A new version; omitted fields are taken from the newest."""
    prompt = prompts.get(session, user, ids.parse_prompt(prompt_id))
    prompts.revise(session, user, prompt, prompts.read_body({**prompts.version(session, prompt).body, **body}))
    return prompts.to_json(session, prompt)


@api.delete("/{prompt_id}", operation_id="delete_prompt", responses=answers(schemas.Deleted, 409))
def delete(session: Db, user: CurrentUser, prompt_id: str) -> Json:
    """Delete a prompt with its versions. Refused while one of its runs has not ended."""
    prompts.delete(session, user, prompts.get(session, user, ids.parse_prompt(prompt_id)))
    return {"id": prompt_id, "object": "prompt", "deleted": True}


@api.get("/{prompt_id}/runs", operation_id="list_prompt_runs", responses=answers(schemas.page_of(schemas.PromptRun)))
def list_runs(session: Db, user: CurrentUser, prompt_id: str, after: After = None, limit: Limit = 20) -> Json:
    """Runs of a prompt, newest first."""
    prompt = prompts.get(session, user, ids.parse_prompt(prompt_id))
    return page(
        prompt_runs.of_prompt(session, user, prompt), after, limit, "desc", prompt_runs.to_json, session=session, key=ids.parse_prompt_run
    )


@api.post(
    "/{prompt_id}/runs",
    operation_id="create_prompt_run",
    responses=answers(schemas.PromptRun, 409),
    openapi_extra=takes(schemas.CreatePromptRun),
)
def create_run(session: Db, user: CurrentUser, prompt_id: str, body: Annotated[Json, Body()]) -> Json:
    """Run a prompt with a model over rows of a dataset."""
    given = dict(body)
    model, number = given.pop("model", None), given.pop("version", None)
    dataset_id, file = given.pop("dataset_id", None), given.pop("file", None)
    if not isinstance(model, str):
        raise BadField("model is missing.", hint="Name a model.", param="model", code="missing_required_parameter")
    if number is not None and not isinstance(number, int):
        raise BadField("version takes a whole number.", param="version")
    prompt = prompts.get(session, user, ids.parse_prompt(prompt_id))
    dataset = _dataset(session, user, dataset_id, file)
    return prompt_runs.to_json(_run(session, user, prompt, number, model, dataset, given))


def _dataset(session: Session, user: User, dataset_id: Any, file: Any) -> Dataset:
    """A dataset by its id, or by the file it was parsed from."""
    if isinstance(dataset_id, str):
        return datasets.get(session, user, ids.parse(ids.DATASET, dataset_id, param="dataset_id"))
    if isinstance(file, str):
        return datasets.for_file(session, user, ids.parse(ids.FILE, file, param="file"))
    hint = gettext("Send dataset_id or file.")
    raise BadField(gettext("No data was named."), hint=hint, param="dataset_id", code="missing_required_parameter")


def _run(session: Session, user: User, prompt: Prompt, number: int | None, model: str, dataset: Dataset, order: Json) -> PromptRun:
    return prompt_runs.create(session, user, prompts.version(session, prompt, number), model, dataset, prompt_runs.read_order(order))


# The pages ------------------------------------------------------------------------------------------------------------


Typed = dict[str, str]


page_moved(pages, "/playground/lab", "/playground/prompts")
page_moved(pages, "/playground/lab/prompts/{rest:path}", "/playground/prompts/{rest}")
page_moved(pages, "/playground/lab/{rest:path}", "/playground/prompts/{rest}")


@pages.get("/playground/prompts")
def prompts_page(request: Request, session: Db, user: CurrentUser) -> Response:
    return web_templates.render(request, "prompts.html", **_lab(session, user))


def _lab(session: Session, user: User) -> Json:
    runs = prompt_runs.table(session, user)
    choices, found = playground.choices(session, user), prompts.newest(session, user, prompts.SHOWN + 1)
    return {
        "prompts": found[: prompts.SHOWN], "more": len(found) > prompts.SHOWN,
        "datasets": prompt_lab.usable(session, user), "choices": choices, "error": None, "public": ids.public,
        "table": [(dataset, prompt_lab.matrix(rows), prompt_vs_tuning.verdict(session, rows)) for dataset, rows in runs],
        "builders": prompts.BUILDERS, "metrics": prompts.SCORES,
        "offer": None if choices else first_model.offer(session, user),
        "live": any(run.status in ("queued", "running") for _, rows in runs for run, _, _ in rows),
    }  # fmt: skip


@pages.get("/playground/prompts/new")
def new(
    request: Request,
    session: Db,
    user: CurrentUser,
    builder: Annotated[str, Query()] = "zero_shot",
    dataset: Annotated[str, Query()] = "",
    model: Annotated[str, Query()] = "",
) -> Response:
    """A preset. For a labeled dataset the answer is scored by the first label that it contains."""
    start = prompts.STARTS.get(builder, prompts.STARTS["zero_shot"])
    chosen = _chosen(session, user, {"dataset": dataset})
    if chosen is not None and objectives.get(chosen.task).classifies:
        start = start | {"score": "label", "max_tokens": 16}
    return web_templates.render(request, "prompt.html", **_form(session, user, PromptBody(**start), {"dataset": dataset}, [model]))


def _chosen(session: Session, user: User, data: Typed) -> Dataset | None:
    """The selected dataset, or the newest that can be used."""
    found = prompt_lab.usable(session, user, data.get("dataset"))
    return next((d for d in found if ids.public(ids.DATASET, d.id) == data.get("dataset")), found[0] if found else None)


def _form(
    session: Session, user: User, body: PromptBody | None, data: Typed, models: list[str], prompt: Prompt | None = None, **more: Any
) -> Json:
    """The template context of the form. `more` holds raw input that is invalid, and the error."""
    fault: StudioError | None = more.get("error")
    choices = playground.choices(session, user, *filter(None, models))
    first = next((option.name for group in choices.values() for option in group), "")
    chosen = _chosen(session, user, data)
    errors = {fault.param: fault.message} if fault and fault.param in PromptBody.model_fields else {}
    controls = forms.controls(
        PromptBody,
        PREFIX,
        typed=more.pop("typed", None) or _as_typed(body or PromptBody()),
        errors=errors,
        placeholders={"lines": "3, 17, 42"},
    )
    return {
        "controls": {c.name: c for c in controls}, "name": data.get("name", ""), "prompt": prompt, "error": None, "public": ids.public,
        "versions": prompts.versions(session, prompt) if prompt else [], "presets": prompts.BUILDERS, "choices": choices,
        "graders": saved_graders.offered(session, user, body.grader if body else None),
        "datasets": prompt_lab.usable(session, user, data.get("dataset")), "dataset": chosen, "models": [m for m in models if m] or [first], "data": data,
        "try_rows": prompt_lab.TRY_ROWS, "preview": prompt_lab.preview(body, chosen) if body else None, "wrong": bool(errors), **more,
    }  # fmt: skip


def _as_typed(body: PromptBody) -> Typed:
    typed = {key: forms.as_text(value) for key, value in body.model_dump(mode="json").items()}
    typed |= {"lines": ", ".join(map(str, body.lines)), "variables": "\n".join(f"{k} = {v}" for k, v in body.variables.items())}
    return typed | {"separator": body.separator.replace("\n", "\\n")}


async def _posted(request: Request) -> tuple[Typed, list[str], list[str]]:
    """The fields of a posted form, with the selected models and prompts."""
    form = await request.form(max_fields=256, max_files=0)
    data = {key: str(value).replace("\r\n", "\n") for key, value in form.items()}
    return data, [str(name) for name in form.getlist("models") if name], [str(name) for name in form.getlist("prompts") if name]


def _typed(data: Typed) -> Typed:
    return {key.removeprefix(f"{PREFIX}."): value for key, value in data.items() if key.startswith(f"{PREFIX}.")}


@pages.post("/playground/prompts/preview")
async def preview(request: Request, user: CurrentUser) -> Response:
    """The form's prompt rendered with the first row, or the error in it."""
    data, _, _ = await _posted(request)
    return await run_in_threadpool(_preview, request, user, data)


def _preview(request: Request, user: User, data: Typed) -> Response:
    found, error = None, None
    with transaction() as session:
        try:
            found = prompt_lab.preview(prompts.read_body(_typed_body(_typed(data))), _chosen(session, user, data))
        except StudioError as fault:
            error = fault
        return web_templates.render(request, "parts/prompt_preview.html", preview=found, error=error)


@pages.post("/playground/prompts/try")
async def try_out(request: Request, user: CurrentUser) -> Response:
    """Run the form's prompt with the first selected model on three validation rows; nothing is saved."""
    return await run_in_threadpool(_save, request, user, *(await _posted(request))[:2], "try")


@pages.post("/playground/prompts")
async def save(request: Request, user: CurrentUser) -> Response:
    """Save a new prompt, or with `prompt_id` a new version of one; with `do=run` also start a run with each selected model."""
    data, models, _ = await _posted(request)
    return await run_in_threadpool(_save, request, user, data, models, data.get("do", "save"))


def _save(request: Request, user: User, data: Typed, models: list[str], action: str) -> Response:
    try:
        with transaction() as session:
            body = prompts.read_body(_typed_body(_typed(data)))
            if action == "try":
                dataset = _dataset(session, user, data.get("dataset"), None)
                if not models:
                    raise BadField(gettext("No model was chosen."), hint=gettext("Choose one to try the prompt on."), param="models")
                run = prompt_lab.try_out(session, user, body, models[0], dataset)
                return RedirectResponse(f"/playground/prompts/runs/{ids.public(ids.RUN, run.id)}", status_code=303)
            prompt, made = _saved(session, user, data, body)
            if action == "run":
                prompt_lab.run_matrix(session, user, [made], models, _dataset(session, user, data.get("dataset"), None), _rows_of(data))
            name, number, place = prompt.name, made.number, ids.public(ids.PROMPT, prompt.id)
    except StudioError as error:
        with transaction() as session:
            prompt_ = prompts.get(session, user, ids.parse_prompt(data["prompt_id"])) if data.get("prompt_id") else None
            context = _form(session, user, None, data, models, prompt_, typed=_typed(data), error=error)
            return web_templates.render(request, "prompt.html", status_code=error.status, **context)
    web_templates.flash(request, gettext("Saved “%(name)s”, version %(version)s.", name=name, version=number))
    return RedirectResponse("/playground/prompts#scores" if action == "run" else f"/playground/prompts/{place}", status_code=303)


def _saved(session: Session, user: User, data: Typed, body: PromptBody) -> tuple[Prompt, PromptVersion]:
    if data.get("prompt_id"):
        prompt = prompts.get(session, user, ids.parse_prompt(data["prompt_id"]))
        return prompt, prompts.revise(session, user, prompt, body)
    return prompts.create(session, user, data.get("name", ""), body)


def _rows_of(data: Typed) -> Json:
    return {k: data[k] for k in ("part", "rows") if data.get(k)}


def _typed_body(typed: Typed) -> Json:
    """The form's input as PromptBody takes it. Texts are not stripped; an empty number means the default."""
    found: Json = {k: v for k, v in typed.items() if v != "" or k in ("system", "example")}
    found["separator"] = typed.get("separator", "\\n\\n").replace("\\n", "\n")
    lines = [forms.whole_number(part) for part in typed.get("lines", "").replace(",", " ").split()]
    if None in lines:
        raise BadField(gettext("Row numbers are whole numbers separated by commas."), param="lines")
    pairs = [line.partition("=") for line in typed.get("variables", "").splitlines() if line.strip()]
    if not all(sign and name.strip() for name, sign, _ in pairs):
        raise BadField(gettext("Write each variable as name = text, one per line."), param="variables")
    return found | {"lines": lines, "variables": {n.strip(): v.strip() for n, _, v in pairs}}


@pages.get("/playground/prompts/{prompt_id}")
def show(request: Request, session: Db, user: CurrentUser, prompt_id: str, version: PageNumber | None = None) -> Response:
    prompt = prompts.get(session, user, ids.parse_prompt(prompt_id))
    found = prompts.version(session, prompt, version)
    context = _form(session, user, PromptBody(**found.body), {"name": prompt.name}, [], prompt, shown=found.number)
    return web_templates.render(request, "prompt.html", **context)


@pages.post("/playground/prompts/{prompt_id}/delete")
def remove(request: Request, session: Db, user: CurrentUser, prompt_id: str) -> Response:
    prompt = prompts.get(session, user, ids.parse_prompt(prompt_id))
    prompts.delete(session, user, prompt)
    web_templates.flash(request, gettext("Deleted “%(name)s”. Its runs are kept.", name=prompt.name))
    return RedirectResponse("/playground/prompts", status_code=303)


@pages.post("/playground/prompts/runs")
async def start(request: Request, user: CurrentUser) -> Response:
    """Start one run for each selected prompt and model."""
    return await run_in_threadpool(_start, request, user, *await _posted(request))


def _start(request: Request, user: User, data: Typed, models: list[str], chosen: list[str]) -> Response:
    try:
        with transaction() as session:
            versions = [_version(session, user, name) for name in chosen]
            prompt_lab.run_matrix(session, user, versions, models, _dataset(session, user, data.get("dataset"), None), _rows_of(data))
    except StudioError as error:
        with transaction() as session:
            return web_templates.render(request, "prompts.html", status_code=error.status, **(_lab(session, user) | {"error": error}))
    return RedirectResponse("/playground/prompts#scores", status_code=303)


def _version(session: Session, user: User, name: str) -> PromptVersion:
    """A version by `prompt-…:2`; the newest without a number."""
    prompt_id, _, number = name.partition(":")
    return prompts.version(session, prompts.get(session, user, ids.parse_prompt(prompt_id)), forms.whole_number(number) if number else None)


@pages.get("/playground/prompts/runs/{run_id}")
def run_page(request: Request, session: Db, user: CurrentUser, run_id: str, after: Offset = 0) -> Response:
    run = prompt_runs.get(session, user, ids.parse_prompt_run(run_id))
    found = prompt_runs.results(session, run, after, 51)
    return web_templates.render(
        request, "prompt_run.html", run=run, key=run_id, results=found[:50], more=found[49].line if len(found) > 50 else None,
        live=run.status in ("queued", "running"), metrics=prompts.SCORES, trial=bool(run.spec.get("trial")),
    )  # fmt: skip


@pages.post("/playground/prompts/runs/{run_id}/{action}")
def change_run(session: Db, user: CurrentUser, run_id: str, action: str) -> Response:
    run = prompt_runs.get(session, user, ids.parse_prompt_run(run_id))
    if action == "cancel":
        prompt_runs.cancel(session, user, run)
    elif action == "delete":
        prompt_runs.delete(session, user, run)
    else:
        message = gettext("A run has no action %(action)s.", action=action[:40])
        raise BadField(message, hint=gettext("It can be cancelled and deleted."), param="action")
    return RedirectResponse("/playground/prompts#scores", status_code=303)
