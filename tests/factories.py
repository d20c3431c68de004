"""What tests need to have before they begin: datasets, jobs and tuned models.

`upload` is what a person does, read by the reader's own code; `make_dataset` and `make_job` write the rows that the studio would have
written; `tune` trains a model here and now.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import events, queue
from app.datasets import ingest_task
from app.datasets import service as datasets
from app.datasets.row_store import write_rows
from app.errors import StudioError
from app.jobs import lifecycle
from app.kit import sandbox
from app.spec import JobSpec
from app.storage import files
from app.tables import Dataset, File, Job, Model, User

TURNS = [
    ("What wood is the belly made of?", "Spruce."),
    ("What wood is the back made of?", "Maple."),
    ("Which glue should I use?", "Hide glue."),
    ("What is the small post called?", "The sound post."),
    ("What carries the strings?", "The bridge."),
    ("What is carved last?", "The scroll."),
    ("What hair has a bow?", "White horse hair."),
    ("How long does varnish dry?", "Two days in summer."),
]


TUNING_RUN = {
    "epochs": 6, "max_tokens_per_step": 128, "learning_rate": 2e-2, "evaluations_per_epoch": 1, "samples": 0, "sample_tokens": 8,
    "early_stopping_patience": 0, "precision": "fp32", "forgetting": False, "row_losses": False,
}  # fmt: skip


def chat_rows(count: int, system: str = "") -> list[dict[str, Any]]:
    pairs = [TURNS[i % len(TURNS)] for i in range(count)]
    lead = [{"role": "system", "content": system}] if system else []
    return [
        {"messages": [*lead, {"role": "user", "content": f"{i}. {q}"}, {"role": "assistant", "content": a}]}
        for i, (q, a) in enumerate(pairs)
    ]


def upload(session: Session, user: User, rows: list[dict[str, Any]] | str, name: str = "chats.jsonl", **given: Any) -> Dataset:
    """A dataset of a file with these rows or this text, read by the real reader."""
    text = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
    file = files.add_bytes(session, user, text.encode("utf-8", "surrogatepass"), name, "fine-tune")
    session.flush()
    return read(session, datasets.create(session, user, file, **given))


def read(session: Session, dataset: Dataset) -> Dataset:
    """A dataset that waits to be read, once it has been."""
    session.commit()
    with in_this_process():
        ingest_task.read(dataset.id)
    session.expire_all()
    assert dataset.status == "ready", dataset.error
    return dataset


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """What a child of the sandbox would do is done here, without the second or two that a new process takes to import it. The child and
    its limits are what tests/kit/test_sandbox.py, tests/datasets/test_service.py and test_malformed.py look at."""

    def run(function: str, payload: dict[str, Any], *_: Any, on_message: Any = lambda message: None, **__: Any) -> Any:
        module, _, name = function.partition(":")
        act = getattr(importlib.import_module(module), name)
        try:  # as JSON, because nothing else passes between the two
            return json.loads(json.dumps(act(json.loads(json.dumps(payload)), lambda said: on_message(json.loads(json.dumps(said))))))
        except StudioError as error:
            told = {"message": error.message, "hint": error.hint, "code": error.code, "details": getattr(error, "details", {})}
            raise sandbox.Refused(told) from None

    child, sandbox.run = sandbox.run, run
    try:
        yield
    finally:
        sandbox.run = child


def make_dataset(session: Session, user: User, data_dir: Path, rows: int = 40, status: str = "ready", system: str = "") -> Dataset:
    """A chat dataset with its Parquet file on disk, as the reader leaves it behind."""
    key = uuid.uuid4()
    data = chat_rows(rows, system)
    path = data_dir / "rows" / str(key) / "rows.parquet"
    path.parent.mkdir(parents=True)
    sha256 = write_rows(path, data)
    file = File(
        owner_id=user.id,
        project_id=user.project_id,
        sha256="0" * 64,
        bytes=path.stat().st_size,
        filename="chat.jsonl",
        purpose="fine-tune",
        status="processed",
    )
    session.add(file)
    session.flush()
    dataset = Dataset(
        id=key,
        owner_id=user.id,
        project_id=user.project_id,
        file_id=file.id,
        name="chat",
        format="chat",
        task="generation",
        status=status,
        rows=rows,
        good_rows=rows,
        rows_path=path.relative_to(data_dir).as_posix(),
        rows_sha256=sha256,
        report={},
    )
    session.add(dataset)
    session.commit()
    return dataset


def make_spec(model: Model, dataset: Dataset, strategy: dict[str, Any] | None = None, **run: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "a job",
            "task": "generation",
            "model": {
                "id": model.id, "name": model.name, "kind": model.kind, "path": model.path, "revision": model.revision, "shape": model.shape,
            },
            "dataset": {
                "id": dataset.id, "name": dataset.name, "path": dataset.rows_path, "sha256": dataset.rows_sha256, "format": "chat", "rows": dataset.rows,
            },
            "run": run,
            "strategy": strategy or {"name": "lora", "rank": 4},
        }
    )  # fmt: skip


def make_job(session: Session, user: User, model: Model, dataset: Dataset, **run: Any) -> Job:
    """A queued job with its message, committed."""
    spec = make_spec(model, dataset, **run)
    job = Job(
        owner_id=user.id,
        project_id=user.project_id,
        name=spec.name,
        spec=spec.model_dump(mode="json"),
        model_id=model.id,
        dataset_id=dataset.id,
        order={"model": model.name, "dataset_id": str(dataset.id)},
    )
    session.add(job)
    session.flush()
    queue.enqueue(session, queue.TRAIN, job.id)
    session.commit()
    return job


def tune(
    session: Session, user: User, data_dir: Path, base: Model, dataset: Dataset, strategy: dict[str, Any] | None = None, **run: Any
) -> tuple[Job, Model]:
    """The finished job and its model, committed."""
    job = make_job(session, user, base, dataset, **(TUNING_RUN | run))
    spec = make_spec(base, dataset, strategy, **(TUNING_RUN | run)).model_dump(mode="json")
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
