"""The tabs of a job's page. `app/views/job.py` makes the header above all of them.

A tab has a URL of its own and queries only what it shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode

from sqlalchemy.orm import Session

from app import metrics
from app.evaluation import verdict
from app.inference import tryout
from app.jobs import artifacts as job_artifacts
from app.jobs import checkpoints, config_file, progress_cache, row_losses, usage
from app.jobs import service as jobs
from app.jobs.progress import JobProgress
from app.kit import ids
from app.kit.forms import as_text
from app.kit.humanize import NOTHING, human_bytes, human_count, human_number, human_percent, human_seconds
from app.languages import gettext, lowered, mark
from app.models import service as models
from app.objectives import OBJECTIVES
from app.older_settings import renamed
from app.spec import JobSpec
from app.tables import Job, Model, User
from app.trackers import TRACKERS
from app.tracking import service as tracking
from app.views import evaluation as evaluation_view
from app.views import scores as score_view
from app.views.evaluation import between, by_chance
from app.views.job import dataset_url, forgetting, head, model_url, url
from app.web import charts

Part = dict[str, Any]


class Wish(NamedTuple):
    """Further URL parameters of a tab: one prompt at one step, or some lines of the log."""

    prompt: int = 0
    step: int | None = None
    filter: str = ""
    level: str = ""


def page(session: Session, user: User, job: Job, tab: str, wish: Wish, *, points: bool = True) -> Part:
    """The data of the page with this tab; the live part leaves out the charts' points, which the stream sends."""
    top = head(session, job)
    made = TABS[tab][1](session, user, job, top, wish)
    found = made.get("charts")
    asked = {name: value for name, value in made.get("asked", {}).items() if value not in (None, "", 0)}
    return {
        **top,
        **made,
        "tab": tab,
        "tabs": [(key, gettext(title)) for key, (title, _) in TABS.items()],
        "here": f"{top['url']}?{urlencode({'tab': tab, **asked})}",
        "points": charts.data(found, top["progress"]) if points and found else None,
    }


# Overview -------------------------------------------------------------------------------------------------------------


def _overview(session: Session, user: User, job: Job, top: Part, wish: Wish) -> Part:
    progress, spec = top["progress"], top["spec"]
    tuned = jobs.tuned_model(session, job)
    estimated = (job.estimate or {}).get("trainable_parameters") or spec.strategy.trainable(spec.model.shape)
    trained = progress.started.trainable_parameters if progress.started else estimated
    total = spec.model.shape.parameters()  # the base's own, as everywhere: what a strategy adds to it is not counted
    return {
        "failure": failure(job, progress),
        "forgot": _forgot(job, progress),
        "removable": type(spec.strategy).adapter,
        "suggestions": suggestions(session, job),
        "tuned": tuned,
        "compare_url": tryout.address(spec.model.name, tuned.name, tuned.kind, tryout.has_examples(job)) if tuned else "",
        "download_url": f"{model_url(tuned.id)}/download" if tuned else "",
        "tiles": [*tiles(job, progress, spec), *_cost_tile(session, job)],
        "charts": charts.charts(progress)[:1],
        "trainable": {"share": trained / total if total else 0.0, "trained": human_count(trained), "all": human_count(total)},
        "settings": [
            (name, as_text(value))
            for name, value in spec.strategy.model_dump(exclude={"name", *spec.strategy.unused()}).items()
            if value is not None
        ][:4],
        "checkpoints": _checkpoints(session, job, progress),
    }


class Tile(NamedTuple):
    """One metric at the top: its current value, and what it is compared with. `good` colors the note; None leaves it gray."""

    title: str
    figure: str
    note: str = ""
    good: bool | None = None


def tiles(job: Job, progress: JobProgress, spec: JobSpec) -> list[Tile]:
    """The five most informative metrics: loss, score and general ability with their change, and the cost compared with the estimate."""
    estimate, measured = job.estimate or {}, job.measured or {}
    ability = forgetting(_told(job, progress, "forgetting"))
    coming = spec.run.forgetting and job.status in ("queued", "running", "paused") and ability["figure"] == NOTHING
    seconds = measured.get("seconds") or (progress.latest.seconds if progress.latest else None)
    time = gettext("Time") if measured else gettext("Training time")
    return [
        _reward_tile(progress) if OBJECTIVES[spec.task].rewards else _loss_tile(progress),
        _score_tile(job, progress),
        Tile(gettext("General ability"), ability["figure"], gettext("measured at the end") if coming else ability["verdict"]),
        Tile(gettext("Peak memory"), human_bytes(progress.peak_memory_bytes), _predicted(human_bytes(estimate.get("memory_bytes")))),
        Tile(time, human_seconds(seconds), _predicted(human_seconds(estimate.get("seconds")))),
    ]


def _cost_tile(session: Session, job: Job) -> list[Tile]:
    """What it cost, only where something of it is known."""
    found = usage.cost_of(session, job.id) if job.attempt else None
    if found is None:
        return []
    hours = gettext("%(time)s of GPU time", time=human_seconds(found.gpu_hours * 3600))
    kwh = None if found.kwh is None else f"{human_number(found.kwh)} kWh"
    if found.amount is None:
        return [Tile(gettext("Energy"), kwh or "", hours)]
    return [Tile(gettext("Cost"), f"{human_number(found.amount, 2)} {found.currency}", ", ".join(filter(None, (hours, kwh))))]


def _predicted(text: str) -> str:
    return gettext("predicted %(value)s", value=text) if text != NOTHING else ""


SMOOTHED = 5
"""Steps of whose drawn answers the mean reward is shown: a few prompts are easier or harder than others."""


def _reward_tile(progress: JobProgress) -> Tile:
    """The mean reward of the answers that the newest steps drew, against that of the first ones."""
    rewards = [value for _, value in progress.step_metrics.get("reward", [])]
    if not rewards:
        return Tile(gettext("Training reward"), NOTHING, gettext("mean of drawn answers"))
    first, now = (statistics.fmean(some) for some in (rewards[:SMOOTHED], rewards[-SMOOTHED:]))
    told = len(rewards) >= 2 * SMOOTHED
    note = gettext("from %(value)s", value=human_number(first)) if told else gettext("mean of drawn answers")
    return Tile(gettext("Training reward"), human_number(now), note, now > first if told else None)


def _loss_tile(progress: JobProgress) -> Tile:
    """The best validation loss against the one before fine-tuning; the training loss without a validation set."""
    best = progress.best_evaluation
    if best is None:
        first, now = progress.first_loss, progress.loss
        unchecked = progress.started is not None and not progress.started.validation_rows
        title = gettext("Training loss") if unchecked else gettext("Validation loss")
        shown = unchecked and first is not None
        note = gettext("from %(value)s; no validation rows", value=human_number(first)) if shown else ""
        return Tile(title, human_number(now if unchecked else None), note)
    before = progress.evaluations[0]
    if best.step == before.step:
        return Tile(gettext("Validation loss"), human_number(best.loss), gettext("best, step %(step)s", step=human_number(best.step)))
    change = best.loss / before.loss - 1 if before.loss else 0.0
    note = gettext("%(change)s, best at step %(step)s", change=metrics.signed(change, 0), step=human_number(best.step))
    return Tile(gettext("Validation loss"), human_number(best.loss), note, change < 0 if change else None)


def _score_tile(job: Job, progress: JobProgress) -> Tile:
    """The task's score at the end against the base's; while training the newest one of an evaluation."""
    evaluation = _told(job, progress, "evaluation") or {}
    tuned, base = evaluation.get("tuned"), evaluation.get("base")
    tuned, base = tuned if isinstance(tuned, Mapping) else {}, base if isinstance(base, Mapping) else {}
    contest = evaluation.get("contest") or {}
    if contest.get("cross_validated"):  # over all rows, where the few validation ones are too noisy
        score, before = contest["base"]["tuned"], contest["base"]["score"]
        note = gettext("from %(value)s, cross-validated", value=human_percent(before, 0))
        return Tile(gettext("Accuracy"), human_percent(score, 0), note, score > before)
    for name in metrics.TILES:
        found, before = score_view.number(tuned.get(name)), score_view.number(base.get(name))
        if found is not None:
            title = gettext(metrics.METRICS[name].title)
            told = before is not None and found != before and not by_chance(evaluation, name)
            known = before is not None
            note = gettext("from %(value)s", value=metrics.figure(before, name, 3)) if known else between(tuned, name)
            return Tile(title, metrics.figure(found, name, 3), note, found > before if told and before is not None else None)
        if points := progress.metrics.get(name):
            note = gettext("at step %(step)s", step=human_number(points[-1][0]))
            return Tile(gettext(metrics.METRICS[name].title), metrics.figure(points[-1][1], name, 3), note)
    coming = job.status in ("queued", "running", "paused")
    return Tile(gettext("Task score"), NOTHING, gettext("measured at the end") if coming else gettext("not measured"))


def _told(job: Job, progress: JobProgress, name: str) -> Mapping[str, Any] | None:
    """Measurements of a finished job: from its row, or from its last event."""
    return getattr(job, name) or (getattr(progress.finished, name) if progress.finished else None)


def _forgot(job: Job, progress: JobProgress) -> score_view.Forgot | None:
    return score_view.forgot(_told(job, progress, "forgetting"))


def failure(job: Job, progress: JobProgress) -> Part | None:
    """The failure and its hint: from the trainer's last event, else from the job's row."""
    if job.status == "paused" and job.error:  # a full disk pauses a job without a request
        return {"message": job.error["message"], "hint": job.error.get("hint", ""), "line": None}
    if job.status != "failed":
        return None
    if progress.failure:
        return {"message": progress.failure.message, "hint": progress.failure.hint, "line": progress.failure.line}
    error = job.error or {}
    return {"message": error.get("message", gettext("The run failed and left no reason.")), "hint": error.get("hint", ""), "line": None}


def suggestions(session: Session, job: Job) -> list[verdict.Suggestion]:
    """What to try next, one click each: from the verdict, else from the failure."""
    if (found := verdict.of_job(job)) is not None:
        return found.suggestions
    failed = progress_cache.progress_of(session, job).failure if job.status == "failed" else None
    if failed is None or not failed.suggestion:
        return []
    changed = renamed(failed.suggestion)
    named = {lowered(gettext(name.replace("_", " ").capitalize())): as_text(value) for name, value in changed.items()}
    settings = ", ".join(f"{name} {value}" for name, value in named.items())
    return [verdict.Suggestion(label=gettext("Try again with %(settings)s", settings=settings), order={"run": changed})]


def _checkpoints(session: Session, job: Job, progress: JobProgress) -> list[Part]:
    """The checkpoints on disk, newest first, each with its validation loss and the link to try it."""
    losses = dict(progress.curves["validation"])
    again = job.status in ("paused", "failed", "cancelled")
    found = []
    for row in jobs.checkpoints(session, job):
        loss = losses.get(row.step, row.metrics.get("validation_loss", row.metrics.get("loss")))
        name = models.checkpoint_name(session, job, row.step)
        where = tryout.address(job.spec["model"]["name"], name, OBJECTIVES[job.spec["task"]].result_kind or "")
        found.append(
            {"step": row.step, "best": row.best, "loss": loss, "try_url": where, "resumable": again and checkpoints.resumable(row)}
        )
    return found


# Metrics --------------------------------------------------------------------------------------------------------------


def _metrics(session: Session, user: User, job: Job, top: Part, wish: Wish) -> Part:
    started = top["progress"].started
    return {
        "charts": charts.charts(top["progress"]),
        "predictions": predictions(session, job, started.trainable_parameters if started else None),
        "signed": metrics.signed,
    }


JUDGED = 10
"""Number of newest jobs from which the accuracy of estimates is computed."""


def predictions(session: Session, job: Job, counted: int | None) -> Part | None:
    """Estimated and measured values, and the errors of the estimates of the newest jobs here; None before the end."""
    estimate, measured = job.estimate or {}, job.measured or {}
    if not estimate or not measured:
        return None
    rows = [
        (gettext("Memory"), "bytes", estimate.get("memory_bytes"), measured.get("peak_memory_bytes")),
        (gettext("Time"), "seconds", estimate.get("seconds"), measured.get("seconds")),
        (gettext("Trainable parameters"), "count", estimate.get("trainable_parameters"), counted),
    ]
    lines = [
        {"title": title, "unit": unit, "predicted": predicted, "measured": found, "off": off(predicted, found)}
        for title, unit, predicted, found in rows
        if predicted is not None and found is not None
    ]
    return {"lines": lines, "sentence": _record(session, job)} if lines else None


def off(predicted: float | None, measured: float | None) -> float | None:
    """Relative error of an estimate: +0.1 is a tenth too much."""
    return predicted / measured - 1 if predicted and measured else None


def _record(session: Session, job: Job) -> str:
    """`The last 8 runs here predicted memory within 6%, time within 22%.` Jobs of the same person on the same device."""
    query = jobs.mine_of(job).where(Job.status == "succeeded", Job.measured["device"].astext == str((job.measured or {}).get("device")))
    found = session.scalars(query.order_by(Job.finished_at.desc()).limit(JUDGED)).all()
    memory = [off((j.estimate or {}).get("memory_bytes"), (j.measured or {}).get("peak_memory_bytes")) for j in found]
    time = [off((j.estimate or {}).get("seconds"), (j.measured or {}).get("seconds")) for j in found]
    both = [(abs(m), abs(t)) for m, t in zip(memory, time, strict=True) if m is not None and t is not None]
    if len(both) < 2:
        return ""
    worst = [human_percent(max(figures), 0) for figures in zip(*both, strict=True)]
    return gettext(
        "The last %(runs)s runs here predicted memory within %(memory)s, time within %(time)s.",
        runs=len(both),
        memory=worst[0],
        time=worst[1],
    )


# Samples --------------------------------------------------------------------------------------------------------------


def _samples(session: Session, user: User, job: Job, top: Part, wish: Wish) -> Part:
    """One prompt at one step: the base's answer, the model's answer, and the reference."""
    told = top["progress"].samples
    steps = [sampled.step for sampled in told]
    prompts = list(dict.fromkeys(sample.prompt for sampled in told for sample in sampled.samples))
    chosen = min(wish.prompt, max(len(prompts) - 1, 0))
    step = wish.step if wish.step in steps else (steps[-1] if steps else None)
    at = steps.index(step) if step is not None else 0
    answers = [s for sampled in told if sampled.step == step for s in sampled.samples if prompts and s.prompt == prompts[chosen]]
    return {
        "asked": {"prompt": chosen, "step": wish.step if wish.step in steps else None},
        "prompts": prompts,
        "prompt": chosen,
        "steps": steps,
        "step": step,
        "earlier": steps[at - 1] if at > 0 else None,
        "later": steps[at + 1] if at + 1 < len(steps) else None,
        "sample": answers[0] if answers else None,
    }


# Evaluation -----------------------------------------------------------------------------------------------------------


def _evaluation(session: Session, user: User, job: Job, top: Part, wish: Wish) -> Part:
    progress, spec = top["progress"], top["spec"]
    tuned: Model | None = jobs.tuned_model(session, job)
    return {
        "scores": score_view.view(_told(job, progress, "evaluation"), spec.task),
        "forgot": _forgot(job, progress),
        "removable": type(spec.strategy).adapter,
        "blends": evaluation_view.blend_panel(session, user, tuned, f"{url(job)}?tab=evaluation"),
    }


# Data -----------------------------------------------------------------------------------------------------------------

HARDEST = 8


def _data(session: Session, user: User, job: Job, top: Part, wish: Wish) -> Part:
    """Training and validation rows, their overlap, and the rows that stayed hardest."""
    entries = row_losses.read(session, job)
    spec: JobSpec = top["spec"]
    return {
        "overlap": (job.estimate or {}).get("overlap") or {},
        "warnings": (job.estimate or {}).get("warnings") or [],
        "losses": row_losses.summary(entries) if entries else None,
        "hardest": row_losses.ranked(entries, "after")[:HARDEST],
        "rows_url": f"{dataset_url(spec.dataset.id)}/rows",
        "ledger_query": urlencode({"sort": "after", "job": ids.public(ids.JOB, job.id)}),
    }


# Config & logs --------------------------------------------------------------------------------------------------------


def _config(session: Session, user: User, job: Job, top: Part, wish: Wish) -> Part:
    progress, started = top["progress"], top["progress"].started
    return {
        "asked": {"filter": wish.filter, "level": wish.level},
        "yaml": config_file.of_job(job),
        "environment": [(name, as_text(value)) for name, value in (started.details if started else {}).items() if _plain(value)],
        "tensorboard": job_artifacts.tensorboard(job),
        "trackers": [(TRACKERS[row.kind].title, row) for row in tracking.of_job(session, job)],
        "more_trackers": tracking.possible(session, job),
        "lines": [line for line in reversed(progress.log) if _wanted(line.level, line.message, wish)],
        "all_lines": len(progress.log),
        "output": [line for line in job_artifacts.output(job) if _wanted("", line, wish)],
        "filter": wish.filter,
        "level": wish.level,
    }


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _wanted(level: str, text: str, wish: Wish) -> bool:
    return wish.filter.casefold() in text.casefold() and (not wish.level or level == wish.level)


TABS: dict[str, tuple[str, Callable[[Session, User, Job, Part, Wish], Part]]] = {
    "overview": (mark("Overview"), _overview),
    "metrics": (mark("Metrics"), _metrics),
    "samples": (mark("Samples"), _samples),
    "evaluation": (mark("Evaluation"), _evaluation),
    "data": (mark("Data"), _data),
    "config": (mark("Config & logs"), _config),
}
"""Key, title and function; the first is shown where the URL names none."""
