"""The data of job pages, computed once, so that the templates only lay it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from markupsafe import Markup, escape
from sqlalchemy.orm import Session

from app import formats, metrics
from app.evaluation import comparisons, train_queue, verdict
from app.jobs import progress_cache
from app.jobs import service as jobs
from app.jobs.progress import JobProgress
from app.kit import ids
from app.kit.humanize import NOTHING, human_count, human_number, human_percent, human_seconds
from app.languages import gettext, lowered, mark, ngettext
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
        return {"figure": NOTHING, "verdict": gettext("not measured")}
    before, after = measured.get("before"), measured.get("after")
    change = measured.get("change")
    if change is None and before and after is not None:
        change = after / before - 1
    said = str(measured.get("verdict", ""))
    return {"figure": NOTHING if change is None else metrics.ability(change), "verdict": gettext(metrics.ABILITY.get(said, said))}


def summary(found: list[Job]) -> str:
    """`1 running, 2 queued, 14 succeeded`: all jobs in one line."""
    counts = Counter(job.status for job in found)
    told = {
        "running": ngettext("%(num)s running", "%(num)s running", counts["running"]),
        "queued": ngettext("%(num)s queued", "%(num)s queued", counts["queued"]),
        "paused": ngettext("%(num)s paused", "%(num)s paused", counts["paused"]),
        "succeeded": ngettext("%(num)s succeeded", "%(num)s succeeded", counts["succeeded"]),
        "failed": ngettext("%(num)s failed", "%(num)s failed", counts["failed"]),
        "cancelled": ngettext("%(num)s cancelled", "%(num)s cancelled", counts["cancelled"]),
    }
    return ", ".join(words for status, words in told.items() if counts[status])


def _title(strategy: str) -> str:
    return gettext(STRATEGIES[strategy].title) if strategy in STRATEGIES else strategy


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
        "dataset_format": gettext(formats.get(dataset.format).title) if dataset is not None and dataset.format else "",
        "tokens": tokens,
        "rows_per_step": ngettext("%(num)s row", "%(num)s rows", form.rows_per_step) if form.rows_per_step else "",
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
        "no_room": gettext(overview.MAKE_ROOM) if job.status in ("queued", "running") and overview.no_room() else "",
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
    task = progress.task if job.status == "running" else None
    doing = f"{gettext(task.what)}, {human_percent(task.share, 0)}" if task else ""
    loading, total = gettext("loading the model and the data"), human_number(progress.total_steps)
    if not progress.total_steps:
        words = {"queued": gettext("Queued"), "running": f"{_starting(progress)}: {doing or loading}"}
        return escape(words.get(job.status, gettext("No training step")))
    if job.status == "running" and progress.starting and not progress.step:
        first = gettext("the first of %(steps)s steps is being made", steps=total)
        return escape(f"{_starting(progress)}: {doing or first}")
    parts = [Markup("<b>{}</b>").format(gettext("Step %(step)s of %(steps)s", step=human_number(progress.step), steps=total))]
    if progress.latest and not spec.run.max_steps and type(spec.strategy).recipe != "features":
        epochs = max(1, -int(-spec.run.epochs // 1))
        now = min(epochs, int(progress.epoch) + 1)
        parts.append(escape(gettext("epoch %(epoch)s of %(epochs)s", epoch=now, epochs=human_number(epochs))))
    if progress.attempt > 1:
        attempt = gettext("attempt %(number)s", number=progress.attempt)
        parts.append(escape(f"{attempt} ({progress.resumed})" if progress.resumed else attempt))
    if progress.finished and progress.finished.reason == "early_stopped":
        early = gettext("stopped early, since validation loss no longer fell")
        parts.append(escape(gettext("stopped by itself") if progress.finished.why else early))
    if job.status == "running" and progress.loading:
        parts.append(escape(f"{lowered(_starting(progress))}: {loading}"))
    if doing:
        parts.append(escape(lowered(doing[0]) + doing[1:]))
    return Markup(", ").join(parts)


TASKS = (
    mark("Checking whether the reward can teach"),
    mark("Comparing base and result"),
    mark("Drawing and grading answers"),
    mark("Loading the teacher"),
    mark("Reading the rows with the base model"),
    mark("Scoring the validation rows"),
    mark("Turning texts into vectors"),
    mark("Writing the base's answers to general prompts"),
)
"""What a trainer says that it does besides steps. They are marked here, since catalogs are made of `app/` without `worker/`."""
STARTING_SECONDS = 60
"""A normal start takes up to this long; after it the page shows how long it has taken."""


def _starting(progress: JobProgress) -> str:
    seconds = (datetime.now(UTC) - progress.claimed_at).total_seconds() if progress.claimed_at else 0.0
    if seconds < STARTING_SECONDS:
        return gettext("Starting up")
    return gettext("Still starting, after %(time)s", time=human_seconds(seconds))


def time_line(progress: JobProgress, job: Job) -> str:
    """Text in place of the remaining time while there is none."""
    predicted = (job.estimate or {}).get("seconds")
    if job.status == "paused":
        left = progress.seconds_to_train
        return gettext("about %(time)s of training left", time=human_seconds(left)) if left is not None else ""
    if job.status not in ("queued", "running"):
        return ""
    if progress.step and progress.step == progress.total_steps:
        return gettext("finishing")
    if progress.step:
        return gettext("estimating the time left")
    return gettext("predicted to take %(time)s", time=human_seconds(predicted)) if predicted else ""


def actions(job: Job, *, saved: bool) -> list[dict[str, Any]]:
    """The available buttons; one whose request is pending says so and is disabled."""
    stop = {"name": "stop", "label": gettext("Stop"), "pending": False}
    pause = {"name": "pause", "label": gettext("Pause"), "pending": False}
    resume = {"name": "resume", "label": gettext("Resume"), "pending": False}
    if job.status == "running":
        save = {
            "name": "save",
            "label": gettext("Saving…") if job.save_requested else gettext("Save checkpoint"),
            "pending": job.save_requested,
        }
        if job.pause_requested:
            pause["label"] = gettext("Pausing…")
        if job.cancel_requested:
            stop["label"] = gettext("Stopping…")
        return [{**pause, "pending": job.pause_requested or job.cancel_requested}, save, {**stop, "pending": job.cancel_requested}]
    if job.status == "queued":
        return [pause, stop]
    if job.status == "paused":
        return [resume, stop]
    if job.status == "failed" or (job.status == "cancelled" and saved):
        return [resume if saved else {**resume, "label": gettext("Start again")}]
    return []


def _waiting(session: Session, job: Job) -> str | Markup:
    """Why a queued job does not run yet, and what helps."""
    if jobs.reading(session, job):
        return gettext("The dataset is still being read. The run starts when that is done.")
    return waiting.in_words(session, job)
