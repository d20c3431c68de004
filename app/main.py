"""The web application. `uvicorn app.main:create_app --factory` runs it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import hashlib
import importlib
import mimetypes
import pkgutil
import re
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from app import routes
from app.db import answer_people, get_engine, transaction
from app.errors import BadRequest, Forbidden
from app.inference import external_server
from app.kit import logs, secret
from app.kit.addresses import is_loopback
from app.settings import get_settings
from app.storage import objects
from app.web import audit, auth, csrf, error_responses, middleware, navigation, request_rate
from app.web import templates as web_templates
from app.web.background import BackgroundRunner


async def _refuse_unread_body(request: Request) -> None:
    """Refuse fields that a call does not read rather than ignore them. An empty object passes."""
    route = request.scope["route"]
    if route.body_field is not None or "requestBody" in (route.openapi_extra or {}):
        return
    if request.headers.get("content-type", "").startswith("application/json") and (await request.body()).strip() not in (
        b"",
        b"{}",
        b"null",
    ):
        raise BadRequest("This call takes no body.", hint="Send it without one.", code="unread_body")


def create_app() -> FastAPI:
    """The application with every router of `app/routes/`, all behind sign-in except what is in `app.web.auth.PUBLIC`."""
    logs.configure()
    answer_people()
    _refuse_open_door()
    secret.check()
    objects.check()
    external_server.allowed()  # an invalid setting is reported now, and not on somebody's page
    app = FastAPI(
        title="Luthier",
        version=version("luthier"),
        summary="Fine-tuning of language models, in the shape of the OpenAI API.",
        dependencies=[Depends(auth.sign_in), Depends(csrf.check_csrf), Depends(navigation.remember_notes)],
        lifespan=_lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for module in _route_modules():
        if isinstance(getattr(module, "api", None), APIRouter):
            _answer_head(module.api)
            app.include_router(module.api, dependencies=[Depends(request_rate.counted), Depends(_refuse_unread_body)])
        if isinstance(getattr(module, "pages", None), APIRouter):
            app.include_router(module.pages, include_in_schema=False)
    app.mount("/static", StaticFiles(web_templates.STATIC), name="static")
    for kind in _handled():
        app.add_exception_handler(kind, _handle)
    app.state.menu = navigation.menu_of(_route_modules())
    middleware.install(app)
    audit.install()
    return app


def _route_modules() -> list[Any]:
    names = sorted(info.name for info in pkgutil.iter_modules(routes.__path__))
    return [importlib.import_module(f"app.routes.{name}") for name in names]


def _answer_head(api: APIRouter) -> None:
    """HEAD for every GET of the API, except streams of events, which have no length."""
    from app.schemas import openapi  # the routes need it, and the web's import need not wait for them

    for route in api.routes:
        if not isinstance(route, APIRoute) or route.methods is None or "GET" not in route.methods:
            continue
        if openapi.EVENTS not in route.responses.get(200, {}).get("content", {}):
            route.methods.add("HEAD")


def _refuse_open_door() -> None:
    """Refuse to listen on other addresses than loopback without a password."""
    settings = get_settings()
    if not is_loopback(settings.host) and not settings.admin_password:
        raise Forbidden(
            f"LUTHIER_HOST={settings.host} would open the studio to other machines.",
            hint="Set LUTHIER_ADMIN_PASSWORD first, or stay on 127.0.0.1.",
        )


def _handled() -> list[Any]:
    from fastapi.exceptions import RequestValidationError

    from app.errors import StudioError

    return [StudioError, HTTPException, RequestValidationError]


async def _handle(request: Request, error: Exception) -> Response:
    fault = error_responses.fault_of(error)
    if fault.status == 405:  # the router tried one route of the path, and others may accept other methods
        fault.headers = {"allow": ", ".join(navigation.methods(request.app, request.url.path))}
    return await run_in_threadpool(error_responses.answer, request, fault)


@functools.cache
def _settle() -> None:
    """Take what was imported out of garbage collection, once per process: each full one went through a quarter of a million objects, and
    pages stood still for 140 ms meanwhile. Of what is left a full one takes 30 to 60 ms, which every fortieth page waited for; it comes
    a thirtieth as often now."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Create the first account if the database is there already, run batches meanwhile, and close the pools at the end."""
    from sqlalchemy.exc import DBAPIError

    def start() -> None:
        secret.secret()
        web_templates.static_version()
        with contextlib.suppress(DBAPIError), transaction() as session:
            auth.first_user(session)

    await run_in_threadpool(start)
    from app.web import batch_runner, eval_runner  # no page needs them

    app.state.background = BackgroundRunner(app, (batch_runner.KIND, eval_runner.KIND))
    running = asyncio.create_task(app.state.background.run())
    _settle()
    yield
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    app.state.background = None
    from app.queue import get_redis

    if get_engine.cache_info().currsize:
        get_engine().dispose()
    if get_redis.cache_info().currsize:
        get_redis().close()


class StaticFiles:
    """The files of `static/` under `/static/<version>/…`, cached forever by browsers while the version is current.

    They are half a megabyte and are read once: only what is in this dictionary is served, and no thread is needed, since all of
    them may be waiting for an unresponsive database.
    """

    def __init__(self, folder: Path) -> None:
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if request.method not in ("GET", "HEAD"):
            raise HTTPException(405, headers={"allow": "GET, HEAD"})
        version, _, name = request.url.path.partition("/static/")[2].partition("/")
        if not re.fullmatch(r"[0-9a-f]{16}", version):
            version, name = "", f"{version}/{name}".rstrip("/")
        if (content := self.files.get(name)) is None:
            raise HTTPException(404)
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        fresh = version == web_templates.static_version()
        headers = {"etag": etag, "cache-control": "public, max-age=31536000, immutable" if fresh else "no-cache"}
        if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
            response = Response(status_code=304, headers=headers)
        else:
            response = Response(content, headers=headers, media_type=mimetypes.guess_type(name)[0])
        await response(scope, receive, send)
