"""Log lines: text for people, JSON for machines, each with the id of the request it belongs to. Never a secret."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import structlog

from app.settings import get_settings

SECRETS = re.compile(r"(sk-luthier-[0-9a-f]{8})[\w-]+|(/sign-in/)[\w-]{8,}|(csrf_token=)[\w.-]+|(://[^:/@\s]*:)[^@\s/]+(?=@)")
"""API keys, sign-in links, form tokens and passwords in addresses: what a log line or an error text could carry."""


def hide(text: str) -> str:
    return SECRETS.sub(lambda found: next(part for part in found.groups() if part) + "…", text)


def _hide_all(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    return {name: hide(value) if isinstance(value, str) else value for name, value in event.items()}


def configure() -> None:
    """Send everything, our own lines and those of the libraries, through one formatter to stderr."""
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
