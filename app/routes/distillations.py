"""`/v1/distillations`, and its pages: a teacher's best answers to the prompts of a dataset become another dataset."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import formats, saved_graders, schemas
from app.datasets import service as datasets
from app.db import Db, transaction
from app.distillations import service as distillations
from app.distillations.service import DistillationOrder
from app.errors import BadField, StudioError
from app.inference import playground
from app.kit import forms, ids
from app.languages import gettext, mark
from app.models import first_model
from app.schemas.openapi import answers, takes
from app.tables import Dataset, DistillationRun, User
from app.views import reward_form
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.pagination import After, Limit, Offset, page
from app.web.templates import flash, render

pages = APIRouter()
MENU = (MenuPage(mark("Distillation"), "/distillations", "training", 35),)
api = APIRouter(prefix="/v1/distillations")
Json = dict[str, Any]
ON_A_PAGE = 25
OWN = ("model", "dataset", "grader", "allows_training")
"""Inputs of the form with a place of their own above the others."""
PLACED = ("model", "dataset_id", "grader", "allows_training")
"""The fields whose errors are shown there."""


@api.post(
    "",
    operation_id="create_distillation",
    responses=answers(schemas.Distillation, 404, 409),
    openapi_extra=takes(schemas.CreateDistillation),
)
def create(session: Db, user: CurrentUser, body: Annotated[Json, Body()]) -> Json:
    """Queue a run: a teacher answers the prompts of a dataset, and the best answers become a dataset. The license of the teacher is kept
    with it, and `allows_training` says that it permits that."""
    given = dict(body)
    model, dataset_id = given.pop("model", None), given.pop("dataset_id", None)
    for name, value in (("model", model), ("dataset_id", dataset_id)):
        if not isinstance(value, str):
            raise BadField(f"{name} is missing.", hint=f"Send {name}.", param=name, code="missing_required_parameter")
    dataset = datasets.get(session, user, ids.parse(ids.DATASET, dataset_id, param="dataset_id"))
    return distillations.to_json(distillations.create(session, user, model, dataset, distillations.read_order(given)))


@api.get("", operation_id="list_distillations", responses=answers(schemas.page_of(schemas.Distillation)))
def list_distillations(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Runs, newest first."""
    return page(distillations.mine(user), after, limit, "desc", distillations.to_json, session=session, key=ids.parse_distillation)


@api.get("/{distillation_id}", operation_id="retrieve_distillation", responses=answers(schemas.Distillation))
def retrieve(session: Db, user: CurrentUser, distillation_id: str) -> Json:
    """One run, with its progress."""
    return distillations.to_json(_get(session, user, distillation_id))


@api.get("/{distillation_id}/rows", operation_id="list_distilled_rows", responses=answers(schemas.DistilledRows))
def list_rows(session: Db, user: CurrentUser, distillation_id: str, after: Offset = 0, limit: Limit = 20) -> Json:
    """The answered prompts in the order of the dataset, each with all answers and their scores; `after` is the line of the last row."""
    found = distillations.rows(session, _get(session, user, distillation_id), after, limit + 1)
    return {"object": "list", "data": [distillations.row_json(row) for row in found[:limit]], "has_more": len(found) > limit}


@api.post("/{distillation_id}/cancel", operation_id="cancel_distillation", responses=answers(schemas.Distillation))
def cancel(session: Db, user: CurrentUser, distillation_id: str) -> Json:
    """Cancel a run. Its answers are kept; one that has ended is unchanged."""
    return distillations.to_json(distillations.cancel(session, _get(session, user, distillation_id)))


@api.post("/{distillation_id}/resume", operation_id="resume_distillation", responses=answers(schemas.Distillation, 409))
def resume(session: Db, user: CurrentUser, distillation_id: str) -> Json:
    """Queue a failed or cancelled run again: it goes on with the prompts that are not answered yet."""
    return distillations.to_json(distillations.resume(session, user, _get(session, user, distillation_id)))


@api.delete("/{distillation_id}", operation_id="delete_distillation", responses=answers(schemas.Deleted, 409))
def delete(session: Db, user: CurrentUser, distillation_id: str) -> Json:
    """Delete a run; its dataset stays. Refused while it has not ended."""
    distillations.delete(session, _get(session, user, distillation_id))
    return {"id": distillation_id, "object": "distillation", "deleted": True}


def _get(session: Session, user: User, distillation_id: str) -> DistillationRun:
    return distillations.get(session, user, ids.parse_distillation(distillation_id))


# Pages ----------------------------------------------------------------------------------------------------------------

Typed = dict[str, str]


def usable(session: Session, user: User, *named: str | None) -> list[Dataset]:
    """Datasets on offer whose rows have prompts."""
    return [d for d in datasets.with_rows(session, user, *named) if formats.asks(d.format)]


@pages.get("/distillations")
def list_page(request: Request, session: Db, user: CurrentUser, dataset: str = "", model: str = "") -> Response:
    return render(request, "distillations.html", **_form(session, user, {"dataset": dataset, "model": model}))


def _form(session: Session, user: User, typed: Typed, fault: StudioError | None = None) -> Json:
    choices = playground.choices(session, user, typed.get("model", ""))
    errors = {fault.param.split(".")[0]: str(fault)} if fault and fault.param else {}
    saved = saved_graders.offered(session, user, typed.get("grader"))
    found = distillations.list_(session, user)
    controls = forms.controls(DistillationOrder, "order", typed=_own(typed), errors=errors)
    return {
        "choices": choices, "datasets": usable(session, user, typed.get("dataset")), "typed": typed, "fault": None if errors else fault, "ids": ids,
        "errors": dict.fromkeys(PLACED) | errors,
        "controls": [c for c in controls if c.name not in OWN], "graders": [*reward_form.choices(saved, {}), ("", gettext("none: one answer each"))],
        "offer": None if choices else first_model.offer(session, user),
        "rows": [(ids.public(ids.DISTILLATION, run.id), run) for run in found],
        "moving": any(run.status in ("queued", "running") for run in found),
    }  # fmt: skip


def _own(typed: Typed) -> Typed:
    return {name.removeprefix("order."): value for name, value in typed.items() if name.startswith("order.")}


@pages.post("/distillations")
async def start_page(request: Request, user: CurrentUser) -> Response:
    """Start a run from the form."""
    form = await request.form(max_fields=64, max_files=0)
    return await run_in_threadpool(_start, request, user, {key: str(value).replace("\r\n", "\n") for key, value in form.items()})


def _start(request: Request, user: User, typed: Typed) -> Response:
    try:
        filled = forms.fill(DistillationOrder, typed, "order")
        if filled.errors:
            name, text = next(iter(filled.errors.items()))
            raise BadField(text, param=name)
        grader = reward_form.asked([("number", "")], {reward_form.KEY: typed["grader"]}) if typed.get("grader") else None
        more = {"grader": grader, "allows_training": bool(typed.get("allows_training"))} | ({} if grader else {"answers": 1})
        with transaction() as session:
            dataset = datasets.get(session, user, ids.parse(ids.DATASET, typed.get("dataset", ""), param="dataset_id"))
            order = distillations.read_order(filled.settings | more)
            place = ids.public(ids.DISTILLATION, distillations.create(session, user, typed.get("model", ""), dataset, order).id)
    except StudioError as fault:
        with transaction() as session:
            return render(request, "distillations.html", status_code=fault.status, **_form(session, user, typed, fault))
    return RedirectResponse(f"/distillations/{place}", status_code=303)


@pages.get("/distillations/{distillation_id}")
def run_page(request: Request, session: Db, user: CurrentUser, distillation_id: str, after: Offset = 0) -> Response:
    run = _get(session, user, distillation_id)
    found = distillations.rows(session, run, after, ON_A_PAGE + 1)
    made = session.get(Dataset, run.made_id) if run.made_id else None
    return render(
        request, "distillation.html", run=run, key=distillation_id, rows=found[:ON_A_PAGE],
        more=found[ON_A_PAGE - 1].line if len(found) > ON_A_PAGE else None, live=run.status in ("queued", "running"),
        made=made, made_url=f"/datasets/{ids.public(ids.DATASET, made.id)}" if made else "",
        dataset_url=f"/datasets/{ids.public(ids.DATASET, run.dataset_id)}",
    )  # fmt: skip


@pages.post("/distillations/{distillation_id}/{action}")
def change_page(request: Request, session: Db, user: CurrentUser, distillation_id: str, action: str) -> Response:
    run = _get(session, user, distillation_id)
    if action == "cancel":
        distillations.cancel(session, run)
    elif action == "resume":
        distillations.resume(session, user, run)
    elif action == "delete":
        distillations.delete(session, run)
        flash(request, gettext("Deleted the run. Its dataset stays."))
        return RedirectResponse("/distillations", status_code=303)
    else:
        message = gettext("A distillation has no action %(action)s.", action=action[:40])
        raise BadField(message, hint=gettext("It can be cancelled, resumed and deleted."), param="action")
    return RedirectResponse(f"/distillations/{distillation_id}", status_code=303)
