"""`/v1/fine_tuning/alpha/graders`, as OpenAI's clients call it, and `/v1/graders`: graders that are saved under a name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from anyio import from_thread
from fastapi import APIRouter, Body, Query, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import graders, limits, saved_graders, schemas
from app.datasets import service as datasets
from app.db import Db, transaction
from app.errors import BadField, StudioError
from app.graders import GRADERS, Ask, Graded, GradedSample, GradeError, Grader, Judge, JudgeAsk, PairVerdict, Reply
from app.inference import judges, playground
from app.inference.judges import Hear, ResolvedJudge
from app.inference.protocol import GenerateRequest
from app.kit import ids
from app.kit.json_safe import too_deep
from app.kit.token_meter import TokenMeter
from app.languages import gettext, mark
from app.schemas.graders import MAX_ITEM_BYTES
from app.schemas.openapi import answers, takes
from app.tables import User
from app.views import grader as grader_view
from app.views import prompt_lab
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.pagination import After, Limit, page
from app.web.streaming import while_connected
from app.web.templates import flash, render

pages = APIRouter()
SHOWN = 50
MENU = (MenuPage(mark("Graders"), "/graders", "evaluation", 15),)
api = APIRouter(prefix="/v1")
Json = dict[str, Any]
ALPHA = "/fine_tuning/alpha/graders"
Given = Annotated[Json, Body()]
ANSWER_TOKENS = 128
"""Of a model's answer in a trial."""
MAX_COMPARED = 50
"""Rows of one comparison. Each is two questions to the judge."""


@api.post(f"{ALPHA}/run", operation_id="run_grader", responses=answers(schemas.GraderRun, 404, 409), openapi_extra=takes(schemas.RunGrader))
async def run(request: Request, user: CurrentUser, body: Given) -> Json:
    """Grade one answer. What goes wrong with the answer is in `metadata.errors`; a grader that does not work is refused."""
    given = _only(body, "grader", "model_sample", "item")
    sample, item = given.get("model_sample"), given.get("item")
    if not isinstance(sample, str):
        raise BadField("model_sample is missing or no text.", hint="Send the answer to be graded.", param="model_sample")
    _check_item({} if item is None else item, "item")
    grader = await run_in_threadpool(graders.read, given.get("grader"))
    found = await run_in_threadpool(grade_here, request, user, grader, [(GradedSample(sample), item or {})])
    return graders.as_openai(grader, found[0])


@api.post(
    f"{ALPHA}/validate",
    operation_id="validate_grader",
    responses=answers(schemas.ValidGrader, 404, 409),
    openapi_extra=takes(schemas.ValidateGrader),
)
def validate(session: Db, user: CurrentUser, body: Given) -> Json:
    """Check a grader: its fields, its code, its formula, and that the models it asks are there. The grader comes back as it was sent."""
    given = _only(body, "grader").get("grader")
    judges.resolve(session, user, [graders.read(given)])
    return {"grader": given}


def _only(body: Json, *names: str) -> Json:
    """The body, which may hold these fields and no others."""
    if unknown := next((name for name in body if name not in names), None):
        raise BadField(f"There is no field {unknown[:60]!r} here.", hint=f"Send {', '.join(names)}.", param=unknown[:60])
    return body


def grade_here(request: Request, user: User, grader: Grader, given: list[tuple[GradedSample, Json]]) -> list[Graded]:
    """Grade answers in a thread of a request. Questions to models end when its client leaves; no transaction is open meanwhile."""
    if not any(True for _ in grader.models()):
        return [graders.grade(grader, sample, item, graders.no_models) for sample, item in given]
    with transaction() as session:
        limits.check(session, user, "tokens_per_day")
        known = judges.resolve(session, user, [grader])
    with _asking(request, user, known) as answer:
        return [graders.grade(grader, sample, item, answer) for sample, item in given]


def compare_here(request: Request, user: User, judge: Judge, given: Sequence[tuple[Json, str, str]]) -> list[PairVerdict]:
    """Ask a judge which of two answers to each item is better, in both orders, in the same way."""
    with transaction() as session:
        limits.check(session, user, "tokens_per_day")
        known = judges.resolve(session, user, [judge])
    with _asking(request, user, known) as answer:
        return [graders.compare(judge, *one, answer) for one in given]


def _judge(grader: Grader) -> Judge:
    """Raises BadField for a grader that is no judge."""
    if not isinstance(grader, Judge):
        message = gettext("A %(type)s grader compares no answers.", type=grader.type)
        raise BadField(message, hint=gettext("Send a judge: score_model or label_model."), param="grader.type")
    return grader


@contextlib.contextmanager
def _asking(request: Request, user: User, known: Sequence[ResolvedJudge]) -> Iterator[Callable[[Ask], Reply]]:
    """What asks these models. At the end their tokens are counted, also where the client has left."""
    meter = TokenMeter()
    try:
        yield judges.answers(user.id, known, lambda asked, hear: from_thread.run(_send, request, asked, hear), meter)
    finally:
        with transaction() as session:
            limits.count_tokens(session, user.id, user.project_id, **meter.counts())


async def _send(request: Request, asked: GenerateRequest, hear: Hear) -> None:
    if not await while_connected(request, judges.listen(asked, hear)):
        raise GradeError("model_grader_server_error", "The client left.")


@api.post(
    "/graders/compare",
    operation_id="create_grader_comparison",
    responses=answers(schemas.GraderComparison, 404, 409),
    openapi_extra=takes(schemas.CompareAnswers),
)
async def compare(request: Request, user: CurrentUser, body: Given) -> Json:
    """Ask a judge which of two answers to each row is better, in both orders, and how often it agrees with itself."""
    rows = _only(body, "grader", "rows").get("rows")
    if not isinstance(rows, list) or not 0 < len(rows) <= MAX_COMPARED:
        raise BadField(f"rows is no list of 1 to {MAX_COMPARED} rows.", hint="Send rows, each with first and second.", param="rows")
    given = [_compared(row, f"rows.{place}") for place, row in enumerate(rows)]
    judge = _judge(await run_in_threadpool(graders.read, body.get("grader")))
    return grader_view.comparison_json(await run_in_threadpool(compare_here, request, user, judge, given))


def _compared(row: Any, where: str) -> tuple[Json, str, str]:
    if not isinstance(row, dict):
        raise BadField(f"{where} is no JSON object.", hint="Send item, first and second.", param=where)
    try:
        _only(row, "item", "first", "second")
    except BadField as fault:
        fault.param = f"{where}.{fault.param}"
        raise
    item = row.get("item") or {}
    _check_item(item, f"{where}.item")
    for side in ("first", "second"):
        if not isinstance(row.get(side), str):
            raise BadField(f"{where}.{side} is missing or no text.", hint="Send the answer.", param=f"{where}.{side}")
    return item, row["first"], row["second"]


def _check_item(item: Any, param: str) -> None:
    """Raises BadField."""
    if not isinstance(item, dict) or too_deep(item) or len(json.dumps(item)) > MAX_ITEM_BYTES:
        raise BadField(
            f"{param} is no JSON object, or is too large.", hint=f"Send an object of at most {MAX_ITEM_BYTES >> 20} MiB.", param=param
        )


# Saved graders --------------------------------------------------------------------------------------------------------


@api.post(
    "/graders", operation_id="create_grader", responses=answers(schemas.SavedGrader, 404, 409), openapi_extra=takes(schemas.CreateGrader)
)
def create(session: Db, user: CurrentUser, body: Given) -> Json:
    """Save a grader under its name, so that evaluations, jobs and prompts can name it by its id."""
    return saved_graders.to_json(saved_graders.create(session, user, _working(session, user, body)))


@api.get("/graders", operation_id="list_graders", responses=answers(schemas.page_of(schemas.SavedGrader)))
def list_graders(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Saved graders, newest first."""
    return page(saved_graders.mine(user), after, limit, "desc", saved_graders.to_json, session=session, key=ids.parse_grader)


@api.get("/graders/{grader_id}", operation_id="retrieve_grader", responses=answers(schemas.SavedGrader))
def retrieve(session: Db, user: CurrentUser, grader_id: str) -> Json:
    """One saved grader."""
    return saved_graders.to_json(saved_graders.get(session, user, ids.parse_grader(grader_id)))


@api.patch(
    "/graders/{grader_id}",
    operation_id="update_grader",
    responses=answers(schemas.SavedGrader, 404, 409),
    openapi_extra=takes(schemas.ChangeGrader),
)
def update(session: Db, user: CurrentUser, grader_id: str, body: Given) -> Json:
    """Change a saved grader. What was ordered with it before keeps it as it was."""
    saved = saved_graders.get(session, user, ids.parse_grader(grader_id))
    return saved_graders.to_json(saved_graders.change(session, saved, _working(session, user, body)))


@api.delete("/graders/{grader_id}", operation_id="delete_grader", responses=answers(schemas.Deleted))
def delete(session: Db, user: CurrentUser, grader_id: str) -> Json:
    """Delete a saved grader. What was ordered with it keeps it."""
    saved_graders.delete(session, saved_graders.get(session, user, ids.parse_grader(grader_id)))
    return {"id": grader_id, "object": "grader", "deleted": True}


def _working(session: Session, user: User, body: Json) -> Grader:
    """The grader of a body, which works and whose models are there."""
    grader = graders.read(_only(body, "grader").get("grader"))
    judges.resolve(session, user, [grader])
    return grader


# Pages ----------------------------------------------------------------------------------------------------------------


@pages.get("/graders")
def list_page(request: Request, session: Db, user: CurrentUser, shown: Annotated[int, Query(ge=1, le=5000)] = SHOWN) -> Response:
    found = [(ids.public(ids.GRADER, one.id), one) for one in saved_graders.newest(session, user, shown + 1)]
    more = shown + SHOWN if len(found) > shown else None
    return render(request, "graders.html", graders=found[:shown], types=GRADERS, more=more)


@pages.get("/graders/new")
def new_page(
    request: Request, session: Db, user: CurrentUser, kind: Annotated[str, Query(alias="type")] = "string_check", model: str = ""
) -> Response:
    """The form of a type, with its example; of one that asks a model, with that model."""
    cls = GRADERS.get(kind, GRADERS["string_check"])
    kind = next(name for name, one in GRADERS.items() if one is cls)
    filled = {**cls.example, **({"model": model} if model and "model" in cls.example else {})}
    return render(request, "grader.html", **_form(session, user, kind, "", grader_view.typed_of(kind, filled), {}))


@pages.get("/graders/{grader_id}")
def grader_page(request: Request, session: Db, user: CurrentUser, grader_id: str) -> Response:
    saved = saved_graders.get(session, user, ids.parse_grader(grader_id))
    kind = saved.body["type"]
    return render(request, "grader.html", **_form(session, user, kind, saved.name, grader_view.typed_of(kind, saved.body), {}, grader_id))


@pages.post("/graders")
async def save_page(request: Request, user: CurrentUser) -> Response:
    """Save a new grader, or with `grader_id` change one."""
    return await run_in_threadpool(_save, request, user, await _posted(request))


@pages.post("/graders/try")
async def try_page(request: Request, user: CurrentUser) -> Response:
    """Grade answers to the first rows of a dataset; with `do=answer` a model writes them first. Nothing is saved."""
    return await run_in_threadpool(_try, request, user, await _posted(request))


@pages.post("/graders/{grader_id}/delete")
def delete_page(request: Request, session: Db, user: CurrentUser, grader_id: str) -> Response:
    saved = saved_graders.get(session, user, ids.parse_grader(grader_id))
    saved_graders.delete(session, saved)
    flash(request, gettext("Deleted “%(name)s”. What was ordered with it keeps it.", name=saved.name))
    return RedirectResponse("/graders", status_code=303)


Typed = dict[str, str]


async def _posted(request: Request) -> Typed:
    form = await request.form(max_fields=128, max_files=0)
    return {key: str(value).replace("\r\n", "\n") for key, value in form.items()}


def _form(
    session: Session, user: User, kind: str, name: str, typed: Typed, data: Typed, grader_id: str = "", fault: StudioError | None = None
) -> Json:
    """The context of the form, with the rows of the chosen dataset."""
    usable = prompt_lab.usable(session, user, data.get("dataset"))
    dataset = next((d for d in usable if ids.public(ids.DATASET, d.id) == data.get("dataset")), usable[0] if usable else None)
    return {
        "kind": kind, "type": GRADERS[kind], "types": GRADERS, "name": name, "grader_id": grader_id, "fault": fault, "data": data,
        "controls": grader_view.controls(GRADERS[kind], typed, fault), "datasets": usable, "dataset": dataset, "ids": ids,
        "rows": grader_view.rows_of(dataset, data) if dataset else [], "labels": grader_view.LABELS, "agreement": None,
        "choices": playground.choices(session, user, data.get("model", "")), "judges": issubclass(GRADERS[kind], Judge), "compared": None,
    }  # fmt: skip


def _of_form(session: Session, user: User, data: Typed, fault: StudioError | None = None) -> Json:
    """The context of a form that was sent, as it was filled."""
    kind = data.get("type", "")
    kind = kind if kind in GRADERS else "string_check"
    return _form(session, user, kind, data.get("name", ""), _typed(data), data, data.get("grader_id", ""), fault)


def _typed(data: Typed) -> Typed:
    start = f"{grader_view.PREFIX}."
    return {key.removeprefix(start): value for key, value in data.items() if key.startswith(start)}


def _read(data: Typed) -> Grader:
    return graders.read(grader_view.body_of(data.get("type", ""), data.get("name", "").strip(), _typed(data)))


def _save(request: Request, user: User, data: Typed) -> Response:
    try:
        grader = _read(data)
        with transaction() as session:
            judges.resolve(session, user, [grader])
            if data.get("grader_id"):
                saved = saved_graders.get(session, user, ids.parse_grader(data["grader_id"]))
                saved_graders.change(session, saved, grader)
            else:
                saved = saved_graders.create(session, user, grader)
            place = ids.public(ids.GRADER, saved.id)
    except StudioError as fault:
        with transaction() as session:
            return render(request, "grader.html", status_code=fault.status, **_of_form(session, user, data, fault))
    flash(request, gettext("Saved “%(name)s”.", name=grader.name))
    return RedirectResponse(f"/graders/{place}", status_code=303)


def _try(request: Request, user: User, data: Typed) -> Response:
    fault: StudioError | None = None
    tried: Json = {}
    try:
        tried = _compare(request, user, data) if data.get("do") == "compare" else _grade(request, user, data)
    except (StudioError, GradeError) as error:
        fault = error if isinstance(error, StudioError) else BadField(error.message, hint=gettext("Try again."), param="model")
    with transaction() as session:
        context = _of_form(session, user, data, fault) | tried
        return render(request, "grader.html", status_code=fault.status if fault else 200, **context)


def _trial(session: Session, user: User, data: Typed) -> list[grader_view.TrialRow]:
    """The rows of a filled form. Raises NotFound for another person's dataset."""
    if data.get("dataset"):
        datasets.get(session, user, ids.parse(ids.DATASET, data["dataset"], param="dataset"))
    return list(_of_form(session, user, data)["rows"])


def _typed_grader(data: Typed) -> Grader:
    return _read(data | {"name": data.get("name", "").strip() or "trial"})


def _grade(request: Request, user: User, data: Typed) -> Json:
    grader = _typed_grader(data)
    with transaction() as session:
        rows = _trial(session, user, data)
        writer = judges.writer(session, user, data.get("model", "")) if data.get("do") == "answer" else None
        if writer is not None:
            limits.check(session, user, "tokens_per_day")
    if writer is not None:
        rows = _answered(request, user, writer, rows)
        data |= {f"answer.{row.line}": row.answer for row in rows}
    tried = grader_view.with_grades(grader, rows, grade_here(request, user, grader, grader_view.samples_of(rows)))
    return {"rows": tried, "agreement": grader_view.agreement(tried)}


def _compare(request: Request, user: User, data: Typed) -> Json:
    """Two models answer the rows, and the judge is asked in both orders which answer is better."""
    judge = _judge(_typed_grader(data))
    if data.get("model") == data.get("other"):
        raise BadField(gettext("A model cannot be compared with itself."), hint=gettext("Choose two models."), param="other")
    with transaction() as session:
        rows = _trial(session, user, data)
        writers = [judges.writer(session, user, data.get(name, "")) for name in ("model", "other")]
        limits.check(session, user, "tokens_per_day")
    first, second = (_answered(request, user, writer, rows) for writer in writers)
    found = compare_here(request, user, judge, [(a.item, a.answer, b.answer) for a, b in zip(first, second, strict=True)])
    return {"compared": grader_view.compared((data["model"], data["other"]), first, second, found)}


def _answered(request: Request, user: User, writer: ResolvedJudge, rows: list[grader_view.TrialRow]) -> list[grader_view.TrialRow]:
    """The rows with answers of a model."""
    with _asking(request, user, [writer]) as answer:
        asks = [JudgeAsk(writer.name, ({"role": "user", "content": row.prompt},), max_tokens=ANSWER_TOKENS) for row in rows]
        return [row._replace(answer=answer(ask).text.strip()) for row, ask in zip(rows, asks, strict=True)]
