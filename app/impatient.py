"""A connection to PostgreSQL on which no word of the server is awaited for long."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.errors import _WaitTimeout

from app.db import WEB


class Impatient(psycopg.Connection[Any]):
    """`statement_timeout` is the server's own doing, and a server that is stopped, or whose disk hangs, keeps no time."""

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        if timeout is not None:
            return super().wait(gen, interval, timeout)  # psycopg asks for it and knows what to do
        seconds = WEB.connect if self._autocommit else WEB.silence  # it is on while the pool asks whether the connection still works
        try:
            return super().wait(gen, interval, seconds)
        except _WaitTimeout:
            self.pgconn.finish()  # an answer that comes later must not be taken for that to another question
            raise psycopg.OperationalError(f"the database said nothing for {seconds:g} seconds") from None
