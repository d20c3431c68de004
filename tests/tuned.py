"""Tuned models for tests: a real job, trained in this process, recorded as its supervisor records it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import events
from app.jobs import lifecycle
from app.tables import Dataset, Job, Model, User
from tests.orders import make_job, make_spec

RUN = {
    "epochs": 6, "max_tokens_per_step": 128, "learning_rate": 2e-2, "evaluations_per_epoch": 1, "samples": 0, "sample_tokens": 8,
    "early_stopping_patience": 0, "precision": "fp32", "forgetting": False, "row_losses": False,
}  # fmt: skip


def tune(
    session: Session, user: User, data_dir: Path, base: Model, dataset: Dataset, strategy: dict[str, Any] | None = None, **run: Any
) -> tuple[Job, Model]:
    """The finished job and its model, committed."""
    job = make_job(session, user, base, dataset, **(RUN | run))
    spec = make_spec(base, dataset, strategy, **(RUN | run)).model_dump(mode="json")
    job.spec = spec | {"task": dataset.task, "dataset": spec["dataset"] | {"format": dataset.format}}
    session.commit()
    return job, carry_out(session, data_dir, job)


def carry_out(session: Session, data_dir: Path, job: Job, *, live: bool = False) -> Model:
    """Train a queued job here and now, and record what came of it; with `live` also every event, for pages that show them."""
    from worker.train import train

    held = lifecycle.claim(session, job.id, "a test")
    assert held is not None
    session.commit()
    for number, event in enumerate(train(held.spec, data_dir / held.folder)):
        if isinstance(event, events.Finished):
            lifecycle.finish(session, held, event)
        elif not isinstance(event, events.Failed):
            lifecycle.record(session, held, number, [event]) if live or isinstance(event, events.Saved) else None
        session.commit()
    session.refresh(job)
    assert job.status == "succeeded", job.error
    return session.scalars(select(Model).where(Model.job_id == job.id)).one()
