"""The request body of `/v1/responses`: text and tools of functions."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from app.errors import BadField
from app.inference.protocol import MAX_TOP_LOGPROBS, Effort
from app.jobs.request import MetadataKey, MetadataValue
from app.schemas.chat import JsonSchema, ObfuscationOptions, SamplingBody, answer_schema
from app.schemas.tools import (
    MAX_TOOLS,
    AllowedTools,
    Choice,
    FunctionDefinition,
    FunctionName,
    FunctionTool,
    NamedFunction,
    NamedTool,
    ToolChoice,
)

MAX_ITEMS = 2048
LOGPROBS = "message.output_text.logprobs"
Json = dict[str, Any]


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ItemText(BaseModel):
    """A text of an item; files, images and audio are refused."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["input_text", "output_text"]
    text: str


Texts = Annotated[list[ItemText], BeforeValidator(_as_parts, json_schema_input_type=str | list[ItemText]), Field(max_length=MAX_ITEMS)]


class _Item(BaseModel, ABC):
    model_config = ConfigDict(extra="ignore")

    id: str | None = Field(None, max_length=256)

    @abstractmethod
    def as_item(self) -> Json:
        """The item as it is listed."""

    def _head(self, prefix: str, kind: str) -> Json:
        return {"id": self.id or f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "completed"}


class ItemMessage(_Item):
    """A message, or one that was answered before."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts
    phase: None = None

    def as_item(self) -> Json:
        kind = {"type": "output_text", "annotations": []} if self.role == "assistant" else {"type": "input_text"}
        content = [kind | {"text": part.text} for part in self.content]
        return {**self._head("msg", "message"), "role": self.role, "content": content}


class ItemFunctionCall(_Item):
    """A call of an earlier answer, as it was answered."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=256)
    arguments: str

    def as_item(self) -> Json:
        return {**self._head("fc", self.type), "call_id": self.call_id, "name": self.name, "arguments": self.arguments}


class ItemFunctionOutput(_Item):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=256)
    output: Texts

    def as_item(self) -> Json:
        return {**self._head("fco", self.type), "call_id": self.call_id, "output": "".join(part.text for part in self.output)}


class ReasoningText(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["reasoning_text"]
    text: str


class ItemReasoning(_Item):
    """What a model thought before the next message or call, where its chat template takes it."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = Field(None, max_length=MAX_ITEMS)
    encrypted_content: None = None

    def as_item(self) -> Json:
        content = [part.model_dump() for part in self.content or []]
        return {**self._head("rs", self.type), "summary": [], "content": content}


def _kind(value: Any) -> str | None:
    return (value.get("type") or "message") if isinstance(value, dict) else getattr(value, "type", None)


InputItem = Annotated[
    Annotated[ItemMessage, Tag("message")]
    | Annotated[ItemFunctionCall, Tag("function_call")]
    | Annotated[ItemFunctionOutput, Tag("function_call_output")]
    | Annotated[ItemReasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="an item is a message, function_call, function_call_output or reasoning",
    ),
]


class TextFormat(BaseModel):
    """The form of the answer: any text, any JSON object, or JSON of a schema, which every answer follows."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    strict: bool | None = None
    json_schema: Json | None = Field(None, alias="schema")

    def schema_of(self) -> Json | None:
        """The JSON schema of the answer; None for text. Raises BadField for one that is too large, missing or out of place."""
        if (self.type == "json_schema") != (self.json_schema is not None and self.name is not None):
            hint = 'Send {"type": "json_schema", "name": …, "schema": {…}}.'
            raise BadField("text.format of the type json_schema has a name and a schema, and no other has.", hint=hint, param="text.format")
        given = JsonSchema.model_validate({"name": self.name, "schema": self.json_schema}) if self.type == "json_schema" else None
        return answer_schema(self.type, given, "text.format")


class TextConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: TextFormat = TextFormat(type="text")
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(BaseModel):
    """`effort` as `reasoning_effort` of chat completions. The reasoning is returned whole, so there are no summaries."""

    model_config = ConfigDict(extra="forbid")

    effort: Effort | None = None
    summary: None = None
    generate_summary: None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseTool(BaseModel):
    """A function that a model may call. With `strict`, and where a call is required, the arguments follow the schema of the parameters."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: None = None
    output_schema: None = None

    def as_tool(self) -> FunctionTool:
        given = FunctionDefinition(name=self.name, description=self.description, parameters=self.parameters, strict=self.strict)
        return FunctionTool(type="function", function=given)


class NamedResponseTool(BaseModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    name: FunctionName


class ResponseToolChoice(BaseModel):
    """The one function that must be called, or those that may be."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function", "allowed_tools"]
    name: FunctionName | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[NamedResponseTool] | None = Field(None, min_length=1, max_length=MAX_TOOLS)

    def as_choice(self) -> ToolChoice:
        function = NamedFunction(name=self.name) if self.name else None
        allowed = None
        if self.mode and self.tools:
            named = [NamedTool(type="function", function=NamedFunction(name=tool.name)) for tool in self.tools]
            allowed = AllowedTools(mode=self.mode, tools=named)
        return ToolChoice(type=self.type, function=function, allowed_tools=allowed)


class ResponseBody(SamplingBody):
    """A response that is created from text, earlier items or an earlier response."""

    input: Annotated[
        list[InputItem], BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]), Field(min_length=1, max_length=MAX_ITEMS)
    ]
    instructions: str | None = Field(None, description="The system message. It is not taken over from the previous response.")
    previous_response_id: str | None = Field(None, max_length=256, description="A stored response that this one goes on from.")
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextConfig = TextConfig()
    tools: list[ResponseTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer.")
    reasoning: ReasoningConfig | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = Field(None, max_length=16)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description=f"With {LOGPROBS} in include.")
    store: bool | None = Field(True, description="Keep the response, so that it can be retrieved and gone on from.")
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16, description="Pairs that are kept with the response.")
    truncation: Literal["disabled"] | None = Field(None, description="An input that is longer than the context is refused.")
    stream_options: ObfuscationOptions | None = None
    safety_identifier: str | None = Field(None, max_length=512, description="As `user`.")
    prompt_cache_key: str | None = Field(
        None, max_length=512, description="The beginning of a prompt is reused wherever it was read before, by any key and without one."
    )

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "prompt_cache_options": ({"mode": "implicit"},),
        "prompt_cache_retention": ("in_memory",),
        "service_tier": ("auto", "default"),
    }

    def choice(self) -> Choice | None:
        return self.tool_choice.as_choice() if isinstance(self.tool_choice, ResponseToolChoice) else self.tool_choice

    def labels(self) -> Json:
        """What is kept with the answer and has no effect on it."""
        given = {"user": self.user, "safety_identifier": self.safety_identifier}
        return {name: value for name, value in given.items() if value}

    def echoed(self) -> Json:
        """What a response says of its request."""
        form = self.text.format.model_dump(mode="json", by_alias=True, exclude_none=True)
        tools = [tool.model_dump(mode="json", include={"type", "name", "description", "parameters", "strict"}) for tool in self.tools or []]
        choice = self.tool_choice or "auto"
        return {
            "model": self.model,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "store": self.store is not False,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": form, "verbosity": "medium"},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(mode="json", exclude_none=True),
            "tools": tools,
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }
