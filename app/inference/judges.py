"""The models that graders ask: judges, and encoders for embeddings. They are resolved once, in the project of whoever grades, and asked
by the path that every answer takes: a worker of this studio, or a registered external server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from app.errors import BadField
from app.graders import Ask, EmbedAsk, GradeError, Grader, JudgeAsk, Reply
from app.inference import playground
from app.inference.answer_fold import AnswerFold
from app.inference.client import raise_broke, stream
from app.inference.protocol import Done, Embedded, Entry, ExternalEngine, GenerateRequest, Sampling, StreamError
from app.kit.token_meter import TokenMeter
from app.models import service as models
from app.spec import ModelRef
from app.tables import User

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
    found: dict[str, ResolvedJudge] = {}
    for grader in graders:
        encodes = _encodes(grader)
        for name in grader.models():
            if (key := name or "") not in found:
                found[key] = _encoder(session, user, name) if name in encodes else _judge(session, user, key)
    return tuple(found.values())


def _encodes(grader: Grader) -> set[str | None]:
    """Names of the models that it asks for embeddings."""
    parts = [grader, *grader.children().values()]
    return {name for part in parts if part.type == "text_similarity" for name in part.models()}


def _judge(session: Session, user: User, name: str) -> ResolvedJudge:
    try:
        return writer(session, user, name)
    except BadField as error:
        raise BadField(error.message, hint=error.hint, param="grader.model") from None


def writer(session: Session, user: User, name: str) -> ResolvedJudge:
    """A model that answers in a trial. Raises as `resolve` does, naming the field `model`."""
    who = playground.speaker(session, user, name)
    return ResolvedJudge(name=name, model=who.ref, engine=who.engine)


def _encoder(session: Session, user: User, name: str | None) -> ResolvedJudge:
    if name is None:
        ready = [m for m in models.offered(session, user) if m.kind == "encoder" and m.status == "ready"]
        if not ready:
            raise BadField(
                "The metric cosine needs an embedding model, and this project has none.",
                hint="Add the starter all-minilm-l6-v2, or compare words: rouge_l.",
                param="grader.evaluation_metric",
            )
        return ResolvedJudge(name="", model=models.resolve(session, user, ready[-1].name).ref)
    ref = models.resolve(session, user, name).ref
    if ref.kind != "encoder":
        raise BadField(f"{name} is no encoder, so it gives no embeddings.", hint="Add the starter all-minilm-l6-v2.", param="grader.model")
    return ResolvedJudge(name=name, model=ref)


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
        request = _embedding(owner, judge, ask) if isinstance(ask, EmbedAsk) else _question(owner, judge, ask)
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
    embedded = sum(entry.tokens for entry in entries if isinstance(entry, Embedded))
    usage = AnswerFold.of(entries).usage()
    return embedded + usage["prompt_tokens"], usage["completion_tokens"]


def _embedding(owner: uuid.UUID, judge: ResolvedJudge, ask: EmbedAsk) -> GenerateRequest:
    texts = [playground.readable(text[:MAX_TEXT]) for text in ask.texts]
    return GenerateRequest(id=uuid.uuid4(), owner=owner, model=judge.model, embed=texts, sampling=Sampling(), seed=0, seconds=SECONDS)


def _question(owner: uuid.UUID, judge: ResolvedJudge, ask: JudgeAsk) -> GenerateRequest:
    sampling = Sampling(temperature=ask.temperature, top_p=ask.top_p, max_tokens=ask.max_tokens, seed=ask.seed)
    said = [{"role": one["role"], "content": playground.readable(one["content"])} for one in ask.messages]
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
