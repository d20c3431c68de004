"""The models that graders ask: judges, reward models, and encoders for embeddings. They are resolved once, in the project of whoever grades, and asked
by the path that every answer takes: a worker of this studio, or a registered external server."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from app.errors import StudioError
from app.graders import Ask, EmbedAsk, GradeError, Grader, JudgeAsk, Reply
from app.inference import external_servers, playground
from app.inference.answer_fold import AnswerFold
from app.inference.client import raise_broke, stream
from app.inference.protocol import Done, Embedded, Entry, ExternalEngine, GenerateRequest, Rewarded, Sampling, StreamError
from app.kit.token_meter import TokenMeter
from app.models import asked_models
from app.models import service as models
from app.models.service import Resolved
from app.spec import SILENT, AskedModel, ModelRef
from app.tables import Model, User

SECONDS = 120.0
"""Time limit of one question to a judge."""
MAX_TEXT = 200_000  # characters that an encoder is given


class ResolvedJudge(BaseModel):
    """A model that a grader asks, as it was when it was resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # in the grader; empty is the encoder of the project
    model: ModelRef
    engine: ExternalEngine | None = None


def resolve(session: Session, user: User, graders: Iterable[Grader]) -> tuple[ResolvedJudge, ...]:
    """The models that these graders ask. Raises NotFound, Conflict and BadField, as asking them would."""
    return tuple(_resolved(session, name, found) for name, found in asked_models.resolve(session, user, graders).items())


def writer(session: Session, user: User, name: str) -> ResolvedJudge:
    """A model that answers in a trial. Raises as `resolve` does, naming the field `model`."""
    return _resolved(session, name, asked_models.writer(session, user, name))


def pinned(session: Session, asked: AskedModel) -> ResolvedJudge:
    """A model that a job asks: with the weights that it had when the job was created, and the server that answers for it now."""
    model = session.get(Model, asked.model.id)
    with contextlib.suppress(StudioError):  # a part of it is gone, and asking it will say so
        if model is not None and models.reference(session, model) == asked.model:
            return _resolved(session, asked.name, Resolved(model, None, asked.model))
    return ResolvedJudge(name=asked.name, model=asked.model)


def _resolved(session: Session, name: str, found: Resolved) -> ResolvedJudge:
    writes = found.ref.kind not in SILENT
    return ResolvedJudge(name=name, model=found.ref, engine=external_servers.engine_of(session, found) if writes else None)


Hear = Callable[[Sequence[Entry]], None]
Send = Callable[[GenerateRequest, Hear], None]
"""Runs one request to its end, and passes on its entries as they come."""


def answers(owner: uuid.UUID, judges: Sequence[ResolvedJudge], send: Send, meter: TokenMeter) -> Callable[[Ask], Reply]:
    """What `graders.grade` asks models through. `meter` gets the tokens of each question, also of one that broke off."""
    known = {judge.name: judge for judge in judges}

    def answer(ask: Ask) -> Reply:
        judge = known.get(ask.model or "")
        if judge is None:
            raise GradeError("model_grader_server_error", f"The model {ask.model} was not resolved.")
        request = request_of(owner, judge, ask)
        entries: list[Entry] = []
        try:
            send(request, entries.extend)
        finally:
            meter.add(*_tokens(entries))
        for entry in entries:
            if isinstance(entry, StreamError):
                raise_broke(entry)
        return _reply(judge, entries)

    return answer


def _tokens(entries: Sequence[Entry]) -> tuple[int, int]:
    """(tokens read, tokens written) of a request, as far as it came."""
    embedded = sum(entry.tokens for entry in entries if isinstance(entry, Embedded | Rewarded))
    usage = AnswerFold.of(entries).usage()
    return embedded + usage["prompt_tokens"], usage["completion_tokens"]


def request_of(owner: uuid.UUID, judge: ResolvedJudge, ask: Ask) -> GenerateRequest:
    """The request that a question is."""
    if isinstance(ask, JudgeAsk):
        return _question(owner, judge, ask)
    given: dict[str, Any] = {}
    if isinstance(ask, EmbedAsk):
        given["embed"] = [playground.readable(text[:MAX_TEXT]) for text in ask.texts]
    else:
        given["reward"] = [_readable(ask.messages)]
    return GenerateRequest(id=uuid.uuid4(), owner=owner, model=judge.model, sampling=Sampling(), seed=0, seconds=SECONDS, **given)


def _readable(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": one["role"], "content": playground.readable(one["content"])} for one in messages]


def _question(owner: uuid.UUID, judge: ResolvedJudge, ask: JudgeAsk) -> GenerateRequest:
    sampling = Sampling(temperature=ask.temperature, top_p=ask.top_p, max_tokens=ask.max_tokens, seed=ask.seed)
    said = _readable(ask.messages)
    prompt: dict[str, Any] = {"messages": said}
    if judge.model.kind == "generic" and judge.engine is None:  # it has no turns
        prompt = {"prompt": "\n\n".join(one["content"] for one in said) + "\n\n"}
    return GenerateRequest(
        id=uuid.uuid4(), owner=owner, model=judge.model, engine=judge.engine, bulk=True, sampling=sampling, seed=ask.seed, seconds=SECONDS, **prompt
    )  # fmt: skip


def _reply(judge: ResolvedJudge, entries: Sequence[Entry]) -> Reply:
    embedded = next((entry for entry in entries if isinstance(entry, Embedded)), None)
    if embedded is not None:
        return Reply(vectors=tuple(map(tuple, embedded.vectors)), tokens=embedded.tokens, model=judge.model.name)
    rewarded = next((entry for entry in entries if isinstance(entry, Rewarded)), None)
    if rewarded is not None:
        return Reply(reward=rewarded.rewards[0], tokens=rewarded.tokens, model=judge.model.name)
    fold = AnswerFold.of(entries)
    done = next((entry for entry in entries if isinstance(entry, Done)), None)
    text = fold.choices[0].text if 0 in fold.choices else ""
    return Reply(text=text, tokens=done.prompt_tokens + done.completion_tokens if done else 0, model=judge.model.name)


async def listen(request: GenerateRequest, hear: Hear) -> None:
    """Run one request to its end."""
    async for entries in stream(request):
        hear(entries)


def send_and_wait(request: GenerateRequest, hear: Hear) -> None:
    """The same from a process without an event loop."""
    asyncio.run(listen(request, hear))
