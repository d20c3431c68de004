"""What the pages of jobs show, worked out once in plain words and figures, so that the templates only lay it out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import charts, comparisons, evaluations, ids, jobs, live, models, order_file, score_view, studio, verdict, workers
from app.forms import as_text
from app.order_form import OrderForm
from app.progress import Progress
from app.shapes import Shape
from app.spec import JobSpec
from app.strategies import STRATEGIES
from app.tables import Job, Model, User
from app.web import NARROW, NOTHING, human_number, human_percent, human_seconds, plural


def url(job: Job) -> str:
    return f"/jobs/{ids.public(ids.JOB, job.id)}"


def model_url(model_id: Any) -> str:
    return f"/models/{ids.public(ids.MODEL, model_id)}"


def dataset_url(dataset_id: Any) -> str:
    return f"/datasets/{ids.public(ids.DATASET, dataset_id)}"


def playground_url(*names: str) -> str:
    return f"/playground?{urlencode([('models', name) for name in names])}"


def _try_url(base: str, tuned: Model) -> str:
    """Where a result is tried: beside its base, or, for a classifier, where texts are sorted."""
    return f"/playground/classify?{urlencode({'models': tuned.name})}" if tuned.kind == "classifier" else playground_url(base, tuned.name)


def count(value: int) -> str:
    """A number of parameters in three figures: `2.44 M`, `134 M`, `1.24 B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{NARROW}{unit}"
    return str(value)


# The list -------------------------------------------------------------------------------------------------------------


def rows(found: list[Job], best: Mapping[Any, float]) -> list[dict[str, Any]]:
    return [
        {
            "job": job,
            "url": url(job),
            "model": job.spec["model"]["name"],
            "dataset": job.spec["dataset"]["name"],
            "strategy": _title(job.spec["strategy"]["name"]),
            "loss": best.get(job.id),
            "verdict": verdict.of_job(job),
            "forgetting": forgetting(job.forgetting)["figure"],
            "memory": (job.measured or {}).get("peak_memory_bytes"),
            "predicted_memory": (job.estimate or {}).get("memory_bytes"),
            "seconds": (job.measured or {}).get("seconds"),
            "predicted_seconds": (job.estimate or {}).get("seconds"),
        }
        for job in found
    ]


def summary(found: list[Job]) -> str:
    """`1 running, 2 waiting, 14 finished`: what is going on, in one line."""
    words = {
        "running": "running",
        "queued": "waiting",
        "paused": "paused",
        "succeeded": "finished",
        "failed": "failed",
        "cancelled": "stopped",
    }
    counts = {status: sum(job.status == status for job in found) for status in words}
    return ", ".join(f"{human_number(n)} {words[status]}" for status, n in counts.items() if n)


def _title(strategy: str) -> str:
    return STRATEGIES[strategy].title if strategy in STRATEGIES else strategy


# The order form -------------------------------------------------------------------------------------------------------


def facts_of(form: OrderForm) -> dict[str, Any]:
    """Figures about the chosen model and data that stand beside the form."""
    shape = Shape.model_validate(form.model.shape) if form.model and form.model.shape else None
    dataset = form.dataset
    tokens = None
    if dataset is not None and dataset.status == "ready":
        from app import datasets

        tokens = datasets.stats(dataset).tokens
    trained = form.estimate["trainable_parameters"] if form.estimate else 0
    return {
        "model_parameters": count(shape.parameters()) if shape else "",
        "bad_rows": (dataset.rows or 0) - (dataset.good_rows or 0) if dataset else 0,
        "tokens": tokens,
        "rows_per_step": plural(form.rows_per_step, "row") if form.rows_per_step else "",
        "trainable": count(trained) if trained else "",
        "trainable_share": trained / shape.parameters() if trained and shape else None,
    }


# One job --------------------------------------------------------------------------------------------------------------


def page(session: Session, user: User, job: Job, *, points: bool = True) -> dict[str, Any]:
    """Everything `job.html` and its live part show; the live part does without the charts' points, which it is told by the stream."""
    progress = live.progress_of(session, job)
    spec = JobSpec.model_validate(job.spec)
    shape, strategy = spec.model.shape, spec.strategy
    learnt = progress.started.trainable_parameters if progress.started else strategy.trainable(shape)
    total = progress.started.parameters if progress.started else shape.parameters()
    found = charts.charts(progress)
    tuned = jobs.tuned_model(session, job)
    comparison = comparisons.of_job(session, job)
    return {
        "job": job,
        "public_id": ids.public(ids.JOB, job.id),
        "url": url(job),
        "spec": spec,
        "strategy": strategy,
        "model_url": model_url(job.model_id),
        "dataset_url": dataset_url(spec.dataset.id),
        "rows": spec.dataset.rows,
        "progress": progress,
        "status_line": status_line(progress, job, spec),
        "time_line": time_line(progress, job),
        "ends_at": datetime.now(UTC) + timedelta(seconds=progress.seconds_left or 0),
        "actions": actions(job, saved=bool(progress.checkpoints)),
        "waiting": _waiting(session, job) if job.status == "queued" else "",
        "no_room": studio.MAKE_ROOM if job.status in ("queued", "running") and studio.no_room() else "",
        "failure": failure(job, progress),
        "verdict": verdict.of_job(job),
        "removable": type(strategy).adapter,
        "suggestions": suggestions(session, job),
        "tuned": tuned,
        "comparison": comparison,
        "comparison_url": f"/compare/{ids.public(ids.COMPARISON, comparison.id)}" if comparison else "",
        "compare_url": _try_url(spec.model.name, tuned) if tuned else "",
        "download_url": f"{model_url(tuned.id)}/download" if tuned else "",
        "forgetting": _forgetting_of(job, progress, spec),
        "trainable": {"share": learnt / total if total else 0.0, "learnt": count(learnt), "all": count(total)},
        "settings": [(name, as_text(value)) for name, value in strategy.model_dump(exclude={"name"}).items() if value is not None][:4],
        "checkpoints": _checkpoints(session, job, progress),
        "sample_history": sample_history(progress),
        "scores": score_view.view(job.evaluation or (progress.finished.evaluation if progress.finished else None), spec.task),
        "forgot": score_view.forgot(job.forgetting or (progress.finished.forgetting if progress.finished else None)),
        "predictions": predictions(session, job, progress.started.trainable_parameters if progress.started else None),
        "count": count,
        "signed": score_view.signed,
        "charts": found,
        "blends": evaluations.blend_panel(session, user, tuned, url(job)),
        "points": charts.data(found, progress) if points else None,
        "yaml": order_file.of_job(job),
    }


def status_line(progress: Progress, job: Job, spec: JobSpec) -> Markup:
    """`Step 74 of 120, epoch 2 of 3, attempt 2 (resumed at step 40 after the worker was lost)`."""
    doing = f"{progress.doing.what}, {human_percent(progress.doing.share, 0)}" if progress.doing and job.status == "running" else ""
    if not progress.total_steps:
        words = {"queued": "Waiting to start", "running": f"{_starting(progress)}: {doing or 'loading the model and the data'}"}
        return Markup("{}").format(words.get(job.status, "No step was made"))
    if job.status == "running" and progress.starting and not progress.step:
        return Markup("{}: {}").format(
            _starting(progress), doing or f"the first of {human_number(progress.total_steps)} steps is being made"
        )
    parts = [Markup("<b>Step {} of {}</b>").format(human_number(progress.step), human_number(progress.total_steps))]
    if progress.latest and not spec.run.max_steps:
        epochs = max(1, -int(-spec.run.epochs // 1))
        parts.append(Markup("epoch {} of {}").format(min(epochs, int(progress.epoch) + 1), human_number(epochs)))
    if progress.attempt > 1:
        note = f" ({progress.resumed})" if progress.resumed else ""
        parts.append(Markup("attempt {}{}").format(progress.attempt, note))
    if progress.finished and progress.finished.reason == "early_stopped":
        parts.append(Markup("stopped early, since validation loss no longer fell"))
    if job.status == "running" and progress.loading:
        parts.append(Markup("{}: loading the model and the data").format(_starting(progress).lower()))
    if doing:
        parts.append(Markup("{}").format(doing[0].lower() + doing[1:]))
    return Markup(", ").join(parts)


STARTING_SECONDS = 60
"""So long a start is nothing out of the way; after it the page says how long it has taken."""


def _starting(progress: Progress) -> str:
    seconds = (datetime.now(UTC) - progress.claimed_at).total_seconds() if progress.claimed_at else 0.0
    return "Starting" if seconds < STARTING_SECONDS else f"Still starting, after {human_seconds(seconds)}"


def time_line(progress: Progress, job: Job) -> str:
    """What stands of the time where it is not yet, or no longer, counted down."""
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
    """The buttons that make sense now; one whose wish is on its way says so and waits."""
    stop = {"name": "stop", "label": "Stopping…" if job.cancel_requested else "Stop", "pending": job.cancel_requested}
    pause = {
        "name": "pause",
        "label": "Pausing…" if job.pause_requested else "Pause",
        "pending": job.pause_requested or job.cancel_requested,
    }
    save = {"name": "save", "label": "Saving…" if job.save_requested else "Save now", "pending": job.save_requested}
    if job.status == "running":
        return [pause, save, stop]
    if job.status == "queued":
        return [{**pause, "label": "Pause", "pending": False}, {**stop, "label": "Stop", "pending": False}]
    if job.status == "paused":
        return [{"name": "resume", "label": "Resume", "pending": False}, {**stop, "label": "Stop", "pending": False}]
    return (
        [{"name": "resume", "label": "Go on from the last checkpoint" if saved else "Start again", "pending": False}]
        if job.status == "failed"
        else []
    )


def _waiting(session: Session, job: Job) -> str | Markup:
    """Why a queued job does not run yet, and what helps."""
    if jobs.reading(session, job):
        return "The dataset is still being read. The job starts when that is done."
    if not any(worker.queue == "train" for worker in workers.alive()):
        return Markup("No train worker is there. <code>luthier up</code> starts one on this machine; the job then begins by itself.")
    ahead = session.scalar(select(func.count()).select_from(Job).where(Job.status == "running", Job.deleted_at.is_(None)))
    return "A worker takes it as soon as it has finished another job." if ahead else "A worker takes it in a moment."


def failure(job: Job, progress: Progress) -> dict[str, Any] | None:
    """What went wrong and the way out: from the trainer's last word, else from the job's row."""
    if job.status == "paused" and job.error:  # a full disk pauses a job, which is nobody's wish
        return {"message": job.error["message"], "way_out": job.error.get("way_out", ""), "line": None}
    if job.status != "failed":
        return None
    if progress.failure:
        return {"message": progress.failure.message, "way_out": progress.failure.way_out, "line": progress.failure.line}
    error = job.error or {}
    return {"message": error.get("message", "The job failed and left no reason."), "way_out": error.get("way_out", ""), "line": None}


def suggestions(session: Session, job: Job) -> list[verdict.Suggestion]:
    """What to try next, a click each: what the verdict says, else what the failure does."""
    if (found := verdict.of_job(job)) is not None:
        return found.suggestions
    failed = live.progress_of(session, job).failure if job.status == "failed" else None
    if failed is None or not failed.suggestion:
        return []
    settings = ", ".join(f"{name.replace('_', ' ')} {as_text(value)}" for name, value in failed.suggestion.items())
    return [verdict.Suggestion(label=f"Try again with {settings}", order={"run": failed.suggestion})]


def forgetting(measured: Mapping[str, Any] | None) -> dict[str, str]:
    """The change of general ability, with its verdict; a dash where it was not measured."""
    if not measured:
        return {"figure": NOTHING, "verdict": "not measured"}
    before, after = measured.get("before"), measured.get("after")
    change = measured.get("change")
    if change is None and before and after is not None:
        change = after / before - 1
    said = str(measured.get("verdict", ""))
    return {"figure": NOTHING if change is None else score_view.ability(change), "verdict": score_view.ABILITY.get(said, said)}


def _forgetting_of(job: Job, progress: Progress, spec: JobSpec) -> dict[str, str]:
    found = forgetting(job.forgetting or (progress.finished.forgetting if progress.finished else None))
    coming = spec.run.forgetting and job.status in ("queued", "running", "paused") and found["figure"] == NOTHING
    return {**found, "verdict": "measured at the end"} if coming else found


def _checkpoints(session: Session, job: Job, progress: Progress) -> list[dict[str, Any]]:
    """The checkpoints on disk, newest first, each with its validation loss and the way to try it."""
    losses = dict(progress.curves["validation"])
    found = []
    for row in jobs.checkpoints(session, job):
        loss = losses.get(row.step, row.metrics.get("validation_loss", row.metrics.get("loss")))
        name = models.checkpoint_name(session, job, row.step)
        found.append({"step": row.step, "best": row.best, "loss": loss, "url": playground_url(job.spec["model"]["name"], name)})
    return found


def sample_history(progress: Progress) -> list[tuple[str, list[tuple[int, str]]]]:
    """For each prompt its answers from the first evaluation to the last."""
    history: dict[str, list[tuple[int, str]]] = {}
    for sampled in progress.samples:
        for sample in sampled.samples:
            history.setdefault(sample.prompt, []).append((sampled.step, sample.answer))
    return list(history.items())


# Predicted and measured -----------------------------------------------------------------------------------------------

JUDGED = 10
"""How many of the newest jobs say how well this machine predicts."""


def predictions(session: Session, job: Job, counted: int | None) -> dict[str, Any] | None:
    """Each figure as it was predicted and measured, and how far predictions of the newest jobs here were off; None before the end."""
    estimate, measured = job.estimate or {}, job.measured or {}
    if not estimate or not measured:
        return None
    rows = [
        ("Memory", "bytes", estimate.get("memory_bytes"), measured.get("peak_memory_bytes")),
        ("Time", "seconds", estimate.get("seconds"), measured.get("seconds")),
        ("Learns", "count", estimate.get("trainable_parameters"), counted),
    ]
    lines = [
        {"title": title, "unit": unit, "predicted": predicted, "measured": found, "off": off(predicted, found)}
        for title, unit, predicted, found in rows
        if predicted is not None and found is not None
    ]
    return {"lines": lines, "sentence": _record(session, job)} if lines else None


def off(predicted: float | None, measured: float | None) -> float | None:
    """How far a prediction lies from what was measured, relative to it: +0.1 predicted a tenth too much."""
    return predicted / measured - 1 if predicted and measured else None


def _record(session: Session, job: Job) -> str:
    """`The last 8 jobs here predicted memory within 6 %, time within 22 %.` Jobs of the same person on the same device."""
    query = jobs.mine_of(job).where(Job.status == "succeeded", Job.measured["device"].astext == str((job.measured or {}).get("device")))
    found = session.scalars(query.order_by(Job.finished_at.desc()).limit(JUDGED)).all()
    memory = [off((j.estimate or {}).get("memory_bytes"), (j.measured or {}).get("peak_memory_bytes")) for j in found]
    time = [off((j.estimate or {}).get("seconds"), (j.measured or {}).get("seconds")) for j in found]
    both = [(abs(m), abs(t)) for m, t in zip(memory, time, strict=True) if m is not None and t is not None]
    if len(both) < 2:
        return ""
    worst = [max(figures) for figures in zip(*both, strict=True)]
    return f"The last {len(both)} jobs here predicted memory within {worst[0]:.0%}, time within {worst[1]:.0%}."
