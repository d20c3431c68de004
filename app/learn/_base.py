"""What a stop of the reading room is: an idea, what one click starts, and how the result is read from what was started."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Literal, NamedTuple

from sqlalchemy.orm import Session

from app.datasets import samples
from app.inference.playground import PendingAnswer
from app.inference.protocol import Entry
from app.languages import gettext, mark
from app.tables import JSON, Dataset, StopVisit, User
from app.web.charts import LinesPicture

Need = Literal["writes", "encoder"]
Typed = Mapping[str, str]


class StopField(NamedTuple):
    """A control of a stop's form: a text, or a choice where `choices` has (value, words) pairs."""

    name: str
    label: str
    value: str = ""
    choices: tuple[tuple[str, str], ...] = ()
    long: bool = False


class StopButton(NamedTuple):
    """One way to start. `value` is sent as `do`; `off` says why it cannot be pressed yet."""

    value: str
    title: str
    off: str = ""


class StopText(NamedTuple):
    """What one model answered: who, the prompt as it was rendered, the answer, and whether it is right where that is known."""

    title: str
    text: str
    prompt: str = ""
    right: bool | None = None
    path: str = ""
    note: str = ""


class StopBar(NamedTuple):
    """One bar. `share` is its length, 0 to 1; `low` and `high` are the ends of a 95% interval on the same scale."""

    label: str
    share: float
    value: str
    low: float | None = None
    high: float | None = None
    path: str = ""
    best: bool = False


class StopBars(NamedTuple):
    title: str
    bars: Sequence[StopBar]


class StopTable(NamedTuple):
    """Rows of texts; the first cell of each is its heading. `numeric` are the columns that are aligned at the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: tuple[int, ...] = ()


class StopCurve(NamedTuple):
    """Lines through points, and what they show."""

    title: str
    picture: LinesPicture
    table: StopTable


@dataclass
class StopResult:
    """What came of a visit so far. `headline` is kept with the visit once it has ended."""

    ended: bool = False
    fault: str = ""
    doing: str = ""
    progress: float | None = None
    headline: str = ""
    notes: list[str] = field(default_factory=list)
    texts: list[StopText] = field(default_factory=list)
    bars: list[StopBars] = field(default_factory=list)
    tables: list[StopTable] = field(default_factory=list)
    curves: list[StopCurve] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class StartedStop:
    """What a click started: ids and choices for `StopVisit.refs`, and the requests that the click itself waits for, each under a key. `at` is when the
    click came, by the clock of the database."""

    refs: JSON
    at: datetime | None = None
    asked: dict[str, PendingAnswer] = field(default_factory=dict)


class Stop(ABC):
    """One stop. A subclass in a file of this folder is all that it takes; `part` is a template of its own for the result. Its texts are marked,
    and translated where they are shown."""

    name: ClassVar[str]
    title: ClassVar[str]
    place: ClassVar[int]
    idea: ClassVar[str]  # what the reader has read, in one or two sentences
    do: ClassVar[str]  # what a click does here
    words: ClassVar[tuple[str, ...]] = ()  # of the glossary
    needs: ClassVar[tuple[Need, ...]] = ()
    samples: ClassVar[tuple[str, ...]] = ()  # datasets that are read before it begins
    part: ClassVar[str] = "learn/result.html"
    button: ClassVar[str] = mark("Start")
    reads: ClassVar[Literal["", "read", "encoded"]] = ""  # whose requests write nothing: how their tokens count against limits

    def datasets(self, session: Session, user: User) -> list[Dataset]:
        """The datasets that have to be read before it begins, added where they are not there."""
        return [samples.add(session, user, name) for name in self.samples]

    def fields(self, session: Session, user: User, visit: StopVisit | None) -> list[StopField]:
        """The controls of its form, with what was chosen last."""
        return []

    def buttons(self, session: Session, user: User, visit: StopVisit | None) -> list[StopButton]:
        return [StopButton("", gettext(self.button))]

    @abstractmethod
    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        """Start what the click asks for. `visit` is the newest one, for a stop of several clicks. Raises StudioError."""

    def heard(self, session: Session, user: User, begun: StartedStop, entries: Mapping[str, Sequence[Entry]]) -> None:  # noqa: B027  most wait for nothing
        """Put the entries of the requests into `begun.refs`, or into rows of their own."""

    @abstractmethod
    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        """What came of a visit, read from the rows that it started."""
