"""What `/v1/responses` answers: responses, their items, and the events of a stream."""

from __future__ import annotations

import functools
import operator
from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from app.schemas.answers import ChatLogprob, Proof
from app.schemas.base import UNBUILT, Schema
from app.schemas.responses import ReasoningText

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Schema):
    """The text of a message. Log-probabilities are those of all tokens before and in it, where they were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatLogprob]


class OutputMessage(Schema):
    """A message of the model."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(Schema):
    """What a model that thinks wrote before its answer."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]


class OutputFunctionCall(Schema):
    """A call of a function, its arguments as JSON text. Read them with care: only those of calls that are required and of functions that
    are strict follow a schema."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = Annotated[OutputMessage | OutputReasoning | OutputFunctionCall, Field(discriminator="type")]


class ListedText(Schema):
    """A text of a message that was sent."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None


class ListedMessage(Schema):
    """A message that was sent."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["user", "assistant", "system", "developer"]
    content: list[ListedText]


class ListedFunctionOutput(Schema):
    """What a function returned."""

    id: str
    type: Literal["function_call_output"]
    status: ItemStatus
    call_id: str
    output: str


class ListedItem(
    RootModel[Annotated[ListedMessage | OutputReasoning | OutputFunctionCall | ListedFunctionOutput, Field(discriminator="type")]]
):
    """An item that was sent for a response."""

    model_config = UNBUILT


class ResponseError(Schema):
    """Why a response failed."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(Schema):
    """Why a response is not whole."""

    reason: Literal["max_output_tokens"]


class InputTokensDetails(Schema):
    """Details of the prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int = Field(description="Always 0: nothing is charged for the cache.")


class OutputTokensDetails(Schema):
    """Details of the answer's tokens."""

    reasoning_tokens: int


class ResponseUsage(Schema):
    """Numbers of tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseReasoning(Schema):
    """How much the model was to reason."""

    effort: str | None
    summary: None


class ResponseText(Schema):
    """The form of the answer."""

    format: dict[str, Any]
    verbosity: Literal["medium"]


class Response(Schema):
    """The answer to a text or to items. With `stream` it is sent as events, the last of which has all of it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ResponseReasoning
    store: bool
    temperature: float
    text: ResponseText
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None
    luthier: Proof | None = Field(None, description="Once the answer has ended.")


class _Event(Schema):
    sequence_number: int


class ResponseStateEvent(_Event):
    """A response as it is now. The last event of a stream is completed, incomplete or failed."""

    type: Literal["response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"]
    response: Response


class OutputItemEvent(_Event):
    """An item has begun, or ended."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class _ItemEvent(_Event):
    item_id: str
    output_index: int


class ContentPartEvent(_ItemEvent):
    """The text of a message, or of reasoning, has begun, or ended."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0]
    part: Annotated[OutputText | ReasoningText, Field(discriminator="type")]


class OutputTextDeltaEvent(_ItemEvent):
    """More of the text of a message."""

    type: Literal["response.output_text.delta"]
    content_index: Literal[0]
    delta: str
    logprobs: list[ChatLogprob]


class OutputTextDoneEvent(_ItemEvent):
    """The whole text of a message."""

    type: Literal["response.output_text.done"]
    content_index: Literal[0]
    text: str
    logprobs: list[ChatLogprob]


class ReasoningDeltaEvent(_ItemEvent):
    """More of the reasoning."""

    type: Literal["response.reasoning_text.delta"]
    content_index: Literal[0]
    delta: str


class ReasoningDoneEvent(_ItemEvent):
    """The whole reasoning."""

    type: Literal["response.reasoning_text.done"]
    content_index: Literal[0]
    text: str


class ArgumentsDeltaEvent(_ItemEvent):
    """More of the arguments of a call."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_ItemEvent):
    """The whole arguments of a call."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


_EVENTS = (
    ResponseStateEvent, OutputItemEvent, ContentPartEvent, OutputTextDeltaEvent, OutputTextDoneEvent, ReasoningDeltaEvent,
    ReasoningDoneEvent, ArgumentsDeltaEvent, ArgumentsDoneEvent,
)  # fmt: skip


class ResponseEvent(RootModel[Annotated[functools.reduce(operator.or_, _EVENTS), Field(discriminator="type")]]):  # type: ignore[misc]
    """The data of one server-sent event of a response."""

    model_config = UNBUILT
