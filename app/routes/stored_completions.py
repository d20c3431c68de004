"""Chat completions that were asked for with `store`, as OpenAI's clients list, retrieve, change and delete them; and a dataset of them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from app import schemas
from app.db import Db
from app.inference import stored
from app.kit import ids
from app.schemas.openapi import answers
from app.tables import Exchange
from app.web.auth import CurrentUser
from app.web.pagination import METADATA, After, Limit, Order, page, with_metadata

api = APIRouter(prefix="/v1")
Json = dict[str, Any]
ONE = "/chat/completions/{completion_id}"


@api.get(
    "/chat/completions",
    operation_id="list_chat_completions",
    responses=answers(schemas.page_of(schemas.ChatCompletion)),
    openapi_extra={"parameters": [METADATA]},
)
def list_completions(
    request: Request,
    session: Db,
    user: CurrentUser,
    model: Annotated[str | None, Query(max_length=512, description="As it was named in the request.")] = None,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> Json:
    """Stored chat completions. `metadata[key]=value` filters by metadata, with all given pairs; `metadata=null` selects those without."""
    query = with_metadata(stored.of_model(stored.mine(user, stored.COMPLETION), model), Exchange.user_metadata, request)
    return page(query, after, limit, order, stored.completion_json, session=session, key=ids.parse_completion)


@api.get(ONE, operation_id="retrieve_chat_completion", responses=answers(schemas.ChatCompletion))
def retrieve(session: Db, user: CurrentUser, completion_id: str) -> Json:
    """One stored chat completion, as it was answered."""
    return stored.completion_json(_get(session, user, completion_id))


@api.post(ONE, operation_id="update_chat_completion", responses=answers(schemas.ChatCompletion))
def update(session: Db, user: CurrentUser, completion_id: str, order: schemas.ChangeStored) -> Json:
    """Replace the metadata of a stored chat completion."""
    found = _get(session, user, completion_id)
    if "metadata" in order.model_fields_set:
        stored.set_metadata(session, found, order.metadata)
    return stored.completion_json(found)


@api.delete(ONE, operation_id="delete_chat_completion", responses=answers(schemas.Deleted))
def delete(session: Db, user: CurrentUser, completion_id: str) -> Json:
    """Delete a stored chat completion, with the record of its call."""
    stored.delete(session, _get(session, user, completion_id))
    return {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}


@api.get(f"{ONE}/messages", operation_id="list_chat_completion_messages", responses=answers(schemas.page_of(schemas.StoredMessage)))
def list_messages(session: Db, user: CurrentUser, completion_id: str, after: After = None, limit: Limit = 20, order: Order = "asc") -> Json:
    """The messages that were sent for a stored chat completion; the answer is in its choices."""
    return page(stored.messages_json(_get(session, user, completion_id))[::-1], after, limit, order)


@api.post("/datasets/stored_completions", operation_id="create_stored_completions_dataset", responses=answers(schemas.StoredRows, 409))
def make_dataset(session: Db, user: CurrentUser, order: schemas.CreateStoredDataset) -> Json:
    """Create a chat dataset of stored chat completions: the messages of each, with its first choice as the answer.

    Answers that are empty, or were cut off by their length, are excluded."""
    dataset, rows, excluded = stored.make_dataset(session, user, order, order.name)
    told = {"id": ids.public(ids.DATASET, dataset.id), "object": "dataset", "name": dataset.name, "status": dataset.status}
    return {**told, "rows": rows, "excluded": excluded}


def _get(session: Db, user: CurrentUser, text: str) -> Exchange:
    return stored.get_completion(session, user, ids.parse_completion(text))
