"""The audit log's one seam: what a request commits is written down in the same transaction.

Whatever a route does, it commits through a SQLAlchemy session. Before a commit, `_write` looks at what the transaction changed and
at the request that runs, and adds one row: who (session or API key), what (a type made from the route), to which object, from
where. A route needs no line for it, and a deed without its row cannot be committed.

Two things have no transaction of their own: a download, and a sign-in that was refused. The layer `Audit` writes these before the
response begins.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastapi import Request
from sqlalchemy import event
from sqlalchemy.orm import ORMExecuteState, Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.db import on_commit, transaction
from app.kit import ids
from app.ownership import MADE
from app.tables import AuditLog, BrowserSession, Comparison
from app.web import templates as web_templates
from app.web.auth import SAFE

QUIET = frozenset(
    [
        "answers",
        "audit_logs",
        "batch_answers",
        "eval_items",
        "events",
        "exchanges",
        "findings",
        "inspections",
        "outbox",
        "prompt_results",
        "sign_in_links",
        "token_uses",
        "tracked_runs",
        "uploads",
        "votes",
        "webhook_deliveries",
    ]
)
"""Tables whose rows come with every answer of a model, or with work in progress. A transaction that changes nothing else is no deed."""

SHOWN = {
    "files": ("file", ids.FILE),
    "datasets": ("dataset", ids.DATASET),
    "comparisons": ("comparison", ids.COMPARISON),
    "jobs": ("job", ids.JOB),
    "models": ("model", ids.MODEL),
    "exports": ("export", ids.EXPORT),
    "evaluations": ("evaluation", ids.EVALUATION),
    "prompts": ("prompt", ids.PROMPT),
    "graders": ("grader", ids.GRADER),
    "batches": ("batch", ids.BATCH),
    "evals": ("eval", ids.EVAL),
    "eval_runs": ("eval.run", ids.EVAL_RUN),
    "webhook_endpoints": ("webhook_endpoint", ids.WEBHOOK),
    "prompt_runs": ("prompt_run", ids.RUN),
    "distillation_runs": ("distillation", ids.DISTILLATION),
    "checkpoint_permissions": ("checkpoint.permission", "cp"),
    "api_keys": ("api_key", "key"),
}
"""What a new row of a table is called, and the prefix of its id."""
NOUNS = {
    "keys": "api_key",
    "compare": "comparison",
    "searches": "search",
    "model_aliases": "model_alias",
    "aliases": "model_alias",
    "permissions": "checkpoint.permission",
    "batch": "prediction",
    "batches": "batch",
    "webhooks": "webhook_endpoint",
    "vectors": "evaluation",
    "playground": "conversation",
}
DONE = {
    "GET": "downloaded", "POST": "changed", "PUT": "set", "PATCH": "updated", "DELETE": "deleted", "cancel": "cancelled", "pause": "paused",
    "resume": "resumed", "retry": "retried", "again": "retried", "stop": "stopped", "save": "saved", "delete": "deleted", "keep": "kept",
    "push": "pushed", "revoke": "deleted", "remove": "removed", "name": "renamed", "engine": "engine_set", "engine_check": "engine_checked",
    "aliases": "alias_set", "aliases_remove": "alias_removed", "bulk": "changed", "fix": "fixed", "fixes": "fixed", "edits": "edited",
    "back": "moved_back", "model": "set", "gate": "gate_set", "evaluations": "evaluated", "drop": "edited", "read": "read", "roles": "edited", "repair": "fixed",
}  # fmt: skip
"""What a method, or the words of a route after its last parameter, have done. Others are taken as they are."""

MAX_REFUSALS = 60
"""Refused sign-ins written per minute: a flood of them must not fill the disk. The next row says how many were not written."""

_WRITTEN = "luthier_audit"
_console: ContextVar[str] = ContextVar("console", default="")


def type_of(method: str, route: str, place: str = "") -> str:
    """The type of a deed that made nothing, from its method and its route's pattern: `job.cancelled` of POST /v1/fine_tuning/jobs/{id}/cancel."""
    words = [place if word == "{place}" else word for word in route.removeprefix("/v1").split("/") if word]
    if method == "GET" and words[-1] in ("content", "download", "export"):
        words.pop()
    last = max((at for at, word in enumerate(words) if word.startswith("{")), default=0 if place else len(words))
    named = [word for word in words[: max(last, 1)] if not word.startswith("{")] or words
    action = "" if method == "GET" else "_".join(words[last + 1 :]).replace("-", "_")
    return f"{_singular(named[-1])}.{DONE.get(action, action) or DONE[method]}"


def _singular(word: str) -> str:
    word = word.replace("-", "_")
    return NOUNS.get(word) or (f"{word[:-3]}y" if word.endswith("ies") else word.removesuffix("s"))


# In the transaction of the deed -----------------------------------------------------------------------------------------


def install() -> None:
    """Listen to every session of this process, once."""
    for name, action in (("do_orm_execute", _note_statement), ("after_flush", _note_rows), ("before_commit", _write)):
        if not event.contains(Session, name, action):
            event.listen(Session, name, action)


@contextmanager
def at_the_console(command: str) -> Iterator[None]:
    """What this process makes in this block is written down as done by `command`."""
    install()
    before = _console.set(command)
    try:
        yield
    finally:
        _console.reset(before)


def _note_statement(state: ORMExecuteState) -> None:
    """An INSERT, UPDATE or DELETE that is no object of the session."""
    if state.is_insert or state.is_update or state.is_delete:
        table = getattr(state.statement, "table", None)
        _changes(state.session)[0].add(str(getattr(table, "name", "")))


def _note_rows(session: Session, context: object) -> None:
    tables, made = _changes(session)
    for row in (*session.new, *session.dirty, *session.deleted):
        tables.add(row.__tablename__)
    made += session.new


def _changes(session: Session) -> tuple[set[str], list[Any]]:
    """Names of the tables that this transaction changed, and the rows it made."""
    found: tuple[set[str], list[Any]] = session.info.setdefault(_WRITTEN, (set(), []))
    return found


def _write(session: Session) -> None:
    if session.in_nested_transaction():  # the end of a savepoint, which says nothing yet
        return
    session.flush()
    tables, added = session.info.pop(_WRITTEN, (set(), []))
    made = [*session.info.pop(MADE, []), *added]
    request = web_templates.current.get(None)
    if request is None and (command := _console.get()):
        for row in made:
            if shown := _shown(row):
                noun, prefix = shown
                told = {"object_id": ids.public(prefix, row.id), "details": {"command": command}}
                session.add(AuditLog(type=f"{noun}.created", actor="console", **told))
    if request is not None and (entry := _deed(request, tables - QUIET, made)) is not None:
        session.add(entry)
        on_commit(session, lambda: setattr(request.state, "audited", True))  # only then: a request may try again


def _deed(request: Request, tables: set[str], made: list[Any]) -> AuditLog | None:
    """The row of what this transaction did; None for one that did nothing, or whose request is written down already."""
    if getattr(request.state, "audited", False):
        return None
    for row in made:
        if isinstance(row, BrowserSession):
            return _entry(request, "login.succeeded", user_id=row.user_id, actor="session")
    user = getattr(request.state, "user", None)
    if user is None or request.method in SAFE or not tables:
        return None
    if request.url.path == "/sign-out":
        return _entry(request, "logout.succeeded")
    for row in made:
        if shown := _shown(row):
            noun, prefix = shown
            return _entry(request, f"{noun}.created", object_id=ids.public(prefix, row.id))
    place = str(request.path_params.get("place", ""))
    return _entry(request, type_of(request.method, _route(request), place), object_id=_named(request))


def _shown(row: Any) -> tuple[str, str] | None:
    """What a new row is called, and the prefix of its id; None for one that is no deed of its own."""
    if isinstance(row, Comparison) and row.kind == "search":
        return "search", ids.SEARCH
    return SHOWN.get(row.__tablename__)


def _route(request: Request) -> str:
    """The pattern of the route, never its path: a path may hold a sign-in link."""
    return str(getattr(request.scope.get("route"), "path", ""))


def _named(request: Request) -> str | None:
    """The object that the path names."""
    values = [str(value) for name, value in request.path_params.items() if name not in ("token", "place")]
    return "/".join(values)[:300] or None


def _entry(request: Request, type_: str, **values: Any) -> AuditLog:
    user, given = getattr(request.state, "user", None), getattr(request.state, "pass_", None)
    known: dict[str, Any] = {"actor": "nobody"}
    if user is not None:
        known = {"user_id": user.id, "user_name": user.name, "actor": "api_key" if given and given.key_id else "session"}
        known["key_id"] = given.key_id if given else None
    return AuditLog(
        type=type_,
        **known | values,
        address=request.client.host if request.client else None,
        request_id=getattr(request.state, "id", None),
        details={"method": request.method, "route": _route(request)},
    )


# What has no transaction ------------------------------------------------------------------------------------------------


class Audit:
    """Writes downloads and refused sign-ins before the response begins. One that cannot be written down is not given out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start" and (entry := _seen(request, message)) is not None:
                await run_in_threadpool(_store, entry)
            await send(message)

        await self.app(scope, receive, noted)


def _seen(request: Request, message: Message) -> AuditLog | None:
    status, headers = message["status"], Headers(raw=message["headers"])
    if status in (200, 206) and request.method == "GET" and headers.get("content-disposition", "").startswith("attachment"):
        begins = re.match(r"bytes=0?-|$", request.headers.get("range", ""))  # not each part of a download that goes on
        return _entry(request, type_of("GET", _route(request)), object_id=_named(request)) if begins else None
    if _refused(request, status):
        return _refusals.entry(request, status)
    return None


def _refused(request: Request, status: int) -> bool:
    """A wrong password, link or key; not a page that was opened without any."""
    if request.url.path == "/sign-in" and request.method == "POST":
        return status in (401, 429)
    if _route(request) == "/sign-in/{token}":
        return status == 404
    return status == 401 and bool(request.headers.get("authorization", "").strip())


class _Refusals:
    def __init__(self) -> None:
        self.times: deque[float] = deque()
        self.unwritten = 0

    def entry(self, request: Request, status: int) -> AuditLog | None:
        now = time.monotonic()
        while self.times and self.times[0] < now - 60:
            self.times.popleft()
        if len(self.times) >= MAX_REFUSALS:
            self.unwritten += 1
            return None
        self.times.append(now)
        entry = _entry(request, "login.failed")
        entry.details = {**(entry.details or {}), "status": status, **({"not_written": self.unwritten} if self.unwritten else {})}
        self.unwritten = 0
        return entry


_refusals = _Refusals()


def _store(entry: AuditLog) -> None:
    with transaction() as session:
        session.add(entry)
