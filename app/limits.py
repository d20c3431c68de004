"""Limits: what a person, and what a project, may use at most. Without one nothing is limited.

A limit of running jobs lets a job wait (`app.jobs.fair_share`); every other refuses what would go beyond it, and says which limit it
is, how much is used and when some of it is free again. An admin sets them; a person without an own one has that of the settings.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Hashable, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, NamedTuple

import redis
from sqlalchemy import BigInteger, ColumnElement, Date, Select, cast, column, func, select, union_all
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.orm import Session

from app import leases, queue
from app.db import on_commit
from app.errors import BadField, TooMany
from app.kit.humanize import human_bytes, human_number
from app.kit.token_meter import TokenMeter
from app.languages import gettext, lowered, mark
from app.settings import get_settings
from app.tables import (
    JSON,
    Checkpoint,
    DistillationRun,
    EvalRun,
    Evaluation,
    Export,
    File,
    Job,
    MachineUse,
    Model,
    Project,
    PromptRun,
    TokenUse,
    Upload,
    User,
)

By = Literal["person", "project"]
Name = Literal["running_jobs", "queued_jobs", "gpu_hours_per_month", "storage_bytes", "tokens_per_day", "requests_per_minute"]
HOUR = 3600.0


class LimitReached(TooMany):
    """A request that would go beyond a limit. Asking again at once helps nothing, so clients are told not to."""

    code = "limit_reached"

    def __init__(self, message: str, *, hint: str, retry_after_seconds: float) -> None:
        super().__init__(message, hint=hint, retry_after_seconds=retry_after_seconds)
        self.headers = {"x-should-retry": "false"}


class Limit(NamedTuple):
    """One thing that is limited."""

    title: str
    unit: str
    figure: Callable[[float], str]
    hint: str
    """What frees some of it; where its window has an end that is told, when."""
    window: Literal["", "minute", "day", "month"] = ""


def _number(value: float) -> str:
    value = round(value, 2)
    return human_number(value, 2) if value != int(value) else human_number(int(value))


LIMITS: dict[Name, Limit] = {
    "running_jobs": Limit(mark("Running runs"), "", _number, mark("It starts when another one has ended.")),
    "queued_jobs": Limit(mark("Queued runs"), "", _number, mark("Wait until one has started, or cancel one.")),
    "gpu_hours_per_month": Limit(
        mark("GPU-hours this month"),
        mark("GPU-hours"),
        _number,
        mark("They begin anew with the next month (UTC) at %(when)s UTC."),
        "month",
    ),
    "storage_bytes": Limit(mark("Storage"), "", human_bytes, mark("Delete files, models, exports or runs that are no longer needed.")),
    "tokens_per_day": Limit(
        mark("Tokens today"), mark("tokens"), _number, mark("They begin anew with the next day (UTC) at %(when)s UTC."), "day"
    ),
    "requests_per_minute": Limit(
        mark("Requests this minute"), mark("requests"), _number, mark("They begin anew with the next minute."), "minute"
    ),
}
"""In the order of pages. An hour of a train worker without a GPU counts as one GPU-hour. Requests are counted, and
refused, by `app.web.request_rate`."""


# What is used -----------------------------------------------------------------------------------------------------------


def _owners(table: Any) -> tuple[Any, Any]:
    """The columns of a row's person and project, under the names that `By` has."""
    person = table.user_id if hasattr(table, "user_id") else table.owner_id
    return person.label("person"), table.project_id.label("project")


def _month() -> ColumnElement[datetime]:
    return func.date_trunc("month", leases.now(), "UTC")


def _jobs(status: str) -> Select[Any]:
    return _amounts(Job, func.count()).where(Job.status == status, Job.deleted_at.is_(None))


def _gpu_hours() -> Select[Any]:
    ended = func.coalesce(MachineUse.ended_at, leases.now())
    seconds = func.date_part("epoch", ended - func.greatest(MachineUse.started_at, _month()))
    return _amounts(MachineUse, func.sum(seconds * func.greatest(MachineUse.gpus, 1)) / HOUR).where(ended > _month())


def _storage() -> Select[Any]:
    """Uploaded files and what open uploads announced, models, the checkpoints of jobs, the files of exports and of predictions."""
    exported = func.jsonb_array_elements(Export.files).table_valued(column("value", JSONB), joins_implicitly=True)
    parts = union_all(
        select(*_owners(File), File.bytes.label("size")).where(File.deleted_at.is_(None)),
        select(*_owners(Upload), Upload.length).where(Upload.file_id.is_(None), Upload.expires_at > leases.now()),
        select(*_owners(Model), Model.bytes).where(Model.deleted_at.is_(None), Model.owner_id.is_not(None)),
        select(*_owners(Job), Checkpoint.bytes)
        .select_from(Checkpoint)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Checkpoint.deleted_at.is_(None)),
        select(*_owners(Export), cast(exported.c.value["bytes"].astext, BigInteger)).where(Export.deleted_at.is_(None)),
        select(*_owners(Evaluation), Evaluation.output_bytes).where(Evaluation.deleted_at.is_(None), Evaluation.output_bytes > 0),
    ).subquery()
    owners, size = (parts.c.person, parts.c.project), func.coalesce(func.sum(parts.c.size), 0)
    return select(*owners, size.label("amount")).group_by(*owners)


def _tokens() -> Select[Any]:
    """What was written, and what was embedded or classified. Prompts are read for the sake of an answer, and are not limited."""
    return _amounts(TokenUse, func.sum(TokenUse.written + TokenUse.encoded)).where(TokenUse.day == _today())


def _amounts(table: Any, amount: Any) -> Select[Any]:
    owners = _owners(table)
    return select(*owners, amount.label("amount")).group_by(*owners)


def _today() -> ColumnElement[date]:
    return cast(func.timezone("UTC", leases.now()), Date)


_USED: dict[Name, Callable[[], Select[Any]]] = {
    "running_jobs": lambda: _jobs("running"),
    "queued_jobs": lambda: _jobs("queued"),
    "gpu_hours_per_month": _gpu_hours,
    "storage_bytes": _storage,
    "tokens_per_day": _tokens,
}
"""Statements of what each person uses in each project."""


def requests_key(by: By, now: float) -> str:
    """Where Redis has the requests of the minute of `now`, in seconds since 1970: a hash of counts by person, or by project."""
    return f"{queue.PREFIX}requests:{by}:{int(now // 60)}"


def _requests(by: By) -> dict[str, float]:
    """Requests of this minute where they are limited; none while Redis is away."""
    try:
        found: Any = queue.get_redis().hgetall(requests_key(by, time.time()))
    except redis.RedisError:
        return {}
    return {key.decode(): float(count) for key, count in found.items()}


Usage = dict[uuid.UUID, dict[Name, float]]
"""By the id of a person, or of a project, what it uses of everything that is limited."""


def used(session: Session) -> dict[By, Usage]:
    """What each person, and what each project, uses."""
    found: dict[By, Usage] = {"person": {}, "project": {}}
    for name, query in _USED.items():
        for person, project, amount in session.execute(query()):
            for by, key in (("person", person), ("project", project)):
                if key is not None:
                    own = found[by].setdefault(key, {})  # type: ignore[index]
                    own[name] = own.get(name, 0.0) + float(amount or 0)
    for by, of in found.items():
        for text, count in _requests(by).items():
            of.setdefault(uuid.UUID(text), {})["requests_per_minute"] = count
    return found


def used_by(session: Session, by: By, key: uuid.UUID, name: Name) -> float:
    if name == "requests_per_minute":
        return _requests(by).get(str(key), 0.0)
    every = _USED[name]().subquery()
    return float(session.scalar(select(func.sum(every.c.amount)).where(every.c[by] == key)) or 0)


def usage_json(session: Session, by: By, key: uuid.UUID) -> JSON:
    """All that one person or project uses, as the API says it."""
    have: JSON = {name: used_by(session, by, key, name) for name in LIMITS}
    return {name: round(value, 4) if name == "gpu_hours_per_month" else int(value) for name, value in have.items()}


def own_json(own: Mapping[str, Any] | None) -> JSON:
    return {name: (own or {}).get(name) for name in LIMITS}


def count_tokens(
    session: Session, person: uuid.UUID, project: uuid.UUID, *, read: int, written: int = 0, encoded: int = 0, day: date | None = None
) -> None:
    """Add tokens to those of this day, or of another one. `encoded` are those of `read` whose texts were embedded or classified."""
    if not read and not written:
        return
    counts = {"read": read, "written": written, "encoded": encoded}
    row = insert(TokenUse).values(user_id=person, project_id=project, day=day or _today(), **counts)
    more = {name: getattr(TokenUse, name) + count for name, count in counts.items()}
    session.execute(row.on_conflict_do_update(index_elements=["user_id", "project_id", "day"], set_=more))


def count_meter(
    session: Session, table: type[Evaluation | PromptRun | EvalRun | DistillationRun | Job], key: uuid.UUID, meter: TokenMeter
) -> None:
    """Count the tokens of work in the background, for the person and the project whose it is. Once that is committed the meter has
    them no more; one thread at a time may do this."""
    counts = meter.counts()
    whose = session.execute(select(table.owner_id, table.project_id).where(table.id == key)).one_or_none()
    if whose is not None:
        count_tokens(session, *whose, **counts)
        on_commit(session, lambda: meter.add(-counts["read"], -counts["written"], -counts["encoded"]))


# What is allowed --------------------------------------------------------------------------------------------------------


def allowed(own: Mapping[str, Any] | None, by: By) -> dict[Name, float]:
    """The limits in force, of a person's or a project's own ones and of the settings, which are for people."""
    settings = get_settings()
    found: dict[Name, float] = {}
    for name in LIMITS:
        usual = getattr(settings, f"limit_{name}") if by == "person" else None
        value = (own or {}).get(name, usual)
        if value is not None:
            found[name] = float(value)
    return found


def set_own(of: User | Project, changes: Mapping[str, float | None]) -> None:
    """Change the own limits of a person or a project; None takes one away, so that that of the settings is in force."""
    for name, value in changes.items():
        if name not in LIMITS:
            raise BadField(f"There is no limit {name[:60]!r}.", hint=f"There are {', '.join(LIMITS)}.", param="limits")
        if value is not None and not 0 <= value <= 1e15:
            message = gettext("%(limit)s cannot be limited to %(value)s.", limit=gettext(LIMITS[name].title), value=value)
            raise BadField(message, hint=gettext("Send 0 or more, or null."), param=f"limits.{name}")
    kept: JSON = {name: value for name, value in ((of.limits or {}) | dict(changes)).items() if value is not None}
    of.limits = kept or None


def check(session: Session, user: User, name: Name, more: float = 0) -> None:
    """Refuse what would take `more` than is allowed, or anything once all is used. Raises LimitReached."""
    row = session.execute(select(User.limits, Project.limits).join(Project, Project.id == user.project_id).where(User.id == user.id))
    own, projects = row.one()
    for by, key, limits in (("person", user.id, own), ("project", user.project_id, projects)):
        most = allowed(limits, by).get(name)  # type: ignore[arg-type]
        if most is None:
            continue
        if more:  # two requests at once do not pass both
            table = User if by == "person" else Project
            session.execute(select(table.id).where(table.id == key).with_for_update(key_share=True))
        have = used_by(session, by, key, name)  # type: ignore[arg-type]
        if have + more > most or (not more and have >= most):
            raise _reached(name, by, have, most)  # type: ignore[arg-type]


def _reached(name: Name, by: By, have: float, most: float) -> LimitReached:
    limit = LIMITS[name]
    free = frees_at(limit.window)
    wait = (free - datetime.now(UTC)).total_seconds() if free else 60.0
    told = {
        "what": lowered(gettext(limit.title)),
        "used": limit.figure(have),
        "most": f"{limit.figure(most)} {gettext(limit.unit)}".strip(),
    }
    if by == "person":
        message = gettext("Your limit is reached: %(what)s, %(used)s used of %(most)s.", **told)
    else:
        message = gettext("The limit of this project is reached: %(what)s, %(used)s used of %(most)s.", **told)
    when = {"when": free.strftime("%Y-%m-%d %H:%M")} if free else {}
    hint = gettext(limit.hint, **when) + " " + gettext("An admin can raise it.")
    return LimitReached(message, hint=hint, retry_after_seconds=wait)


def frees_at(window: str) -> datetime | None:
    """When a window of time ends; None for what is free once something is deleted or ends."""
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if window == "day":
        return today + timedelta(days=1)
    if window == "month":
        return (today.replace(day=1) + timedelta(days=32)).replace(day=1)
    return None


def running_limits(session: Session, by: By) -> dict[Hashable, int]:
    """The limit of running jobs of everybody who has one."""
    table = User if by == "person" else Project
    found = {key: allowed(own, by).get("running_jobs") for key, own in session.execute(select(table.id, table.limits))}
    return {key: int(most) for key, most in found.items() if most is not None}


class LimitUse(NamedTuple):
    """One limit next to its use, for pages."""

    name: Name
    title: str
    used: str
    allowed: str
    share: float | None
    own: float | None


def of_person(session: Session, key: uuid.UUID) -> list[LimitUse]:
    own = session.scalar(select(User.limits).where(User.id == key))
    return lines(own, {name: used_by(session, "person", key, name) for name in LIMITS}, "person")


def of_project(session: Session, key: uuid.UUID) -> list[LimitUse]:
    """Of a project that has a limit; of any other nothing."""
    own = session.scalar(select(Project.limits).where(Project.id == key))
    return lines(own, {name: used_by(session, "project", key, name) for name in LIMITS}, "project") if own else []


def lines(own: Mapping[str, Any] | None, have: Mapping[Name, float], by: By) -> list[LimitUse]:
    most = allowed(own, by)
    told = []
    for name, limit in LIMITS.items():
        value, top = have.get(name, 0.0), most.get(name)
        share = None if top is None else min(1.0, value / top) if top else 1.0
        told.append(
            LimitUse(name, limit.title, limit.figure(value), "" if top is None else limit.figure(top), share, (own or {}).get(name))
        )
    return told
