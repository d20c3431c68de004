"""Datasets and jobs as rows, for tests of what happens to a job after it was ordered."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app import queue
from app.datasets.row_store import write_rows
from app.spec import JobSpec
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


def chat_rows(count: int, system: str = "") -> list[dict[str, Any]]:
    pairs = [TURNS[i % len(TURNS)] for i in range(count)]
    lead = [{"role": "system", "content": system}] if system else []
    return [
        {"messages": [*lead, {"role": "user", "content": f"{i}. {q}"}, {"role": "assistant", "content": a}]}
        for i, (q, a) in enumerate(pairs)
    ]


def make_dataset(session: Session, user: User, data_dir: Path, rows: int = 40, status: str = "ready", system: str = "") -> Dataset:
    """A chat dataset with its Parquet file on disk, as the reader leaves it behind."""
    key = uuid.uuid4()
    data = chat_rows(rows, system)
    path = data_dir / "rows" / str(key) / "rows.parquet"
    path.parent.mkdir(parents=True)
    sha256 = write_rows(path, data)
    file = File(
        owner_id=user.id, sha256="0" * 64, bytes=path.stat().st_size, filename="chat.jsonl", purpose="fine-tune", status="processed"
    )
    session.add(file)
    session.flush()
    dataset = Dataset(
        id=key,
        owner_id=user.id,
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
