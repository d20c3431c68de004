"""Log lines: text for people, JSON for machines, each with the id of its request. Never a secret."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import structlog

from app.settings import get_settings

SECRETS = re.compile(
    r"(sk-luthier-[0-9a-f]{8})[\w-]+|(/(?:sign-in|invitation|shared)/)[\w-]{8,}|(csrf_token=)[\w.-]+|(://[^:/@\s]*:)[^@\s/]+(?=@)"
)
"""API keys, sign-in links, form tokens and passwords in URLs: what a log line or an error text could contain."""


def hide(text: str) -> str:
    return SECRETS.sub(lambda found: next(part for part in found.groups() if part) + "…", text)


def _hide_all(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    return {name: hide(value) if isinstance(value, str) else value for name, value in event.items()}


def configure() -> None:
    """Send all log lines, ours and those of libraries, through one formatter to stderr."""
    settings = get_settings()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _hide_all,
    ]
    last = (
        structlog.processors.JSONRenderer() if settings.log_format == "json" else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last]
    )
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in [h for h in root.handlers if getattr(h, "luthier", False)]:
        root.removeHandler(old)
    handler.luthier = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(settings.log_level.upper())
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    # Our own line per request has the id and hides sign-in links; uvicorn's would print them.
    logging.getLogger("uvicorn.access").disabled = True
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def turned_over(path: Path) -> Path:
    """The file that holds what a rotated log held before: `train-1.log.1` of `train-1.log`."""
    return path.with_suffix(".log.1")


def turn_over(path: Path, limit_bytes: int) -> None:
    """Rotate a log that exceeds the limit: copy its end to a file next to it (`train-1.log.1`) and truncate it.

    Its writer may go on: the file was opened for appending, so the next line goes to the new beginning. What is written between
    the last byte copied and the truncation, some microseconds, is lost. Without room for the copy nothing is done, since a log
    does not grow on a full disk either.
    """
    try:
        with path.open("r+b") as log:
            if os.fstat(log.fileno()).st_size <= limit_bytes:
                return
            with turned_over(path).open("wb", buffering=0) as kept:
                for _ in range(10):  # a log that grows faster than it is copied: its end again, which is what matters of it
                    log.seek(os.fstat(log.fileno()).st_size - limit_bytes)
                    kept.seek(0)
                    kept.truncate()
                    while kept.tell() < 2 * limit_bytes and (piece := log.read(min(limit_bytes, 2**20))):
                        kept.write(piece)
                    if log.tell() == os.fstat(log.fileno()).st_size:
                        break
                log.truncate(0)
    except OSError:
        return
