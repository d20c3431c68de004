"""A job, its events and its checkpoints as the API sends them: OpenAI's fields, then our own."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import events, leases
from app.errors import problem_json
from app.evaluation import train_queue, verdict
from app.jobs import config_file, lifecycle, usage
from app.jobs import service as jobs
from app.jobs.defaults import rows_per_step
from app.jobs.request import Hyperparameters, JobRequest, ReinforcementHyperparameters
from app.kit import ids
from app.models import service as models
from app.objectives import OBJECTIVES, DrawnSettings
from app.spec import JobSpec, usual_learning_rate
from app.tables import Checkpoint, CheckpointPermission, Dataset, Event, Job
from app.web import auth

Json = dict[str, Any]


def of(session: Session, job: Job) -> Json:
    """A `fine_tuning.job`, with our `strategy`, `estimate`, `measured`, `forgetting`, `progress` and further fields."""
    order = JobRequest.model_validate(job.order)
    tuned, cost = jobs.tuned_model(session, job), usage.cost_of(session, job.id) if job.attempt else None
    return {
        "object": "fine_tuning.job",
        "id": ids.public(ids.JOB, job.id),
        "created_at": _seconds(job.created_at),
        "finished_at": _seconds(job.finished_at),
        "estimated_finish": _estimated_finish(session, job),
        "model": order.model,
        "fine_tuned_model": tuned.name if tuned is not None else None,
        "organization_id": auth.ORGANIZATION,
        "status": "validating_files" if jobs.reading(session, job) else job.status,
        "training_file": order.training_file or _file_of(session, job.dataset_id),
        "validation_file": order.validation_file,
        "result_files": [ids.public(ids.FILE, job.result_file_id)] if job.result_file_id else [],
        "trained_tokens": job.trained_tokens,
        "seed": job.spec["run"]["seed"],
        "hyperparameters": _hyperparameters(session, job, order.asked()),
        "method": _method(session, job, order),
        "integrations": order.integrations or [],
        "metadata": job.user_metadata,
        "error": problem_json({"param": None, **job.error}) if job.error else None,
        "user_provided_suffix": order.suffix,
        # Ours.
        "name": job.name,
        "tags": job.tags,
        "priority": job.priority,
        "resources": {
            "gpus": job.num_gpus,
            "machines": job.num_machines,
            "gpu": job.gpu_type,
            "gpu_memory_bytes": lifecycle.needs_of(job).gpu_bytes,
            "memory_bytes": lifecycle.needs_of(job).cpu_bytes,
            "labels": job.labels,
        },
        **train_queue.place_json(session, job),
        "task": job.spec["task"],
        "strategy": job.spec["strategy"],
        "run": job.spec["run"],
        "preference": job.spec.get("preference"),
        "dataset": ids.public(ids.DATASET, job.dataset_id),
        "cost": cost.as_json() if cost else None,
        "estimate": job.estimate,
        "measured": job.measured,
        "evaluation": job.evaluation,
        "forgetting": job.forgetting,
        "verdict": _verdict(session, job, order),
        "progress": _progress(job),
    }


def _verdict(session: Session, job: Job, order: JobRequest) -> Json | None:
    """The verdict on a job that has ended. `order` of a suggestion is a whole body for POST /v1/fine_tuning/jobs."""
    found = verdict.of_job(job)
    if found is None:
        return None
    body = config_file.body_of(session, session.get_one(Dataset, job.dataset_id), order)
    orders = [{**body, "run": {**body.get("run", {}), **s.order["run"]}} for s in found.suggestions]
    told = [{"label": s.label, "order": one} for s, one in zip(found.suggestions, orders, strict=True)]
    return {**found.model_dump(mode="json"), "suggestions": told}


def _progress(job: Job) -> Json:
    asked = "cancelling" if job.cancel_requested else "pausing" if job.pause_requested else None
    return {
        "step": job.step,
        "total_steps": job.total_steps,
        "fraction": min(job.step / job.total_steps, 1.0) if job.total_steps else 0.0,
        "seconds_left": job.seconds_left,
        "attempt": job.attempt,
        "asked": asked,
    }


def _hyperparameters(session: Session, job: Job, asked: Hyperparameters) -> Json:
    """OpenAI's hyperparameters as requested. Once the job has begun, "auto" is replaced by the actual value."""
    settings = asked.model_dump(include={"n_epochs", "batch_size", "learning_rate_multiplier"})
    if not job.attempt:
        return settings
    spec = JobSpec.model_validate(job.spec)
    own = spec.preference
    rate = usual_learning_rate(spec.strategy, spec.task, spec.run.optimizer)
    dataset = session.get_one(Dataset, job.dataset_id)
    came_to = {
        "n_epochs": max(1, round(spec.run.epochs)),
        "batch_size": own.prompts_per_step if isinstance(own, DrawnSettings) else rows_per_step(dataset, spec.run),
        "learning_rate_multiplier": float(f"{(spec.run.learning_rate or rate) / rate:.6g}"),
    }
    return {name: came_to[name] if value == "auto" else value for name, value in settings.items()}


def _method(session: Session, job: Job, order: JobRequest) -> Json:
    """The requested method; by default the one of the dataset's task."""
    kind = order.method.type if order.method else OBJECTIVES[job.spec["task"]].method
    settings = _hyperparameters(session, job, order.asked())
    if kind == "reinforcement":
        settings = ReinforcementHyperparameters(**order.asked().model_dump()).model_dump(exclude={"beta"}) | settings
        return {"type": kind, kind: {"grader": job.spec["preference"]["grader"], "hyperparameters": settings}}
    if OBJECTIVES[job.spec["task"]].settings:
        beta = order.asked().beta
        settings["beta"] = (job.spec.get("preference") or {}).get("beta", beta) if beta == "auto" and job.attempt else beta
    return {"type": kind, kind: {"hyperparameters": settings}}


def event_json(row: Event, names: Names) -> Json:
    """A `fine_tuning.job.event`: the message, and the whole event as `data`."""
    event = events.from_row(row.type, row.data)
    level, message = _sentence(event, names)
    data = {**row.data, "event": row.type, "attempt": row.attempt}
    if isinstance(event, events.Failed):
        data = problem_json(data) or {}
    elif isinstance(event, events.Step):
        data |= {"train_loss": event.loss}
    elif isinstance(event, events.Evaluated):
        data |= {"valid_loss": event.loss}
    return {
        "object": "fine_tuning.job.event",
        "id": ids.public(ids.EVENT, row.key),
        "created_at": _seconds(row.created_at),
        "level": level,
        "type": "metrics" if isinstance(event, events.Step | events.Evaluated) else "message",
        "message": message,
        "data": data,
    }


def _sentence(event: events.JobEvent, names: Names) -> tuple[str, str]:
    """The level and message of an event."""
    match event:
        case events.Queued(reason="submitted"):
            return "info", f"Created fine-tuning job: {names.job}"
        case events.Queued(reason="resumed"):
            return "info", "The job was resumed and waits for a worker."
        case events.Queued():
            return "warn", "The job goes back to the queue and will go on from its newest checkpoint."
        case events.Claimed():
            return "info", f"Attempt {event.attempt} begins on {event.worker}."
        case events.Started():
            where = f" from step {event.resumed_from}" if event.resumed_from else ""
            return "info", f"Training started{where}: {event.total_steps} steps over {event.train_rows} rows on {event.device}."
        case events.Step():
            return "info", f"Step {event.step}/{names.total_steps or '?'}: training loss={event.loss:.4g}"
        case events.Evaluated():
            return "info", f"Step {event.step}/{names.total_steps or '?'}: validation loss={event.loss:.4g}"
        case events.Sampled():
            return "info", f"Wrote {len(event.samples)} sample answers at step {event.step}."
        case events.Saved():
            return "info", f"Checkpoint created at step {event.step}."
        case events.Finished():
            return "info", f"New fine-tuned model created: {names.model}. Fine tuning job successfully completed."
        case events.Failed():
            return "error", f"{event.message} {event.hint}".strip()
        case events.Lost():
            return "warn", f"Attempt {event.attempt} was lost: {event.message}"
        case events.Stopped():
            return "info", f"The job was {event.status}{f': {event.reason}' if event.reason and event.reason != 'asked for' else ''}."
        case events.TaskProgress():
            return "info", f"{event.what}: {event.share:.0%}."
        case events.Log():
            return event.level, event.message


class Names:
    """Display names in the messages of one job."""

    def __init__(self, session: Session, job: Job) -> None:
        self.job = ids.public(ids.JOB, job.id)
        self.total_steps = job.total_steps
        tuned = jobs.tuned_model(session, job)
        self.model = tuned.name if tuned is not None else ""


def checkpoint_json(session: Session, job: Job, row: Checkpoint, losses: dict[int, float]) -> Json:
    """A `fine_tuning.job.checkpoint`. `metrics` has the names of OpenAI's client; null where a metric was not measured. All
    validation rows are always scored, so `valid_…` and `full_valid_…` are equal. All metrics are under `scores`."""
    loss, accuracy = row.metrics.get("loss"), row.metrics.get("token_accuracy")
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": ids.public(ids.CHECKPOINT, row.id),
        "created_at": _seconds(row.created_at),
        "fine_tuned_model_checkpoint": models.checkpoint_name(session, job, row.step),
        "fine_tuning_job_id": ids.public(ids.JOB, job.id),
        "step_number": row.step,
        "metrics": {
            "step": row.step,
            "train_loss": losses.get(row.step),
            "train_mean_token_accuracy": None,
            "valid_loss": loss,
            "valid_mean_token_accuracy": accuracy,
            "full_valid_loss": loss,
            "full_valid_mean_token_accuracy": accuracy,
        },
        # Ours.
        "scores": row.metrics,
        "best": row.best,
        "bytes": row.bytes,
    }


def permission_json(row: CheckpointPermission) -> Json:
    return {
        "object": "checkpoint.permission",
        "id": f"cp_{row.id.hex}",
        "created_at": _seconds(row.created_at),
        "project_id": row.project_id,
    }


def step_losses(session: Session, job: Job) -> dict[int, float]:
    """The training loss at each checkpoint's step, as reported last."""
    steps = [row.step for row in jobs.checkpoints(session, job)]
    if not steps:
        return {}
    step = Event.data["step"].as_integer()
    rows = session.execute(
        select(step, Event.data["loss"].as_float()).where(Event.job_id == job.id, Event.type == "step", step.in_(steps)).order_by(Event.id)
    )
    return {row[0]: row[1] for row in rows}


def _seconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())


def _estimated_finish(session: Session, job: Job) -> int | None:
    if job.status != "running" or job.seconds_left is None:
        return None
    return int(session.scalars(select(leases.now())).one().timestamp() + job.seconds_left)


def _file_of(session: Session, dataset_id: uuid.UUID) -> str:
    file_id = session.scalar(select(Dataset.file_id).where(Dataset.id == dataset_id))
    return ids.public(ids.FILE, file_id) if file_id else ids.public(ids.DATASET, dataset_id)
