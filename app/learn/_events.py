"""What the events of a job say of its course: losses by step, and the texts it wrote on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.kit.humanize import human_number
from app.languages import gettext
from app.learn._base import StopCurve, StopTable
from app.tables import Event, Job
from app.web import charts
from app.web.charts import Scale

SHOWN = 8


def validation_losses(session: Session, job: Job) -> list[tuple[float, float]]:
    """(step, validation loss in nats per token) of each evaluation, in order."""
    rows = session.execute(
        select(Event.data["step"].as_integer(), Event.data["loss"].as_float()).where(Event.job_id == job.id, Event.type == "evaluated")
    )
    return sorted({int(step): float(loss) for step, loss in rows if loss is not None}.items())


def written(session: Session, job: Job) -> list[tuple[int, str, str]]:
    """(step, prompt, text) of the first sample of each evaluation."""
    rows = session.scalars(select(Event.data).where(Event.job_id == job.id, Event.type == "sampled").order_by(Event.id))
    found = {int(data["step"]): data["samples"][0] for data in rows if data.get("samples")}
    return [(step, sample["prompt"], sample["answer"]) for step, sample in sorted(found.items())]


def loss_curve(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], *, x: str = "") -> list[StopCurve]:
    """The losses of several jobs in one drawing, with their numbers; none where there are fewer than two points."""
    found = charts.lines(
        lines,
        Scale(x or gettext("Step"), lambda v: human_number(v, 0), amount=True),
        Scale(gettext("Validation loss"), lambda v: human_number(v, 1)),
    )
    if found is None:
        return []
    rows = [
        [name, *(gettext("%(loss)s at %(step)s", loss=human_number(y, 2), step=human_number(at, 0)) for at, y in (points[0], points[-1]))]
        for name, points in lines.items()
        if points
    ]
    head = (gettext("Run"), gettext("First"), gettext("Last"))
    return [StopCurve(title, found, StopTable(gettext("%(title)s, first and last", title=title), head, rows, (1, 2)))]
