"""What a tracker is given of a job, and what it says of itself."""

from __future__ import annotations

import math
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from app import events
from app.errors import BadField
from app.kit.addresses import Address, listed
from app.languages import gettext
from app.settings import get_settings

MEASURED = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes")
"""The figures of a step."""
SentState = dict[str, Any]
"""What a tracker keeps between two sendings: `url` is where a person reads the run, the rest is the tracker's own."""
Value = str | int | float | bool
Item = TypeVar("Item")


@dataclass(frozen=True)
class Point:
    """The figures of one event: tag → value. `kind` and `step` name it, however often it is sent; `at` is in seconds since 1970."""

    kind: str
    step: int
    at: float
    values: dict[str, float]


@dataclass(frozen=True)
class TrackedJob:
    """A job as trackers show it. `status` is `running` until it has ended; times are seconds since 1970; `folder` is its own, of files."""

    key: uuid.UUID
    public_id: str
    name: str
    url: str
    folder: Path
    status: str
    started_at: float
    ended_at: float | None = None
    parameters: dict[str, Value] = field(default_factory=dict)
    error: str = ""

    @property
    def ended(self) -> bool:
        return self.status != "running"


class Tracker(BaseModel, ABC):
    """One kind of tracker, with what an order says of it: the fields under its kind in `integrations`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ClassVar[str]
    title: ClassVar[str]
    pause_seconds: ClassVar[float] = 15.0
    """Between two sendings of one job."""

    def check(self) -> None:
        """Raises BadField where this studio cannot send there, and says what to set."""

    def waits_for_end(self) -> bool:
        """Whether nothing is sent before the job has ended."""
        return False

    @abstractmethod
    def send(self, job: TrackedJob, points: Sequence[Point], state: SentState, beat: Callable[[], None]) -> SentState:
        """Send figures, in the order of their steps, and the job's status where it changed; return what is to be kept. The same points
        may come again after a death, and are then there once. `beat` is called between requests.

        Raises StudioError, and OSError, for what can be tried again."""


def figures(event: events.JobEvent) -> dict[str, float]:
    """Tag → value of one event; nothing where there is nothing to draw."""
    if isinstance(event, events.Step):
        return {f"train/{name}": getattr(event, name) for name in MEASURED} | {f"train/{name}": at for name, at in event.metrics.items()}
    if isinstance(event, events.Evaluated):
        return {"validation/loss": event.loss, **{f"validation/{name}": value for name, value in event.metrics.items()}}
    if isinstance(event, events.Finished):
        return dict(_numbers({"final": {**event.evaluation, "measured": event.measured.model_dump(), "forgetting": event.forgetting}}))
    return {}


def _numbers(value: Any, path: str = "") -> Iterable[tuple[str, float]]:
    """Numbers in nested objects, by their path; lists, such as rows, are left out."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{path}/{name}" if path else str(name))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def json_number(value: float) -> float | str:
    """A number as JSON can have it: NaN and infinities by their names, as servers read them."""
    return value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items in order, at most `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def chosen_server(kind: str, url: str | None) -> Address:
    """The server of this address in the setting of a tracker; without one the first. Raises BadField for one that is not listed."""
    setting = f"LUTHIER_{kind.upper()}"
    known = listed(str(getattr(get_settings(), kind)), kind)
    if not known:
        raise BadField(
            gettext("This studio sends nothing to %(tracker)s: no server is set.", tracker=kind),
            hint=gettext("Whoever runs the studio lists its address in %(setting)s.", setting=setting),
            param="integrations",
        )
    wanted = next(iter(known)) if url is None else url.strip().rstrip("/")
    if wanted not in known:
        raise BadField(
            gettext("This studio sends nothing to %(tracker)s.", tracker=repr(wanted[:120])),
            hint=gettext("It sends to %(names)s; whoever runs it lists addresses in %(setting)s.", names=", ".join(known), setting=setting),
            param="integrations",
        )
    return known[wanted]
