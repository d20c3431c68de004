"""A connection to PostgreSQL on which no word of the server is awaited for long."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.errors import _WaitTimeout


class Impatient(psycopg.Connection[Any]):
    """`statement_timeout` is the server's own doing, and a server that is stopped, or whose disk hangs, keeps no time."""

    ping_seconds = silence_seconds = 10.0

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        if timeout is not None:
            return super().wait(gen, interval, timeout)  # psycopg asks for it and knows what to do
        # Autocommit is on while the pool asks whether the connection still works.
        seconds = self.ping_seconds if self._autocommit else self.silence_seconds
        try:
            return super().wait(gen, interval, seconds)
        except _WaitTimeout:
            self.pgconn.finish()  # an answer that comes later must not be taken for that to another question
            raise psycopg.OperationalError(f"the database said nothing for {seconds:g} seconds") from None


def connect(*arguments: Any, ping_seconds: float, silence_seconds: float, **named: Any) -> Impatient:
    """`psycopg.connect` that gives up a server silent for `silence_seconds`, for `ping_seconds` where it is only asked if it is there."""
    connection = Impatient.connect(*arguments, **named)
    connection.ping_seconds, connection.silence_seconds = ping_seconds, silence_seconds
    return connection
