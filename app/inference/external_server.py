"""Client of an external engine, an OpenAI-compatible server such as vLLM, whose responses it converts to our own entries.

The studio renders the prompt with the model's own tokenizer, as in training, and sends its tokens to `/v1/completions`; a server
that takes no tokens gets the messages instead (`via="chat"`).

Only the addresses in LUTHIER_ENGINES are ever called: the person who runs the studio lists them, and no user can add one. The
name is resolved once per call and the connection goes to exactly that address; redirects, proxies of the environment and
link-local addresses (where clouds have their metadata services) are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

from app.errors import BadField, StudioError, Unavailable
from app.inference import external_tools
from app.inference.protocol import (
    AnswerStarted,
    ChoiceFinished,
    Done,
    Entry,
    ExternalEngine,
    GenerateRequest,
    Logprob,
    RenderedPrompt,
    TextPart,
)
from app.kit import addresses
from app.kit.addresses import Address
from app.languages import gettext
from app.settings import get_settings
from app.storage import places

if TYPE_CHECKING:
    import httpx

JSON = dict[str, Any]

CONNECT_SECONDS = 5.0
ASKING_SECONDS = 10.0
SILENT_SECONDS = 120.0
"""A server that sends nothing for this long is taken to have stopped."""
MAX_LINE_LENGTH = 4 * 2**20
MAX_ANSWER_LENGTH = 64 * 2**20  # bytes
NO_LIMIT_TOKENS = 512
"""max_tokens of a request without a limit to a server that renders the prompt itself: only the server knows the room left."""


# Which servers there are ----------------------------------------------------------------------------------------------


def allowed() -> dict[str, Address]:
    """The servers in the settings, by address. Raises BadField for an entry that is no server address."""
    return addresses.listed(get_settings().engines, "engines")


def find(url: str) -> Address:
    """The server of this address. Raises BadField for one that is not in the settings."""
    known = allowed()
    wanted = url.strip().rstrip("/")
    if wanted not in known:
        raise BadField(
            gettext("%(url)s is not among the engines of this studio.", url=repr(wanted[:120])),
            hint=gettext("There are %(names)s.", names=", ".join(known))
            if known
            else gettext("Whoever runs the studio lists them in LUTHIER_ENGINES."),
            param="url",
        )
    return known[wanted]


def names(address: Address) -> list[str]:
    """The models that a server serves, by `GET /models`. Raises Unavailable."""
    status, body = exchange(address, "GET", "models", seconds=ASKING_SECONDS)
    if status != 200:
        raise refused(address, status, body, None)
    try:
        return [str(entry["id"]) for entry in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        raise strange(address) from None


def exchange(
    address: Address, method: str, path: str, said: JSON | None = None, *, seconds: float = SILENT_SECONDS, most: int = MAX_LINE_LENGTH
) -> tuple[int, bytes]:
    """The status and the body of one answer. Raises Unavailable for a server that is not there or sends more than `most` bytes."""
    import httpx

    try:
        where, more = addresses.pinned(f"{address.url}/{path}")
        with httpx.Client(**_options(address, seconds)) as client, client.stream(method, where, json=said, **more) as answer:
            body = b""
            for part in answer.iter_bytes():
                body += part
                if len(body) > most:
                    raise strange(address)
        return answer.status_code, body
    except (httpx.HTTPError, OSError) as error:
        raise away(address, error) from None


# Asking ---------------------------------------------------------------------------------------------------------------


async def answer(request: GenerateRequest, rendered: RenderedPrompt | None) -> AsyncGenerator[list[Entry]]:
    """Entries of one request from the server, in the order of our own engine. Closing it closes the connection, by which the
    server notices that nobody reads. Raises StudioError."""
    import httpx

    engine = request.engine
    assert engine is not None
    address = find(engine.url)
    fold = Fold(request, rendered, address)
    deadline = asyncio.get_running_loop().time() + request.seconds
    try:
        where, more = await asyncio.to_thread(addresses.pinned, f"{address.url}/{fold.path}")
        async with httpx.AsyncClient(**_options(address)) as client:
            await _load_adapter(client, address, engine)
            async with client.stream("POST", where, json=fold.body(), **more) as response:
                if response.status_code != 200:
                    raise refused(address, response.status_code, await _some(response), request)
                yield [fold.started()]
                events = _events(response, address)
                while (data := await _next(events, deadline)) not in (None, "[DONE]"):
                    if entries := fold.take(str(data)):
                        yield entries
                yield fold.end()
    except (httpx.HTTPError, OSError) as error:
        raise away(address, error) from None


async def _next(events: AsyncIterator[str], deadline: float) -> str | None:
    """The next event; None at the end, and when the time is over: the answer is then truncated, as by our own engine."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(deadline):
            return await anext(events, None)
    return None


async def _some(response: httpx.Response) -> bytes:
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) > 10_000:
            break
    return body


async def _events(response: httpx.Response, address: Address) -> AsyncIterator[str]:
    """The contents of `data:` in each server-sent event; an overlong line or answer ends in an error."""
    held, total = b"", 0
    async for part in response.aiter_bytes():
        total += len(part)
        *lines, held = (held + part).split(b"\n")
        if len(held) > MAX_LINE_LENGTH or total > MAX_ANSWER_LENGTH:
            raise strange(address)
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8", "replace")


async def _load_adapter(client: httpx.AsyncClient, address: Address, engine: ExternalEngine) -> None:
    """Load an adapter on the server, once. vLLM responds 200, and 400 for one that it has already."""
    if engine.adapter is None or (address.url, engine.model) in _loaded:
        return
    where, more = await asyncio.to_thread(addresses.pinned, f"{address.url}/load_lora_adapter")
    folder = str((await asyncio.to_thread(places.path, engine.adapter)).resolve())
    answer = await client.post(where, json={"lora_name": engine.model, "lora_path": folder}, **more)
    if answer.status_code != 200 and "already" not in answer.text[:2000]:
        raise no_adapter(address, answer.status_code)
    _loaded.add((address.url, engine.model))


def no_adapter(address: Address, status: int) -> Unavailable:
    return Unavailable(
        gettext("%(engine)s would not load the adapter (status %(status)s).", engine=address.host, status=status),
        hint=gettext(
            "Start vLLM with --enable-lora, a --max-lora-rank that is large enough and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, "
            "on a machine that sees the data folder; or take the engine away from the base model."
        ),
        code="engine_adapter",
    )


_loaded: set[tuple[str, str]] = set()
"""Adapters that this process has loaded. A server that was restarted responds 404, and the adapter is removed here."""


# Two wires, one answer --------------------------------------------------------------------------------------------------


class Fold:
    """Converts one request to the server's API, and the server's response to our entries."""

    def __init__(self, request: GenerateRequest, rendered: RenderedPrompt | None, address: Address) -> None:
        self.request, self.rendered, self.address = request, rendered, address
        assert request.engine is not None
        self.engine = request.engine
        self.chat = request.messages is not None and self.engine.via == "chat"
        self.path = "chat/completions" if self.chat else "completions"
        self.began = time.monotonic()
        self.first: float | None = None
        self.usage: dict[str, Any] = {}
        self.parts = [0] * request.sampling.n
        self.reasons: dict[int, str] = {}
        self.calls = external_tools.ServersCalls(request.sampling.n)
        self.texts = [""] * request.sampling.n if request.sampling.json_schema is not None else []

    def body(self) -> JSON:
        s, most = self.request.sampling, self.request.sampling.max_tokens
        room = self.rendered.max_tokens if self.rendered else None
        body: JSON = {
            "model": self.engine.model, "stream": True, "stream_options": {"include_usage": True}, "seed": self.request.seed, "n": s.n,
            "temperature": s.temperature, "top_p": s.top_p, "max_tokens": min(most or room or NO_LIMIT_TOKENS, room or 10**9),
        }  # fmt: skip
        if self.chat:
            body |= {"messages": self.request.messages} | external_tools.fields(self.request)
            body |= {"reasoning_effort": self.request.effort} if self.request.effort else {}
            body |= {"logprobs": True, "top_logprobs": s.top_logprobs} if s.logprobs else {}
        else:
            body |= {"prompt": self.rendered.tokens if self.rendered else self.request.tokens or self.request.prompt}
            body |= {"stop_token_ids": self.rendered.stop_tokens} if self.rendered else {}
            body |= {"skip_special_tokens": False} if self.rendered and self.rendered.special else {}
            body |= {"logprobs": s.top_logprobs} if s.logprobs else {}
        # Parameters that not every server supports are sent only where they have an effect.
        plain = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
        body |= {name: getattr(s, name) for name, usual in plain.items() if getattr(s, name) != usual}
        body |= {"stop": list(s.stop)} if s.stop else {}
        if s.json_schema is not None:
            body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": s.json_schema, "strict": True}}}
        body |= {"logit_bias": {str(token): bias for token, bias in s.logit_bias.items()}} if s.logit_bias else {}
        return body

    def started(self) -> AnswerStarted:
        if self.rendered is not None:
            text, tokens = self.rendered.text, len(self.rendered.tokens)
        else:
            asked = [f"{m['role']}: {m.get('content') or ''}" for m in self.request.messages or []]
            text, tokens = "\n".join(asked) or self.request.prompt or "", 0
        most = self.request.sampling.max_tokens or (self.rendered.max_tokens if self.rendered else NO_LIMIT_TOKENS)
        return AnswerStarted(
            rendered_prompt=text,
            prompt_tokens=tokens,
            max_tokens=most,
            context=self.rendered.context if self.rendered else 0,
            syntax=self.rendered.syntax if self.rendered else None,
        )

    def take(self, data: str) -> list[Entry]:
        """The entries of one event. Raises the server's own error, and Unavailable for an unexpected event."""
        try:
            said = json.loads(data)
            if said.get("error"):
                raise refused(self.address, _status(said["error"]), data.encode(), self.request)
            self.usage = said.get("usage") or self.usage
            return [entry for choice in said.get("choices", []) for entry in self._choice(choice)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise strange(self.address) from None

    def _choice(self, choice: JSON) -> list[Entry]:
        index, text = int(choice["index"]), (choice["delta"].get("content") if self.chat else choice["text"]) or ""
        if not 0 <= index < len(self.parts):
            raise ValueError(index)
        if choice.get("finish_reason"):
            self.reasons[index] = "length" if choice["finish_reason"] == "length" else "stop"
        logs = (
            _logprobs(choice["logprobs"], self.request.sampling.top_logprobs)
            if self.request.sampling.logprobs and choice.get("logprobs")
            else []
        )
        divided = self.calls.entries(index, choice["delta"], self.parts[index] + 1) if self.chat and self.request.split else []
        if not text and not logs and not divided:
            return []
        self.first = self.first or time.monotonic()
        self.parts[index] += len(logs) or 1
        if self.texts:
            self.texts[index] += text
        told: list[Entry] = [TextPart(index=index, text=text, tokens=self.parts[index], logprobs=logs)] if text or logs else []
        return [*divided, *told]

    def end(self) -> list[Entry]:
        """The end of every choice, then Done. Without usage from the server, the parts it sent are counted. Raises Unavailable for
        a server that took a schema and wrote something that is no JSON."""
        for index, text in enumerate(self.texts):
            if self.reasons.get(index) == "stop" and index in self.calls.without_calls() and not is_json(text):
                raise Unavailable(
                    gettext("The engine at %(engine)s did not follow the schema.", engine=self.address.host),
                    hint=gettext("Take a server that honors response_format, or the built-in engine."),
                    code="engine_failed",
                )
        self.calls.check(self.request, self.reasons, self.address.host)
        now, n = time.monotonic(), len(self.parts)
        written = int(self.usage.get("completion_tokens") or sum(self.parts))
        read = int(self.usage.get("prompt_tokens") or (len(self.rendered.tokens) if self.rendered else 0))
        details = self.usage.get("prompt_tokens_details") or {}
        tokens = [written] if n == 1 else self.parts
        ends: list[Entry] = [ChoiceFinished(index=i, reason=self.reasons.get(i, "length"), tokens=tokens[i]) for i in range(n)]
        speed = (written - n) / max(now - self.first, 1e-9) if self.first and written > n else None
        done = Done(
            prompt_tokens=read,
            cached_tokens=int(details.get("cached_tokens") or 0),
            completion_tokens=written,
            first_token_seconds=self.first - self.began if self.first else None,
            tokens_per_second=speed,
        )
        return [*ends, done]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _logprobs(said: JSON, top: int) -> list[Logprob]:
    """Both forms of the API: a list of tokens with their alternatives, and the older parallel lists, in which vLLM counts the
    token itself among the alternatives."""
    if "content" in said:
        return [_logprob(x, [_logprob(t, []) for t in x.get("top_logprobs") or []]) for x in said["content"] or []]
    tops = said.get("top_logprobs") or [None] * len(said["tokens"])
    found = []
    for token, value, others in zip(said["tokens"], said["token_logprobs"], tops, strict=True):
        best = sorted((others or {}).items(), key=lambda pair: -pair[1])[:top]
        if value is not None:
            also = [Logprob(token=t, bytes=list(t.encode()), logprob=v) for t, v in best]
            found.append(Logprob(token=token, bytes=list(token.encode()), logprob=value, top=also))
    return found


def _logprob(x: JSON, top: list[Logprob]) -> Logprob:
    return Logprob(token=x["token"], bytes=x.get("bytes") or list(x["token"].encode()), logprob=x["logprob"], top=top)


# The connection ---------------------------------------------------------------------------------------------------------


@functools.cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


def _options(address: Address, seconds: float = SILENT_SECONDS) -> dict[str, Any]:
    import httpx

    return {
        "headers": {"authorization": f"Bearer {address.key}"} if address.key else {},
        "timeout": httpx.Timeout(seconds, connect=CONNECT_SECONDS),
        "follow_redirects": False,
        "trust_env": False,
        "verify": _certificates() if address.url.startswith("https:") else False,
    }


# What went wrong --------------------------------------------------------------------------------------------------------


def away(address: Address, error: Exception) -> Unavailable:
    return Unavailable(
        gettext("The engine at %(engine)s cannot be reached (%(error)s).", engine=address.host, error=type(error).__name__),
        hint=gettext("Start it, or take it away from the model on the model's page; then the studio's own engine answers."),
        code="engine_unreachable",
    )


def strange(address: Address) -> Unavailable:
    return Unavailable(
        gettext("The engine at %(engine)s answered what no OpenAI-compatible server answers.", engine=address.host),
        hint=gettext("Check its address in LUTHIER_ENGINES; it usually ends in /v1."),
        code="engine_answer",
    )


def _status(error: JSON) -> int:
    """The status that a mid-stream error would have had: vLLM has it as `code`, the API by its type."""
    if isinstance(error.get("code"), int):
        return int(error["code"])
    return 400 if error.get("type") == "invalid_request_error" else 500


def refused(address: Address, status: int, body: bytes, request: GenerateRequest | None) -> StudioError:
    """The server's error as ours: errors of the request are passed on, everything else is the server's own."""
    try:
        said = json.loads(body)
        said = said.get("error", said) if isinstance(said, dict) else {}
        message = str(said.get("message") or said.get("detail") or "")[:2000] if isinstance(said, dict) else str(said)[:2000]
    except ValueError:
        said, message = {}, ""
    if status == 404 and request is not None and request.engine is not None:
        _loaded.discard((address.url, request.engine.model))
    if status in (400, 413, 422, 429) and message:
        fault = StudioError(f"{address.host}: {message}", param=said.get("param"), code=said.get("code") and str(said["code"]))
        fault.status, fault.type = (429, "rate_limit_error") if status == 429 else (400, "invalid_request_error")
        fault.code = fault.code if fault.code != StudioError.code else "engine_refused"
        return fault
    if status in (401, 403):
        return Unavailable(
            gettext("The engine at %(engine)s refuses the studio's key.", engine=address.host),
            hint=gettext("Put its key into LUTHIER_ENGINES."),
            code="engine_key",
        )
    told = gettext("The engine at %(engine)s answered with status %(status)s: %(error)s", engine=address.host, status=status, error=message)
    return Unavailable(
        told if message else gettext("The engine at %(engine)s answered with status %(status)s", engine=address.host, status=status),
        hint=gettext("See its log, or take it away from the model on the model's page."),
        code="engine_failed",
    )
