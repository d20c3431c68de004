"""`/v1/votes` and the arena: blind pairwise votes."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from app import formats, schemas
from app.datasets import service as datasets
from app.db import Db, transaction
from app.errors import StudioError
from app.inference import playground, votes
from app.inference.answer_fold import AnswerFold
from app.inference.protocol import Sampling
from app.kit import ids
from app.languages import mark
from app.schemas.chat import Message
from app.schemas.openapi import answers
from app.tables import User
from app.web import templates as web_templates
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.pagination import After, Limit, page
from app.web.renamed import page_moved
from app.web.streaming import collect, later, left, stream_or_error

pages = APIRouter()
MENU = (MenuPage(mark("Blind A/B"), "/playground/arena", "evaluation", 30),)
api = APIRouter(prefix="/v1/votes")
Json = dict[str, Any]


class NewVote(BaseModel):
    """A vote cast elsewhere: the conversation, two models with an answer each, and the preferred one."""

    models: list[str] = Field(min_length=2, max_length=2)
    messages: list[Message] = Field(min_length=1, max_length=2048)
    answers: list[str] = Field(min_length=2, max_length=2)
    choice: int = Field(ge=0, le=2, description="1 the first answer, 2 the second, 0 a tie")
    edited: str | None = Field(None, max_length=votes.MAX_EDIT_LENGTH)


@api.post("", operation_id="create_vote", responses=answers(schemas.Vote, 404, 409))
def create(session: Db, user: CurrentUser, body: NewVote) -> Json:
    """Store a vote that was cast elsewhere."""
    messages = [message.plain(i) for i, message in enumerate(body.messages)]
    return votes.to_json(votes.add(session, user, body.models, messages, body.answers, body.choice, body.edited))


@api.get("", operation_id="list_votes", responses=answers(schemas.page_of(schemas.Vote)))
def list_votes(session: Db, user: CurrentUser, after: After = None, limit: Limit = 20) -> Json:
    """Votes, newest first."""
    return page(votes.mine(user), after, limit, "desc", votes.to_json, session=session, key=ids.parse_vote)


@api.get("/scores", operation_id="list_vote_scores", responses=answers(schemas.VoteScores))
def scores(session: Db, user: CurrentUser) -> Json:
    """Every pair of models that was voted on, and whether one is better with statistical significance."""
    found = votes.scores(session, user)
    return {"object": "list", "data": [_score(s) for s in found]}


def _score(s: votes.Score) -> Json:
    more = {"votes": s.votes, "decided": s.decided, "rate": s.rate, "interval": list(s.interval), "p": s.p, "verdict": s.says}
    return {**s._asdict(), **more}


class NewDataset(BaseModel):
    kind: str = Field("preference", pattern="^(preference|chat)$")


@api.post("/dataset", operation_id="create_vote_dataset", responses=answers(schemas.VoteDataset, 409))
def make_dataset(session: Db, user: CurrentUser, body: NewDataset) -> Json:
    """Create a preference dataset from the votes."""
    dataset = votes.make_dataset(session, user, body.kind)
    return {"id": ids.public(ids.DATASET, dataset.id), "object": "dataset", "name": dataset.name, "status": dataset.status}


# The page -------------------------------------------------------------------------------------------------------------


page_moved(pages, "/playground/ab", "/playground/arena")
page_moved(pages, "/playground/ab/{vote_id}", "/playground/arena/{vote_id}")


@pages.get("/playground/arena")
def arena(request: Request, session: Db, user: CurrentUser, models: Annotated[list[str] | None, Query()] = None) -> Response:
    return web_templates.render(request, "arena.html", **_context(session, user, models or []))


def _context(session: Any, user: User, models: list[str], **more: Any) -> Json:
    asking = [d for d in datasets.offered(session, user) if d.status == "ready" and d.good_rows and formats.asks(d.format)]
    context = {
        "choices": playground.choices(session, user, *models), "names": [*models, "", ""][:2], "scores": votes.scores(session, user),
        "datasets": asking, "dataset": "", "public": ids.public, "vote": None, "prompt": "", "error": None,
    }  # fmt: skip
    return context | more


@pages.post("/playground/arena")
async def ask(
    request: Request,
    user: CurrentUser,
    prompt: Annotated[str, Form(max_length=100_000)] = "",
    models: Annotated[list[str] | None, Form()] = None,
    dataset: Annotated[str, Form(max_length=100)] = "",
    max_tokens: Annotated[int, Form(ge=1, le=4096)] = 96,
) -> Response:
    """Send the prompt to both models, wait for both answers, and show them without their names. Without a prompt, one is taken
    from a row of the dataset."""
    names, prompt = models or [], playground.readable(prompt.replace("\r\n", "\n"))
    sampling = Sampling(max_tokens=max_tokens)
    try:
        vote_id, asked = await run_in_threadpool(_begin, user, names, prompt, dataset, sampling)
    except StudioError as error:
        return await run_in_threadpool(_again, request, user, names, prompt, dataset, error)
    said = await collect(request, [stream_or_error(one.request) for one in asked])
    if said is None:
        later(lambda: _forget(user, vote_id))
        return left()
    heard = [AnswerFold.of(entries) for entries in said]
    broken = next((h.error for h in heard if h.error), None)
    await run_in_threadpool(_answered, user, vote_id, asked, heard, sampling)
    if broken:
        fault = StudioError(broken["message"], hint=broken.get("hint", ""))
        fault.status = 503
        return await run_in_threadpool(_again, request, user, names, prompt, dataset, fault)
    return RedirectResponse(f"/playground/arena/{ids.public(ids.VOTE, vote_id)}", status_code=303)


def _begin(user: User, names: list[str], prompt: str, dataset: str, sampling: Sampling) -> tuple[uuid.UUID, list[Any]]:
    with transaction() as session:
        source = datasets.get(session, user, ids.parse(ids.DATASET, dataset, param="dataset")) if dataset and not prompt.strip() else None
        messages = votes.draw(source) if source else [{"role": "user", "content": prompt}]
        vote, asked = votes.begin(session, user, names, messages, sampling, source)
        return vote.id, asked


def _answered(user: User, vote_id: uuid.UUID, asked: list[Any], heard: list[AnswerFold], sampling: Sampling) -> None:
    with transaction() as session:
        votes.answered(session, user, vote_id, asked, heard, sampling)


def _forget(user: User, vote_id: uuid.UUID) -> None:
    with transaction() as session:
        votes.forget(session, user, vote_id)


def _again(request: Request, user: User, names: list[str], prompt: str, dataset: str, error: StudioError) -> Response:
    with transaction() as session:
        context = _context(session, user, names, prompt=prompt, dataset=dataset, error=error)
        return web_templates.render(request, "arena.html", status_code=error.status, **context)


@pages.get("/playground/arena/{vote_id}")
def round_page(request: Request, session: Db, user: CurrentUser, vote_id: str) -> Response:
    vote = votes.get(session, user, ids.parse_vote(vote_id))
    drawn = ids.public(ids.DATASET, vote.dataset_id) if vote.dataset_id else ""
    context = _context(session, user, sorted((vote.left_model, vote.right_model)), vote=vote, key=vote_id, dataset=drawn)
    return web_templates.render(request, "arena.html", **context)


@pages.post("/playground/arena/{vote_id}")
def cast(
    session: Db,
    user: CurrentUser,
    vote_id: str,
    choice: Annotated[int, Form()],
    edited: Annotated[str, Form(max_length=votes.MAX_EDIT_LENGTH)] = "",
) -> Response:
    votes.cast(session, votes.get(session, user, ids.parse_vote(vote_id)), choice, edited.replace("\r\n", "\n"))
    return RedirectResponse(f"/playground/arena/{vote_id}", status_code=303)


@pages.post("/playground/arena-dataset")
def learn(session: Db, user: CurrentUser, kind: Annotated[str, Form()]) -> Response:
    dataset = votes.make_dataset(session, user, kind)
    return RedirectResponse(f"/datasets/{ids.public(ids.DATASET, dataset.id)}", status_code=303)
