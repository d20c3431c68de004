"""ASGI middleware for every request. Plain ASGI throughout, so that streams are never buffered.

Context    request id, nonce, log line, security headers, waiting messages
Hosts      only names the studio knows (a foreign name means DNS rebinding)
Origin     a page of another site may not change anything
Body       size limit
Compress   pages and lists, never streams
Faults     every exception becomes a response
Audit      downloads and refused sign-ins are written down
WellFormed   UTF-8 without NUL, and unambiguous JSON
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import urlsplit

import structlog
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import languages
from app.errors import BadRequest, Forbidden, StudioError, TooLarge
from app.kit import humanize, tracing
from app.languages import gettext
from app.settings import get_settings
from app.web import accepts, error_responses
from app.web import metrics as web_metrics
from app.web import templates as web_templates
from app.web.audit import Audit
from app.web.auth import SAFE, given_key, secure
from app.web.well_formed import WellFormed

log = structlog.get_logger("luthier.web")
MAX_JSON_BYTES = 32 * 2**20
MULTIPART_ROOM_BYTES = 2**20
QUIET = ("/static/", "/shell", "/healthz", "/readyz", "/metrics")

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "x-frame-options": "DENY",
}


def policy(nonce: str) -> str:
    """The content security policy: everything from this origin, no inline script or style.

    The nonce allows no inline script, since no inline script has it; the htmx CSP extension reads it from here.
    """
    return (
        f"default-src 'self'; script-src 'self' 'nonce-{nonce}'; style-src 'self'; img-src 'self' data:; object-src 'none'; "
        "base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
    )


class Context:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        request.state.id = _request_id(request)
        request.state.nonce = secrets.token_urlsafe(16)
        token = web_templates.current.set(request)
        structlog.contextvars.bind_contextvars(request_id=request.state.id)
        spoken = languages.current.set(_language(request))
        started, status = time.perf_counter(), 500

        async def finish(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                _add_headers(request, headers)
                if accepts.is_program(request):
                    headers["openai-processing-ms"] = str(round((time.perf_counter() - started) * 1000))
            await send(message)

        try:
            with _span(request) as span:
                await self.app(scope, receive, finish)
                if span is not None:
                    span.update_name(f"{request.method} {getattr(request.scope.get('route'), 'path', '')}".strip())
                    span.set_attribute("http.response.status_code", status)
        finally:
            _note(request, status, time.perf_counter() - started)
            structlog.contextvars.unbind_contextvars("request_id")
            web_templates.current.reset(token)
            languages.current.reset(spoken)


def _language(request: Request) -> str:
    """Programs are answered in English: they may compare what they are told. The scripts of pages are none, though they ask for JSON: what
    they get is shown to people."""
    if f"{request.url.path}/".startswith(("/v1/", QUIET[0])) or given_key(request):
        return languages.SOURCE
    return languages.chosen(request.cookies.get("luthier_language", ""), request.headers.get("accept-language", ""))


def _span(request: Request) -> AbstractContextManager[Any]:
    """The request's span; none for what a machine asks for all the time."""
    if request.url.path.startswith(QUIET):
        return nullcontext()
    return tracing.span(f"{request.method} request", request.headers, request_id=request.state.id)


def _request_id(request: Request) -> str:
    """The id that a proxy gave, when it looks like one, so that its log and ours can be correlated."""
    given = request.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w-]{8,64}", given) else f"req_{secrets.token_hex(12)}"


def _add_headers(request: Request, headers: MutableHeaders) -> None:
    headers["x-request-id"] = request.state.id
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    for name, value in getattr(request.state, "rate_headers", {}).items():
        headers[name] = value
    headers.setdefault("content-security-policy", policy(request.state.nonce))
    headers.setdefault("cache-control", "no-store")
    if secure(request):
        headers.setdefault("strict-transport-security", "max-age=31536000")
    _keep_messages(request, headers)


def _keep_messages(request: Request, headers: MutableHeaders) -> None:
    """Messages that no page has shown yet are kept in a signed cookie; shown ones are removed from it."""
    waiting = getattr(request.state, "flashes", [])
    if waiting:
        headers.append(
            "set-cookie",
            f"{web_templates.messages_cookie()}={web_templates.pack_messages(waiting)}; Path=/; HttpOnly; SameSite=Lax; Max-Age=300",
        )
    elif getattr(request.state, "forget_messages", False):
        headers.append("set-cookie", f"{web_templates.messages_cookie()}=; Path=/; HttpOnly; SameSite=Lax; Max-Age=0")


def _note(request: Request, status: int, seconds: float) -> None:
    path = request.url.path
    route = getattr(request.scope.get("route"), "path", "/static" if path.startswith("/static/") else "none")
    web_metrics.answered(request.method, route, status, seconds)
    if not path.startswith(QUIET):
        log.info("request", method=request.method, path=path, status=status, ms=round(seconds * 1000, 1))


class Hosts:
    """Checks the Host header. Numeric addresses pass: an attacker who wants a page to share our origin needs a name under his control."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        settings = get_settings()
        names = {"localhost", socket.gethostname().lower(), settings.host, *settings.trusted_hosts.lower().split(",")}
        self.names = {name.strip() for name in names | {urlsplit(settings.public_url or "").hostname or ""}} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = [value for name, value in scope.get("headers", ()) if name == b"host"]
        # Of two Host headers a proxy may have checked the one and we the other.
        if scope["type"] == "http" and (len(named) != 1 or not self.knows(named[0].decode("latin-1"))):
            fault = BadRequest(
                gettext("The studio does not answer to this host name."),
                hint=gettext("Open it by its address, or add the name to LUTHIER_TRUSTED_HOSTS."),
                code="unknown_host",
            )
            await _refuse(scope, receive, send, fault)
            return
        await self.app(scope, receive, send)

    def knows(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
            return name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


class Origin:
    """Requests other than safe methods must come from our own pages, or from a program, which sends no Origin at all."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE and _foreign(Request(scope)):
            message = gettext("This request came from a page of another site.")
            fault = Forbidden(message, hint=gettext("Use the studio's own pages."), code="foreign_origin")
            await _refuse(scope, receive, send, fault)
            return
        await self.app(scope, receive, send)


def _foreign(request: Request) -> bool:
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = request.headers.get("origin")
    if origin is None:
        return False
    public = urlsplit(get_settings().public_url or "")
    ours = {(request.url.scheme, request.headers.get("host", "")), (public.scheme, public.netloc)}
    try:
        came = urlsplit(origin)
    except ValueError:  # an incomplete IPv6 address
        return True
    return (came.scheme, came.netloc) not in ours or not came.netloc


class Body:
    """Limits the size of bodies: JSON and plain forms fit into memory; only an upload, which is read as a stream, may be large."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in SAFE:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        multipart = headers.get("content-type", "").startswith(("multipart/form-data", "application/offset+octet-stream"))
        most = get_settings().upload_limit_bytes + MULTIPART_ROOM_BYTES if multipart else MAX_JSON_BYTES
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,18}", length):
            message = gettext("The Content-Length of this request is not a number.")
            fault: StudioError = BadRequest(message, hint=gettext("Send the request again."))
            await _refuse(scope, receive, send, fault)
            return
        if int(length) > most:
            await _refuse(scope, receive, send, _too_large(most))
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise _too_large(most)
            return message

        await self.app(scope, counted, send)


def _too_large(most: int) -> TooLarge:
    return TooLarge(
        gettext("This is larger than the %(size)s that are accepted here.", size=humanize.human_bytes(most)),
        hint=gettext("Split it, or raise LUTHIER_UPLOAD_LIMIT_BYTES for dataset uploads."),
    )


class Compress(GZipMiddleware):
    """gzip for pages, lists and our own files; event streams, downloads and archives are not compressed."""

    def __init__(self, app: ASGIApp) -> None:
        streams = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/octet-stream", "application/x-ndjson", "application/jsonl")
        super().__init__(app, minimum_size=800, compresslevel=5, exclude_content_types=streams)


class Faults:
    """Turns exceptions that no handler caught into responses, with the same headers as every other response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            request = Request(scope, receive)
            fault = error_responses.fault_of(error)
            if fault.status >= 500:
                log.error("fault", path=request.url.path, error=type(error).__name__, exc_info=error)
            if begun:
                raise  # the response has started; it can only be cut short
            await _refuse(scope, receive, send, fault)


async def _refuse(scope: Scope, receive: Receive, send: Send, fault: StudioError) -> None:
    """In a thread, because a page queries the database for the counts in its menu."""
    response = await run_in_threadpool(error_responses.answer, Request(scope, receive), fault)
    await response(scope, receive, send)


def install(app: Any) -> None:
    """The last one added is the outermost. Forwarded headers are trusted only from the proxies in the settings."""
    for layer in (WellFormed, Audit, Faults, Compress, Body, Origin, Hosts, Context):
        app.add_middleware(layer)
    if proxies := get_settings().forwarded_allow_ips:
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=proxies)
