"""`POST /v1/classify`, and the page that shows the class probabilities of several classifiers as bars."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app import schemas
from app.db import transaction
from app.errors import StudioError
from app.inference import classify, reading
from app.inference.classify import Sorting
from app.inference.client import stream
from app.inference.playground import MAX_PANES
from app.inference.protocol import GenerateRequest
from app.languages import mark
from app.schemas.openapi import answers
from app.tables import User
from app.web import templates as web_templates
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.streaming import collect, left, stream_or_error

pages = APIRouter()
MENU = (MenuPage(mark("Classify"), "/playground/classify", "playground", 30),)
api = APIRouter(prefix="/v1")
SHOWN = 12
"""Number of classes whose bars are shown at once; the others are collapsed."""


class ClassifyBody(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str = Field(min_length=1, max_length=512)
    input: str | list[str]


@api.post("/classify", response_model=None, operation_id="classify_texts", responses=answers(schemas.Classifications, 404, 409))
async def classify_texts(request: Request, body: ClassifyBody, user: CurrentUser) -> Response | dict[str, Any]:
    """Probabilities of every label for each text. A text longer than the model's context is truncated, and the result says so."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    (asked,) = await run_in_threadpool(_ask, user, [body.model], texts)
    heard = await collect(request, [stream(asked)])
    if heard is None:
        return left()
    await run_in_threadpool(reading.count, user, heard, encoded=True)
    return classify.to_json(classify.read(body.model, asked, heard[0]))


@pages.get("/playground/classify")
async def classify_page(
    request: Request,
    user: CurrentUser,
    models: Annotated[list[str] | None, Query()] = None,
    text: Annotated[str, Query()] = "",
) -> Response:
    """The query string holds the whole state, so a view can be linked. Each line of the text box is one text."""
    names = list(dict.fromkeys(name for part in models or [] for name in part.split(",") if name))
    texts = [line.strip() for line in text.splitlines() if line.strip()]
    found: list[Sorting] = []
    error: StudioError | None = None
    if texts:
        try:
            asked = await run_in_threadpool(_ask, user, names, texts)
            heard = await collect(request, [stream_or_error(one) for one in asked])
            if heard is None:
                return left()
            await run_in_threadpool(reading.count, user, heard, encoded=True)
            found = [classify.read(*each) for each in zip(names, asked, heard, strict=True)]
        except StudioError as fault:
            error = fault
    return await run_in_threadpool(_page, request, user, names, text, texts, found, error)


def _ask(user: User, names: list[str], texts: list[str]) -> list[GenerateRequest]:
    with transaction() as session:
        return classify.ask(session, user, names, texts)


def _page(
    request: Request, user: User, names: list[str], text: str, texts: list[str], found: list[Sorting], error: StudioError | None
) -> Response:
    with transaction() as session:
        choices = classify.choices(session, user, *names)
        every = [option for group in choices.values() for option in group]
        names = names or [option.name for option in sorted(every, key=lambda option: not option.kept)][:1]
        examples = classify.held_out(session, user, names)
    context = {
        "choices": choices, "names": names, "most_panes": MAX_PANES, "text": text, "texts": texts, "found": found, "error": error,
        "shown": SHOWN, "examples": examples, "titles": {option.name: option.title for option in every},
    }  # fmt: skip
    return web_templates.render(request, "classify.html", status_code=error.status if error else 200, **context)
