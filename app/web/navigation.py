"""The frame of every page: the menu with its counts, and the machine's facts in the footer."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import Depends, Request
from sqlalchemy import ScalarSelect, Select, func, or_, select
from sqlalchemy.exc import DBAPIError
from starlette.concurrency import run_in_threadpool

from app.datasets import service as datasets_service
from app.db import transaction
from app.kit import ids
from app.kit.humanize import NOTHING, human_bytes, human_number, human_percent
from app.languages import gettext, mark, ngettext
from app.tables import Job, Model, Project, ProjectMember, User
from app.web.accepts import is_program
from app.web.auth import sign_in
from app.web.policy import ALLOWED, changes, scope_of

Group = Literal["start", "training", "evaluation", "playground", "end"]
HEADINGS: dict[Group, str] = {
    "start": "",
    "training": mark("Training"),
    "evaluation": mark("Evaluation"),
    "playground": mark("Playground"),
    "end": "",
}
"""Groups of the menu in their order; one without a heading stands for itself."""


class MenuPage(NamedTuple):
    """A line of the menu. The file of routes that answers at `path` declares it:
    `MENU = (MenuPage(mark("Runs"), "/jobs", "training", 10),)`."""

    title: str
    path: str
    group: Group
    place: int  # order in its group, lowest first


def menu_of(modules: Iterable[Any]) -> dict[Group, list[MenuPage]]:
    """The menu that the modules of routes declare."""
    pages = sorted((page for module in modules for page in getattr(module, "MENU", ())), key=lambda page: page.place)
    return {group: [page for page in pages if page.group == group] for group in HEADINGS}


class MenuState(NamedTuple):
    """The counts of the menu, this person's running jobs, and whether anything is running."""

    counts: dict[str, str] = {}  # noqa: RUF012  never changed
    training: tuple[str, ...] = ()
    busy: bool = False
    projects: tuple[tuple[str, str, bool], ...] = ()
    """Public id, name, and whether it is the current one: what the sidebar offers, where there is more than one."""


def methods(app: Any, address: str) -> list[str]:
    """Every method that some route accepts at this path, in alphabetical order. Mounted files accept GET and HEAD."""
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
    """`nav` (groups of title, path, note, current), `foot` (lines of text) and `looks_only` for the base template."""
    told = state(request)
    groups: dict[Group, list[MenuPage]] = request.app.state.menu
    here = _longest(request.url.path, [page.path for pages in groups.values() for page in pages])
    nav = [
        {
            "title": gettext(HEADINGS[group]),
            "pages": [
                {"title": gettext(page.title), "path": page.path, "note": told["counts"].get(page.path, ""), "current": page.path == here}
                for page in pages
                if scope_of("GET", page.path) in ALLOWED[user.role]
            ],
        }
        for group, pages in groups.items()
        if pages
    ]
    notes: MenuState = getattr(request.state, "notes", MenuState())
    settings = request.url.path.startswith("/settings")  # the person's own, whatever they may do in the project
    return {"nav": nav, "foot": told["foot"], "projects": notes.projects, "looks_only": not (settings or changes(request, user))}


def state(request: Request) -> dict[str, Any]:
    """The parts of the frame that change while a page is open: the counts of the menu and the footer."""
    notes: MenuState = getattr(request.state, "notes", MenuState())
    return {"counts": notes.counts, "foot": foot(notes)}


def _longest(path: str, pages: list[str]) -> str:
    """The menu page that a path belongs to: the longest prefix."""
    return max((page for page in pages if path == page or (page != "/" and path.startswith(f"{page}/"))), key=len, default="")


async def remember_notes(request: Request, user: Annotated[User | None, Depends(sign_in)]) -> None:
    """The third dependency of the whole app: query the counts of the menu before the route opens its own session.

    If this ran while the page is rendered, each request would hold one connection and wait for a second; enough of them would
    deadlock until the pool times out.
    """
    if user is not None and request.method in ("GET", "POST") and not is_program(request):
        request.state.notes = await run_in_threadpool(notes, user)


def notes(user: User) -> MenuState:
    """The counts, and the running jobs. Empty when the database is unreachable: the page reports that elsewhere."""
    mine = (Job.project_id == user.project_id, Job.deleted_at.is_(None))
    lines = _count(datasets_service.lines(user))
    try:
        with transaction() as session:
            datasets, models, jobs, busy = session.execute(
                select(
                    lines,
                    _count(_kept(Model, or_(Model.project_id == user.project_id, Model.project_id.is_(None)))),
                    _count(_kept(Job, Job.project_id == user.project_id)),
                    _count(_kept(Job, Job.status == "running")),
                )
            ).one()
            query = select(Job.name, Job.step, Job.total_steps).where(*mine, Job.status == "running").order_by(Job.started_at)
            rooms = select(Project.id, Project.name).join(ProjectMember).where(ProjectMember.user_id == user.id)
            rooms = rooms if user.role != "guest" else select(Project.id, Project.name).where(Project.id == user.project_id)
            rooms = rooms.order_by(Project.personal.desc(), Project.name, Project.id)
            projects = tuple((ids.public(ids.PROJECT, key), name, key == user.project_id) for key, name in session.execute(rooms))
            running = [(row.name, _share(row.step, row.total_steps)) for row in session.execute(query.limit(MAX_NAMED + 1))]
    except DBAPIError:
        return MenuState()
    if len(running) == 1:
        beside = running[0][1] or gettext("running")
    elif running:
        beside = gettext("%(num)s running", num=human_number(len(running)))
    else:
        beside = _many(jobs)
    counts = {"/datasets": _many(datasets), "/models": _many(models), "/jobs": beside}
    shown = {path: text for path, text in counts.items() if text != NOTHING}
    return MenuState(shown, tuple(f"{name} {share}".strip() for name, share in running), bool(busy), projects)


MAX_NAMED = 9


def _share(step: int, total: int | None) -> str:
    return human_percent(step / total, 0) if total else ""


MANY = 1000
"""Counts of the menu stop here: every page asks them, and a thousand more rows say nothing more."""


def _kept(table: Any, *conditions: Any) -> Select[Any]:
    return select(table.id).where(table.deleted_at.is_(None), *conditions)


def _count(rows: Select[Any, Any] | Select[Any]) -> ScalarSelect[int]:
    return select(func.count()).select_from(rows.limit(MANY).subquery()).scalar_subquery()


def _many(count: int) -> str:
    return f"{human_number(MANY - 1)}+" if count >= MANY else human_number(count or None)


def foot(notes: MenuState) -> list[str]:
    """Two or three lines: the machine, the number of workers online, and what they train."""
    from app.machines.heartbeats import alive

    lines = [machine_line()] if importlib.util.find_spec("app.machines.hardware") else []
    trainers = [worker for worker in alive() if worker.queue == "train"]
    if not trainers:
        return [*lines, gettext("no train worker online")]
    online = ngettext("%(num)s worker online", "%(num)s workers online", len(trainers))
    if not notes.training:
        return [*lines, online + " · " + (gettext("busy") if notes.busy else gettext("idle"))]
    if len(notes.training) == 1:
        return [*lines, online, gettext("training %(name)s", name=notes.training[0])]
    return [*lines, online, ngettext("training %(num)s run", "training %(num)s runs", len(notes.training))]


def machine_line() -> str:
    facts = dict(machine_facts())
    return facts.get("GPU") or f"{facts['Processor']}, {facts['Memory']}"


def machine_facts() -> list[tuple[str, str]]:
    """This machine's hardware, as (name, value). Whoever shows a name translates it."""
    if not importlib.util.find_spec("app.machines.hardware"):
        return []
    from app.machines.hardware import this_machine

    machine = this_machine()
    cores = gettext("%(num)s cores", num=human_number(machine.cores))
    facts = [(mark("Processor"), cores), (mark("Memory"), human_bytes(machine.memory_bytes))]
    if gpu := getattr(machine, "gpu_name", None):
        facts.insert(0, ("GPU", f"{gpu}, {human_bytes(machine.gpu_memory_bytes)}"))
    return facts
