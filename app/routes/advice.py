"""Advice: which strategy to pick for this model and data. A page and `POST /v1/advice`."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app import advice, datasets, ids, models
from app.accounts import CurrentUser
from app.db import Db
from app.errors import BadField, StudioError
from app.orders import bad_field
from app.spec import RunSettings
from app.strategies import STRATEGIES
from app.tables import Dataset
from app.web import render

pages = APIRouter()
api = APIRouter(prefix="/v1")
Json = dict[str, Any]


class AdviceOrder(BaseModel):
    """Which model, and which data: by the dataset's id or by the file it was made from."""

    model_config = ConfigDict(extra="forbid")

    model: str
    dataset_id: str | None = None
    training_file: str | None = None
    run: dict[str, Any] = Field(default_factory=dict, description="Run settings the costs are estimated with.")


@api.post("/advice")
def give_advice(session: Db, user: CurrentUser, body: Annotated[Json, Body()]) -> Json:
    try:
        order = AdviceOrder.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise bad_field(error) from None
    try:
        RunSettings.model_validate(order.run)
    except ValidationError as error:
        raise bad_field(error, "run") from None
    dataset = _dataset(session, user, order)
    found = advice.advise(session, user, order.model, dataset, order.run)
    return {"object": "advice", **found.model_dump(mode="json", exclude={"shown"})}


def _dataset(session: Db, user: CurrentUser, order: AdviceOrder) -> Dataset:
    if order.dataset_id:
        return datasets.get(session, user, ids.parse(ids.DATASET, order.dataset_id, param="dataset_id"))
    if order.training_file:
        return datasets.for_file(session, user, ids.parse(ids.FILE, order.training_file, param="training_file"))
    raise BadField("No data was named.", way_out="Send dataset_id or training_file.", param="dataset_id", code="missing_required_parameter")


@pages.get("/jobs/advice")
def advice_page(request: Request, user: CurrentUser, session: Db, dataset: str = "", model: str = "") -> Response:
    """Without a choice the first model and dataset that are ready are taken."""
    usable = [m for m in models.list_(session, user) if m.status == "ready"]
    sets = [d for d in datasets.list_(session, user) if d.status == "ready"]
    chosen = next((m for m in usable if model in (m.name, ids.public(ids.MODEL, m.id))), usable[0] if usable and not model else None)
    data = next((d for d in sets if ids.public(ids.DATASET, d.id) == dataset), sets[0] if sets and not dataset else None)
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
        strategies=STRATEGIES, order_url=order_url,
    )  # fmt: skip
