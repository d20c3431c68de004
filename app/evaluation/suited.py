"""Whether a model can be evaluated on a dataset, and why not."""

from __future__ import annotations

from collections.abc import Sequence

from app import objectives
from app.datasets.report import label_name
from app.errors import BadField
from app.languages import gettext
from app.models import interpolation
from app.models import service as models
from app.tables import Dataset, Job


def check(resolved: models.Resolved, dataset: Dataset, kind: str, job: Job | None) -> None:
    """Raises BadField where a model cannot be evaluated on a dataset. `job` is the one that made the model."""
    model, ref = resolved.model, resolved.ref
    name = ref.name
    if model.answered_elsewhere:
        said = gettext("%(model)s answers through another server.", model=name)
        raise BadField(said, hint=gettext("Take a model whose weights are here."), param="model")
    if kind == "blend":
        if ref.name != interpolation.split_name(ref.name)[0]:
            said = gettext("%(model)s is a blend already.", model=name)
            raise BadField(said, hint=gettext("Name the fine-tuned model itself."), param="model")
        if reason := interpolation.why_not(job.spec["strategy"]["name"] if job is not None else None, labels=bool(ref.labels)):
            said = gettext("%(model)s cannot be blended with its base: %(reason)s", model=name, reason=reason)
            raise BadField(said, hint=gettext("Score it as it is."), param="model")
    if kind == "advice":
        if ref.labels:
            said = gettext("%(model)s is a classifier already, not to be tested before fine-tuning.", model=name)
            raise BadField(said, hint=gettext("Take its base."), param="model")
        return
    if fault := unfit(name, ref.shape.architecture, ref.labels, dataset):
        raise fault


def unfit(name: str, architecture: str, labels: Sequence[str] | None, dataset: Dataset) -> BadField | None:
    """Why a model cannot be scored on these rows; None where it can."""
    entry = objectives.get(dataset.task)
    if not entry.scored:
        said = gettext("Rows for %(task)s cannot be scored yet.", task=entry.name)
        return BadField(said, hint=gettext("Take a dataset of answers or of labels."), param="dataset_id")
    if entry.classifies and not labels:
        return BadField(
            gettext("%(model)s is not a classifier, so it cannot be scored on labels.", model=name),
            hint=gettext("Use a model fine-tuned on labeled rows. Advice tests what a prompt alone reaches."),
            param="model",
        )
    if not entry.classifies and (architecture == "encoder" or labels):
        return BadField(
            gettext("%(model)s generates no text, so it cannot be scored on answers.", model=name),
            hint=gettext("Use a model that generates text."),
            param="model",
        )
    own = (dataset.report or {}).get("labels") if labels else None
    if labels and own and own.keys().isdisjoint(map(label_name, labels)):
        return BadField(
            gettext(
                "%(model)s assigns other labels than those of %(dataset)s: %(labels)s.",
                model=name,
                dataset=dataset.name,
                labels=", ".join(map(str, labels[:5])),
            ),
            hint=gettext("Take a dataset with the same labels."),
            param="dataset_id",
        )
    return None
