"""A PostgreSQL connection with a timeout on every response of the server."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.errors import _WaitTimeout


class Impatient(psycopg.Connection[Any]):
    """`statement_timeout` is enforced by the server itself, and a server that is stopped, or whose disk hangs, does not enforce it."""

    ping_seconds = silence_seconds = 10.0

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        if timeout is not None:
            return super().wait(gen, interval, timeout)  # psycopg requests it and handles it
        # Autocommit is on while the pool asks whether the connection still works.
        seconds = self.ping_seconds if self._autocommit else self.silence_seconds
        try:
            return super().wait(gen, interval, seconds)
        except _WaitTimeout:
            self.pgconn.finish()  # a late response must not be taken for that to another query
            raise psycopg.OperationalError(f"the database said nothing for {seconds:g} seconds") from None


def connect(*arguments: Any, ping_seconds: float, silence_seconds: float, **named: Any) -> Impatient:
    """`psycopg.connect` with a timeout of `silence_seconds` per response, and `ping_seconds` for the pool's check of a connection."""
    connection = Impatient.connect(*arguments, **named)
    connection.ping_seconds, connection.silence_seconds = ping_seconds, silence_seconds
    return connection
