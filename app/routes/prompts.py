"""`/v1/prompts` and the prompt lab's pages: prompts with versions, and what they score on held-out rows."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import datasets, enough, forms, ids, playground, prompt_runs, prompts, schemas, web
from app.accounts import CurrentUser
from app.db import Db, transaction
from app.errors import BadField, StudioError
from app.openapi import answers, takes
from app.orders import bad_field
from app.pages import After, Limit, Offset, PageNumber, page
from app.prompt_runs import RUN, RunOrder
from app.prompts import PromptBody
from app.tables import Dataset, Prompt, PromptRun, User

pages = APIRouter()
api = APIRouter(prefix="/v1/prompts")
Json = dict[str, Any]
TEXTS = ("system", "template", "example", "separator", "instruction", "variables", "stop")
PREFIX = "prompt"


def key_of(text: str) -> uuid.UUID:
    return ids.parse(ids.PROMPT, text, param="prompt_id")


def run_key(text: str) -> uuid.UUID:
    return ids.parse(RUN, text, param="run_id")


# The API --------------------------------------------------------------------------------------------------------------


@api.post("", operation_id="create_prompt", responses=answers(schemas.Prompt), openapi_extra=takes(schemas.CreatePrompt))
def create(session: Db, user: CurrentUser, body: Annotated[Json, Body()]) -> Json:
    """A new prompt with its first version: `{"name", …PromptBody}`."""
    given = dict(body)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise BadField("name is missing.", way_out="Send a text.", param="name", code="missing_required_parameter")
    return prompts.to_json(session, prompts.create(session, user, name, prompts.read_body(given))[0])


@api.get("", operation_id="list_prompts", responses=answers(schemas.page_of(schemas.Prompt)))
def list_prompts(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Prompts, newest first."""
    return page(prompts.mine(user), after, limit, "desc", lambda p: prompts.to_json(session, p), session=session, key=key_of)


@api.get("/runs/{run_id}", operation_id="retrieve_prompt_run", responses=answers(schemas.PromptRun))
def retrieve_run(session: Db, user: CurrentUser, run_id: str) -> Json:
    """One run, as far as it has got."""
    return prompt_runs.to_json(prompt_runs.get(session, user, run_key(run_id)))


@api.get("/runs/{run_id}/results", operation_id="list_prompt_run_results", responses=answers(schemas.PromptRunRows))
def results(session: Db, user: CurrentUser, run_id: str, after: Offset = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Json:
    """Rows in the dataset's order; `after` is the line of the last row of the page before."""
    run = prompt_runs.get(session, user, run_key(run_id))
    found = prompt_runs.results(session, run, after, limit + 1)
    return {"object": "list", "data": [prompt_runs.result_json(r) for r in found[:limit]], "has_more": len(found) > limit}


@api.post("/runs/{run_id}/cancel", operation_id="cancel_prompt_run", responses=answers(schemas.PromptRun))
def cancel_run(session: Db, user: CurrentUser, run_id: str) -> Json:
    """Stop a run. What was scored so far is kept."""
    return prompt_runs.to_json(prompt_runs.cancel(session, user, prompt_runs.get(session, user, run_key(run_id))))


@api.get("/{prompt_id}", operation_id="retrieve_prompt", responses=answers(schemas.Prompt))
def retrieve(session: Db, user: CurrentUser, prompt_id: str) -> Json:
    """A prompt in all its versions."""
    return prompts.to_json(session, prompts.get(session, user, key_of(prompt_id)))


@api.post("/{prompt_id}", operation_id="revise_prompt", responses=answers(schemas.Prompt), openapi_extra=takes(schemas.RevisePrompt))
def revise(session: Db, user: CurrentUser, prompt_id: str, body: Annotated[Json, Body()]) -> Json:
    """A new version; what is omitted is as in the newest."""
    prompt = prompts.get(session, user, key_of(prompt_id))
    prompts.revise(session, user, prompt, prompts.read_body({**prompts.version(session, prompt).body, **body}))
    return prompts.to_json(session, prompt)


@api.delete("/{prompt_id}", operation_id="delete_prompt", responses=answers(schemas.Deleted, 409))
def delete(session: Db, user: CurrentUser, prompt_id: str) -> Json:
    """Delete a prompt with its versions. Refused while a run of it has not ended."""
    prompts.delete(session, user, prompts.get(session, user, key_of(prompt_id)))
    return {"id": prompt_id, "object": "prompt", "deleted": True}


@api.get("/{prompt_id}/runs", operation_id="list_prompt_runs", responses=answers(schemas.page_of(schemas.PromptRun)))
def list_runs(session: Db, user: CurrentUser, prompt_id: str, after: After = None, limit: Limit = 20) -> Json:
    """Runs of a prompt, newest first."""
    prompt = prompts.get(session, user, key_of(prompt_id))
    return page(prompt_runs.of_prompt(session, user, prompt), after, limit, "desc", prompt_runs.to_json, session=session, key=run_key)


@api.post(
    "/{prompt_id}/runs",
    operation_id="create_prompt_run",
    responses=answers(schemas.PromptRun, 409),
    openapi_extra=takes(schemas.CreatePromptRun),
)
def create_run(session: Db, user: CurrentUser, prompt_id: str, body: Annotated[Json, Body()]) -> Json:
    """Put a prompt to a model, over rows of a dataset."""
    given = dict(body)
    model, number = given.pop("model", None), given.pop("version", None)
    dataset_id, file = given.pop("dataset_id", None), given.pop("file", None)
    if not isinstance(model, str):
        raise BadField("model is missing.", way_out="Name a model.", param="model", code="missing_required_parameter")
    if number is not None and not isinstance(number, int):
        raise BadField("version takes a whole number.", param="version")
    prompt = prompts.get(session, user, key_of(prompt_id))
    dataset = _dataset(session, user, dataset_id, file)
    return prompt_runs.to_json(_run(session, user, prompt, number, model, dataset, given))


def _dataset(session: Session, user: User, dataset_id: Any, file: Any) -> Dataset:
    """By its public id, or by the file it was read from."""
    if isinstance(dataset_id, str):
        return datasets.get(session, user, ids.parse(ids.DATASET, dataset_id, param="dataset_id"))
    if isinstance(file, str):
        return datasets.for_file(session, user, ids.parse(ids.FILE, file, param="file"))
    raise BadField("No data was named.", way_out="Send dataset_id or file.", param="dataset_id", code="missing_required_parameter")


def _run(session: Session, user: User, prompt: Prompt, number: int | None, model: str, dataset: Dataset, order: Json) -> PromptRun:
    try:
        ordered = RunOrder.model_validate(order)
    except ValidationError as error:
        raise bad_field(error) from None
    return prompt_runs.create(session, user, prompts.version(session, prompt, number), model, dataset, ordered)


# The pages ------------------------------------------------------------------------------------------------------------


@pages.get("/playground/lab")
def lab(request: Request, session: Db, user: CurrentUser) -> Response:
    return web.render(request, "lab.html", **_lab(session, user))


def _lab(session: Session, user: User) -> Json:
    scored = [d for d in datasets.list_(session, user) if d.status == "ready" and d.format != "plain_text" and d.task != "preference"]
    listed = [(p, prompts.versions(session, p)) for p in prompts.list_(session, user)]
    table = [(dataset, rows, enough.verdict(session, rows)) for dataset, rows in prompt_runs.table(session, user)]
    return {
        "prompts": listed, "datasets": scored, "choices": playground.choices(session, user), "table": table,
        "public": ids.public, "error": None, "builders": prompts.BUILDERS, "rules": prompts.SCORES,
        "live": any(run.status in ("queued", "running") for _, rows, _ in table for run, _, _ in rows),
    }  # fmt: skip


@pages.get("/playground/lab/new")
def new(request: Request, user: CurrentUser, builder: Annotated[str, Query()] = "zero_shot") -> Response:
    start = prompts.STARTS.get(builder, prompts.STARTS["zero_shot"])
    return web.render(request, "prompt.html", **_form(PromptBody(**start), "", None, []))


def _form(body: PromptBody, name: str, prompt: Prompt | None, versions: list[Any], **more: Any) -> Json:
    typed = {key: forms.as_text(value) for key, value in body.model_dump(mode="json").items()}
    typed |= {"lines": ", ".join(map(str, body.lines)), "variables": "\n".join(f"{k} = {v}" for k, v in body.variables.items())}
    typed["separator"] = body.separator.replace("\n", "\\n")
    controls = {c.name: c for c in forms.controls(PromptBody, PREFIX, typed=more.pop("typed", typed), placeholders={"lines": "3, 17, 42"})}
    return {"controls": controls, "name": name, "prompt": prompt, "versions": versions, "error": None, "public": ids.public, **more}


@pages.post("/playground/lab/prompts")
async def save(request: Request, user: CurrentUser) -> Response:
    """A new prompt, or with `prompt_id` a new version of one."""
    form = await request.form(max_fields=64, max_files=0)
    data = {key: str(value).replace("\r\n", "\n") for key, value in form.items()}
    return await run_in_threadpool(_save, request, user, data)


def _save(request: Request, user: User, data: dict[str, str]) -> Response:
    typed = {key.removeprefix(f"{PREFIX}."): value for key, value in data.items() if key.startswith(f"{PREFIX}.")}
    try:
        with transaction() as session:
            body = prompts.read_body(_typed_body(typed))
            if data.get("prompt_id"):
                prompt = prompts.get(session, user, key_of(data["prompt_id"]))
                made = prompts.revise(session, user, prompt, body)
            else:
                prompt, made = prompts.create(session, user, data.get("name", ""), body)
            name, number, place = prompt.name, made.number, ids.public(ids.PROMPT, prompt.id)
    except BadField as error:
        with transaction() as session:
            prompt_ = prompts.get(session, user, key_of(data["prompt_id"])) if data.get("prompt_id") else None
            versions = prompts.versions(session, prompt_) if prompt_ else []
            context = _form(PromptBody(), data.get("name", ""), prompt_, versions, typed=typed, error=error)
            return web.render(request, "prompt.html", status_code=error.status, **context)
    web.flash(request, f"Saved “{name}”, version {number}.")
    return RedirectResponse(f"/playground/lab/prompts/{place}", status_code=303)


def _typed_body(typed: dict[str, str]) -> Json:
    """What a person typed, as PromptBody takes it. Texts are kept to the letter; an empty number is its default."""
    found: Json = {k: v for k, v in typed.items() if v != "" or k in ("system", "example")}
    found["separator"] = typed.get("separator", "\\n\\n").replace("\\n", "\n")
    lines = [forms.whole_number(part) for part in typed.get("lines", "").replace(",", " ").split()]
    if None in lines:
        raise BadField("Lines are whole numbers with commas between.", param="lines")
    pairs = [line.partition("=") for line in typed.get("variables", "").splitlines() if line.strip()]
    if not all(sign and name.strip() for name, sign, _ in pairs):
        raise BadField("Write each variable as name = text, one in each line.", param="variables")
    return found | {"lines": lines, "variables": {n.strip(): v.strip() for n, _, v in pairs}}


@pages.get("/playground/lab/prompts/{prompt_id}")
def show(request: Request, session: Db, user: CurrentUser, prompt_id: str, version: PageNumber | None = None) -> Response:
    prompt = prompts.get(session, user, key_of(prompt_id))
    found = prompts.version(session, prompt, version)
    context = _form(PromptBody(**found.body), prompt.name, prompt, prompts.versions(session, prompt), shown=found.number)
    return web.render(request, "prompt.html", **context)


@pages.post("/playground/lab/prompts/{prompt_id}/delete")
def remove(request: Request, session: Db, user: CurrentUser, prompt_id: str) -> Response:
    prompt = prompts.get(session, user, key_of(prompt_id))
    prompts.delete(session, user, prompt)
    web.flash(request, f"Deleted “{prompt.name}”. Its runs are kept.")
    return RedirectResponse("/playground/lab", status_code=303)


@pages.post("/playground/lab/runs")
async def start(request: Request, user: CurrentUser) -> Response:
    """One run for each chosen model."""
    form = await request.form(max_fields=64, max_files=0)
    names = [str(name) for name in form.getlist("models") if name]
    return await run_in_threadpool(_start, request, user, {k: str(v) for k, v in form.items()}, names)


def _start(request: Request, user: User, data: dict[str, str], names: list[str]) -> Response:
    try:
        with transaction() as session:
            if not names:
                raise BadField("No model was chosen.", way_out="Choose at least one.", param="models")
            prompt_id, _, number = data.get("prompt", "").partition(":")
            prompt = prompts.get(session, user, key_of(prompt_id))
            dataset = _dataset(session, user, data.get("dataset"), None)
            order: Json = {k: data[k] for k in ("part", "rows") if data.get(k)} | {"beside": names[:16]}
            for name in dict.fromkeys(names[:16]):
                _run(session, user, prompt, forms.whole_number(number), name, dataset, order)
    except StudioError as error:
        with transaction() as session:
            return web.render(request, "lab.html", status_code=error.status, **(_lab(session, user) | {"error": error}))
    return RedirectResponse("/playground/lab#scores", status_code=303)


@pages.get("/playground/lab/runs/{run_id}")
def run_page(request: Request, session: Db, user: CurrentUser, run_id: str, after: Offset = 0) -> Response:
    run = prompt_runs.get(session, user, run_key(run_id))
    found = prompt_runs.results(session, run, after, 51)
    return web.render(
        request, "prompt_run.html", run=run, key=run_id, results=found[:50], more=found[49].line if len(found) > 50 else None,
        live=run.status in ("queued", "running"), rules=prompts.SCORES,
    )  # fmt: skip


@pages.post("/playground/lab/runs/{run_id}/{deed}")
def run_deed(session: Db, user: CurrentUser, run_id: str, deed: str) -> Response:
    run = prompt_runs.get(session, user, run_key(run_id))
    if deed == "stop":
        prompt_runs.cancel(session, user, run)
    elif deed == "delete":
        prompt_runs.delete(session, user, run)
    else:
        raise BadField(f"A run cannot be told to {deed[:40]}.", way_out="It can be stopped and deleted.", param="deed")
    return RedirectResponse("/playground/lab#scores", status_code=303)
