"""Request bodies of `/v1/chat/completions` and `/v1/completions`, and what `/v1/responses` shares with them."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from app.errors import BadField
from app.inference import playground
from app.inference.protocol import MAX_CHOICES, MAX_STOPS, MAX_TOP_LOGPROBS, Effort, Sampling
from app.jobs.request import MetadataKey, MetadataValue
from app.schemas.tools import MAX_TOOLS, Choice, FunctionTool

MAX_SCHEMA_LENGTH = 65_536
_Stop = Annotated[str, Field(min_length=1, max_length=256)]


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


class ObfuscationOptions(BaseModel):
    include_obfuscation: Literal[False] | None = Field(None, description="Chunks are not padded.")


class StreamOptions(ObfuscationOptions):
    include_usage: bool = False


class SamplingBody(BaseModel):
    """Fields of all calls that generate; `null` means the default.

    Unknown parameters are ignored, as the clients expect. Of those that OpenAI's client knows none is: what is not a field here is
    in `refused`, with the values that ask for nothing else than is done.
    """

    model_config = ConfigDict(extra="ignore")

    model: str = Field(min_length=1, max_length=512)
    stream: bool | None = False
    stop: Annotated[list[_Stop], BeforeValidator(_as_list, json_schema_input_type=_Stop | list[_Stop]), Field(max_length=MAX_STOPS)] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    user: str | None = Field(None, max_length=512, description="A name of the caller's own, kept with the answer.")
    # Ours, through `extra_body`.
    top_k: int | None = Field(0, ge=0, le=1_000_000)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, gt=0, le=10)

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_cannot_be_kept(cls, body: Any) -> Any:
        for name, harmless in cls.refused.items() if isinstance(body, dict) else ():
            if body.get(name) is not None and body[name] not in harmless:
                hint = " ".join(["Omit it", *(f"or send {json.dumps(value)}" for value in harmless if value)])
                raise BadField(f"{name} is not supported with this value.", hint=f"{hint}.", param=name, code="unsupported_parameter")
        return body

    def sampling(self, **more: Any) -> Sampling:
        given = {name: getattr(self, name) for name in Sampling.model_fields if getattr(self, name, None) is not None}
        given |= {
            "stop": tuple(self.stop),
            "max_tokens": getattr(self, "max_tokens", None),
            "temperature": 1.0 if self.temperature is None else self.temperature,
        }
        return Sampling(**({"top_p": 1.0} | given | more))


class GenerationBody(SamplingBody):
    """Fields of chat completions and completions."""

    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)


class AssistantFunction(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: str = Field(min_length=1, max_length=256)
    arguments: str


class AssistantCall(BaseModel):
    """A tool call of an earlier answer, as it was answered."""

    model_config = ConfigDict(extra="ignore")

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: AssistantFunction


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: str = Field(pattern="^(system|developer|user|assistant|tool|function)$")
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[AssistantCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="What the model thought before this answer, where its chat template takes it.")
    audio: None = None
    function_call: None = Field(None, description="Send tool_calls instead.")

    def plain(self, place: int) -> dict[str, Any]:
        """The message in the form that chat templates take. Raises BadField for a part that is not text."""
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.get("type") not in ("text", "refusal") or not isinstance(part.get(part["type"]), str):
                    raise BadField(f"messages.{place}.content: only parts of type text can be read.", param="messages")
            content = "".join(part[part["type"]] for part in content)
        if content is None and self.role != "assistant":
            raise BadField(f"messages.{place}.content is missing.", hint="Send a text.", param="messages")
        calls = [call.model_dump(mode="json") for call in self.tool_calls or []]
        extra = {"name": self.name, "tool_calls": calls, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning_content}
        extra = {name: value for name, value in extra.items() if value}
        return {"role": "system" if self.role == "developer" else self.role, "content": playground.readable(content or ""), **extra}

    def as_sent(self, place: int) -> dict[str, Any]:
        """The message in the form in which a stored one is returned: with its own role, and its parts where it had some."""
        parts = {"content_parts": self.content} if isinstance(self.content, list) else {}
        return self.plain(place) | {"role": self.role} | parts


class JsonSchema(BaseModel):
    """Every answer follows the schema, whether `strict` asks for it or not."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(BaseModel):
    """The form of the answer: any text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None for text. Raises BadField for one that is too large, missing or out of place."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise BadField(
                "response_format.json_schema belongs to the type json_schema, and to no other.",
                hint='Send {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}.',
                param="response_format",
            )
        return answer_schema(self.type, self.json_schema, "response_format")


def answer_schema(kind: str, given: JsonSchema | None, param: str) -> dict[str, Any] | None:
    """The JSON schema of an answer of this form; None for text. Raises BadField for one that is too large."""
    if given is None:
        return {"type": "object"} if kind == "json_object" else None
    if len(json.dumps(given.json_schema)) > MAX_SCHEMA_LENGTH:
        raise BadField("The schema is too large.", hint=f"Send one of at most {MAX_SCHEMA_LENGTH:,} characters.", param=param)
    return given.json_schema


class ChatBody(GenerationBody):
    messages: list[Message] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer.")
    reasoning_effort: Effort | None = Field(
        None,
        description="For models whose chat template knows it: none switches thinking off, and any other switches it on or sets its level.",
    )
    response_format: ResponseFormat | None = None
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16, description="Pairs that are kept with the answer.")
    store: bool | None = Field(None, description="Keep the answer, so that it can be listed, retrieved, evaluated and trained on.")
    safety_identifier: str | None = Field(None, max_length=512, description="As `user`.")
    prompt_cache_key: str | None = Field(
        None, max_length=512, description="The beginning of a prompt is reused wherever it was read before, by any key and without one."
    )

    refused = {
        "functions": ([],),
        "function_call": ("auto", "none"),
        "modalities": (["text"],),
        "audio": (),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": ({"mode": "implicit"},),
        "prompt_cache_retention": ("in_memory",),
        "service_tier": ("auto", "default"),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    @model_validator(mode="after")
    def _one_limit(self) -> ChatBody:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise BadField("max_tokens and max_completion_tokens differ.", hint="Send one of them.", param="max_tokens")
        return self

    def labels(self) -> dict[str, Any]:
        """What is kept with the answer and has no effect on it."""
        given = {"user": self.user, "safety_identifier": self.safety_identifier}
        return {name: value for name, value in given.items() if value}


class CompletionBody(GenerationBody):
    prompt: str | list[str] | list[int] | list[list[int]] = "<|endoftext|>"
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = False

    refused = {"suffix": ("",), "best_of": ()}

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_are_given(cls, body: Any) -> Any:
        """`best_of` equal to `n` has no effect, so it is accepted."""
        if isinstance(body, dict) and "best_of" in body and body["best_of"] == (body.get("n") or 1):
            return {name: value for name, value in body.items() if name != "best_of"}
        return body
