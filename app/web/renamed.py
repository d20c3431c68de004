"""Addresses of the version before. They keep working for this version: a page leads to its new address, and a call of the API is
answered as before, with headers that name its successor."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

SINCE = datetime(2026, 11, 29, tzinfo=UTC)
"""When the addresses below were deprecated."""
MOVED = "moved"
"""What a route that redirects is called."""
HEADERS = {
    "Deprecation": {"description": "Since when, as @ and seconds since 1970 (RFC 9745).", "schema": {"type": "string"}},
    "Link": {"description": 'The address to use instead, with rel="successor-version".', "schema": {"type": "string"}},
}


def page_moved(pages: APIRouter, old: str, new: str) -> None:
    """Redirect an old address of a page, with its query. `new` may use the parameters of `old`."""

    def moved(request: Request) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(_filled(new, request.path_params) + query, status_code=308)

    pages.add_api_route(old, moved, methods=["GET"], name=MOVED, include_in_schema=False)


def deprecated_path(api: APIRouter, old: str, endpoint: Callable[..., Any]) -> None:
    """Answer at an old address as `endpoint` does at its own, which must take the same parameters."""
    route = next(one for one in api.routes if isinstance(one, APIRoute) and one.endpoint is endpoint)
    method, responses = sorted(route.methods or ())[0], deepcopy(route.responses)
    for status, said in responses.items():
        if int(status) < 400:
            said["headers"] = said.get("headers", {}) | HEADERS
    api.add_api_route(
        old,
        endpoint,
        methods=[method],
        operation_id=f"{route.operation_id}_deprecated",
        description=f"Deprecated: use `{method} {route.path_format}`. This address is removed in the next version.",
        response_model=route.response_model,
        responses=responses,
        openapi_extra=route.openapi_extra,
        deprecated=True,
        route_class_override=type("DeprecatedRoute", (DeprecatedRoute,), {"successor": route.path_format}),
    )


class DeprecatedRoute(APIRoute):
    """Adds the headers to whatever it answers, refusals too."""

    successor = ""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["deprecation"] = f"@{int(SINCE.timestamp())}"
                headers["link"] = f'<{_filled(self.successor, scope["path_params"])}>; rel="successor-version"'
            await send(message)

        await super().handle(scope, receive, tell)


def _filled(path: str, params: dict[str, Any]) -> str:
    return path.format(**{name: quote(str(value), safe="/") for name, value in params.items()})
