"""Advice: which method to use for this model and data, and whether to fine-tune at all. A page and `POST /v1/advice`."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Body, Form, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app import schemas
from app.datasets import service as datasets
from app.db import Db
from app.errors import StudioError
from app.evaluation import advice
from app.evaluation import service as evaluations
from app.jobs import preselection
from app.jobs.request import bad_field
from app.kit import ids
from app.languages import mark
from app.models import first_model
from app.models import service as models
from app.run_settings import RunSettings
from app.schemas.openapi import answers, takes
from app.strategies import STRATEGIES
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.templates import render

pages = APIRouter()
MENU = (MenuPage(mark("Advice"), "/jobs/advice", "training", 40),)
api = APIRouter(prefix="/v1")
Json = dict[str, Any]


class AdviceOrder(BaseModel):
    """The model, and the data: by the dataset's id or by the file it was made from."""

    model_config = ConfigDict(extra="forbid")

    model: str
    dataset_id: str | None = None
    training_file: str | None = None
    measure: bool = Field(False, description="Test the base model on validation rows, zero-shot and few-shot, if that was not done yet.")
    run: dict[str, Any] = Field(default_factory=dict, description="Run settings the costs are estimated with.")


@api.post("/advice", operation_id="create_advice", responses=answers(schemas.StrategyAdvice, 404, 409), openapi_extra=takes(AdviceOrder))
def give_advice(session: Db, user: CurrentUser, body: Annotated[Json, Body()]) -> Json:
    """Which method to use for this model and data on this machine, and whether to fine-tune at all."""
    try:
        order = AdviceOrder.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise bad_field(error) from None
    try:
        RunSettings.model_validate(order.run)
    except ValidationError as error:
        raise bad_field(error, "run") from None
    dataset = evaluations.find_dataset(session, user, order.dataset_id, order.training_file, "training_file")
    if order.measure:
        advice.measure(session, user, order.model, dataset)
    found = advice.advise(session, user, order.model, dataset, order.run)
    return {"object": "advice", **found.model_dump(mode="json", exclude={"shown"})}


@pages.get("/jobs/advice")
def advice_page(request: Request, user: CurrentUser, session: Db, dataset: str = "", model: str = "") -> Response:
    """Without parameters, the model and dataset that were used last are selected."""
    usable = [m for m in models.offered(session, user, model) if m.status == "ready"]
    sets = [d for d in datasets.offered(session, user, dataset) if d.status == "ready"]
    chosen, data = preselection.pair(session, user, usable, sets, model, dataset)
    found, fault = None, None
    if chosen is not None and data is not None:
        try:
            found = advice.advise(session, user, chosen.name, data)
        except StudioError as error:
            fault = error
    order_url = (
        f"/jobs/new?{urlencode({'model': chosen.name, 'dataset': ids.public(ids.DATASET, data.id)})}" if chosen and data else "/jobs/new"
    )
    return render(
        request, "advice.html", models=usable, datasets=sets, model=chosen, dataset=data, found=found, fault=fault, ids=ids,
        strategies=STRATEGIES, by_name={a.strategy: a for a in found.ranking} if found else {}, order_url=order_url, offer=None if usable else first_model.offer(session, user),
    )  # fmt: skip


@pages.post("/jobs/advice")
def measure(user: CurrentUser, session: Db, model: Annotated[str, Form()], dataset: Annotated[str, Form()]) -> Response:
    """Evaluate the base model, so that the recommendation can use the result."""
    advice.measure(session, user, model, datasets.get(session, user, ids.parse(ids.DATASET, dataset, param="dataset")))
    return RedirectResponse(f"/jobs/advice?{urlencode({'model': model, 'dataset': dataset})}#measured", status_code=303)
