"""Lives of jobs, recorded through the real services: what a worker would record, without the training."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

from sqlalchemy.orm import Session

from app import events
from app.jobs import lifecycle
from app.spec import DatasetRef, JobSpec, ModelRef, RunSettings
from app.strategies import STRATEGIES
from app.tables import Dataset, Job, Model, User

SAMPLES = [
    ("My parcel is a week late. What can I do?", "There are several reasons why a parcel may be late.", "I am sorry for the wait. Send me the order number and I will ask the carrier today."),
    ("Do you mend violins by other makers?", "Yes, a violin is a string instrument.", "Yes, gladly. Bring it in on any weekday and we look at it together."),
]  # fmt: skip


def order(session: Session, user: User, model: Model, *, name: str = "support-tone", strategy: str = "lora", **run: Any) -> Job:
    """A queued job on a dataset of 1,204 rows, with its first event."""
    dataset = Dataset(
        owner_id=user.id, project_id=user.project_id, name="support-replies", version=3, format="chat", task="generation", status="ready", rows=1210,
        good_rows=1204, rows_path="rows/none.parquet", rows_sha256="0" * 64,
        report={"characters": 900_000, "tokens": 240_000, "trained_tokens": 90_000, "longest": 512},
    )  # fmt: skip
    session.add(dataset)
    session.flush()
    spec = JobSpec(
        name=name,
        task="generation",
        model=ModelRef(id=model.id, name=model.name, kind=model.kind, path=model.path, revision=model.revision, shape=model.shape),
        dataset=DatasetRef(
            id=dataset.id, name=dataset.name, path="rows/none.parquet", sha256="0" * 64, format="chat", rows=dataset.good_rows
        ),
        run=RunSettings(**run),
        strategy=STRATEGIES[strategy](),
    )
    memory = {"weights": 540_000_000, "gradients": 10_000_000, "optimizer": 30_000_000, "activations": 780_000_000, "other": 0}
    job = Job(
        owner_id=user.id, project_id=user.project_id, name=name, spec=spec.model_dump(mode="json"), model_id=model.id, dataset_id=dataset.id,
        order={"model": model.name, "dataset_id": str(dataset.id), "name": name, "strategy": {"name": strategy}, "run": run},
        estimate={"memory_bytes": 1_360_000_000, "memory": memory, "seconds": 300.0, "trainable_parameters": 2_440_000, "fits": True},
    )  # fmt: skip
    session.add(job)
    session.flush()
    lifecycle.record_event(session, job.id, 0, events.Queued())
    session.commit()
    return job


def started(total: int = 120, resumed_from: int | None = None) -> events.Started:
    return events.Started(
        device="cpu, 2 cores", precision="fp32", total_steps=total, train_rows=1084, validation_rows=120, train_tokens=240_000,
        trainable_parameters=2_442_240, parameters=136_957_248, resumed_from=resumed_from,
    )  # fmt: skip


def steps(first: int, last: int, total: int = 120, every: int = 12) -> Iterator[events.TrainerEvent]:
    """Steps `first` to `last`, evaluated, sampled and saved every so many."""
    for n in range(first, last + 1):
        noise = random.Random(n).uniform(-0.06, 0.06)
        warm = min(1.0, n / 6)
        yield events.Step(
            step=n, epoch=n * 3 / total, loss=1 + 1.45 * math.exp(-n / 25) + noise, grad_norm=0.8 + abs(noise) * 6,
            learning_rate=5e-4 * warm * (0.5 + 0.5 * math.cos(math.pi * n / total)), tokens=n * 2048, trained_tokens=n * 700,
            tokens_per_second=2640 + noise * 900, memory_bytes=1_180_000_000 + min(n, 40) * 3_250_000, seconds=n * 2.8,
        )  # fmt: skip
        if n % every == 0:
            loss = 1.12 + 1.4 * math.exp(-n / 22)
            yield events.Evaluated(step=n, loss=loss, best=True, seconds=3.1)
            said = [events.Sample(prompt=p, base=b, answer=a[: 20 + n], reference=a) for p, b, a in SAMPLES]
            yield events.Sampled(step=n, samples=said)
            yield events.Saved(step=n, path=f"runs/j/a1/checkpoint-{n}", bytes=9_800_000, manifest_sha256="0" * 64, best=True)


def finished(step: int = 120) -> events.Finished:
    measured = events.Measured(
        peak_memory_bytes=1_310_000_000, seconds=336, tokens_per_second=2640, tokens=step * 2048, trained_tokens=step * 700, steps=step,
        device="cpu, 2 cores",
    )  # fmt: skip
    return events.Finished(
        reason="completed", step=step, path="runs/j/a1/final", bytes=9_800_000, revision="1" * 64, adapter_sha256="2" * 64,
        kind="dialogue", best_step=step, measured=measured,
        evaluation={"base": {"loss": 2.51, "token_accuracy": 0.48}, "tuned": {"loss": 1.13, "token_accuracy": 0.71}},
    )  # fmt: skip


class Life:
    """One attempt after another, recorded as its supervisor would."""

    def __init__(self, session: Session, job: Job) -> None:
        self.session, self.job_id, self.said = session, job.id, 0
        self.held: lifecycle.Claim | None = None

    def claim(self) -> Life:
        self.held, self.said = lifecycle.claim(self.session, self.job_id, "w1"), 0
        assert self.held is not None, "nobody could claim the job"
        self.session.commit()
        return self

    def say(self, *said: events.TrainerEvent) -> Life:
        lifecycle.record(self.session, self.held, self.said, list(said))
        self.said += len(said)
        self.session.commit()
        return self

    def lose(self) -> Life:
        lifecycle.lost(self.session, self.held, events.Failed(kind="worker_lost", message="The worker was lost: it stopped beating."))
        self.session.commit()
        return self

    def leave(self, step: int) -> Life:
        """The trainer saved and left, as it was asked to."""
        lifecycle.stopped(self.session, self.held, step)
        self.session.commit()
        return self

    def fail(self, failed: events.Failed) -> Life:
        lifecycle.fail(self.session, self.held, failed)
        self.session.commit()
        return self

    def finish(self, step: int = 120) -> Life:
        lifecycle.finish(self.session, self.held, finished(step))
        self.session.commit()
        return self


def running(session: Session, user: User, model: Model, **run: Any) -> Life:
    """The job of the picture: second attempt, resumed at step 36, now at step 74 of 120."""
    job = order(session, user, model, **run)
    life = Life(session, job).claim().say(started(), *steps(1, 44)).lose()
    return life.claim().say(started(resumed_from=36), *steps(37, 74))


__all__ = ["Life", "finished", "order", "running", "started", "steps"]
