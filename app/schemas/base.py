"""What several nouns share: pages of a list, a deletion, an error."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

UNBUILT = ConfigDict(defer_build=True)
"""No validator is built of what only describes, so that the web starts as fast as before."""


class Schema(BaseModel):
    """A described object. What it does not name may still come: clients must not refuse it."""

    model_config = ConfigDict(protected_namespaces=()) | UNBUILT


class Listing(Schema):
    """Everything there is, at once."""

    object: Literal["list"]
    data: list[Any]
    has_more: Literal[False]


class Page(Schema):
    """One page of a list. While `has_more` is true, ask again with `after` set to `last_id`."""

    object: Literal["list"]
    data: list[Any]
    has_more: bool
    first_id: str | None
    last_id: str | None


@cache
def list_of(item: type[BaseModel]) -> type[Listing]:
    """A list that comes whole, as `ModelList`."""
    return create_model(f"{item.__name__}List", __base__=Listing, __doc__=Listing.__doc__, data=(list[item], ...))  # type: ignore[valid-type]


@cache
def page_of(item: type[BaseModel]) -> type[Page]:
    """A list that comes in pages, as `DatasetPage`."""
    return create_model(f"{item.__name__}Page", __base__=Page, __doc__=Page.__doc__, data=(list[item], ...))  # type: ignore[valid-type]


class Deleted(Schema):
    """What was deleted."""

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
    """Every refusal under /v1, whatever its status."""

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
