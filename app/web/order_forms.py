"""Forms that order something: how their fields are read, and how a form orders once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from app.errors import Conflict

Created = TypeVar("Created")


async def posted(request: Request) -> list[tuple[str, str]]:
    """The fields of a posted form; a repeated field is a list."""
    form = await request.form()
    return [(name, value) for name, value in form.multi_items() if isinstance(value, str)]


Posted = Annotated[list[tuple[str, str]], Depends(posted)]


def once(create: Callable[[str | None], Created], key: str) -> Created:
    """What `create` makes under an idempotency key, once for a form and its values: the form carries the key, so that a double click creates
    one. After Back, changed values under the same key create a new one."""
    try:
        return create(f"form-{key[:64]}")
    except Conflict as conflict:
        if conflict.code != "idempotency_key_reused":
            raise
        return create(None)
