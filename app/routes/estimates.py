"""`POST /v1/estimates`: the memory, time and steps of a job on this machine, from the body that would create it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body

from app import schemas
from app.datasets import inspections
from app.db import transaction
from app.errors import Conflict
from app.jobs import request as job_request
from app.jobs import spec_builder, split_leakage
from app.schemas.openapi import answers, takes
from app.web.auth import CurrentUser

api = APIRouter(prefix="/v1")
Json = dict[str, Any]
WAIT_SECONDS = 2.0
"""Seconds that a response waits for the leakage check of the split. No database connection is held meanwhile."""


@api.post(
    "/estimates", operation_id="create_estimate", responses=answers(schemas.JobEstimate, 404, 409), openapi_extra=takes(schemas.CreateJob)
)
def estimate(user: CurrentUser, body: Annotated[Json, Body()]) -> Json:
    """The memory, time and steps of a job on this machine, from the body that would create it."""
    with transaction() as session:
        order = job_request.read_order(body)
        spec = spec_builder.build_spec(session, user, order)
        asked = split_leakage.ask(session, spec)
    if asked is not None:
        inspections.wait(asked.id, WAIT_SECONDS)
    with transaction() as session:
        found = spec_builder.estimate_of(session, spec, order.resources)
    if found is None:
        raise Conflict("The dataset is still being read.", hint="Ask again in a moment.", param="training_file", code="still_reading")
    return found
