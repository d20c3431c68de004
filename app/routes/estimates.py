"""`POST /v1/estimates`: what an order would take on this machine, from the same body that would create the job."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body

from app import orders
from app.accounts import CurrentUser
from app.db import Db
from app.errors import Conflict

api = APIRouter(prefix="/v1")
Json = dict[str, Any]


@api.post("/estimates")
def estimate(session: Db, user: CurrentUser, body: Annotated[Json, Body()]) -> Json:
    spec = orders.build_spec(session, user, orders.read_order(body))
    found = orders.estimate_of(session, spec)
    if found is None:
        raise Conflict("The dataset is still being read.", way_out="Ask again in a moment.", param="training_file", code="still_reading")
    return found
