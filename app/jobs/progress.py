"""The state of a job page, as a fold over the job's events. No database, no clock, no HTTP.

    progress = Progress()
    for row in events:
        fold(progress, from_row(row.type, row.data), at=row.created_at, event_id=row.id)

The same events give the same page: after a reload, in a second browser, on another web process. A job that resumes at step S
repeats all events after S, so everything recorded about later steps is dropped first.

Curves are lists of (step, value), increasing in step. Losses are nats per trained token, memory bytes, times seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from app.events import (
    Claimed,
    Evaluated,
    Failed,
    Finished,
    JobEvent,
    Log,
    Lost,
    Queued,
    Sampled,
    Saved,
    Started,
    Step,
    Stopped,
    TaskProgress,
)
from app.languages import gettext, localized, mark

Point = tuple[int, float]
Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]

CURVES = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes")
"""The curves with a point per step; `validation` comes from the evaluations."""

RECENT_STEPS = 25
"""Steps from which the current speed, and so the remaining time, is computed."""

KEPT_LOG_LINES = 500


@dataclass(slots=True)
class LogLine:
    """One line of the page's log: the trainer's own, or about the job's state. It is put into words when it is read, since the fold is kept
    for readers of every language."""

    at: datetime | None
    level: Literal["info", "warn", "error"]
    event: JobEvent
    resume_reason: str
    attempt: int

    @property
    def message(self) -> str:
        return _words(self.event, self.resume_reason)


@dataclass(slots=True)
class JobProgress:
    """The state of a job page. Mutable, so that folding one more event costs the same after a thousand as after one."""

    last_event_id: int = 0
    status: Status = "queued"
    attempt: int = 0
    worker: str | None = None
    claimed_at: datetime | None = None
    """When the running attempt was claimed by its worker."""
    loading: bool = False
    """Claimed by a worker, but not training yet."""
    started: Started | None = None
    resumed_from: int | None = None
    resume_reason: str = ""
    total_steps: int | None = None
    step: int = 0
    epoch: float = 0.0
    latest: Step | None = None
    task: TaskProgress | None = None
    """What the job does besides steps just now; None while it makes steps."""
    curves: dict[str, list[Point]] = field(default_factory=lambda: {name: [] for name in (*CURVES, "validation")})
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    """Metrics of evaluations other than the loss."""
    step_metrics: dict[str, list[Point]] = field(default_factory=dict)
    """Other metrics of training steps, under the same names where they are the same metric."""
    times: list[Point] = field(default_factory=list)
    """Training seconds at each recent step, over all attempts."""
    evaluations: list[Evaluated] = field(default_factory=list)
    samples: list[Sampled] = field(default_factory=list)
    checkpoints: list[Saved] = field(default_factory=list)
    log: list[LogLine] = field(default_factory=list)
    failure: Failed | None = None
    finished: Finished | None = None

    def snapshot(self) -> JobProgress:
        """A copy that later folds do not change. Events are immutable, so only the lists are copied."""
        return replace(
            self,
            curves={name: list(points) for name, points in self.curves.items()},
            metrics={name: list(points) for name, points in self.metrics.items()},
            step_metrics={name: list(points) for name, points in self.step_metrics.items()},
            times=list(self.times),
            log=list(self.log),
        )

    # What the page asks -----------------------------------------------------------------------------------------------

    @property
    def first_loss(self) -> float | None:
        points = self.curves["loss"]
        return points[0][1] if points else None

    @property
    def loss(self) -> float | None:
        return self.latest.loss if self.latest else None

    @property
    def best_evaluation(self) -> Evaluated | None:
        """The evaluation that the trainer called the best last; of older events the one with the lowest validation loss, where NaN is
        never the best."""
        if chosen := [e for e in self.evaluations if e.best]:
            return chosen[-1]
        real = [e for e in self.evaluations if e.loss == e.loss]
        return min(real, key=lambda e: e.loss, default=None)

    @property
    def peak_memory_bytes(self) -> int | None:
        if self.finished:
            return self.finished.measured.peak_memory_bytes
        points = self.curves["memory_bytes"]
        return int(max(value for _, value in points)) if points else None

    @property
    def tokens_per_second(self) -> float | None:
        """Current speed: the median of the recent steps. After the end, the average over the whole job."""
        if self.finished:
            return self.finished.measured.tokens_per_second
        recent = [value for _, value in self.curves["tokens_per_second"][-RECENT_STEPS:]]
        return statistics.median(recent) if recent else None

    @property
    def share(self) -> float:
        """Fraction of the steps that are done, 0 to 1."""
        if self.finished:
            return 1.0
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Remaining steps times the median recent step, plus the evaluations' time averaged over the steps so far.

        The median, because an evaluation or a checkpoint between two steps must not look like slow training. None before two
        steps were seen in one attempt, after the last one, and when nothing is running.
        """
        return self.seconds_to_train if self.status == "running" else None

    @property
    def seconds_to_train(self) -> float | None:
        """The same for a paused job: how long the remaining steps would take."""
        gaps = [later[1] - earlier[1] for earlier, later in zip(self.times, self.times[1:], strict=False) if later[1] > earlier[1]]
        if not gaps or not self.total_steps or self.step >= self.total_steps:
            return None
        evaluating = sum(e.seconds for e in self.evaluations) / max(self.step, 1)
        return (self.total_steps - self.step) * (statistics.median(gaps) + evaluating)

    @property
    def starting(self) -> bool:
        """Claimed by a worker, and no step of this attempt was made yet."""
        return self.status == "running" and (self.loading or not self.times)

    @property
    def latest_samples(self) -> Sampled | None:
        return self.samples[-1] if self.samples else None

    @property
    def resumed(self) -> str:
        """`resumed at step 40 after the worker was lost`, or empty for a job without interruptions."""
        reason, step = gettext(self.resume_reason), self.resumed_from
        if self.loading:
            return reason
        if step is None:
            return gettext("started over %(reason)s", reason=reason) if self.attempt > 1 and self.started and reason else ""
        if self.started is None or self.started.exact:
            words = gettext("resumed at step %(step)s %(reason)s", step=step, reason=reason)
            return words if reason else gettext("resumed at step %(step)s", step=step)
        words = gettext("resumed at step %(step)s %(reason)s, not bit for bit", step=step, reason=reason)
        return words if reason else gettext("resumed at step %(step)s, not bit for bit", step=step)


def progress(events: Iterable[JobEvent]) -> JobProgress:
    """The fold of a whole list of events."""
    folded = JobProgress()
    for event in events:
        fold(folded, event)
    return folded


def fold(progress: JobProgress, event: JobEvent, *, at: datetime | None = None, event_id: int | None = None) -> JobProgress:
    """Fold one more event into `progress`, which is changed and returned. `at` and `event_id` are the row's time and id."""
    if event_id is not None:
        progress.last_event_id = event_id
    progress.task = event if isinstance(event, TaskProgress) else progress.task if isinstance(event, Log) else None
    _FOLDS[type(event)](progress, event)
    if isinstance(event, Claimed):
        progress.claimed_at = at
    level = event.level if isinstance(event, Log) else _LEVELS.get(type(event))
    if level is not None:
        progress.log.append(LogLine(at, level, event, progress.resume_reason, progress.attempt))
        del progress.log[:-KEPT_LOG_LINES]
    return progress


# One function per event, in the order a job says them ---------------------------------------------------------------


_REASONS = {
    "submitted": "",
    "resumed": mark("after a pause"),
    "worker_left": mark("after its worker was restarted"),
    "worker_lost": mark("after the worker was lost"),
    "retry": mark("after a fault that may pass"),
}


_AFTER = {"cancelled": mark("after it was cancelled"), "failed": mark("after it failed")}


def _queued(progress: JobProgress, event: Queued) -> None:
    progress.status = "queued"
    progress.failure = None
    ended = progress.status if progress.status in ("cancelled", "failed") else ""
    progress.resume_reason = _AFTER[ended] if event.reason == "resumed" and ended else _REASONS[event.reason]


def _claimed(progress: JobProgress, event: Claimed) -> None:
    progress.status, progress.attempt, progress.worker = "running", event.attempt, event.worker
    progress.failure = None
    progress.loading = True
    progress.times.clear()  # this worker's speed is unknown yet


def _started(progress: JobProgress, event: Started) -> None:
    progress.status, progress.loading = "running", False
    progress.started = event
    progress.total_steps = event.total_steps
    progress.resumed_from = event.resumed_from
    progress.times.clear()  # loading the model again is no step
    _forget_after(progress, event.resumed_from or 0)


def _step(progress: JobProgress, event: Step) -> None:
    progress.latest, progress.step, progress.epoch = event, event.step, event.epoch
    for name in CURVES:
        _put(progress.curves[name], event.step, float(getattr(event, name)))
    for name, value in event.metrics.items():
        _put(progress.step_metrics.setdefault(name, []), event.step, value)
    _put(progress.times, event.step, event.seconds)
    del progress.times[: -RECENT_STEPS - 1]


def _evaluated(progress: JobProgress, event: Evaluated) -> None:
    _put(progress.curves["validation"], event.step, event.loss)
    for name, value in event.metrics.items():
        _put(progress.metrics.setdefault(name, []), event.step, value)
    progress.evaluations = [*(e for e in progress.evaluations if e.step < event.step), event]


def _sampled(progress: JobProgress, event: Sampled) -> None:
    progress.samples = [*(s for s in progress.samples if s.step < event.step), event]


def _saved(progress: JobProgress, event: Saved) -> None:
    progress.checkpoints = [*(c for c in progress.checkpoints if c.step < event.step), event]


def _finished(progress: JobProgress, event: Finished) -> None:
    progress.status, progress.finished, progress.step = "succeeded", event, event.step


def _failed(progress: JobProgress, event: Failed) -> None:
    progress.status, progress.failure = "failed", event


def _stopped(progress: JobProgress, event: Stopped) -> None:
    progress.status = event.status


def _lost(progress: JobProgress, event: Lost) -> None:
    progress.status = "queued"
    progress.resume_reason = _REASONS["worker_lost"]


def _nothing(progress: JobProgress, event: Log | TaskProgress) -> None:
    pass


_FOLDS: dict[type[JobEvent], Callable[[JobProgress, Any], None]] = {
    Queued: _queued, Claimed: _claimed, Started: _started, Step: _step, Evaluated: _evaluated, Sampled: _sampled, Saved: _saved,
    Finished: _finished, Failed: _failed, Stopped: _stopped, Lost: _lost, TaskProgress: _nothing, Log: _nothing,
}  # fmt: skip


def _put(points: list[Point], step: int, value: float) -> None:
    """Add a point. A repeated step replaces the earlier one, so a line recorded twice draws nothing twice."""
    while points and points[-1][0] >= step:
        points.pop()
    points.append((step, value))


def _forget_after(progress: JobProgress, step: int) -> None:
    """Drop everything recorded about later steps: the attempt that did is gone and the next one repeats them."""
    for points in (*progress.curves.values(), *progress.metrics.values(), *progress.step_metrics.values()):
        while points and points[-1][0] > step:
            points.pop()
    progress.evaluations = [e for e in progress.evaluations if e.step <= step]
    progress.samples = [s for s in progress.samples if s.step <= step]
    progress.checkpoints = [c for c in progress.checkpoints if c.step <= step]
    if progress.latest and progress.latest.step > step:
        progress.latest = None
    progress.step = step


_LEVELS: dict[type[JobEvent], Literal["info", "warn", "error"]] = {
    Queued: "info", Claimed: "info", Started: "info", Evaluated: "info", Saved: "info", Lost: "warn", Stopped: "info", Failed: "error",
    Finished: "info",
}  # fmt: skip
"""Of the log line of an event; steps have none, they are the curves."""
_STOPPED = {
    ("paused", False, False): mark("Paused."),
    ("paused", False, True): mark("Paused at step %(step)s."),
    ("paused", True, False): mark("Paused by you."),
    ("paused", True, True): mark("Paused by you at step %(step)s."),
    ("cancelled", False, False): mark("Cancelled."),
    ("cancelled", False, True): mark("Cancelled at step %(step)s."),
    ("cancelled", True, False): mark("Cancelled by you."),
    ("cancelled", True, True): mark("Cancelled by you at step %(step)s."),
}
"""By status, whether a person asked for it, and whether the step is known."""


def _words(event: JobEvent, resume_reason: str) -> str:
    """The log line of an event, in the language of the reader; what is stored as a text stays as it is."""
    match event:
        case Log() | Lost():
            return event.message
        case Queued(reason="submitted"):
            return gettext("Queued.")
        case Queued():
            return gettext("Queued again, %(reason)s.", reason=gettext(resume_reason))
        case Claimed():
            return gettext("Attempt %(attempt)s started on %(worker)s.", attempt=event.attempt, worker=event.worker)
        case Started():
            return _started_words(event)
        case Evaluated():
            loss = localized(f"{event.loss:.4f}")
            if event.best:
                return gettext("Step %(step)s: validation loss %(loss)s, the best so far.", step=event.step, loss=loss)
            return gettext("Step %(step)s: validation loss %(loss)s.", step=event.step, loss=loss)
        case Saved():
            return gettext("Step %(step)s: checkpoint saved and verified.", step=event.step)
        case Stopped():
            asked = event.reason == "asked for"
            words = gettext(_STOPPED[event.status, asked, event.step is not None], step=event.step)
            return words if asked else f"{words} {event.reason}".strip()
        case Failed():
            return f"{event.message} {event.hint}".strip()
        case Finished():
            words = gettext("Succeeded at step %(step)s.", step=event.step)
            early = event.why or gettext("The validation score had stopped improving.")
            return f"{words} {early}" if event.reason == "early_stopped" else words
        case _:
            return ""


def _started_words(event: Started) -> str:
    values = {"steps": event.total_steps, "rows": event.train_rows, "device": event.device, "precision": event.precision}
    if event.resumed_from is None:
        return gettext("Training starts: %(steps)s steps over %(rows)s rows, on %(device)s in %(precision)s.", **values)
    return gettext(
        "Training resumes at step %(step)s of %(steps)s steps over %(rows)s rows, on %(device)s in %(precision)s.",
        step=event.resumed_from,
        **values,
    )


# Fewer points, the same picture --------------------------------------------------------------------------------------


def downsample(points: Sequence[Point], budget: int) -> list[Point]:
    """At most `budget` of the points, chosen so that the line looks the same: largest triangle three buckets (Steinarsson 2013,
    Downsampling Time Series for Visual Representation, University of Iceland, section 4.2).

    The first and the last point stay; from each bucket between them, the point that spans the largest triangle with the one
    chosen before and the mean of the next bucket. Points with a non-finite value are dropped: they have no position on an axis,
    and the log reports them.
    """
    points = [p for p in points if abs(p[1]) < float("inf")]
    if budget < 3:
        raise ValueError("The budget must be at least three points.")
    if len(points) <= budget:
        return points
    size = (len(points) - 2) / (budget - 2)
    edges = [1 + int(i * size) for i in range(budget - 1)]
    chosen = [points[0]]
    for bucket in range(budget - 2):
        here = points[edges[bucket] : edges[bucket + 1]]
        after = points[edges[bucket + 1] : edges[bucket + 2]] if bucket + 2 < len(edges) else [points[-1]]
        mean_x = sum(x for x, _ in after) / len(after)
        mean_y = sum(y for _, y in after) / len(after)
        last_x, last_y = chosen[-1]
        chosen.append(max(here, key=lambda p: abs((last_x - mean_x) * (p[1] - last_y) - (last_x - p[0]) * (mean_y - last_y))))
    return [*chosen, points[-1]]
