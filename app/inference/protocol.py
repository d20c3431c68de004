"""The protocol between web process and generate worker: one request, and a stream of entries back.

The request is JSON in the Celery message. The answer comes through one Redis stream per request: every entry has an increasing
`seq`, so that a reader detects a lost one. Both ends prove that they are alive by keys that expire:

    luthier:answer:<id>            the stream of entries; expires by itself
    luthier:answer:<id>:claim      which worker took the request; only the first message about it counts
    luthier:answer:<id>:reader     renewed by the reader; when it is gone the worker stops and drops the request
    luthier:generator:<worker>     renewed by the worker; when it is gone the reader ends with an error
"""

from __future__ import annotations

import codecs
import uuid
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from app.answer_syntax import Syntax
from app.languages import mark
from app.queue import PREFIX
from app.spec import ModelRef

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_NEXT = 100
MAX_TEXTS = 256

READER_SECONDS = 10
"""Expiry of the reader's key. A reader renews it each time it reads, so one that blocks on a full socket lets it expire."""
WORKER_SECONDS = 4
"""Expiry of the worker's key, renewed every second by a thread of its own."""
STREAM_SECONDS = 300
"""Expiry of a stream after its last entry."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sampling(_Frozen):
    """How the next token is chosen. The descriptions are the help under each field of the playground."""

    temperature: float = Field(0.7, ge=0, le=2, description="0 always takes the likeliest token; higher is more varied.")
    top_p: float = Field(0.95, gt=0, le=1, description=mark("Only the likeliest tokens that together hold this share of the probability."))
    top_k: int = Field(0, ge=0, le=1_000_000, description=mark("Only this many of the likeliest tokens. 0 is no limit."))
    min_p: float = Field(0.0, ge=0, le=1, description=mark("Only tokens at least this share as likely as the likeliest."))
    repetition_penalty: float = Field(1.0, gt=0, le=10, description=mark("Above 1, tokens that were seen before become less likely."))
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description=mark("Lowers a token each time the answer has used it."))
    presence_penalty: float = Field(0.0, ge=-2, le=2, description=mark("Lowers a token once the answer has used it."))
    max_tokens: int | None = Field(128, ge=1, le=1_000_000, description=mark("Longest answer. Empty is whatever the context has room for."))
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        (), max_length=MAX_STOPS, description="The answer ends before any of these texts."
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description=mark("The same seed gives the same answer. Empty draws one, and the answer states it.")
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Answers to the same prompt.")
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=1024)
    json_schema: dict[str, Any] | None = Field(None, description="The answer is JSON of this schema: no other token can follow.")


LLAMA_CPP = "llama.cpp"


class ExternalEngine(_Frozen):
    """An OpenAI-compatible server that answers for a model in place of our own engine. Its key is only in the settings. With the
    address `llama.cpp` it is a llama.cpp server that the generate worker runs itself, and `model` a GGUF type."""

    url: str = Field(description="base address, one of LUTHIER_ENGINES, or llama.cpp")
    model: str = Field(description="what that server calls the model")
    adapter: str | None = Field(None, description="a LoRA folder, relative to the data folder, that the server loads first")
    via: Literal["tokens", "chat"] = Field("tokens", description="send the rendered prompt's tokens, or messages the server renders")

    @property
    def local(self) -> bool:
        return self.url == LLAMA_CPP

    @property
    def host(self) -> str:
        return f"{self.url} {self.model}" if self.local else urlsplit(self.url).netloc


class ToolUse(_Frozen):
    """How an answer uses the request's tools. `calls` says whether it may or must call one, and `function` names the only one that it
    may. Arguments of the functions in `strict` follow their schema, as those of calls that must come do."""

    calls: Literal["auto", "required"] = "auto"
    function: str | None = None
    strict: tuple[str, ...] = ()
    parallel: bool = True

    @property
    def constrains(self) -> bool:
        """Whether the answer's tokens are chosen under a grammar."""
        return self.calls == "required" or bool(self.strict)


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class GenerateRequest(_Frozen):
    """One prompt for one model. Exactly one of `messages`, `prompt`, `tokens` and `embed` is given; `seed` is always set.

    With `look` nothing is generated: the result is the log-probability of each token of the prompt, and the `look` likeliest next
    ones. With `embed` the model is an encoder, and the result is a vector for each text; with `classify` it is a classifier; with `reward`
    it is a reward model, and each conversation ends with the answer that gets a number. With `render` nothing is generated either: the result is the rendered prompt, which goes to the request's `engine`.
    """

    id: uuid.UUID
    owner: uuid.UUID
    model: ModelRef
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_use: ToolUse = ToolUse()
    effort: Effort | None = Field(None, description="how much the model reasons; null leaves it to its chat template")
    split: bool = Field(False, description="reasoning and tool calls come as entries of their own")
    prompt: str | None = None
    tokens: list[int] | None = None
    embed: list[str] | None = Field(None, max_length=MAX_TEXTS)
    classify: list[str] | None = Field(None, max_length=MAX_TEXTS)
    reward: list[list[dict[str, Any]]] | None = Field(None, max_length=MAX_TEXTS)
    look: int | None = Field(None, ge=1, le=MAX_NEXT)
    render: bool = False
    bulk: bool = Field(False, description="one of very many, as a run of the prompt lab asks: it leaves room for people who chat")
    engine: ExternalEngine | None = Field(None, description="who answers; null is the studio's own engine")
    sampling: Sampling
    seed: int
    seconds: float = Field(600, gt=0, le=3600, description="the answer is cut off after this long")


class Logprob(BaseModel):
    """One token of an answer: its text, its UTF-8 bytes, and the natural logarithm of its probability before sampling."""

    token: str
    bytes: list[int]
    logprob: float
    top: list[Logprob] = Field(default_factory=list)


class Offsets:
    """Character offsets of tokens in their text. A token that begins inside a character has that character's offset."""

    def __init__(self) -> None:
        self.at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def place(self, raw: list[int]) -> int:
        """The offset of the next token, which consists of these bytes."""
        begin = self.at
        for place, byte in enumerate(raw):
            self.at += len(self._decoder.decode(bytes([byte])))
            if place == 0 and not 0x80 <= byte < 0xC0:  # it begins a character, so a half one before it has become a mark
                begin = self.at - (byte < 0x80)
        return begin


# Entries of the stream, in the order they come: started, then text and finished for each choice, then done. Reasoning and tool calls are
# told from the text by the reader (`app/inference/division.py`). -------------


class AnswerStarted(BaseModel):
    type: Literal["started"] = "started"
    rendered_prompt: str
    prompt_tokens: int
    max_tokens: int
    context: int
    syntax: Syntax | None = None


class RenderedPrompt(BaseModel):
    """A prompt as a model reads it, and the tokens that end its answer. `max_tokens` is what the context leaves room for. `syntax` says how
    the answer is divided; with `special` some of its markers are special tokens, which a server must not hide."""

    type: Literal["rendered"] = "rendered"
    text: str
    tokens: list[int]
    stop_tokens: list[int]
    max_tokens: int
    context: int
    syntax: Syntax | None = None
    special: bool = False


class TextPart(BaseModel):
    """`tokens` counts the tokens of this choice so far, including this part: all that is known of an answer that is stopped."""

    type: Literal["text"] = "text"
    index: int
    text: str
    tokens: int
    logprobs: list[Logprob] = Field(default_factory=list)


class ReasoningPart(BaseModel):
    """A piece of the reasoning that precedes an answer; `tokens` as in a TextPart."""

    type: Literal["reasoning"] = "reasoning"
    index: int
    text: str
    tokens: int


class ToolCallPart(BaseModel):
    """A tool call, or a piece of one: the `place`-th of its choice. The first piece has `id` and `name`; the `arguments` of all pieces are
    one JSON text."""

    type: Literal["tool_call"] = "tool_call"
    index: int
    place: int
    id: str | None = None
    name: str | None = None
    arguments: str
    tokens: int


class ChoiceFinished(BaseModel):
    """`tokens` counts the generated tokens, including the one that ended the answer."""

    type: Literal["finished"] = "finished"
    index: int
    reason: Literal["stop", "length", "cancelled"]
    tokens: int


class SeenToken(BaseModel):
    """One token: its id, text, UTF-8 bytes, and the natural logarithm of its probability at its position; None for the first
    token of a prompt, which has no predecessor. `top` are the likeliest at its position, as many as the sampling says."""

    id: int
    token: str
    bytes: list[int]
    logprob: float | None
    top: list[Logprob] = Field(default_factory=list)


class PromptLogprobs(BaseModel):
    """Log-probabilities of a prompt's tokens, and the likeliest next ones."""

    type: Literal["seen"] = "seen"
    tokens: list[SeenToken]
    following: list[SeenToken]


class Embedded(BaseModel):
    """A unit vector for each text, in order."""

    type: Literal["embedded"] = "embedded"
    vectors: list[list[float]]
    tokens: int


class Classified(BaseModel):
    """The probability of every label, in the order of `labels`, for each text; and whether the text was truncated."""

    type: Literal["classified"] = "classified"
    labels: list[str]
    probabilities: list[list[float]]
    cut: list[bool]


class Rewarded(BaseModel):
    """The reward of the last message of each conversation, in order."""

    type: Literal["rewarded"] = "rewarded"
    rewards: list[float]
    tokens: int


class Done(BaseModel):
    """Seconds are counted from the moment the worker took the request; `tokens_per_second` from the first token on."""

    type: Literal["done"] = "done"
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int
    first_token_seconds: float | None
    tokens_per_second: float | None


class StreamError(BaseModel):
    """The request has failed. `status` is the HTTP status if nothing was sent yet."""

    type: Literal["error"] = "error"
    status: int
    code: str
    error_type: str = "server_error"
    message: str
    hint: str = ""
    param: str | None = None


Entry = Annotated[
    AnswerStarted
    | RenderedPrompt
    | TextPart
    | ReasoningPart
    | ToolCallPart
    | ChoiceFinished
    | PromptLogprobs
    | Embedded
    | Classified
    | Rewarded
    | Done
    | StreamError,
    Field(discriminator="type"),
]
_entries: TypeAdapter[list[Entry]] = TypeAdapter(list[Entry])


def pack(entries: list[Entry]) -> bytes:
    return _entries.dump_json(entries, exclude_defaults=False)


def unpack(data: bytes) -> list[Entry]:
    return _entries.validate_json(data)


def stream_key(request_id: uuid.UUID) -> str:
    return f"{PREFIX}answer:{request_id.hex}"


def claim_key(request_id: uuid.UUID) -> str:
    return f"{stream_key(request_id)}:claim"


def reader_key(request_id: uuid.UUID) -> str:
    return f"{stream_key(request_id)}:reader"


def worker_key(worker: str) -> str:
    return f"{PREFIX}generator:{worker}"
