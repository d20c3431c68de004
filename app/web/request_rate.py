"""Requests of the API in a minute, by person and by project, where an admin limits them.

They are counted in Redis, so that all web processes count together; while Redis is away nothing is refused. A minute is one of the
clock, as the day and the month of other limits are. Pages are not counted, and neither is what the studio asks on behalf of a batch.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Annotated

import redis
from fastapi import Depends, Request
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from app import limits, queue
from app.db import transaction
from app.errors import TooMany
from app.tables import Project, User
from app.web.auth import ON_BEHALF, sign_in

READ_SECONDS = 5.0
"""How soon a limit that an admin sets is in force."""

_reading = threading.Lock()
_read_at = float("-inf")
_own: dict[limits.By, dict[uuid.UUID, float]] = {"person": {}, "project": {}}


def own_limits() -> dict[limits.By, dict[uuid.UUID, float]]:
    """The limits of everybody who has one of their own, at most five seconds old."""
    global _read_at, _own
    with _reading:
        if time.monotonic() - _read_at > READ_SECONDS:
            with transaction() as session:
                found: dict[limits.By, dict[uuid.UUID, float]] = {"person": {}, "project": {}}
                for by, table in (("person", User), ("project", Project)):
                    value = table.limits["requests_per_minute"].as_float()
                    query = select(table.id, value).where(table.limits.has_key("requests_per_minute"))
                    found[by] = {key: float(most) for key, most in session.execute(query)}  # type: ignore[index]
            _read_at, _own = time.monotonic(), found
        return _own


def forget() -> None:
    """Read the limits again at the next request."""
    global _read_at
    _read_at = float("-inf")


def limits_of(user: User) -> dict[tuple[limits.By, uuid.UUID], float]:
    """What holds for a request of this person in their project."""
    own, usual = own_limits(), limits.allowed(None, "person").get("requests_per_minute")
    person, project = own["person"].get(user.id, usual), own["project"].get(user.project_id)
    found: dict[tuple[limits.By, uuid.UUID], float | None] = {("person", user.id): person, ("project", user.project_id): project}
    return {whose: most for whose, most in found.items() if most is not None}


def count(request: Request, user: User) -> None:
    """Count a request. Raises TooMany where it is one too many."""
    if not (most := limits_of(user)):
        return
    now = time.time()
    reset = 60.0 - now % 60.0
    try:
        with queue.get_redis().pipeline() as pipe:
            for by, key in most:
                name = limits.requests_key(by, now)
                pipe.hincrby(name, str(key), 1)
                pipe.expire(name, 120)
            counts = pipe.execute()[::2]
    except redis.RedisError:
        return
    left, (by, _), limit = min((limit - counted, whose, limit) for (whose, limit), counted in zip(most.items(), counts, strict=True))
    # By the names that OpenAI's API gives them.
    request.state.rate_headers = {
        "x-ratelimit-limit-requests": f"{limit:.0f}",
        "x-ratelimit-remaining-requests": f"{max(0, left):.0f}",
        "x-ratelimit-reset-requests": f"{reset:.0f}s",
    }
    if left < 0:
        whose = "Your limit" if by == "person" else "The limit of this project"
        raise TooMany(
            f"{whose} is reached: {limit:.0f} requests in a minute.",
            hint=f"Wait {reset:.0f} seconds. An admin can raise it.",
            retry_after_seconds=reset,
        )


async def counted(request: Request, user: Annotated[User | None, Depends(sign_in)]) -> None:
    """A dependency of every route of the API."""
    if user is not None and ON_BEHALF not in request.scope:
        await run_in_threadpool(count, request, user)
