"""The rows of a request for a job: whether they can be trained on, and how they are split."""

from __future__ import annotations

from app import formats, objectives
from app.errors import BadField
from app.jobs.request import JobRequest
from app.languages import gettext
from app.objectives import OBJECTIVES, Task
from app.spec import Split
from app.tables import Dataset


def check_dataset(dataset: Dataset, task: Task, param: str) -> None:
    """Check that the dataset can be trained on for this task. One that is still being parsed is checked when it is ready."""
    from app.datasets import service as datasets

    if dataset.status == "reading":
        return
    if dataset.status == "error":
        said = (dataset.error or {}).get("message", gettext("It could not be read."))
        raise BadField(
            gettext("The dataset %(dataset)s has an error: %(said)s", dataset=dataset.name, said=said),
            hint=(dataset.error or {}).get("hint") or gettext("Fix the file and upload it again."),
            param=param,
            code="invalid_training_file",
        )
    if not dataset.good_rows:
        raise BadField(
            gettext("The dataset %(dataset)s has no valid row.", dataset=dataset.name),
            hint=gettext("Its report lists every invalid row with the reason."),
            param=param,
            code="invalid_training_file",
        )
    if dataset.format and OBJECTIVES[task] not in formats.objectives_of(dataset.format):
        usual = datasets.usual_task(dataset)
        raise BadField(
            gettext(
                "The dataset %(dataset)s holds rows for %(usual)s (%(format)s), which cannot be used for %(task)s.",
                dataset=dataset.name,
                usual=usual,
                format=dataset.format,
                task=task,
            ),
            hint=gettext("Set task to %(usual)s, or choose a dataset for %(task)s.", usual=usual, task=task),
            param="task" if param != "validation_file" else param,
        )


def split_of(order: JobRequest, dataset: Dataset) -> Split | None:
    """The validation split; None for a random one, the default."""
    asked = order.split
    if asked is None or (asked.method == "random" and asked.seed is None):
        return None
    if order.validation_file or order.validation_dataset_id:
        raise BadField(gettext("Both a validation file and a split are set."), hint=gettext("Remove one of them."), param="split")
    if asked.method == "grouped" and not asked.column:
        raise BadField(gettext("The group column is missing."), hint=gettext("Send split.column."), param="split.column")
    if dataset.status == "ready":
        known = set((dataset.report or {}).get("columns", [])) - set((dataset.mapping or {}).values())
        if asked.column and asked.column not in known | {"label"}:
            shown = ", ".join(sorted(known)[:20])
            hint = gettext("Take one of %(columns)s.", columns=shown) if known else gettext("This dataset keeps no further columns.")
            raise BadField(
                gettext("There is no column “%(column)s” to split by.", column=asked.column[:60]), hint=hint, param="split.column"
            )
        if asked.method == "stratified" and not asked.column and not objectives.get(dataset.task).classifies:
            raise BadField(
                gettext("Only labeled rows can be split by label."), hint=gettext("Send split.column, or split at random."), param="split"
            )
    return asked
