"""A connection to PostgreSQL on which no word of the server is awaited for long."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.errors import _WaitTimeout

from app.db import WEB


class Impatient(psycopg.Connection[Any]):
    """`statement_timeout` is the server's own doing, and a server that is stopped, or whose disk hangs, keeps no time."""

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        try:
            return super().wait(gen, interval, WEB.silence if timeout is None else timeout)
        except _WaitTimeout:
            if timeout is not None:
                raise  # psycopg asked for it and knows what to do
            self.pgconn.finish()  # an answer that comes later must not be taken for that to another question
            raise psycopg.OperationalError(f"the database said nothing for {WEB.silence:g} seconds") from None
