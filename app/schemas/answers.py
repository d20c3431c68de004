"""Model outputs: chats, completions, embeddings, labels and next tokens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.schemas.base import Schema

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(Schema):
    """Details of the prompt's tokens."""

    cached_tokens: int
    audio_tokens: int


class CompletionTokensDetails(Schema):
    """Details of the completion's tokens."""

    reasoning_tokens: int
    audio_tokens: int


class Usage(Schema):
    """Numbers of prompt and completion tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Proof(Schema):
    """Which weights answered, how fast, and the seeds that reproduce the answers."""

    model: str = Field(description="The model that answered, also where an alias was named.")
    revision: str
    adapter_sha256: str | None
    engine: str | None = Field(description="Address of the server that answered; null is the studio's own engine.")
    seeds: list[int]
    first_token_seconds: float | None
    tokens_per_second: float | None


class Alternative(Schema):
    """A token and its log-probability."""

    token: str
    bytes: list[int] | None
    logprob: float | None


class ChatLogprob(Alternative):
    """A generated token, and the most likely ones at its position."""

    top_logprobs: list[Alternative]


class ChatLogprobs(Schema):
    """Log-probabilities of each token, those of reasoning and of tool calls included."""

    content: list[ChatLogprob]
    refusal: None


class CalledFunction(Schema):
    """A function, and its arguments as JSON text. Read them with care: only those of calls that are required and of functions that are
    strict follow a schema."""

    name: str
    arguments: str


class ChatToolCall(Schema):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswer(Schema):
    """The message that the model generated."""

    role: Literal["assistant"]
    content: str | None = Field(description="null where the answer is nothing but tool calls.")
    reasoning_content: str | None = Field(None, description="What a model that thinks wrote before its answer.")
    tool_calls: list[ChatToolCall] | None = None
    refusal: None
    annotations: list[Any]


class ChatChoice(Schema):
    """One of `n` answers."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class _Head(Schema):
    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str


class ChatCompletion(_Head):
    """A complete response. With `stream` it is sent as chunks instead."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    luthier: Proof
    metadata: dict[str, str] | None = Field(None, description="Of one that is stored.")


class CalledFunctionDelta(Schema):
    """The new part of a call: the name comes first, and the arguments of all parts are one JSON text."""

    name: str | None = None
    arguments: str


class ChatToolCallDelta(Schema):
    """A part of the `index`-th tool call of an answer; the first has its id."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionDelta


class ChatDelta(Schema):
    """The new part of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ChatToolCallDelta] | None = None
    refusal: None = None


class ChatChunkChoice(Schema):
    """The new part of one choice. The last chunk of each choice holds the finish reason."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletionChunk(_Head):
    """The data of one server-sent event. The last one before [DONE] carries the proof, and the usage where it was requested."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    luthier: Proof | None = None


class CompletionLogprobs(Schema):
    """Log-probabilities of each token, in the format of the completions API."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


class CompletionChoice(Schema):
    """One completion of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(_Head):
    """Complete answers to one or several prompts. With `stream` they are sent as chunks instead."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    luthier: Proof


class CompletionChunkChoice(Schema):
    """The new part of one choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunk(_Head):
    """The data of one server-sent event."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
    luthier: Proof | None = None


class TokensRead(Schema):
    """Number of tokens in all texts."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Schema):
    """The embedding of one text: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Schema):
    """One embedding for each text, in order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: TokensRead


class Classification(Schema):
    """The most likely label of one text, and the probability of every label."""

    object: Literal["classification"]
    index: int
    label: str
    probabilities: dict[str, float]
    truncated: bool = Field(description="Whether the text is longer than the model reads.")


class Classifications(Schema):
    """One for each text, in order."""

    object: Literal["list"]
    data: list[Classification]
    model: str
    usage: TokensRead


class LikelyToken(Schema):
    """A token and its probability; null where a model does not report it."""

    token: str
    id: int | None
    bytes: list[int] | None
    logprob: float | None
    probability: float | None


class NextTokensOfModel(Schema):
    """The most likely next tokens of one model, in descending order; with `prompt_tokens` also the probability of each token of
    the text."""

    model: str
    revision: str
    adapter_sha256: str | None
    tokens: list[LikelyToken]
    prompt_tokens: list[LikelyToken] | None = None


class NextTokensOfModels(Schema):
    """One for each model, in the order they were named."""

    object: Literal["list"]
    data: list[NextTokensOfModel]
