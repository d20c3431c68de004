"""`POST /v1/next_tokens`, and the page that compares next-token distributions of several models, and the log-probabilities of a
text."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from app import schemas
from app.db import transaction
from app.errors import StudioError
from app.inference import next_tokens, playground, reading
from app.inference.client import stream
from app.inference.next_tokens import ModelTokens
from app.inference.playground import MAX_PANES, PendingAnswer
from app.inference.protocol import MAX_NEXT
from app.languages import mark
from app.schemas.openapi import answers
from app.tables import User
from app.web import templates as web_templates
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.renamed import page_moved
from app.web.streaming import collect, left, stream_or_error

pages = APIRouter()
MENU = (MenuPage(mark("Next token"), "/playground/next-tokens", "playground", 20),)
api = APIRouter(prefix="/v1")
SHOWN = 10


class NextTokens(BaseModel):
    models: list[str] = Field(min_length=1, max_length=MAX_PANES)
    prompt: str = Field(min_length=1, max_length=next_tokens.MAX_TEXT_LENGTH)
    top_k: int = Field(10, ge=1, le=MAX_NEXT)
    prompt_tokens: bool = Field(False, description="Also say how likely each token of the prompt was.")


def _ask(user: User, models: list[str], prompt: str, top_k: int) -> list[PendingAnswer]:
    with transaction() as session:
        return next_tokens.ask(session, user, models, prompt, top_k)


@api.post(
    "/next_tokens",
    response_model=None,
    operation_id="predict_next_tokens",
    responses=answers(schemas.NextTokensOfModels, 404, 409, 422),
)
async def next_tokens_of(request: Request, body: NextTokens, user: CurrentUser) -> Response | dict[str, Any]:
    """The most likely next tokens of several models, and the probability of each token of the text."""
    asked = await run_in_threadpool(_ask, user, body.models, body.prompt, body.top_k)
    heard = await collect(request, [stream(one.request) for one in asked])
    if heard is None:
        return left()
    await run_in_threadpool(reading.count, user, heard, encoded=False)
    views = [next_tokens.view(one, said) for one, said in zip(asked, heard, strict=True)]
    return {"object": "list", "data": [next_tokens.to_json(view, body.prompt_tokens) for view in views]}


page_moved(pages, "/playground/tokens", "/playground/next-tokens")


@pages.get("/playground/next-tokens")
async def next_tokens_page(
    request: Request,
    user: CurrentUser,
    models: Annotated[list[str] | None, Query()] = None,
    text: Annotated[str, Query()] = "",
    top_k: Annotated[int, Query()] = SHOWN,
) -> Response:
    """The query string holds the whole state, so a view can be linked; each likely token links to the text continued by it."""
    names = list(dict.fromkeys(name for name in models or [] if name))
    views: list[ModelTokens] = []
    error: StudioError | None = None
    text = text.replace("\r\n", "\n")
    if text:
        try:
            asked = await run_in_threadpool(_ask, user, names, text, top_k)
            heard = await collect(request, [stream_or_error(one.request) for one in asked])
            if heard is None:
                return left()
            await run_in_threadpool(reading.count, user, heard, encoded=False)
            views = [next_tokens.view(one, said) for one, said in zip(asked, heard, strict=True)]
        except StudioError as fault:
            error = fault
    return await run_in_threadpool(_page, request, user, names, text, top_k, views, error)


def _page(
    request: Request, user: User, names: list[str], text: str, top_k: int, views: list[ModelTokens], error: StudioError | None
) -> Response:
    with transaction() as session:
        choices = playground.choices(session, user, *names)
    if not names:
        names = [option.name for group in choices.values() for option in group][:1]
    said = [view for view in views if not view.error]
    context = {
        "choices": choices, "names": names, "most_panes": MAX_PANES, "text": text, "top_k": top_k, "views": views, "error": error,
        "probability": next_tokens.probability, "shade": next_tokens.shade, "rows": next_tokens.side_by_side(said), "said": said,
        "same": next_tokens.same_tokens(said) if said else False,
    }  # fmt: skip
    return web_templates.render(request, "next_tokens.html", status_code=error.status if error else 200, **context)
