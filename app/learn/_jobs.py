"""Jobs that a stop starts."""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy.orm import Session

from app.jobs import request as job_request
from app.jobs import service as jobs
from app.kit import ids
from app.languages import gettext
from app.learn._base import Stop
from app.ownership import mine
from app.tables import Dataset, Job, Model, User

RECIPE = "reading-room"
"""Metadata key `recipe` of a job that a stop created."""
OPEN = ("queued", "running", "paused")


def order_job(
    session: Session,
    user: User,
    stop: Stop,
    model: Model,
    dataset: Dataset,
    strategy: dict[str, Any],
    run: dict[str, Any],
    *,
    title: str = "",
    **more: Any,
) -> Job:
    """A queued job; `more` are further fields of the request. Raises any error of the request."""
    order = {
        "model": model.name, "dataset_id": ids.public(ids.DATASET, dataset.id), "strategy": strategy, "run": run,
        "name": f"{stop.title}{f': {title}' if title else ''}"[:200], "metadata": {"recipe": RECIPE, "stop": stop.name}, **more,
    }  # fmt: skip
    return jobs.create(session, user, job_request.read_order(order))


def job_of(session: Session, user: User, key: str) -> Job | None:
    return session.scalar(mine(Job, user).where(Job.id == uuid.UUID(key)))


def moving(job: Job) -> bool:
    return job.status in OPEN


def fault_of(job: Job) -> str:
    """Why a job gave no result; empty while it may."""
    if job.status == "failed":
        error = job.error or {}
        return f"{error.get('message', gettext('The run failed.'))} {error.get('hint', '')}".strip()
    return gettext("The run was cancelled.") if job.status == "cancelled" else ""


def doing(job: Job, learning: str = "") -> str:
    """What a job that has not ended does; `learning` says it while it runs."""
    return (learning or gettext("Training")) if job.status == "running" else gettext("Waiting for the worker")


def share_done(job: Job) -> float:
    return 1.0 if job.status == "succeeded" else job.step / job.total_steps if job.total_steps else 0.0


def path_of(job: Job) -> str:
    return f"/jobs/{ids.public(ids.JOB, job.id)}"
