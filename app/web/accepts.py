"""Content negotiation: JSON or pages."""

from __future__ import annotations

from fastapi import Request


def is_program(request: Request) -> bool:
    """Whether the client expects JSON: everything under /v1, and clients that accept only JSON or events."""
    if request.url.path == "/v1" or request.url.path.startswith("/v1/"):
        return True
    accepts = request.headers.get("accept", "")
    return "text/html" not in accepts and ("json" in accepts or "text/event-stream" in accepts)
