"""Answers that the API was asked to keep (`store`).

Each is the exchange that records the call, with the answer as the API returned it. It goes with its project and its person, and by the
retention rule of the playground.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Select, func
from sqlalchemy.orm import Session

from app import ownership
from app.datasets import service as datasets
from app.errors import Conflict, NotFound
from app.jobs.request import MetadataKey, MetadataValue
from app.kit import ids
from app.kit.json_safe import storable
from app.languages import gettext
from app.storage import files
from app.tables import JSON, Dataset, Exchange, User

COMPLETION, RESPONSE = "api", "responses"
"""`source` of the exchanges of chat completions, and of responses."""
MAX_ROWS = 50_000
"""Rows of a dataset of stored answers."""


class StoredFilter(BaseModel):
    """Which stored chat completions are meant: those that have all of this, the newest first where there are more than `limit`."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    model: str | None = Field(None, max_length=512)
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16, description="Pairs that each must carry.")
    created_after: int | None = Field(None, ge=0, le=2**33, description="Seconds since 1970.")
    created_before: int | None = Field(None, ge=0, le=2**33, description="Seconds since 1970.")
    limit: int | None = Field(None, ge=1, le=MAX_ROWS)


def mine(user: User, source: str) -> Select[Exchange]:
    """All of the project."""
    return ownership.mine(Exchange, user, Exchange.source == source, Exchange.stored.is_not(None))


def of_model(query: Select[Exchange], model: str | None) -> Select[Exchange]:
    return query.where(Exchange.stored["model"].astext == model) if model else query


def chosen(user: User, wanted: StoredFilter) -> Select[Exchange]:
    """The chat completions that a filter means, newest first."""
    query = of_model(mine(user, COMPLETION), wanted.model)
    if wanted.metadata:
        query = query.where(Exchange.user_metadata.contains(wanted.metadata))
    if wanted.created_after is not None:
        query = query.where(Exchange.created_at >= func.to_timestamp(wanted.created_after))
    if wanted.created_before is not None:
        query = query.where(Exchange.created_at < func.to_timestamp(wanted.created_before + 1))  # the whole second
    return query.order_by(Exchange.created_at.desc(), Exchange.id.desc()).limit(wanted.limit)


def get(session: Session, user: User, source: str, prefix: str, key: uuid.UUID, param: str) -> Exchange:
    """One stored answer. Raises NotFound, also for another project's and for one that was not stored."""
    found = session.scalar(mine(user, source).where(Exchange.id == key).execution_options(populate_existing=True))
    if found is None:
        hint = gettext("Only answers that were asked for with store are kept, for as long as the retention rules of the studio say.")
        raise NotFound(gettext("Nothing is stored as %(id)s.", id=ids.public(prefix, key)), hint=hint, param=param)
    return found


def get_completion(session: Session, user: User, key: uuid.UUID) -> Exchange:
    return get(session, user, COMPLETION, ids.CHAT_COMPLETION, key, "completion_id")


def get_response(session: Session, user: User, key: uuid.UUID, param: str = "response_id") -> Exchange:
    return get(session, user, RESPONSE, ids.RESPONSE, key, param)


def set_metadata(session: Session, found: Exchange, metadata: Mapping[str, str] | None) -> None:
    found.user_metadata = storable(dict(metadata)) if metadata else None
    session.flush()


def delete(session: Session, found: Exchange) -> None:
    """Delete a stored answer with the record of its call."""
    session.delete(found)
    session.flush()


def completion_json(found: Exchange) -> JSON:
    """A stored chat completion as it was answered, with its metadata as it is now."""
    return {**(found.stored or {}), "metadata": found.user_metadata or {}}


def response_json(found: Exchange) -> JSON:
    """A stored response as it was answered."""
    return {name: value for name, value in (found.stored or {}).items() if name != "input"}


def messages_of(found: Exchange) -> list[JSON]:
    """The messages that were sent, in the form in which chat completions take them."""
    return [{name: value for name, value in one.items() if name != "content_parts"} for one in found.messages or []]


def messages_json(found: Exchange) -> list[JSON]:
    """The messages that were sent, as they are listed."""
    head = ids.public(ids.CHAT_COMPLETION, found.id)
    empty = {"name": None, "content_parts": None, "refusal": None}
    return [{"id": f"{head}-{place}", **empty, **message} for place, message in enumerate(found.messages or [])]


# Datasets -----------------------------------------------------------------------------------------------------------


class StoredRows(NamedTuple):
    """A dataset of stored answers: its rows, and how many answers were excluded because they are empty or not whole."""

    dataset: Dataset
    rows: int
    excluded: int


def make_dataset(session: Session, user: User, wanted: StoredFilter, name: str | None) -> StoredRows:
    """A chat dataset of stored chat completions, oldest first: the messages, the first choice and the tools. Raises Conflict for none."""
    query = chosen(user, wanted.model_copy(update={"limit": wanted.limit or MAX_ROWS}))
    rows = [_training_row(one) for one in session.scalars(query.execution_options(yield_per=500))]
    lines = [row for row in reversed(rows) if row]
    if not lines:
        raise Conflict(
            gettext("No stored chat completion that ended fits this."), hint=gettext("Ask with store: true first, or widen the filter.")
        )
    data = "\n".join(lines).encode()
    file = files.add_bytes(session, user, data, "stored-completions.jsonl", "fine-tune")
    dataset = datasets.create(session, user, file, name=name or "Stored completions", format="chat")
    return StoredRows(dataset, len(lines), len(rows) - len(lines))


def _training_row(found: Exchange) -> str | None:
    """The conversation with its answer, as a line; None for one that was cut off or is empty."""
    choice = (found.stored or {})["choices"][0]
    answer = {name: choice["message"].get(name) for name in ("content", "reasoning_content", "tool_calls")}
    if choice["finish_reason"] not in ("stop", "tool_calls") or not any(answer.values()):
        return None
    said: dict[str, Any] = {"role": "assistant", "content": answer["content"] or ""}
    said |= {name: answer[name] for name in ("reasoning_content", "tool_calls") if answer[name]}
    tools = found.sampling.get("tools")
    row = {"messages": [*messages_of(found), said], **({"tools": tools} if tools else {})}
    return json.dumps(row, ensure_ascii=False)
