"""Schemas that several nouns share: pages of a list, deletions, errors."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

UNBUILT = ConfigDict(defer_build=True)
"""Response models validate nothing, so no validators are built of them, and the web process starts faster."""


class Schema(BaseModel):
    """A described response. It may have further fields, which clients must accept."""

    model_config = ConfigDict(protected_namespaces=()) | UNBUILT


class Listing(Schema):
    """A complete list."""

    object: Literal["list"]
    data: list[Any]
    has_more: Literal[False]


class Page(Schema):
    """One page of a list. While `has_more` is true, request the next with `after` set to `last_id`."""

    object: Literal["list"]
    data: list[Any]
    has_more: bool
    first_id: str | None
    last_id: str | None


@cache
def list_of(item: type[BaseModel]) -> type[Listing]:
    """The schema of a complete list, named like `ModelList`."""
    return create_model(f"{item.__name__}List", __base__=Listing, __doc__=Listing.__doc__, data=(list[item], ...))  # type: ignore[valid-type]


@cache
def page_of(item: type[BaseModel]) -> type[Page]:
    """The schema of a paginated list, named like `DatasetPage`."""
    return create_model(f"{item.__name__}Page", __base__=Page, __doc__=Page.__doc__, data=(list[item], ...))  # type: ignore[valid-type]


class Deleted(Schema):
    """The object that was deleted."""

    id: str
    object: str
    deleted: Literal[True]


class Fault(Schema):
    """What went wrong, where, and what to do."""

    message: str = Field(description="For people: what is wrong and how to fix it.")
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="The field of the request that is at fault.")
    code: str = Field(description="For programs; it does not change between releases.")


class Error(Schema):
    """The body of every error response under /v1."""

    error: Fault


WAY_OUT: Any = Field(None, description="What `hint` was called before. Removed in the next version.", deprecated=True)


class Problem(Schema):
    """Why an object has the status error."""

    code: str | None = None
    message: str
    hint: str | None = Field(None, description="What to do about it.")
    way_out: str | None = WAY_OUT
    line: int | None = Field(None, description="Line of the file, where one is at fault.")
    column: str | None = None
    param: str | None = None
