"""What stands around every page: the menu with its counts, and the facts of the machine at its foot."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import Depends, Request
from sqlalchemy import ScalarSelect, func, or_, select
from sqlalchemy.exc import DBAPIError
from starlette.concurrency import run_in_threadpool

from app.accounts import sign_in
from app.answers import is_program
from app.db import transaction
from app.tables import Dataset, Job, Model, User
from app.web import human_bytes, human_number, human_seconds

MENU = (
    ("Overview", "/"),
    ("Datasets", "/datasets"),
    ("Models", "/models"),
    ("Jobs", "/jobs"),
    ("Compare", "/compare"),
    ("Playground", "/playground"),
    ("Guide", "/guide"),
    ("Settings", "/settings"),
)


def paths(app: Any) -> set[str]:
    """Every path this application answers to, through all included routers."""
    return {path for path, _ in each_route(app.router)}


def methods(app: Any, address: str) -> list[str]:
    """Every method that some route takes at this address, in alphabetical order. Mounted files take GET and HEAD."""
    found: set[str] = set()
    for _, route in each_route(app.router):
        if route.path_regex.match(address):
            found |= getattr(route, "methods", {"GET", "HEAD"})
    return sorted(found)


def each_route(router: Any) -> Iterator[tuple[str, Any]]:
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from each_route(inner)
        else:
            yield route.path, route


def menu(request: Request, user: User) -> dict[str, Any]:
    """`nav` (title, path, note, current) and `foot` (lines of text) for the base template."""
    here, known, notes = request.url.path, request.app.state.paths, getattr(request.state, "notes", {})
    nav = [
        {
            "title": title,
            "path": path,
            "note": notes.get(path, ""),
            "current": here == path or (path != "/" and here.startswith(f"{path}/")),
        }
        for title, path in MENU
        if path in known
    ]
    return {"nav": nav, "foot": foot()}


async def remember_notes(request: Request, user: Annotated[User | None, Depends(sign_in)]) -> None:
    """The third dependency of the whole app: ask for the counts of the menu before the route opens its own session.

    Asked while the page is rendered, each request would hold one connection and wait for a second; enough of them at
    once would then wait for each other until the pool gives up.
    """
    if user is not None and request.method in ("GET", "POST") and not is_program(request):
        request.state.notes = await run_in_threadpool(notes, user)


def notes(user: User) -> dict[str, str]:
    """How many there are of each, by one query. Nothing when the database is away: the page says so elsewhere."""
    try:
        with transaction() as session:
            datasets, models, jobs, running = session.execute(
                select(
                    _count(Dataset, Dataset.owner_id == user.id),
                    _count(Model, or_(Model.owner_id == user.id, Model.owner_id.is_(None))),
                    _count(Job, Job.owner_id == user.id),
                    _count(Job, Job.owner_id == user.id, Job.status == "running"),
                )
            ).one()
    except DBAPIError:
        return {}
    return {
        "/datasets": human_number(datasets) if datasets else "",
        "/models": human_number(models) if models else "",
        "/jobs": f"{running} running" if running else human_number(jobs) if jobs else "",
    }


def _count(table: Any, *conditions: Any) -> ScalarSelect[int]:
    return select(func.count()).select_from(table).where(table.deleted_at.is_(None), *conditions).scalar_subquery()


def foot() -> list[str]:
    """Two or three lines: what the machine is, and whether somebody is there to train."""
    from app.workers import alive

    lines = [machine_line()] if importlib.util.find_spec("app.machine") else []
    trainers = [worker for worker in alive() if worker.queue == "train"]
    if not trainers:
        return [*lines, "No train worker"]
    oldest = max(worker.up_seconds for worker in trainers)
    word = "Worker" if len(trainers) == 1 else f"{len(trainers)} workers"
    return [*lines, f"{word} up {human_seconds(oldest)}"]


def machine_line() -> str:
    facts = dict(machine_facts())
    return facts.get("GPU") or f"{facts['Processor']}, {facts['Memory']}"


def machine_facts() -> list[tuple[str, str]]:
    """What stands in this machine, as (what, how much)."""
    if not importlib.util.find_spec("app.machine"):
        return []
    from app.machine import this_machine

    machine = this_machine()
    facts = [("Processor", f"{machine.cores} cores"), ("Memory", human_bytes(machine.memory_bytes))]
    if gpu := getattr(machine, "gpu_name", None):
        facts.insert(0, ("GPU", f"{gpu}, {human_bytes(machine.gpu_memory_bytes)}"))
    return facts
