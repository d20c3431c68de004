"""Shared parts of lists: search, filters and sorting, which are in the URL; and the labels of models where one is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlencode

from pydantic import BaseModel, Field
from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from app import formats
from app.errors import BadField
from app.kit import ids
from app.models import service as models_service
from app.strategies import STRATEGIES
from app.tables import Dataset, Job, Model, User

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

    def holds(self, text: str, *more: str) -> bool:
        """Whether one of the texts contains the words of the search."""
        return any(self.q.strip().casefold() in one.casefold() for one in (text, *more))


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
            raise BadField(f"The list cannot be sorted by {self.sort[:40]}.", hint=f"Use one of {', '.join(self.sorts)}.", param="sort")
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


def ordered(rows: Sequence[Any], sort: str, keys: Mapping[str, Any]) -> list[Any]:
    """Rows in the order of a column; those without a value come last."""
    key = keys[sort.removeprefix("-")]
    known = [row for row in rows if key(row) is not None]
    return sorted(known, key=key, reverse=sort.startswith("-")) + [row for row in rows if key(row) is None]


def values(found: Iterable[str | None]) -> list[tuple[str, str]]:
    """Each value once, as options whose text is the value."""
    return [(value, value) for value in sorted({one for one in found if one}, key=str.casefold)]


def methods(found: Iterable[str | None]) -> list[tuple[str, str]]:
    return sorted(((one, STRATEGIES[one].title if one in STRATEGIES else one) for one in {one for one in found if one}), key=lambda o: o[1])


# Models -------------------------------------------------------------------------------------------------------------


MODEL_SORTS = {"-created": "Newest first", "lineage": "By lineage", "name": "Name", "-size": "Largest first"}


def models_bar(rows: Sequence[Model], wish: ListQuery, kinds: Mapping[str, str]) -> Bar:
    filters = [
        Filter("model", "Base model", [(one.name, one.title) for one in rows if one.base_id is None]),
        Filter("method", "Method", methods(one.strategy for one in rows)),
        Filter("kind", "Kind", [(kind, kinds[kind]) for kind in kinds if any(one.kind == kind for one in rows)]),
        Filter(
            "kept", "Results", [("yes", "without comparisons"), ("no", "from comparisons")] if not all(one.kept for one in rows) else []
        ),
        Filter("tag", "Tag", values(tag for one in rows for tag in one.tags)),
    ]
    return Bar("/models", wish, filters, MODEL_SORTS)


def models(rows: Sequence[Model], bar: Bar) -> tuple[list[Model], bool]:
    """The matching models, every base and then the others in order; and whether there are more of those than are shown."""
    wish = bar.wish
    found = [
        one
        for one in rows
        if wish.holds(one.title, one.name)
        and wish.model in ("", models_service.root(one).name)
        and wish.method in ("", one.strategy)
        and wish.kind in ("", one.kind)
        and wish.kept in ("", "yes" if one.kept else "no")
        and (not wish.tag or wish.tag in one.tags)
    ]
    keys = {"created": lambda m: m.created_at, "name": lambda m: m.title.casefold(), "size": lambda m: m.bytes}
    tuned = [one for one in found if one.base_id is not None]
    tuned = ordered(tuned, bar.sort, keys) if bar.sort != "lineage" else tuned
    return [one for one in found if one.base_id is None] + tuned[: wish.shown], len(tuned) > wish.shown


# Jobs ---------------------------------------------------------------------------------------------------------------

STATUSES = ("queued", "running", "paused", "succeeded", "failed", "cancelled")
JOB_SORTS = {
    "-created": "Newest first", "created": "Oldest first", "name": "Name", "status": "Status", "method": "Method", "-time": "Longest first",
    "time": "Shortest first",
}  # fmt: skip
_MODEL, _DATASET, _METHOD = (Job.spec[part]["name"].astext for part in ("model", "dataset", "strategy"))
JOB_COLUMNS: dict[str, ColumnElement[Any] | InstrumentedAttribute[Any]] = {
    "created": Job.created_at,
    "name": func.lower(Job.name),
    "status": Job.status,
    "method": _METHOD,
    "time": Job.measured["seconds"].as_float(),
}


NEWEST = 1000
"""Jobs whose models, datasets, methods and tags a list of jobs can be filtered by: a look into every spec of ten thousand takes too long."""


def jobs_bar(session: Session, user: User, wish: ListQuery) -> Bar:
    newest = select(Job.id).where(Job.project_id == user.project_id, Job.deleted_at.is_(None)).order_by(Job.created_at.desc()).limit(NEWEST)
    used = session.execute(select(_MODEL, _DATASET, _METHOD).where(Job.id.in_(newest)).distinct()).all()
    tags = session.scalars(select(func.jsonb_array_elements_text(Job.tags)).where(Job.id.in_(newest)).distinct())
    filters = [
        Filter("status", "Status", [(one, one) for one in STATUSES]),
        Filter("model", "Base model", values([*(one[0] for one in used), wish.model])),
        Filter("dataset", "Dataset", values([*(one[1] for one in used), wish.dataset])),
        Filter("method", "Method", methods([*(one[2] for one in used), wish.method])),
        Filter("tag", "Tag", values([*tags, wish.tag])),
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
    return query.order_by((column.desc() if bar.sort.startswith("-") else column.asc()).nulls_last(), Job.created_at.desc(), Job.id.desc())


# Datasets -----------------------------------------------------------------------------------------------------------

DATASET_SORTS = {
    "-created": "Newest first", "created": "Oldest first", "name": "Name", "-rows": "Most rows", "rows": "Fewest rows", "status": "Status",
}  # fmt: skip


def datasets_bar(rows: Sequence[Dataset], wish: ListQuery) -> Bar:
    filters = [
        Filter("status", "Status", [(one, one) for one in ("reading", "ready", "error")]),
        Filter("format", "Format", [(name, entry.title) for name, entry in formats.FORMATS.items() if any(d.format == name for d in rows)]),
        Filter("tag", "Tag", values(tag for one in rows for tag in one.tags)),
    ]
    return Bar("/datasets", wish, filters, DATASET_SORTS)


def datasets(rows: Sequence[Dataset], bar: Bar) -> list[Dataset]:
    wish = bar.wish
    found = [
        one
        for one in rows
        if wish.holds(one.name)
        and wish.status in ("", one.status)
        and wish.format in ("", one.format)
        and (not wish.tag or wish.tag in one.tags)
    ]
    keys = {
        "created": lambda d: d.created_at,
        "name": lambda d: d.name.casefold(),
        "rows": lambda d: d.good_rows,
        "status": lambda d: d.status,
    }
    return ordered(found, bar.sort, keys)


# Comparisons --------------------------------------------------------------------------------------------------------

COMPARISON_SORTS = {"-created": "Newest first", "created": "Oldest first", "name": "Name", "status": "Status"}


def comparisons_bar(rows: Sequence[Mapping[str, Any]], path: str, wish: ListQuery) -> Bar:
    """`rows` are those of `app.views.comparison.rows`."""
    filters = [
        Filter("status", "Status", [(one, one) for one in STATUSES]),
        Filter("model", "Base model", values(row["model"] for row in rows)),
        Filter("dataset", "Dataset", values(row["dataset"] for row in rows)),
    ]
    return Bar(path, wish, filters, COMPARISON_SORTS)


def comparisons(rows: Sequence[Mapping[str, Any]], bar: Bar) -> list[Mapping[str, Any]]:
    wish = bar.wish
    found = [
        row
        for row in rows
        if wish.holds(row["comparison"].name)
        and wish.status in ("", row["status"])
        and wish.model in ("", row["model"])
        and wish.dataset in ("", row["dataset"])
    ]
    keys = {
        "created": lambda r: r["comparison"].created_at,
        "name": lambda r: r["comparison"].name.casefold(),
        "status": lambda r: r["status"],
    }
    return ordered(found, bar.sort, keys)


def public_id(found: Any) -> str:
    """The public id of a row."""
    prefix = {"jobs": ids.JOB, "models": ids.MODEL, "datasets": ids.DATASET, "comparisons": ids.COMPARISON}[found.__tablename__]
    return ids.public(prefix, found.id)
