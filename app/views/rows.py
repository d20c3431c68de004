"""The data of the page of a dataset's rows: the rows as a model's trainer sees them, and the effect of a max sequence length."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from app import objectives
from app.datasets import inspections, token_counts
from app.errors import NotFound
from app.jobs import row_losses
from app.kit import ids
from app.languages import gettext, mark
from app.models import service as models
from app.run_settings import TrainOn
from app.spec import SILENT
from app.tables import Dataset, Inspection, Model, User

ROWS_PER_PAGE = 10
DEFAULT_CUTOFF = 1024
CUTOFFS = (128, 256, 512, 1024, 2048, 4096, 8192)
WAIT_SECONDS = 2.5
SORTS = {"longest": mark("longest first"), **row_losses.SORTS}


@dataclass(slots=True)
class RowQuery:
    """The URL parameters of the page."""

    model: Model | None
    cutoff: int
    search: str = ""
    page: int = 1
    lines: list[int] | None = None
    train_on: TrainOn = "assistant"


@dataclass(slots=True)
class RowsShown:
    rows: Inspection
    lengths: Inspection | None
    at: dict[str, Any] = field(default_factory=dict)

    @property
    def waiting(self) -> bool:
        return self.rows.status in ("waiting", "running") or (self.lengths is not None and self.lengths.status in ("waiting", "running"))


def able_models(session: Session, user: User, dataset: Dataset, name: str | None = None) -> list[Model]:
    """The models on offer whose trainer can render the rows: all generative ones, and for labeled texts also encoders."""
    able = [m for m in models.offered(session, user, name) if m.status == "ready"]
    return able if objectives.get(dataset.task).classifies else [m for m in able if m.kind not in SILENT]


def choose_model(session: Session, user: User, dataset: Dataset, name: str | None) -> Model | None:
    """The named model, or the one that counts tokens; None where there is none."""
    able = able_models(session, user, dataset, name)
    if name:
        for model in able:
            if name in (model.name, ids.public(ids.MODEL, model.id)):
                return model
        raise NotFound(gettext("No such model: %(id)s", id=name[:80]), hint=gettext("Choose one of the list."), param="model")
    first = token_counts.counting_model(session, dataset.task)
    return next((model for model in able if first is not None and model.id == first.id), able[0] if able else None)


def window(model: Model | None) -> int:
    """Context window of a model; longer rows are truncated to it."""
    return int((model.shape or {}).get("positions") or 1 << 30) if model else 1 << 30


def cutoffs(model: Model | None, cutoff: int) -> list[int]:
    """The max sequence lengths to choose from, up to the model's context window."""
    most = window(model)
    return sorted({cutoff, *(c for c in CUTOFFS if c <= most), *({most} if most <= CUTOFFS[-1] else ())})


def ask_lengths(session: Session, dataset: Dataset, model: Model | None, cutoff: int, train_on: TrainOn) -> Inspection | None:
    """The length of every row for a model's trainer; None without a model."""
    if model is None:
        return None
    known = inspections.report_cutoff(model)
    return inspections.ask(session, dataset, "lengths", {"cutoff": known if cutoff in CUTOFFS else cutoff, **_turns(train_on)}, model)


def _turns(train_on: TrainOn) -> dict[str, Any]:
    """The argument of an inspection; omitted for the default, so that earlier answers are found."""
    return {} if train_on == "assistant" else {"train_on": train_on}


def ask_rows(session: Session, dataset: Dataset, wish: RowQuery) -> Inspection:
    """Some rows, token by token where there is a model."""
    arguments: dict[str, Any] = {"count": ROWS_PER_PAGE, "cutoff": wish.cutoff, **_turns(wish.train_on)}
    if wish.lines is not None:
        arguments["lines"] = wish.lines
    else:
        arguments |= {"skip": (wish.page - 1) * ROWS_PER_PAGE, "search": wish.search}
    return inspections.ask(session, dataset, "rows", arguments, wish.model)


def look(rows: Inspection, lengths: Inspection | None, cutoff: int) -> RowsShown:
    """The answers, after a short wait for them."""
    rows = inspections.wait(rows.id, WAIT_SECONDS)
    lengths = inspections.wait(lengths.id, 0.3) if lengths else None
    shown = RowsShown(rows, lengths)
    if lengths is not None and lengths.result:
        shown.at = next((entry for entry in lengths.result["cutoffs"] if entry["cutoff"] == cutoff), {})
    return shown


def order(sort: str, entries: list[row_losses.Entry], lengths: Inspection | None) -> list[int] | None:
    """All lines in the requested order; None for that of the file, and until the data of the order is there."""
    if sort == "longest":
        found = lengths.result if lengths is not None and lengths.status == "ready" else None
        return [line for line, _ in found["longest_rows"]] if found else None
    return [entry.line for entry in row_losses.ranked(entries, sort)] if sort and entries else None


def bars(lengths: dict[str, Any], cutoff: int) -> dict[str, Any]:
    """The histogram as rectangles of a 600 × 120 drawing, and the x of the cutoff in it."""
    histogram = lengths["histogram"]
    most = max((count for _, _, count in histogram), default=1) or 1
    end = histogram[-1][1] + 1 if histogram else 1
    width = 600 / max(1, len(histogram))
    return {
        "bars": [
            {"x": place * width, "width": max(1.0, width - 2), "height": 110 * count / most, "low": low, "high": high, "count": count, "cut": low >= cutoff}
            for place, (low, high, count) in enumerate(histogram)
        ],
        "line": 600 * cutoff / end if cutoff < end else None,
        "end": end,
        "most": most,
    }  # fmt: skip
