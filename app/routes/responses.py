"""`/v1/responses`, as OpenAI's clients call it: a translation of chat completions, which answers by the same way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from app import schemas
from app.db import Db, transaction
from app.errors import BadField, StudioError
from app.inference import stored
from app.inference.protocol import Entry, Logprob, Sampling
from app.inference.responses import ResponseFold, as_messages
from app.kit import ids
from app.kit.json_safe import storable
from app.routes.chat import Call, ChatWire
from app.schemas import tools
from app.schemas.openapi import answers
from app.schemas.responses import LOGPROBS, ResponseBody
from app.tables import Exchange, User
from app.web.auth import CurrentUser
from app.web.pagination import After, Limit, Order, page

api = APIRouter(prefix="/v1/responses")
Json = dict[str, Any]
PARAMS = {"messages": "input", "response_format": "text.format", "reasoning_effort": "reasoning.effort"}
"""What a field of chat completions is called here."""


@api.post("", operation_id="create_response", responses=answers(schemas.Response, 404, 409, 422, events=schemas.ResponseEvent))
async def create(request: Request, body: ResponseBody, user: CurrentUser) -> Response:
    """The answer to a text, to items or to what follows an earlier response, whole or as server-sent events."""
    try:
        call = await run_in_threadpool(_call, user, body)
        return await call.respond(request, streamed=bool(body.stream))
    except StudioError as fault:
        fault.param = _renamed(fault.param)
        raise


def _call(user: User, body: ResponseBody) -> ResponseCall:
    if body.top_logprobs and LOGPROBS not in (body.include or ()):
        raise BadField(f"top_logprobs needs {LOGPROBS} in include.", param="top_logprobs")
    sampling = body.sampling(
        max_tokens=body.max_output_tokens, json_schema=body.text.format.schema_of(),
        logprobs=LOGPROBS in (body.include or ()), top_logprobs=body.top_logprobs or 0,
    )  # fmt: skip
    order = tools.order_of([tool.as_tool() for tool in body.tools or []], body.choice(), body.parallel_tool_calls)
    items = [storable(item.as_item()) for item in body.input]
    before = _before(user, body.previous_response_id)
    messages = as_messages([*((before.stored or {})["output"] if before else ()), *items], before.messages or () if before else ())
    system = [{"role": "system", "content": storable(body.instructions)}] if body.instructions else []
    effort = body.reasoning.effort if body.reasoning else None
    prompt = {"messages": [*system, *messages], "tools": order.tools, "tool_use": order.use, "effort": effort, "split": True}
    record = {"messages": messages, "labels": body.labels(), "user_metadata": body.metadata, "tools": order.tools}
    return ResponseCall(user, sampling, prompt, record, storable(body.echoed()), items)


def _before(user: User, text: str | None) -> Exchange | None:
    """The response that this one goes on from. Raises NotFound."""
    if text is None:
        return None
    with transaction() as session:
        return stored.get_response(session, user, ids.parse(ids.RESPONSE, text, param="previous_response_id"), "previous_response_id")


def _renamed(param: str | None) -> str | None:
    """The field of this API that a field of chat completions was made of."""
    head, dot, rest = (param or "").replace(".function.", ".").partition(".")
    return PARAMS.get(head, head) + dot + rest if head else None


class ResponseCall(Call):
    """One call, answered as a response."""

    source = stored.RESPONSE

    def __init__(self, user: User, sampling: Sampling, prompt: Json, record: Json, echoed: Json, items: Sequence[Json]) -> None:
        self.chat, self.items = ChatWire(echoed["model"]), items
        super().__init__(self.chat, user, sampling, [prompt], record, store=echoed["store"])
        head = {"id": ids.public(ids.RESPONSE, self.key), "object": "response", "created_at": int(time.time()), "status": "in_progress"}
        empty = {"background": False, "completed_at": None, "error": None, "incomplete_details": None, "usage": None}
        self.fold = ResponseFold({**head, **empty, **echoed, "output": []}, self._spelt)
        self.last_events: list[bytes] | None = None

    def _spelt(self, logprobs: Sequence[Logprob]) -> list[Json]:
        found = self.chat.logprobs(list(logprobs)) if self.sampling.logprobs else None
        return found["content"] if found else []

    def _hear(self, place: int, entries: list[Entry]) -> None:
        super()._hear(place, entries)
        self.fold.take(entries)

    def _answer(self) -> Json:
        if self.last_events is None:
            self.last_events = self.fold.end(self._usage(), self._proof(), int(time.time()))
        return self.fold.response

    def _kept(self) -> Json:
        return {**self._answer(), "input": self.items}

    def _chunks(self, place: int, entries: list[Entry], usage: bool) -> list[bytes]:
        first = self.fold.begin() if self.fold.sequence == 0 else []
        super()._hear(place, entries)
        return first + self.fold.take(entries)

    def _last_chunks(self, usage: bool) -> list[bytes]:
        self._answer()
        return self.last_events or []

    def _failure(self, fault: StudioError) -> list[bytes]:
        return self.fold.fail(fault.message)


# What is stored -------------------------------------------------------------------------------------------------------


@api.get("/{response_id}", operation_id="retrieve_response", responses=answers(schemas.Response))
def retrieve(request: Request, session: Db, user: CurrentUser, response_id: str) -> Json:
    """One stored response, as it was answered."""
    _refuse_query(request, "stream", "starting_after", "include", "include[]", "include_obfuscation")
    return stored.response_json(_get(session, user, response_id))


@api.delete("/{response_id}", operation_id="delete_response", responses=answers(schemas.Deleted))
def delete(session: Db, user: CurrentUser, response_id: str) -> Json:
    """Delete a stored response, with the record of its call. Responses that went on from it have all of its conversation."""
    stored.delete(session, _get(session, user, response_id))
    return {"id": response_id, "object": "response", "deleted": True}


@api.get("/{response_id}/input_items", operation_id="list_response_input_items", responses=answers(schemas.page_of(schemas.ListedItem)))
def list_input_items(
    request: Request, session: Db, user: CurrentUser, response_id: str, after: After = None, limit: Limit = 20, order: Order = "desc"
) -> Json:
    """The items that were sent for a stored response, without those of the responses before it."""
    _refuse_query(request, "include", "include[]")
    items = (_get(session, user, response_id).stored or {})["input"]
    return page(items[::-1], after, limit, order)


def _get(session: Db, user: User, text: str) -> Exchange:
    return stored.get_response(session, user, ids.parse(ids.RESPONSE, text, param="response_id"))


def _refuse_query(request: Request, *names: str) -> None:
    """Raises BadField for what a stored response does not have: its events and further parts of its items."""
    for name in names:
        if request.query_params.get(name, "").lower() not in ("", "false"):
            name = name.removesuffix("[]")
            raise BadField(f"{name} is not supported for a stored response.", hint="Omit it.", param=name, code="unsupported_parameter")
