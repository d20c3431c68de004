"""What models say: chats, completions, embeddings, labels and next tokens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.schemas.base import Schema

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(Schema):
    """Of the prompt's tokens."""

    cached_tokens: int
    audio_tokens: int


class CompletionTokensDetails(Schema):
    """Of the answer's tokens."""

    reasoning_tokens: int
    audio_tokens: int


class Usage(Schema):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Proof(Schema):
    """Who answered, how fast, and the seeds that give the same answers again."""

    model: str = Field(description="The model that answered, also where an alias was named.")
    revision: str
    adapter_sha256: str | None
    engine: str | None = Field(description="Address of the server that answered; null is the studio's own engine.")
    seeds: list[int]
    first_token_seconds: float | None
    tokens_per_second: float | None


class Alternative(Schema):
    """A token and the logarithm of its probability."""

    token: str
    bytes: list[int] | None
    logprob: float | None


class ChatLogprob(Alternative):
    """A token that was written, and the likeliest ones in its place."""

    top_logprobs: list[Alternative]


class ChatLogprobs(Schema):
    """Token by token."""

    content: list[ChatLogprob]
    refusal: None


class ChatAnswer(Schema):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None
    annotations: list[Any]


class ChatChoice(Schema):
    """One of `n` answers."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class _Head(Schema):
    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str


class ChatCompletion(_Head):
    """A whole answer. With `stream` it comes as chunks instead."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    luthier: Proof


class ChatDelta(Schema):
    """What is new of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChunkChoice(Schema):
    """What is new of one answer. The last one of each says why it ended."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_Head):
    """The data of one server-sent event. The last one before [DONE] carries the proof, and the usage where it was asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    luthier: Proof | None = None


class CompletionLogprobs(Schema):
    """Token by token, as the older API has it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


class CompletionChoice(Schema):
    """One answer to one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(_Head):
    """Whole answers to one or several prompts. With `stream` they come as chunks instead."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    luthier: Proof


class CompletionChunkChoice(Schema):
    """What is new of one answer."""

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
    """Tokens of all texts together."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Schema):
    """The vector of one text: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Schema):
    """One vector for each text, in order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: TokensRead


class Classification(Schema):
    """The likeliest label of one text, and the probability of every label."""

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
    """A token and how likely it is; null where a model does not tell."""

    token: str
    id: int | None
    bytes: list[int] | None
    logprob: float | None
    probability: float | None


class NextTokensOfModel(Schema):
    """What one model would say next, the likeliest first; with `prompt_tokens` also how likely each token of the text was."""

    model: str
    revision: str
    adapter_sha256: str | None
    tokens: list[LikelyToken]
    prompt_tokens: list[LikelyToken] | None = None


class NextTokensOfModels(Schema):
    """One for each model, in the order they were named."""

    object: Literal["list"]
    data: list[NextTokensOfModel]
