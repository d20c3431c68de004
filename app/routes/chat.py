"""`/v1/chat/completions` and `/v1/completions`, as OpenAI's clients call them.

No database session is open while an answer streams: one transaction comes before it, one after it.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import limits, schemas
from app.db import transaction
from app.errors import BadField, StudioError
from app.inference import playground, stored
from app.inference.answer_fold import AnswerFold, Choice
from app.inference.client import BULK, stream
from app.inference.playground import PendingAnswer
from app.inference.protocol import (
    AnswerStarted,
    ChoiceFinished,
    Done,
    Entry,
    Logprob,
    Offsets,
    PromptLogprobs,
    ReasoningPart,
    Sampling,
    SeenToken,
    TextPart,
    ToolCallPart,
)
from app.kit.json_safe import storable
from app.schemas import tools
from app.schemas.chat import ChatBody, CompletionBody, GenerationBody
from app.schemas.openapi import answers
from app.tables import User
from app.web.auth import CurrentUser
from app.web.error_responses import fault_of
from app.web.streaming import Stream, collect, later, left, merge, while_connected

api = APIRouter(prefix="/v1")

MAX_PROMPTS = 16
AnswerPart = TextPart | ReasoningPart | ToolCallPart


@api.post(
    "/chat/completions",
    operation_id="create_chat_completion",
    responses=answers(schemas.ChatCompletion, 404, 409, 422, events=schemas.ChatCompletionChunk),
)
async def chat(request: Request, body: ChatBody, user: CurrentUser) -> Response:
    """The next message of a conversation, as one response or as server-sent events."""
    if body.top_logprobs and not body.logprobs:
        raise BadField("top_logprobs needs logprobs to be true.", param="top_logprobs")
    sampling = body.sampling(
        max_tokens=body.max_completion_tokens or body.max_tokens, logprobs=bool(body.logprobs), top_logprobs=body.top_logprobs or 0,
        json_schema=body.response_format.schema_of() if body.response_format else None,
    )  # fmt: skip
    messages = [message.plain(i) for i, message in enumerate(body.messages)]
    order = tools.order_of(body.tools, body.tool_choice, body.parallel_tool_calls)
    prompt = {"messages": messages, "tools": order.tools, "tool_use": order.use, "effort": body.reasoning_effort, "split": True}
    record: dict[str, Any] = {"messages": messages, "labels": body.labels(), "user_metadata": body.metadata}
    if body.store:
        record |= {"messages": [message.as_sent(i) for i, message in enumerate(body.messages)], "tools": order.tools}
    return await Call(ChatWire(body.model), user, sampling, [prompt], record, store=bool(body.store)).respond(request, *_streamed(body))


@api.post(
    "/completions",
    operation_id="create_completion",
    responses=answers(schemas.Completion, 404, 409, 422, events=schemas.CompletionChunk),
)
async def complete(request: Request, body: CompletionBody, user: CurrentUser) -> Response:
    """The continuation of one or several texts, as one response or as server-sent events."""
    if body.max_tokens == 0 and not body.echo:
        raise BadField("max_tokens 0 writes nothing.", hint="Ask for at least one token, or for the prompt with echo.", param="max_tokens")
    prompts = _prompts(body.prompt)
    sampling = body.sampling(logprobs=body.logprobs is not None, top_logprobs=body.logprobs or 0, max_tokens=body.max_tokens or 1)
    sampling = sampling.model_copy(update={"max_tokens": body.max_tokens})
    prompt = body.prompt if isinstance(body.prompt, str) else json.dumps(body.prompt)
    labels = {"user": body.user} if body.user else {}
    call = Call(CompletionWire(body.model, bool(body.echo)), user, sampling, prompts, {"prompt": prompt, "labels": labels})
    return await call.respond(request, *_streamed(body))


def _streamed(body: GenerationBody) -> tuple[bool, bool]:
    """Whether the answer is streamed, and whether the stream ends with the usage."""
    return bool(body.stream), bool(body.stream_options and body.stream_options.include_usage)


def _prompts(given: str | list[Any]) -> list[dict[str, Any]]:
    """One or several prompts, each as text or as token ids."""
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if not several or len(several) > MAX_PROMPTS:
        raise BadField(f"Send between 1 and {MAX_PROMPTS} prompts.", param="prompt")
    return [{"prompt": playground.readable(p)} if isinstance(p, str) else {"tokens": p} for p in several]


# The two shapes of an answer ------------------------------------------------------------------------------------------


class ChatWire:
    """chat.completion and chat.completion.chunk."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str) -> None:
        self.model = model
        self.prompts: dict[int, list[SeenToken]] = {}

    def first(self, index: int, prompt: str) -> dict[str, Any] | None:
        return {"index": index, "delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, entry: AnswerPart) -> dict[str, Any]:
        logs = self.logprobs(entry.logprobs) if isinstance(entry, TextPart) else None
        return {"index": index, "delta": _delta(entry), "logprobs": logs, "finish_reason": None}

    def last(self, index: int, choice: Choice) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": _chat_reason(choice)}

    def choice(self, index: int, choice: Choice, asked_logprobs: bool, prompt: str) -> dict[str, Any]:
        content = None if choice.calls and not choice.text else choice.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
        message |= {"reasoning_content": choice.reasoning} if choice.reasoning else {}
        message |= {"tool_calls": choice.calls} if choice.calls else {}
        logs = (self.logprobs(choice.logprobs) or {"content": [], "refusal": None}) if asked_logprobs else None
        return {"index": index, "message": message, "logprobs": logs, "finish_reason": _chat_reason(choice)}

    def logprobs(self, logs: list[Logprob]) -> dict[str, Any] | None:
        return {"content": [_token(x) | {"top_logprobs": [_token(t) for t in x.top]} for x in logs], "refusal": None} if logs else None


def _delta(entry: AnswerPart) -> dict[str, Any]:
    if isinstance(entry, TextPart):
        return {"content": entry.text}
    if isinstance(entry, ReasoningPart):
        return {"reasoning_content": entry.text}
    first = {"id": entry.id, "type": "function"} if entry.id else {}
    function = ({"name": entry.name} if entry.name else {}) | {"arguments": entry.arguments}
    return {"tool_calls": [{"index": entry.place, **first, "function": function}]}


def _chat_reason(choice: Choice) -> str:
    """tool_calls for an answer that calls tools and has come to its end."""
    reason = _reason(choice.finish_reason)
    return "tool_calls" if choice.calls and reason == "stop" else reason


def _token(x: Logprob) -> dict[str, Any]:
    return {"token": x.token, "bytes": x.bytes, "logprob": x.logprob}


class CompletionWire:
    """text_completion, whole and in chunks.

    With `echo` the prompt precedes the answer, and so do its tokens where logprobs are requested; `text_offset` counts the
    characters of the returned text.
    """

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, echo: bool) -> None:
        self.model, self.echo = model, echo
        self.prompts: dict[int, list[SeenToken]] = {}
        """`prompts` holds the prompt tokens of each choice, once a model has computed their log-probabilities."""
        self.offsets: dict[int, Offsets] = {}

    def first(self, index: int, prompt: str) -> dict[str, Any] | None:
        if not self.echo:
            return None
        return {"index": index, "text": prompt, "logprobs": self._given(self.prompts.get(index, []), index), "finish_reason": None}

    def piece(self, index: int, entry: AnswerPart) -> dict[str, Any]:
        assert isinstance(entry, TextPart), "its answers are not divided"
        return {"index": index, "text": entry.text, "logprobs": self._given(entry.logprobs, index), "finish_reason": None}

    def last(self, index: int, choice: Choice) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": _reason(choice.finish_reason)}

    def choice(self, index: int, choice: Choice, asked_logprobs: bool, prompt: str) -> dict[str, Any]:
        logs = self.logprobs([*self.prompts.get(index, []), *choice.logprobs], index) if asked_logprobs else None
        text = (prompt if self.echo else "") + choice.text
        return {"index": index, "text": text, "logprobs": logs, "finish_reason": _reason(choice.finish_reason)}

    def _given(self, logs: Sequence[Logprob | SeenToken], index: int) -> dict[str, Any] | None:
        return self.logprobs(logs, index) if logs else None

    def logprobs(self, logs: Sequence[Logprob | SeenToken], index: int) -> dict[str, Any]:
        offsets = self.offsets.setdefault(index, Offsets())
        return {
            "tokens": [_spelt(x) for x in logs],
            "token_logprobs": [x.logprob for x in logs],
            "top_logprobs": [None if x.logprob is None else _alternatives(x) for x in logs],
            "text_offset": [offsets.place(x.bytes) for x in logs],
        }


def _spelt(x: Logprob | SeenToken) -> str:
    """A token as the completions API spells it: bytes that are not valid UTF-8 become `bytes:\\xe2\\x80`, so that no two tokens
    look alike."""
    return "bytes:" + "".join(f"\\x{b:02x}" for b in x.bytes) if "�" in x.token else x.token


def _alternatives(x: Logprob | SeenToken) -> dict[str, float | None]:
    """The most likely tokens at a token's position, including the token itself where it is not among them."""
    return {_spelt(t): t.logprob for t in x.top} | ({_spelt(x): x.logprob} if x.top else {})


def _reason(reason: str | None) -> str:
    """The API's finish reason: stop, or length for every other reason."""
    return "stop" if reason == "stop" else "length"


# One call -------------------------------------------------------------------------------------------------------------


class Call:
    """One API call: several prompts with `n` answers each, returned whole or as a stream."""

    source = stored.COMPLETION

    def __init__(
        self,
        shape: ChatWire | CompletionWire,
        user: User,
        sampling: Sampling,
        prompts: list[dict[str, Any]],
        record: dict[str, Any],
        *,
        store: bool = False,
    ) -> None:
        """`record` is what is recorded of the request; with `store` the answer is kept too, as it was answered."""
        self.shape, self.user, self.sampling, self.prompts, self.record, self.store = shape, user, sampling, prompts, record, store
        self.key = uuid.uuid4()
        self.recording, self.recorded = threading.Lock(), False
        self.head: dict[str, Any] = {}
        self.asked: list[PendingAnswer] = []
        self.heard: list[AnswerFold] = []
        self.held: dict[str, Any] | None = None
        self.seen: list[list[SeenToken]] = []
        """`prompts` holds the tokens of each prompt, where they are returned (`echo`)."""

    async def respond(self, request: Request, streamed: bool, usage: bool = False) -> Response:
        await run_in_threadpool(self._resolve)
        looks = isinstance(self.shape, CompletionWire) and self.shape.echo and (self.sampling.logprobs or not self._writes)
        if looks and not await self._look(request):
            return left()
        streams = [stream(asked.request) if self._writes else self._echo(p) for p, asked in enumerate(self.asked)]
        self.head = {
            "id": f"{self.shape.prefix}-{self.key.hex}",
            "object": self.shape.part if streamed else self.shape.whole,
            "created": int(time.time()),
            "model": self.shape.model,
            "system_fingerprint": playground.fingerprint(self.asked[0].speaker),
        }
        if streamed:
            merged = merge(streams)
            first = await anext(merged)  # an error before the first token is an ordinary error response
            return Stream(self._events(first, merged, usage))
        return await self._whole(request, streams)

    def _resolve(self) -> None:
        with transaction() as session:
            if self._writes:
                limits.check(session, self.user, "tokens_per_day")
            who = playground.speaker(session, self.user, self.shape.model)
        self.asked = [PendingAnswer(who, playground.request_for(self.user, who, self.sampling, **prompt)) for prompt in self.prompts]
        self.heard = [AnswerFold() for _ in self.asked]

    @property
    def _writes(self) -> bool:
        return self.sampling.max_tokens != 0

    async def _look(self, request: Request) -> bool:
        """Compute the log-probabilities of the prompts' tokens. False when the client has disconnected."""
        who, n = self.asked[0].speaker, self.sampling.n
        settings = Sampling(max_tokens=1, temperature=0, seed=0, top_logprobs=self.sampling.top_logprobs)
        looks = [playground.request_for(self.user, who, settings, look=1, **prompt) for prompt in self.prompts]
        heard = await collect(request, [stream(look) for look in looks])
        for p, entries in enumerate(heard or []):
            seen = next(e for e in entries if isinstance(e, PromptLogprobs)).tokens
            given = self.prompts[p].get("prompt")
            if given is not None and seen and not given.startswith(seen[0].token.strip("�")):
                seen = seen[1:]  # the begin-of-sequence token of some models is not part of the prompt
            self.seen.append(seen)
            self.shape.prompts |= dict.fromkeys(range(p * n, p * n + n), seen if self.sampling.logprobs else [])
        return heard is not None

    async def _echo(self, place: int) -> AsyncIterator[list[Entry]]:
        """The response of a request for no new tokens (`max_tokens` 0): the prompt alone."""
        seen = self.seen[place]
        text = self.prompts[place].get("prompt") or b"".join(bytes(t.bytes) for t in seen).decode("utf-8", "replace")
        ends = [ChoiceFinished(index=i, reason="length", tokens=0) for i in range(self.sampling.n)]
        done = Done(prompt_tokens=len(seen), completion_tokens=0, first_token_seconds=None, tokens_per_second=None)
        yield [AnswerStarted(rendered_prompt=text, prompt_tokens=len(seen), max_tokens=0, context=0), *ends, done]

    async def _whole(self, request: Request, streams: list[AsyncIterator[list[Entry]]]) -> Response:
        if not await while_connected(request, self._hear_all(streams)):
            later(self._record)
            return left()
        await run_in_threadpool(self._record)
        return JSONResponse(self._answer())

    def _answer(self) -> dict[str, Any]:
        """The whole answer, also of one that was streamed."""
        n, choices = self.sampling.n, []
        for p, heard in enumerate(self.heard):
            prompt = heard.started.rendered_prompt if heard.started else ""
            for i in range(n):
                choices.append(self.shape.choice(p * n + i, heard.choices.get(i, Choice()), self.sampling.logprobs, prompt))
        answer = {**self.head, "object": self.shape.whole, "choices": choices, "usage": self._usage(), "luthier": self._proof()}
        return answer | ({"metadata": storable(self.record["user_metadata"] or {})} if self.store else {})

    def _kept(self) -> dict[str, Any]:
        """What is stored of the answer."""
        return self._answer()

    async def _hear_all(self, streams: list[AsyncIterator[list[Entry]]]) -> None:
        async for place, entries in merge(streams):
            self._hear(place, entries)

    def _hear(self, place: int, entries: list[Entry]) -> None:
        self.heard[place].take(entries)

    async def _events(
        self, first: tuple[int, list[Entry]], merged: AsyncIterator[tuple[int, list[Entry]]], usage: bool
    ) -> AsyncIterator[bytes]:
        try:
            for line in self._chunks(*first, usage):
                yield line
            async for place, entries in merged:
                for line in self._chunks(place, entries, usage):
                    yield line
            chunks = self._last_chunks(usage)
            if self.store:  # whoever has read the end may ask for it
                await run_in_threadpool(self._record)
            for line in chunks:
                yield line
        except Exception as error:
            fault = fault_of(error)
            for heard in self.heard:
                heard.error = heard.error or (None if heard.done else fault.as_problem())
            for line in self._failure(fault):
                yield line
        finally:
            later(self._record)
            await merged.aclose()  # type: ignore[attr-defined]

    def _chunks(self, place: int, entries: list[Entry], usage: bool) -> list[bytes]:
        """Server-sent events of a few entries of one stream. The last chunk that ends a choice is held back: the final chunk
        carries the proof, which is complete only at the end."""
        heard, n = self.heard[place], self.sampling.n
        fresh = heard.started is None
        self._hear(place, entries)
        more = {"usage": None} if usage else {}
        lines = []
        if fresh and heard.started is not None:
            firsts = [self.shape.first(place * n + i, heard.started.rendered_prompt) for i in range(n)]
            lines += [self._line([choice], **more) for choice in firsts if choice is not None]
        for entry in entries:
            if isinstance(entry, AnswerPart):
                lines.append(self._line([self.shape.piece(place * n + entry.index, entry)], **more))
            elif isinstance(entry, ChoiceFinished):
                lines += [self._line(**self.held)] if self.held else []
                self.held = {"choices": [self.shape.last(place * n + entry.index, heard.choices[entry.index])], **more}
        return lines

    def _last_chunks(self, usage: bool) -> list[bytes]:
        proof: dict[str, Any] = {"luthier": self._proof()}
        lines = [self._line(**self.held, **({} if usage else proof))] if self.held else []
        lines += [self._line([], usage=self._usage(), **proof)] if usage else []
        return [*lines, b"data: [DONE]\n\n"]

    def _failure(self, fault: StudioError) -> list[bytes]:
        lines = [self._line(**self.held)] if self.held else []
        return [*lines, b"data: " + json.dumps({"error": fault.as_json()}).encode() + b"\n\n"]

    def _line(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: " + json.dumps({**self.head, "choices": choices, **more}, ensure_ascii=False).encode() + b"\n\n"

    def _usage(self) -> dict[str, Any]:
        total: dict[str, Any] = {}
        for usage in (heard.usage() for heard in self.heard):
            for key, value in usage.items():
                if isinstance(value, dict):
                    total[key] = {k: total.get(key, {}).get(k, 0) + v for k, v in value.items()}
                else:
                    total[key] = total.get(key, 0) + value
        return total

    def _proof(self) -> dict[str, Any]:
        who, engine = self.asked[0].speaker, self.asked[0].request.engine
        return {
            "model": who.ref.name,
            "revision": who.ref.revision,
            "adapter_sha256": who.adapter_sha256,
            "engine": (engine.host if engine.local else engine.url) if engine else None,
            "seeds": [asked.request.seed for asked in self.asked],
            "first_token_seconds": self.heard[0].done.first_token_seconds if self.heard[0].done else None,
            "tokens_per_second": self.heard[0].done.tokens_per_second if self.heard[0].done else None,
        }

    def _record(self) -> None:
        """Record the call once, and the answer with it where that is to be kept and has ended."""
        with self.recording:
            if not self.recorded:
                with transaction() as session:
                    self._record_in(session)
            self.recorded = True

    def _record_in(self, session: Session) -> None:
        if BULK.get() and not self.store:  # the answer is in the file of a batch
            return playground.count_call(session, self.user, self.heard)
        ended = self.store and all(heard.done and not heard.error for heard in self.heard)
        asked = {"id": self.key, "source": self.source, "stored": self._kept() if ended else None, **self.record}
        playground.record_call(session, self.user, list(zip(self.asked, self.heard, strict=True)), self.sampling, **asked)
