"""Shared parts of lists: search, filters and sorting, which are in the URL; and the labels of models where one is chosen."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlencode

from pydantic import BaseModel, Field
from sqlalchemy import CTE, ColumnElement, Select, case, func, or_, select
from sqlalchemy.dialects.postgresql import array
from sqlalchemy.orm import InstrumentedAttribute, Session, defer, selectinload

from app import formats
from app.datasets import service as datasets_service
from app.errors import BadField
from app.evaluation import comparisons as comparisons_service
from app.jobs.service import ENDED
from app.kit import ids
from app.languages import gettext, mark
from app.models import service as models_service
from app.ownership import either
from app.strategies import STRATEGIES
from app.tables import Comparison, Dataset, Job, Model, User

SHOWN = 50
"""Rows of a list until more are requested."""


class ListQuery(BaseModel):
    """The URL parameters of a list; empty means all. `sort` is a column, with `-` in front for descending order."""

    q: str = Field("", max_length=200)
    status: str = Field("", max_length=40)
    model: str = Field("", max_length=300)
    dataset: str = Field("", max_length=300)
    method: str = Field("", max_length=100)
    kind: str = Field("", max_length=100)
    format: str = Field("", max_length=100)
    kept: str = Field("", max_length=10)
    tag: str = Field("", max_length=100)
    sort: str = Field("", max_length=40)
    shown: int = Field(SHOWN, ge=1, le=5000)


class Filter(NamedTuple):
    name: str
    title: str
    options: list[tuple[str, str]]  # value, text


@dataclass
class Bar:
    """The form above a list and the links in its header. `sorts` are columns by their names, the default order first."""

    path: str
    wish: ListQuery
    filters: list[Filter]
    sorts: dict[str, str]
    more: bool = False
    usual: str = field(init=False)

    def __post_init__(self) -> None:
        self.usual = next(iter(self.sorts))
        if self.sort not in self.sorts:
            message = gettext("The list cannot be sorted by %(column)s.", column=self.sort[:40])
            raise BadField(message, hint=gettext("Use one of %(columns)s.", columns=", ".join(self.sorts)), param="sort")
        self.sorts = {column: gettext(title) for column, title in self.sorts.items()}
        for place, (name, title, options) in enumerate(self.filters):
            value = getattr(self.wish, name)
            if value and value not in dict(options):  # an active filter is shown, even where nothing matches it any more
                self.filters[place] = Filter(name, title, [*options, (value, value)])

    @property
    def sort(self) -> str:
        return self.wish.sort or self.usual

    @property
    def narrowed(self) -> bool:
        return bool(self.wish.q.strip()) or any(getattr(self.wish, one.name) for one in self.filters)

    def query(self, **changes: Any) -> str:
        """The query string with these changes."""
        return urlencode(self.wish.model_dump(exclude_defaults=True) | changes)

    @property
    def address(self) -> str:
        query = self.query()
        return f"{self.path}?{query}" if query else self.path

    @property
    def longer(self) -> str:
        """The URL with more rows."""
        return f"{self.path}?{self.query(shown=self.wish.shown + SHOWN)}"

    def turned(self, column: str) -> str:
        """The URL sorted by a column of the header; in reverse where it is sorted by it already."""
        ways = [way for way in (f"-{column}", column) if way in self.sorts]
        return f"{self.path}?{self.query(sort=ways[(ways.index(self.sort) + 1) % len(ways) if self.sort in ways else 0])}"

    def aria(self, column: str) -> str:
        return {f"-{column}": "descending", column: "ascending"}.get(self.sort, "none")


def values(found: Iterable[str | None]) -> list[tuple[str, str]]:
    """Each value once, as options whose text is the value."""
    return [(value, value) for value in sorted({one for one in found if one}, key=str.casefold)]


def _sorted(column: ColumnElement[Any] | InstrumentedAttribute[Any], bar: Bar) -> ColumnElement[Any]:
    """The order that the bar asks for, what has no value last. Where none can be missing it is the plain one, which an index gives."""
    ordered: ColumnElement[Any] = column.desc() if bar.sort.startswith("-") else column.asc()
    return ordered.nulls_last() if getattr(column, "nullable", True) else ordered


NEWEST = 300
"""Of a list so many are read for the values it can be filtered by: a look into every row of ten thousand takes too long."""


def _newest(table: Any, *seen: ColumnElement[bool]) -> Select[Any]:
    return select(table.id).where(*seen).order_by(table.created_at.desc()).limit(NEWEST)


def methods(found: Iterable[str | None]) -> list[tuple[str, str]]:
    """Each method once, by its title."""
    titles = {one: gettext(STRATEGIES[one].title) if one in STRATEGIES else one for one in found if one}
    return sorted(titles.items(), key=lambda option: option[1])


def words(codes: Iterable[str]) -> list[tuple[str, str]]:
    """Options whose text is the code itself in the language of the page."""
    return [(one, gettext(one)) for one in codes]


# Models -------------------------------------------------------------------------------------------------------------


MODEL_SORTS = {"-created": mark("Newest first"), "lineage": mark("By lineage"), "name": mark("Name"), "-size": mark("Largest first")}


MODEL_COLUMNS: dict[str, ColumnElement[Any] | InstrumentedAttribute[Any]] = {
    "created": Model.created_at, "name": func.lower(Model.title), "size": Model.bytes,
}  # fmt: skip


def models_bar(session: Session, user: User, wish: ListQuery, kinds: Mapping[str, str]) -> Bar:
    own = models_service.visible(user)
    bases = session.execute(select(Model.name, Model.title).where(own, Model.base_id.is_(None)).order_by(Model.created_at, Model.id))
    newest = Model.id.in_(either(select(Model.id).where(own, Model.base_id.is_(None)), _newest(Model, own, Model.base_id.is_not(None))))
    used = session.execute(select(Model.strategy, Model.kind, Model.kept).where(newest).distinct()).all()
    tags = session.scalars(select(func.jsonb_array_elements_text(Model.tags)).where(newest).distinct())
    filters = [
        Filter("model", gettext("Base model"), [(name, title) for name, title in bases]),
        Filter("method", gettext("Method"), methods([*(strategy for strategy, _, _ in used), wish.method])),
        Filter(
            "kind",
            gettext("Kind"),
            [(kind, gettext(kinds[kind])) for kind in kinds if kind == wish.kind or any(kind == one for _, one, _ in used)],
        ),
        Filter(
            "kept",
            gettext("Results"),
            [("yes", gettext("without comparisons")), ("no", gettext("from comparisons"))]
            if wish.kept or not all(kept for _, _, kept in used)
            else [],
        ),
        Filter("tag", gettext("Tag"), values([*tags, wish.tag])),
    ]
    return Bar("/models", wish, filters, MODEL_SORTS)


def models(session: Session, user: User, bar: Bar) -> tuple[list[Model], bool]:
    """The matching models, every base and then the others in order; and whether there are more of those than are shown."""
    wish = bar.wish
    query = select(Model).options(selectinload(Model.base)).where(models_service.visible(user))
    for of, value in ((Model.strategy, wish.method), (Model.kind, wish.kind)):
        query = query.where(of == value) if value else query
    if wish.q.strip():
        query = query.where(or_(*(of.icontains(wish.q.strip(), autoescape=True) for of in (Model.title, Model.name))))
    if wish.kept:
        query = query.where(Model.kept == (wish.kept == "yes"))
    if wish.tag:
        query = query.where(Model.tags.contains([wish.tag]))
    line = lineages(wish.model)
    if wish.model:
        query = query.where(Model.id.in_(select(line.c.id)))
    bases = session.scalars(query.where(Model.base_id.is_(None)).order_by(Model.created_at, Model.id)).all()
    tuned = query.where(Model.base_id.is_not(None))
    if bar.sort == "lineage":
        tuned = tuned.join(line, line.c.id == Model.id).order_by(line.c.path)
    else:
        column = MODEL_COLUMNS[bar.sort.removeprefix("-")]
        tuned = tuned.order_by(_sorted(column, bar), Model.created_at, Model.id)
    found = session.scalars(tuned.limit(wish.shown + 1)).all()
    return [*bases, *found[: wish.shown]], len(found) > wish.shown


def lineages(root_name: str = "") -> CTE:
    """A recursive query (id, path) of every model, or of the base of that name and what was made of it. Ordered by `path`, the times of all
    from the base on, each comes after what it was made of. Deleted ones are passed through."""
    at = func.extract("epoch", Model.created_at)
    top = select(Model.id, array([at]).label("path")).where(Model.base_id.is_(None))
    tree = (top.where(Model.name == root_name) if root_name else top).cte("lineage", recursive=True)
    return tree.union_all(select(Model.id, func.array_append(tree.c.path, at)).join(tree, Model.base_id == tree.c.id))


# Jobs ---------------------------------------------------------------------------------------------------------------

STATUSES = (mark("queued"), mark("running"), mark("paused"), mark("succeeded"), mark("failed"), mark("cancelled"))
JOB_SORTS = {
    "-created": mark("Newest first"),
    "created": mark("Oldest first"),
    "name": mark("Name"),
    "status": mark("Status"),
    "method": mark("Method"),
    "-time": mark("Longest first"),
    "time": mark("Shortest first"),
}
_MODEL, _DATASET, _METHOD = (Job.spec[part]["name"].astext for part in ("model", "dataset", "strategy"))
JOB_COLUMNS: dict[str, ColumnElement[Any] | InstrumentedAttribute[Any]] = {
    "created": Job.created_at,
    "name": func.lower(Job.name),
    "status": Job.status,
    "method": _METHOD,
    "time": Job.measured["seconds"].as_float(),
}


def jobs_bar(session: Session, user: User, wish: ListQuery) -> Bar:
    newest = _newest(Job, Job.project_id == user.project_id, Job.deleted_at.is_(None))
    used = session.execute(select(_MODEL, _DATASET, _METHOD).where(Job.id.in_(newest)).distinct()).all()
    tags = session.scalars(select(func.jsonb_array_elements_text(Job.tags)).where(Job.id.in_(newest)).distinct())
    filters = [
        Filter("status", gettext("Status"), words(STATUSES)),
        Filter("model", gettext("Base model"), values([*(one[0] for one in used), wish.model])),
        Filter("dataset", gettext("Dataset"), values([*(one[1] for one in used), wish.dataset])),
        Filter("method", gettext("Method"), methods([*(one[2] for one in used), wish.method])),
        Filter("tag", gettext("Tag"), values([*tags, wish.tag])),
    ]
    return Bar("/jobs", wish, filters, JOB_SORTS)


def jobs(query: Select[Job], bar: Bar) -> Select[Job]:
    """A query of jobs with the filters of the URL."""
    wish = bar.wish
    for column, value in ((Job.status, wish.status), (_MODEL, wish.model), (_DATASET, wish.dataset), (_METHOD, wish.method)):
        query = query.where(column == value) if value else query
    if wish.q.strip():
        query = query.where(Job.name.icontains(wish.q.strip(), autoescape=True))
    if wish.tag:
        query = query.where(Job.tags.contains([wish.tag]))
    column = JOB_COLUMNS[bar.sort.removeprefix("-")]
    return query.order_by(_sorted(column, bar), Job.created_at.desc(), Job.id.desc())


# Datasets -----------------------------------------------------------------------------------------------------------

DATASET_SORTS = {
    "-created": mark("Newest first"),
    "created": mark("Oldest first"),
    "name": mark("Name"),
    "-rows": mark("Most rows"),
    "rows": mark("Fewest rows"),
    "status": mark("Status"),
}


DATASET_COLUMNS: dict[str, ColumnElement[Any] | InstrumentedAttribute[Any]] = {
    "created": Dataset.created_at, "name": func.lower(Dataset.name), "rows": Dataset.good_rows, "status": Dataset.status,
}  # fmt: skip


def datasets_bar(session: Session, user: User, wish: ListQuery) -> Bar:
    newest = _newest(Dataset, Dataset.project_id == user.project_id, Dataset.deleted_at.is_(None))
    known = {*session.scalars(select(Dataset.format).where(Dataset.id.in_(newest)).distinct()), wish.format}
    tags = session.scalars(select(func.jsonb_array_elements_text(Dataset.tags)).where(Dataset.id.in_(newest)).distinct())
    filters = [
        Filter("status", gettext("Status"), words((mark("reading"), mark("ready"), mark("error")))),
        Filter("format", gettext("Format"), [(name, gettext(entry.title)) for name, entry in formats.FORMATS.items() if name in known]),
        Filter("tag", gettext("Tag"), values([*tags, wish.tag])),
    ]
    return Bar("/datasets", wish, filters, DATASET_SORTS)


def datasets(user: User, bar: Bar) -> Select[Dataset]:
    """A query of datasets without their reports, which may be long; one line for all versions of a dataset."""
    wish, column = bar.wish, DATASET_COLUMNS[bar.sort.removeprefix("-")]
    query = select(Dataset).options(defer(Dataset.report)).where(*datasets_service.newest_versions(user))
    for of, value in ((Dataset.status, wish.status), (Dataset.format, wish.format)):
        query = query.where(of == value) if value else query
    if wish.q.strip():
        query = query.where(Dataset.name.icontains(wish.q.strip(), autoescape=True))
    if wish.tag:
        query = query.where(Dataset.tags.contains([wish.tag]))
    return query.order_by(_sorted(column, bar), Dataset.created_at.desc(), Dataset.id)


def tokens(session: Session, shown: Sequence[Dataset]) -> dict[uuid.UUID, int | None]:
    """Tokens of the text of each, by its report: asked of those shown alone, since each report is unpacked for it."""
    counted = select(Dataset.id, Dataset.report["tokens"].as_integer()).where(Dataset.id.in_([one.id for one in shown]))
    return dict(session.execute(counted).tuples().all())


def twins(session: Session, user: User, shown: Sequence[Dataset]) -> set[str]:
    """The names of these datasets that another line of the list has too."""
    lines = datasets_service.lines(user).where(Dataset.name.in_({one.name for one in shown})).subquery()
    return set(session.scalars(select(lines.c.name).group_by(lines.c.name).having(func.count() > 1)))


# Comparisons --------------------------------------------------------------------------------------------------------

COMPARISON_SORTS = {"-created": mark("Newest first"), "created": mark("Oldest first"), "name": mark("Name"), "status": mark("Status")}


def _comparison_status(status: InstrumentedAttribute[str]) -> ColumnElement[str]:
    """`app.evaluation.comparisons.status_of`, over the statuses of jobs that are grouped by their comparison."""
    held = func.bool_and(status.in_(("paused", *ENDED)))
    running = case((func.bool_and(status == "queued"), "queued"), (held, "paused"), else_="running")
    ended = case(*((func.bool_or(status == one), one) for one in ("succeeded", "failed")), else_="cancelled")
    return case((func.bool_and(status.in_(ENDED)), ended), else_=running)


def _asked_model(name: str) -> ColumnElement[bool]:
    return or_(Comparison.order["model"].astext == name, Comparison.order["models"].contains([name]))


def comparisons_bar(session: Session, user: User, path: str, wish: ListQuery) -> Bar:
    newest = comparisons_service.mine(user).order_by(Comparison.created_at.desc()).limit(NEWEST).with_only_columns(Comparison.id)
    orders = session.execute(select(Comparison.order["model"].astext, Comparison.order["models"]).where(Comparison.id.in_(newest)))
    used = session.scalars(select(_DATASET).where(Job.comparison_id.in_(newest), Job.deleted_at.is_(None)).distinct())
    filters = [
        Filter("status", gettext("Status"), words(STATUSES)),
        Filter("model", gettext("Base model"), values({name for one, several in orders for name in (several or [one])})),
        Filter("dataset", gettext("Dataset"), values(used)),
    ]
    return Bar(path, wish, filters, COMPARISON_SORTS)


def comparisons(user: User, bar: Bar, *wanted: ColumnElement[bool]) -> Select[Comparison]:
    """A query of comparisons with the filters of the URL."""
    wish, query = bar.wish, comparisons_service.mine(user).where(*wanted)
    if wish.q.strip():
        query = query.where(Comparison.name.icontains(wish.q.strip(), autoescape=True))
    if wish.model:
        query = query.where(_asked_model(wish.model))
    own = select(Job.id).where(Job.comparison_id == Comparison.id, Job.deleted_at.is_(None))
    if wish.dataset:
        query = query.where(own.where(wish.dataset == _DATASET).exists())
    column: ColumnElement[Any] | InstrumentedAttribute[Any]
    column = func.lower(Comparison.name) if bar.sort == "name" else Comparison.created_at
    if wish.status or bar.sort == "status":
        states = select(Job.comparison_id, _comparison_status(Job.status).label("status")).where(Job.deleted_at.is_(None))
        of = states.where(Job.comparison_id.is_not(None)).group_by(Job.comparison_id).subquery()
        status = func.coalesce(of.c.status, "cancelled")
        query = query.outerjoin(of, of.c.comparison_id == Comparison.id)
        query = query.where(status == wish.status) if wish.status else query
        column = status if bar.sort == "status" else column
    return query.order_by(column.desc() if bar.sort.startswith("-") else column.asc(), Comparison.created_at.desc(), Comparison.id.desc())


def public_id(found: Any) -> str:
    """The public id of a row."""
    prefix = {"jobs": ids.JOB, "models": ids.MODEL, "datasets": ids.DATASET, "comparisons": ids.COMPARISON}[found.__tablename__]
    return ids.public(prefix, found.id)
