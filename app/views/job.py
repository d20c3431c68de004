"""The data of job pages, computed once, so that the templates only lay it out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from markupsafe import Markup
from sqlalchemy.orm import Session

from app import formats, metrics
from app.evaluation import comparisons, train_queue, verdict
from app.jobs import progress_cache
from app.jobs import service as jobs
from app.jobs.progress import JobProgress
from app.kit import ids
from app.kit.humanize import NOTHING, human_count, human_number, human_percent, human_seconds, plural
from app.shapes import Shape
from app.spec import JobSpec
from app.strategies import STRATEGIES
from app.tables import Job
from app.views import comparison as comparison_view
from app.views import overview, waiting
from app.views.job_form import OrderForm


def url(job: Job) -> str:
    return f"/jobs/{ids.public(ids.JOB, job.id)}"


def model_url(model_id: Any) -> str:
    return f"/models/{ids.public(ids.MODEL, model_id)}"


def dataset_url(dataset_id: Any) -> str:
    return f"/datasets/{ids.public(ids.DATASET, dataset_id)}"


# The list -------------------------------------------------------------------------------------------------------------


def rows(session: Session, found: list[Job], best: Mapping[Any, float]) -> list[dict[str, Any]]:
    places = train_queue.places(session) if any(job.status == "queued" for job in found) else {}
    return [
        {
            "job": job,
            "url": url(job),
            "key": ids.public(ids.JOB, job.id),
            "model": job.spec["model"]["name"],
            "dataset": job.spec["dataset"]["name"],
            "strategy": _title(job.spec["strategy"]["name"]),
            "loss": best.get(job.id),
            "place": places.get(job.id),
            "verdict": verdict.of_job(job),
            "forgetting": forgetting(job.forgetting)["figure"],
            "memory": (job.measured or {}).get("peak_memory_bytes"),
            "predicted_memory": (job.estimate or {}).get("memory_bytes"),
            "seconds": (job.measured or {}).get("seconds"),
            "predicted_seconds": (job.estimate or {}).get("seconds"),
        }
        for job in found
    ]


def forgetting(measured: Mapping[str, Any] | None) -> dict[str, str]:
    """The change of general ability, with its verdict; a dash where it was not measured."""
    if not measured:
        return {"figure": NOTHING, "verdict": "not measured"}
    before, after = measured.get("before"), measured.get("after")
    change = measured.get("change")
    if change is None and before and after is not None:
        change = after / before - 1
    said = str(measured.get("verdict", ""))
    return {"figure": NOTHING if change is None else metrics.ability(change), "verdict": metrics.ABILITY.get(said, said)}


def summary(found: list[Job]) -> str:
    """`1 running, 2 queued, 14 succeeded`: all jobs in one line."""
    states = ("running", "queued", "paused", "succeeded", "failed", "cancelled")
    counts = {status: sum(job.status == status for job in found) for status in states}
    return ", ".join(f"{human_number(n)} {status}" for status, n in counts.items() if n)


def _title(strategy: str) -> str:
    return STRATEGIES[strategy].title if strategy in STRATEGIES else strategy


# The order form -------------------------------------------------------------------------------------------------------


def facts_of(form: OrderForm) -> dict[str, Any]:
    """Numbers about the chosen model and data that are shown next to the form."""
    shape = Shape.model_validate(form.model.shape) if form.model and form.model.shape else None
    dataset = form.dataset
    tokens = None
    if dataset is not None and dataset.status == "ready":
        from app.datasets import service as datasets

        tokens = datasets.stats(dataset).tokens
    trained = form.estimate["trainable_parameters"] if form.estimate else 0
    return {
        "model_parameters": human_count(shape.parameters()) if shape else "",
        "bad_rows": (dataset.rows or 0) - (dataset.good_rows or 0) if dataset else 0,
        "dataset_format": formats.get(dataset.format).title if dataset is not None and dataset.format else "",
        "tokens": tokens,
        "rows_per_step": plural(form.rows_per_step, "row") if form.rows_per_step else "",
        "trainable": human_count(trained) if trained else "",
        "trainable_share": trained / shape.parameters() if trained and shape else None,
    }


# The head of one job's page ---------------------------------------------------------------------------------------------

OPEN = ("queued", "running", "paused")
MARKS = {"succeeded": "✓ ", "failed": "✗ ", "cancelled": "■ ", "paused": "❚❚ "}
"""Symbol before a job's name in the title of its page once it does not run."""
ICONS = {"running": "running", "queued": "running", "succeeded": "succeeded", "failed": "failed"}


def head(session: Session, job: Job) -> dict[str, Any]:
    """The header above every tab: name, status, progress, and the available actions."""
    progress = progress_cache.progress_of(session, job)
    spec = JobSpec.model_validate(job.spec)
    comparison = comparisons.of_job(session, job)
    return {
        "job": job,
        "public_id": ids.public(ids.JOB, job.id),
        "url": url(job),
        "spec": spec,
        "strategy": spec.strategy,
        "model_url": model_url(job.model_id),
        "dataset_url": dataset_url(spec.dataset.id),
        "rows": spec.dataset.rows,
        "progress": progress,
        "open": job.status in OPEN,
        "page_title": page_title(job, progress),
        "icon": f"luthier-{ICONS[job.status]}.svg" if job.status in ICONS else "luthier.svg",
        "status_line": status_line(progress, job, spec),
        "time_line": time_line(progress, job),
        "ends_at": datetime.now(UTC) + timedelta(seconds=progress.seconds_left or 0),
        "actions": actions(job, saved=bool(jobs.checkpoints(session, job))),
        "waiting": _waiting(session, job) if job.status == "queued" else "",
        "no_room": overview.MAKE_ROOM if job.status in ("queued", "running") and overview.no_room() else "",
        "verdict": verdict.of_job(job),
        "comparison": comparison,
        "comparison_url": comparison_view.url(comparison) if comparison else "",
    }


def page_title(job: Job, progress: JobProgress) -> str:
    """`42% · chats` while it runs, `✓ chats` at its end, so that a browser tab shows the progress."""
    if job.status == "running":
        return f"{human_percent(progress.share, 0)} · {job.name}"
    return f"{MARKS.get(job.status, '')}{job.name}"


def status_line(progress: JobProgress, job: Job, spec: JobSpec) -> Markup:
    """`Step 74 of 120, epoch 2 of 3, attempt 2 (resumed at step 40 after the worker was lost)`."""
    doing = f"{progress.task.what}, {human_percent(progress.task.share, 0)}" if progress.task and job.status == "running" else ""
    if not progress.total_steps:
        words = {"queued": "Queued", "running": f"{_starting(progress)}: {doing or 'loading the model and the data'}"}
        return Markup("{}").format(words.get(job.status, "No training step"))
    if job.status == "running" and progress.starting and not progress.step:
        return Markup("{}: {}").format(
            _starting(progress), doing or f"the first of {human_number(progress.total_steps)} steps is being made"
        )
    parts = [Markup("<b>Step {} of {}</b>").format(human_number(progress.step), human_number(progress.total_steps))]
    if progress.latest and not spec.run.max_steps and type(spec.strategy).recipe != "features":
        epochs = max(1, -int(-spec.run.epochs // 1))
        parts.append(Markup("epoch {} of {}").format(min(epochs, int(progress.epoch) + 1), human_number(epochs)))
    if progress.attempt > 1:
        note = f" ({progress.resumed})" if progress.resumed else ""
        parts.append(Markup("attempt {}{}").format(progress.attempt, note))
    if progress.finished and progress.finished.reason == "early_stopped":
        early = "stopped by itself" if progress.finished.why else "stopped early, since validation loss no longer fell"
        parts.append(Markup("{}").format(early))
    if job.status == "running" and progress.loading:
        parts.append(Markup("{}: loading the model and the data").format(_starting(progress).lower()))
    if doing:
        parts.append(Markup("{}").format(doing[0].lower() + doing[1:]))
    return Markup(", ").join(parts)


STARTING_SECONDS = 60
"""A normal start takes up to this long; after it the page shows how long it has taken."""


def _starting(progress: JobProgress) -> str:
    seconds = (datetime.now(UTC) - progress.claimed_at).total_seconds() if progress.claimed_at else 0.0
    return "Starting up" if seconds < STARTING_SECONDS else f"Still starting, after {human_seconds(seconds)}"


def time_line(progress: JobProgress, job: Job) -> str:
    """Text in place of the remaining time while there is none."""
    predicted = (job.estimate or {}).get("seconds")
    if job.status == "paused":
        left = progress.seconds_to_train
        return f"about {human_seconds(left)} of training left" if left is not None else ""
    if job.status not in ("queued", "running"):
        return ""
    if progress.step and progress.step == progress.total_steps:
        return "finishing"
    if progress.step:
        return "estimating the time left"
    return f"predicted to take {human_seconds(predicted)}" if predicted else ""


def actions(job: Job, *, saved: bool) -> list[dict[str, Any]]:
    """The available buttons; one whose request is pending says so and is disabled."""
    stop = {"name": "stop", "label": "Stopping…" if job.cancel_requested else "Stop", "pending": job.cancel_requested}
    pause = {
        "name": "pause",
        "label": "Pausing…" if job.pause_requested else "Pause",
        "pending": job.pause_requested or job.cancel_requested,
    }
    save = {"name": "save", "label": "Saving…" if job.save_requested else "Save checkpoint", "pending": job.save_requested}
    if job.status == "running":
        return [pause, save, stop]
    if job.status == "queued":
        return [{**pause, "label": "Pause", "pending": False}, {**stop, "label": "Stop", "pending": False}]
    if job.status == "paused":
        return [{"name": "resume", "label": "Resume", "pending": False}, {**stop, "label": "Stop", "pending": False}]
    if job.status == "failed" or (job.status == "cancelled" and saved):
        return [{"name": "resume", "label": "Resume" if saved else "Start again", "pending": False}]
    return []


def _waiting(session: Session, job: Job) -> str | Markup:
    """Why a queued job does not run yet, and what helps."""
    if jobs.reading(session, job):
        return "The dataset is still being read. The run starts when that is done."
    return waiting.in_words(session, job)
