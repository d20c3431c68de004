"""`/v1/evaluations`, the list page, and the page of one evaluation: a model scored on a dataset, without training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from app import objectives, saved_graders, schemas
from app.datasets import service as datasets
from app.db import Db
from app.errors import BadField, StudioError
from app.evaluation import service as evaluations
from app.evaluation import suited, train_queue
from app.graders import GRADERS
from app.kit import forms, ids
from app.languages import gettext, mark
from app.models import first_model, interpolation
from app.models import service as models
from app.schemas.openapi import answers, takes
from app.tables import Evaluation
from app.views import evaluation as evaluation_view
from app.views import scores as score_view
from app.views import waiting
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.pagination import After, Limit, page
from app.web.templates import flash, render

pages = APIRouter()
MENU = (MenuPage(mark("Scores"), "/evaluations", "evaluation", 10),)
api = APIRouter(prefix="/v1/evaluations")
Json = dict[str, Any]
SHOWN = 50
FIELDS = {"model": "model", "dataset_id": "dataset", "rows": "rows", "part": "part"}
"""Fields of a request → inputs of the form."""


# The API --------------------------------------------------------------------------------------------------------------


@api.post(
    "",
    operation_id="create_evaluation",
    responses=answers(schemas.Evaluation, 404, 409),
    openapi_extra=takes(evaluations.EvaluationRequest),
)
def create(session: Db, user: CurrentUser, body: Annotated[Json, Body()]) -> Json:
    """Queue an evaluation of a model on a dataset. Where an equal one has not ended, that one is returned."""
    return train_queue.evaluation_json(session, evaluations.create(session, user, evaluations.read_order(body)))


@api.get("", operation_id="list_evaluations", responses=answers(schemas.page_of(schemas.Evaluation)))
def list_evaluations(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Evaluations, newest first."""
    return page(
        evaluations.mine(user),
        after,
        limit,
        "desc",
        partial(train_queue.evaluation_json, session),
        session=session,
        key=ids.parse_evaluation,
    )


@api.get("/{evaluation_id}", operation_id="retrieve_evaluation", responses=answers(schemas.Evaluation))
def retrieve(session: Db, user: CurrentUser, evaluation_id: str) -> Json:
    """One evaluation, with its result once it has succeeded."""
    return train_queue.evaluation_json(session, evaluations.get(session, user, ids.parse_evaluation(evaluation_id)))


@api.post("/{evaluation_id}/cancel", operation_id="cancel_evaluation", responses=answers(schemas.Evaluation, 409))
def cancel(session: Db, user: CurrentUser, evaluation_id: str) -> Json:
    """Cancel an evaluation. One that has ended is unchanged."""
    return train_queue.evaluation_json(session, evaluations.cancel(session, user, ids.parse_evaluation(evaluation_id)))


@api.delete("/{evaluation_id}", operation_id="delete_evaluation", responses=answers(schemas.Deleted, 409))
def delete(session: Db, user: CurrentUser, evaluation_id: str) -> Json:
    """Delete an evaluation. Refused while it has not ended."""
    evaluations.delete(session, user, ids.parse_evaluation(evaluation_id))
    return {"id": evaluation_id, "object": "evaluation", "deleted": True}


# Pages ----------------------------------------------------------------------------------------------------------------


def url(evaluation: Evaluation) -> str:
    return f"/evaluations/{ids.public(ids.EVALUATION, evaluation.id)}"


@pages.get("/evaluations")
def list_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    model: str = "",
    dataset: str = "",
    shown: Annotated[int, Query(ge=1, le=5000)] = SHOWN,
) -> Response:
    return _list_page(request, session, user, {"model": model, "dataset": dataset}, shown)


def _list_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    typed: dict[str, str],
    shown: int = SHOWN,
    fault: StudioError | None = None,
    graders: Sequence[str] = (),
) -> Response:
    found = evaluations.list_(session, user, limit=shown + 1)
    usable = [
        m
        for m in models.offered(session, user, typed.get("model"))
        if m.status == "ready" and not m.answered_elsewhere and m.kind not in ("encoder", "reward")
    ]
    scorable = [d for d in datasets.with_rows(session, user, typed.get("dataset")) if objectives.get(d.task).scored]
    model = next((m for m in usable if typed.get("model") in (m.name, ids.public(ids.MODEL, m.id))), None)
    dataset = next((d for d in scorable if typed.get("dataset") == ids.public(ids.DATASET, d.id)), None)
    if usable and scorable and not (fault and model and dataset):
        if usual := evaluations.usual_pair(session, user, usable, scorable, model, dataset):
            model, dataset = usual
        else:  # the form says why nothing can be scored
            model, dataset = model or usable[0], dataset or scorable[0]
            fault = fault or suited.unfit(model.name, (model.shape or {})["architecture"], model.labels, dataset)
    param = (fault and fault.param) or ""
    return render(
        request,
        "evaluations.html",
        status_code=fault.status if fault else 200,
        rows=evaluation_view.rows(session, found[:shown]),
        moving=any(e.status in evaluations.OPEN for e in found[:shown]),
        more=shown + SHOWN if len(found) > shown else None,
        models=usable,
        datasets=scorable,
        typed={"rows": "500", "part": ""} | typed | {"model": model.name if model else "", "dataset": dataset},
        fault=fault,
        errors=dict.fromkeys(FIELDS.values()) | ({FIELDS[param]: f"{fault.message} {fault.hint}"} if fault and param in FIELDS else {}),
        ids=ids,
        graders=saved_graders.offered(session, user, *graders),
        chosen=graders,
        offer=None if usable else first_model.offer(session, user),
    )


@pages.post("/evaluations")
def order(
    request: Request,
    session: Db,
    user: CurrentUser,
    model: Annotated[str, Form()],
    dataset: Annotated[str, Form()],
    kind: Annotated[str, Form()] = "scores",
    rows: Annotated[str, Form()] = "",
    part: Annotated[str, Form()] = "",
    graders: Annotated[list[str] | None, Form(alias="grader")] = None,
    then: Annotated[str, Form(alias="next")] = "",
) -> Response:
    """Start an evaluation, then redirect to its page, or back to the page that sent the form."""
    body = {"model": model, "dataset_id": dataset, "kind": kind, "rows": _number(rows), "part": part or None, "graders": graders}
    try:
        with session.begin_nested():
            made = evaluations.create(session, user, evaluations.read_order(body))
    except StudioError as fault:
        if then:
            raise
        typed = {"model": model, "dataset": dataset, "rows": rows, "part": part}
        return _list_page(request, session, user, typed, fault=fault, graders=graders or [])
    return RedirectResponse(_local(then) or url(made), status_code=303)


def _number(text: str) -> int | None:
    if not text.strip():
        return None
    number = forms.whole_number(text.strip())
    if number is None:
        message = gettext("“%(text)s” is not a number of rows.", text=text[:20])
        raise BadField(message, hint=gettext("Enter a whole number, or leave it empty."), param="rows")
    return number


def _local(address: str) -> str:
    """The URL to return to if it is one of this studio, else an empty string."""
    return address if re.fullmatch(r"/(jobs|models)/[A-Za-z0-9-]+(\?tab=[a-z]+)?", address) else ""


@pages.get("/evaluations/{evaluation_id}")
def evaluation_page(request: Request, session: Db, user: CurrentUser, evaluation_id: str) -> Response:
    found = evaluations.get(session, user, ids.parse_evaluation(evaluation_id))
    assert found.dataset_id is not None, "what scores a model has a dataset"
    scored = found.result if found.result and found.kind == "scores" else None
    return render(
        request,
        "evaluation.html",
        e=evaluations.to_json(found),
        waiting=waiting.in_words(session, found) if found.status == "queued" else None,
        at=found.created_at,
        model_url=f"/models/{ids.public(ids.MODEL, found.model_id)}",
        dataset_url=f"/datasets/{ids.public(ids.DATASET, found.dataset_id)}",
        view=evaluation_view.view(found) if scored else None,
        grader_titles={name: cls.title for name, cls in GRADERS.items()},
        classes=score_view.view({"tuned": scored.get("scores")}, found.spec["task"]) if scored else None,
        forgot=score_view.forgot(scored.get("forgetting")) if scored else None,
        curve=interpolation.curve(found.result) if found.kind == "blend" else None,
    )


@pages.post("/evaluations/{evaluation_id}/cancel")
def cancel_page(session: Db, user: CurrentUser, evaluation_id: str, then: Annotated[str, Form(alias="next")] = "") -> Response:
    found = evaluations.cancel(session, user, ids.parse_evaluation(evaluation_id))
    return RedirectResponse(_local(then) or url(found), status_code=303)


@pages.post("/evaluations/{evaluation_id}/delete")
def delete_page(request: Request, session: Db, user: CurrentUser, evaluation_id: str) -> Response:
    evaluations.delete(session, user, ids.parse_evaluation(evaluation_id))
    flash(request, gettext("The evaluation was deleted."))
    return RedirectResponse("/evaluations", status_code=303)
