"""Where the items of a run come from, and the messages that a model is sent for each."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from app.errors import BadData, BadField
from app.graders._base import GradedSample, GradeError
from app.graders._templates import Template, fill
from app.inference.stored import StoredFilter
from app.kit.json_safe import too_deep
from app.languages import gettext
from app.tables import JSON

MAX_ITEMS = 10_000
MAX_BYTES = 64 * 2**20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True)


class SourceItem(_Strict):
    """One item, and where no model is asked the answer to it."""

    item: JSON
    sample: JSON | None = None


class StoredItem(SourceItem):
    """A stored chat completion. `sample` is its answer as the API returns one, with an error where it was deleted meanwhile."""


class FileContent(_Strict):
    """The items themselves."""

    type: Literal["file_content"]
    content: list[SourceItem] = Field(min_length=1, max_length=MAX_ITEMS)


class FileId(_Strict):
    """A JSONL file with one item per line."""

    type: Literal["file_id"]
    id: str


class StoredCompletions(StoredFilter):
    """Chat completions that were stored: an item has their messages as `input`."""

    type: Literal["stored_completions"]


Source = Annotated[FileContent | FileId, Field(discriminator="type")]


class TextContent(_Strict):
    """A text of a message."""

    type: Literal["input_text", "output_text"]
    text: Template


class TemplateMessage(_Strict):
    """A message whose text names fields of the item, as `{{item.question}}`."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Template | TextContent | list[TextContent]
    type: Literal["message"] = "message"


class MessagesTemplate(_Strict):
    """The same messages for every item."""

    type: Literal["template"]
    template: list[TemplateMessage] = Field(min_length=1, max_length=200)


class ItemReference(_Strict):
    """The field of an item that holds its messages, as `item.input`."""

    type: Literal["item_reference"]
    item_reference: str = Field(pattern=r"^item\.[A-Za-z_][\w-]*$")


class EvalSamplingParams(_Strict):
    """How the model answers, in the names of chat completions."""

    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    response_format: JSON | None = None
    reasoning_effort: str | None = None
    tools: list[JSON] | None = None


class JsonlDataSource(_Strict):
    """Items with their answers: nothing is asked of a model."""

    type: Literal["jsonl"]
    source: Source


class CompletionsDataSource(_Strict):
    """Items that a model is asked for an answer to; of stored completions without a model, the answers that are stored with them."""

    type: Literal["completions"]
    source: Annotated[FileContent | FileId | StoredCompletions, Field(discriminator="type")]
    model: str | None = Field(None, min_length=1, max_length=512)
    input_messages: Annotated[MessagesTemplate | ItemReference, Field(discriminator="type")] | None = None
    sampling_params: EvalSamplingParams = EvalSamplingParams()

    @model_validator(mode="after")
    def _asks_or_reads(self) -> CompletionsDataSource:
        """Raises BadField for a model without messages or the reverse, and for neither where the items bring no answers."""
        asks = {"model": self.model is not None, "input_messages": self.input_messages is not None}
        reads = isinstance(self.source, StoredCompletions) and "sampling_params" not in self.model_fields_set
        if not all(asks.values()) and (any(asks.values()) or not reads):
            missing = next(name for name, there in asks.items() if not there)
            hint = gettext("Send model and input_messages; without both, the answers of stored completions are graded as they are.")
            where = f"data_source.{missing}"
            raise BadField(gettext("%(field)s is missing.", field=where), hint=hint, param=where)
        return self


DataSource = Annotated[JsonlDataSource | CompletionsDataSource, Field(discriminator="type")]


def read(stored: JSON) -> DataSource:
    """A data source that was checked before."""
    return _adapter().validate_python(stored)


@functools.cache
def _adapter() -> TypeAdapter[DataSource]:
    return TypeAdapter(DataSource)


def items_of(path: Path) -> Iterator[SourceItem]:
    """The items of a JSONL file. Raises BadData with the line at fault."""
    if path.stat().st_size > MAX_BYTES:
        raise BadData(f"The file has more than {MAX_BYTES >> 20} MiB.", hint="Split it.", param="data_source.source.id")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                raise BadData(f"Line {number} is not JSON.", hint='Write {"item": {…}} on every line.') from None
            if not isinstance(line, dict) or not isinstance(line.get("item"), dict) or too_deep(line):
                raise BadData(f"Line {number} has no item.", hint='Write {"item": {…}} on every line.')
            sample = line.get("sample")
            yield SourceItem.model_construct(item=line["item"], sample=sample if isinstance(sample, dict) else None)


def messages_for(source: CompletionsDataSource, item: JSON) -> list[JSON]:
    """What the model is sent for an item. Raises BadField where the item lacks what the template names."""
    asked = source.input_messages
    assert asked is not None, "a source with a model has messages"
    if isinstance(asked, ItemReference):
        found = item.get(asked.item_reference.removeprefix("item."))
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise BadField(f"The item has no list of messages {asked.item_reference}.", param="input_messages")
        return found
    try:
        return [{"role": one.role, "content": _text(one, item)} for one in asked.template]
    except GradeError as error:
        raise BadField(error.message, param="input_messages") from None


def _text(message: TemplateMessage, item: JSON) -> str:
    parts: list[Any] = message.content if isinstance(message.content, list) else [message.content]
    return "".join(fill(part if isinstance(part, str) else part.text, GradedSample(""), item) for part in parts)
