"""Cursor pagination as the OpenAI client expects it: it requests `after=<last id>` while `has_more` is true."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import Path, Query, Request
from sqlalchemy import Select, tuple_
from sqlalchemy.orm import Session

from app.errors import BadField

Json = dict[str, Any]
Order = Literal["asc", "desc"]
MOST = 10_000
"""The largest page. OpenAI lists up to 10,000 files at once; a larger `limit` is reduced to this."""

After = Annotated[str | None, Query(description="Id of the last object of the page before.")]
MAX_NUMBER = 2**53
"""The largest integer in a URL or a form: every JSON parser reads it exactly, and an offset computed from it fits a bigint."""

Offset = Annotated[int, Query(ge=0, le=MAX_NUMBER)]
Step = Annotated[int, Path(ge=0, le=MAX_NUMBER, description="Optimizer step.")]
PageNumber = Annotated[int, Query(ge=1, le=MAX_NUMBER)]
Limit = Annotated[int, Query(ge=1, description="Objects on one page.")]

METADATA: Json = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "description": "Pairs that each must carry.",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}
"""The parameter that `with_metadata` reads, for `openapi_extra`."""


def with_metadata(query: Select[Any], column: Any, request: Request) -> Select[Any]:
    """The query of the rows that carry all pairs `metadata[key]=value` of the address; with `metadata=null`, of those without metadata."""
    if request.query_params.get("metadata") == "null":
        query = query.where(column.is_(None))
    wanted = {name[9:-1]: value for name, value in request.query_params.items() if name.startswith("metadata[") and name.endswith("]")}
    return query.where(column.contains(wanted)) if wanted else query


def page(
    rows: Sequence[Any] | Select[Any],
    after: str | None = None,
    limit: int = 20,
    order: Order = "desc",
    to_json: Callable[[Any], Json] = dict,
    *,
    session: Session | None = None,
    key: Callable[[str], uuid.UUID | int] | None = None,
) -> Json:
    """One page of a list (given newest first) or of a query over one table.

    A query needs `session`, and `key` when `after` is given: it converts the public id into the primary key. Rows of a table with
    `created_at` are ordered by it, then by id; other tables by id alone. An unknown `after` is a BadField.
    """
    limit = min(limit, MOST)
    if isinstance(rows, Select):
        found = _from_query(rows, after, limit, order, session, key)
        data = [to_json(row) for row in found[:limit]]
        return _answer(data, len(found) > limit)
    data = [to_json(row) for row in (rows if order == "desc" else list(reversed(rows)))]
    start = _place(data, after) if after else 0
    return _answer(data[start : start + limit], len(data) > start + limit)


def _place(data: list[Json], after: str) -> int:
    for index, item in enumerate(data):
        if item["id"] == after:
            return index + 1
    raise _unknown(after)


def _from_query(
    query: Select[Any],
    after: str | None,
    limit: int,
    order: Order,
    session: Session | None,
    key: Callable[[str], uuid.UUID | int] | None,
) -> Sequence[Any]:
    assert session is not None, "a query is run in a session"
    table = query.column_descriptions[0]["entity"]
    columns = [table.created_at, table.id] if hasattr(table, "created_at") and not _counts(table) else [table.id]
    if after:
        assert key is not None, "a cursor needs its key"
        last = session.get(table, key(after))
        if last is None:
            raise _unknown(after)
        here, there = tuple_(*columns), tuple_(*[getattr(last, column.key) for column in columns])
        query = query.where(here < there if order == "desc" else here > there)
    query = query.order_by(None).order_by(*[c.desc() if order == "desc" else c.asc() for c in columns])
    return session.scalars(query.limit(limit + 1)).all()


def _counts(table: Any) -> bool:
    """Whether the primary key is an increasing number, so that it determines the order."""
    return table.__table__.c.id.identity is not None


def _unknown(after: str) -> BadField:
    return BadField(
        f"after={after[:80]!r} is not on this list.", param="after", hint="Use the `last_id` of the page before, or leave `after` out."
    )


def _answer(data: list[Json], has_more: bool) -> Json:
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
