"""Operations on one checkpoint of a job: keep it as a model, or resume from it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.errors import BadData, Conflict, NotFound
from app.jobs import checkpoint_folders
from app.jobs import service as jobs
from app.kit import ids, manifest
from app.kit.states import state_word
from app.languages import gettext
from app.models import service as models
from app.objectives import OBJECTIVES
from app.settings import get_settings
from app.storage import places
from app.strategies import STRATEGIES
from app.tables import Checkpoint, Job, Model, User

WEIGHTS, STATE = "weights", "trainer/state.json"
HEAD = "classifier.json"


def get(session: Session, job: Job, step: int) -> Checkpoint:
    """A checkpoint that was not deleted. Raises NotFound."""
    query = select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step == step, Checkpoint.deleted_at.is_(None))
    if (row := session.scalar(query)) is None:
        raise NotFound(
            gettext("The job has no checkpoint of step %(step)s.", step=step),
            hint=gettext("Its page lists those that are still there."),
            param="step",
        )
    return row


def folder_of(row: Checkpoint) -> Path:
    """Its folder, after checking the sizes of its files and that its manifest is the recorded one. Raises BadData."""
    folder = places.path(row.path)
    manifest.verify(folder, deep=False)
    if manifest.sha256_of(folder / manifest.NAME) != row.manifest_sha256:
        raise BadData(
            gettext("The checkpoint of step %(step)s is no longer whole on disk.", step=row.step),
            hint=gettext("Choose another checkpoint of the job."),
        )
    return folder


def model_of(session: Session, job: Job, row: Checkpoint) -> Model:
    """The checkpoint as a model that is not in the database: what `keep` adds, and the source of a download's card."""
    base = session.get_one(Model, job.model_id)
    strategy, labels = job.spec["strategy"]["name"], _labels(job, row)
    return Model(
        id=uuid.uuid5(job.id, f"kept:{row.step}:{row.manifest_sha256}"),
        owner_id=job.owner_id,
        project_id=job.project_id,
        name=f"{models.tuned_name(session, job)}:step-{row.step}",
        title=f"{job.name}, step {row.step}"[:120],
        kind=OBJECTIVES[job.spec["task"]].result_kind or base.kind,
        base_id=base.id,
        job_id=job.id,
        step=row.step,
        strategy=strategy,
        adapter=STRATEGIES[strategy].adapter,
        status="ready",
        adapter_sha256=row.manifest_sha256 if STRATEGIES[strategy].adapter else None,
        source={"from": "checkpoint", "job": ids.public(ids.JOB, job.id), "step": row.step},
        license=base.license,
        shape=base.shape,
        labels=labels,
    )


def _labels(job: Job, row: Checkpoint) -> list[str] | None:
    """The classes of a classifier, from its own files."""
    head = places.path(row.path, weights=False) / WEIGHTS / HEAD
    labels: list[str] | None = json.loads(head.read_text())["labels"] if head.is_file() else job.spec["model"].get("labels")
    return labels


def keep(session: Session, job: Job, step: int) -> Model:
    """Keep the checkpoint as a model of its own, which stays when the job and its checkpoints are deleted. Idempotent.

    Its files are hard links, not copies, since nobody ever changes them. Raises NotFound, BadData, Conflict.
    """
    row = get(session, job, step)
    source = folder_of(row)
    model = model_of(session, job, row)
    known = session.get(Model, model.id, with_for_update=True)
    if known is not None and known.deleted_at is None:
        return known
    if session.scalar(select(Model.id).where(Model.name == model.name, Model.project_id == job.project_id, Model.deleted_at.is_(None))):
        raise Conflict(
            gettext("Another checkpoint of step %(step)s is kept already.", step=step),
            hint=gettext("Delete that model first."),
            param="step",
        )
    target = get_settings().data_dir / "models" / str(model.id)
    made = _link(source, target)
    model.path, model.revision, model.bytes = f"models/{model.id}", made["revision"], made["bytes"]
    if known is not None:
        known.deleted_at, known.status, known.error, known.path = None, "ready", None, model.path
        known.title, known.name, known.bytes, known.revision = model.title, model.name, model.bytes, model.revision
        return known
    session.add(model)
    session.flush()
    return model


def _link(source: Path, target: Path) -> dict[str, Any]:
    """The checkpoint's weights as a model's folder, filled under a temporary name and renamed into place."""
    found = manifest.read(source) or {"files": {}}
    inside = {name.removeprefix(f"{WEIGHTS}/"): entry for name, entry in found["files"].items() if name.startswith(f"{WEIGHTS}/")}
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        shutil.copytree(source / WEIGHTS, aside, copy_function=_link_or_copy)
        made = manifest.write(aside, inside)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    places.push(target.relative_to(get_settings().data_dir).as_posix())
    return made


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def resume(session: Session, user: User, job_id: uuid.UUID, step: int | None) -> Job:
    """Queue a job again; with `step` from that checkpoint, deleting later ones. Raises NotFound, Conflict."""
    if step is None:
        return jobs.resume(session, user, job_id)
    job = jobs.get(session, user, job_id)
    row = get(session, job, step)
    if job.status not in ("paused", "failed", "cancelled"):
        raise Conflict(
            gettext("The job is %(status)s, so it cannot go back to a checkpoint.", status=state_word(job.status)),
            param="step",
            code="wrong_state",
        )
    if not resumable(row):
        raise Conflict(
            gettext("The best checkpoint before step %(step)s was swept, so the job cannot go on from there.", step=step),
            hint=gettext("Resume from the newest checkpoint, or clone the job."),
            param="step",
        )
    resumed = jobs.resume(session, user, job_id)  # locks the job's row: no trainer runs until this is committed
    later = (Checkpoint.job_id == job.id) & (Checkpoint.step > step)
    session.execute(update(Checkpoint).where(later, Checkpoint.deleted_at.is_(None)).values(deleted_at=func.clock_timestamp()))
    remembered = Checkpoint.path == _best_of(row)  # the best one so far, which no sweep may remove
    session.execute(update(Checkpoint).where(Checkpoint.job_id == job.id).values(best=remembered & Checkpoint.deleted_at.is_(None)))
    checkpoint_folders.remove(session, job.id)
    return resumed


def resumable(row: Checkpoint) -> bool:
    """Whether the checkpoint's files are there, and those of the best one it refers to, whose weights the job may end with."""
    try:
        best = _best_of(row)
    except (OSError, ValueError):
        return False
    return best is None or places.exists(best)


def _best_of(row: Checkpoint) -> str | None:
    """The path of the best checkpoint at the time this one was saved, which it records. Raises OSError, ValueError."""
    best: str | None = json.loads((places.path(row.path, weights=False) / STATE).read_text()).get("best_path")
    return best
