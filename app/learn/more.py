"""More data, more parameters: two curves, both measured here."""

from __future__ import annotations

import uuid
from typing import Any, ClassVar

from sqlalchemy.orm import Session

from app.datasets import samples
from app.evaluation import comparison_table, comparisons
from app.kit import ids
from app.kit.humanize import human_count, human_number, human_percent
from app.languages import gettext, mark, ngettext
from app.learn import _text, _visits
from app.learn._base import Need, StartedStop, Stop, StopCurve, StopResult, StopTable, Typed
from app.learn._events import validation_losses
from app.learn._jobs import OPEN, fault_of, job_of, moving, order_job, path_of, share_done
from app.learn.pre_training import RUN
from app.models import from_nothing
from app.models.from_nothing import BlankSize
from app.ownership import mine
from app.shapes import Shape
from app.tables import Comparison, Dataset, Job, StopVisit, User
from app.web import charts
from app.web.charts import Scale

SIZES = (BlankSize(32, 2), BlankSize(64, 3), BlankSize(128, 4))
STEPS: dict[str, Any] = RUN | {"max_steps": 60, "eval_steps": 30, "learning_rate": 1.5e-3, "validation_fraction": 0.05, "samples": 0}
"""At twice this learning rate the largest of the three ended behind the second one (2.991 and 3.043 nats)."""


class MoreStop(Stop):
    name: ClassVar = "more"
    title: ClassVar = mark("More data, more parameters")
    place: ClassVar = 110
    idea: ClassVar = mark(
        "“Large” means much text and many parameters. A parameter is a number that training finds; a hyperparameter, such as the learning "
        "rate, is chosen before. From GPT-2 to GPT-3 both grew a hundredfold, and so did what the model could do."
    )
    do: ClassVar = mark(
        "A classifier is trained on a quarter, half and all of a sample, and three models from nothing, each larger than the one before, "
        "read the same text for the same number of steps."
    )
    words: ClassVar = ("Parameter", "Hyperparameter", "Pre-training", "Loss", "Validation set")
    needs: ClassVar[tuple[Need, ...]] = ("encoder",)
    samples: ClassVar = ("shop-questions",)
    button: ClassVar = mark("Measure both curves")

    def datasets(self, session: Session, user: User) -> list[Dataset]:
        return [samples.add(session, user, self.samples[0]), _text.dataset(session, user)]

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        labeled, text = self.datasets(session, user)
        encoder = _visits.take_model(session, user, "encoder")
        order = {
            "model": encoder.name, "dataset_id": ids.public(ids.DATASET, labeled.id), "strategies": ["feature_extraction"],
            "kind": "learning_curve", "run": {"validation_fraction": 0.25}, "name": f"{self.title}: data",
        }  # fmt: skip
        made = comparisons.create(session, user, comparisons.read_order(order))
        found = {}
        for size in SIZES:
            blank = from_nothing.ensure(session, user, size)
            job = order_job(session, user, self, blank, text, {"name": "full"}, STEPS, title=blank.title)
            found[str(job.id)] = Shape.model_validate(blank.shape).parameters()
        return StartedStop({"comparison": str(made.id), "sizes": found})

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        comparison = session.scalar(mine(Comparison, user).where(Comparison.id == uuid.UUID(visit.refs["comparison"])))
        sized = [
            (parameters, job_of(session, user, key)) for key, parameters in sorted(visit.refs["sizes"].items(), key=lambda item: item[1])
        ]
        grown = [(parameters, job) for parameters, job in sized if job is not None]
        if comparison is None or len(grown) < len(sized):
            return StopResult(fault=gettext("What it started was deleted."))
        shares = comparisons.jobs_of(session, comparison)
        every = [*shares, *(job for _, job in grown)]
        result = StopResult(fault=next(filter(None, map(fault_of, every)), ""))
        waits = [job for job in every if moving(job)]
        if waits:
            result.doing = ngettext(
                "%(done)s of %(num)s run done", "%(done)s of %(num)s runs done", len(every), done=len(every) - len(waits)
            )
            result.progress = sum(map(share_done, every)) / len(every)
        _by_data(session, comparison, result)
        _by_size(session, grown, result)
        result.ended = not waits and not result.fault
        result.links = [
            (gettext("The learning curve"), f"/compare/{ids.public(ids.COMPARISON, comparison.id)}"),
            *((job.name, path_of(job)) for _, job in grown),
        ]
        return result


def _by_data(session: Session, comparison: Comparison, result: StopResult) -> None:
    rows = [
        row for row in comparison_table.table(session, comparison).rows if row["status"] not in OPEN and row.get("accuracy") is not None
    ]
    points = sorted((100 * row["data_fraction"], 100 * row["accuracy"]) for row in rows)
    found = charts.lines(
        {gettext("accuracy"): points},
        Scale(gettext("Share of the training rows, %"), lambda v: f"{v:.0f}", amount=True),
        Scale(gettext("Accuracy, %"), lambda v: f"{v:.0f}"),
    )
    if found is not None:
        table = StopTable(
            gettext("Accuracy by data"),
            (gettext("Share of the rows"), gettext("Accuracy")),
            [[human_percent(x / 100, 0), human_percent(y / 100)] for x, y in points],
            (1,),
        )
        result.curves.append(StopCurve(gettext("More data"), found, table))
        few, many = (human_percent(at[1] / 100, 0) for at in (points[0], points[-1]))
        result.headline = gettext("Accuracy %(few)s → %(many)s with more rows", few=few, many=many)


def _by_size(session: Session, grown: list[tuple[int, Job]], result: StopResult) -> None:
    ends = [
        (parameters, losses[-1][1])
        for parameters, job in grown
        if job.status == "succeeded" and (losses := validation_losses(session, job))
    ]
    found = charts.lines(
        {gettext("loss"): [(float(n), loss) for n, loss in ends]},
        Scale(gettext("Parameters"), human_count, amount=True),
        Scale(gettext("Validation loss"), lambda v: human_number(v, 2)),
    )
    if found is not None:
        table = StopTable(
            gettext("Loss by size"),
            (gettext("Parameters"), gettext("Validation loss")),
            [[human_count(n), human_number(loss, 3)] for n, loss in ends],
            (1,),
        )
        result.curves.append(StopCurve(gettext("More parameters"), found, table))
        small, large = (human_number(at[1], 2) for at in (ends[0], ends[-1]))
        result.headline += "; " + gettext("loss %(small)s → %(large)s with more parameters", small=small, large=large)
