"""A claim with the GPUs that it needs, in one transaction that is retried until the database answers."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.db import transaction
from worker.supervision import exit_codes, gpu_lease

log = logging.getLogger(__name__)
T = TypeVar("T")


class ClaimOutcome(enum.Enum):
    """What came of looking at something that waits for this worker."""

    DONE = "it was claimed, and is over"
    GONE = "it does not wait any more"
    NO_GPU = "others use the GPUs that it needs"
    NO_ROOM = "what trains here leaves too little memory for it"
    LEFT = "the worker was asked to leave"
    GIVEN = "an engine has it already, or may not have more of it"
    NOTHING = "nothing that waits fits what is free here"


class ClaimedWork(Protocol):
    """What a worker has claimed, with the GPUs that it holds for it."""

    lease: gpu_lease.GpuLease


C = TypeVar("C", bound=ClaimedWork)


def claimed(claim: Callable[[Session], C | ClaimOutcome]) -> C | ClaimOutcome:
    """What `claim` takes in a transaction of its own, retried until the database answers. Where that is not committed, its GPUs are free again."""

    def once() -> C | ClaimOutcome:
        found: C | ClaimOutcome = ClaimOutcome.GONE
        try:
            with transaction() as session:
                found = claim(session)
        except BaseException:
            if not isinstance(found, ClaimOutcome):
                found.lease.release()
            raise
        return found

    return retry_until_database(once)


def retry_until_database(action: Callable[[], T], give_up: Callable[[], bool] = lambda: False) -> T:
    """Retry until the database answers. All transitions are idempotent, so a lost response does no harm."""
    pause = 0.2
    while True:
        try:
            return action()
        except DBAPIError as error:
            if not exit_codes.is_away(error) or give_up():
                raise
            log.warning("The database is unreachable: %s", str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else error)
            time.sleep(pause)
            pause = min(pause * 1.6, 3.0)
