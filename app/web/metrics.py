"""Prometheus metrics, served at `GET /metrics`."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _instruments() -> tuple[Any, Any]:
    from prometheus_client import Counter, Histogram

    buckets = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
    return (
        Counter("luthier_requests_total", "Answers, by method, route and status.", ["method", "route", "status"]),
        Histogram("luthier_request_seconds", "Time to the end of an answer.", ["route"], buckets=buckets),
    )


def answered(method: str, route: str, status: int, seconds: float) -> None:
    """Count one response. `route` is the pattern, never the path: paths would create a series each."""
    requests, times = _instruments()
    requests.labels(method if method in ("GET", "POST", "DELETE", "HEAD", "PUT", "PATCH") else "other", route, status).inc()
    times.labels(route).observe(seconds)


def text() -> bytes:
    from prometheus_client import REGISTRY, generate_latest

    return generate_latest(REGISTRY) + _studio()


def _studio() -> bytes:
    """Metrics from the database and the workers, collected on request."""
    from sqlalchemy import func, select

    from app.db import transaction
    from app.machines.heartbeats import alive
    from app.tables import Job, Outbox

    with transaction() as session:
        jobs = session.execute(select(Job.status, func.count()).where(Job.deleted_at.is_(None)).group_by(Job.status)).all()
        unsent = session.scalar(select(func.count()).select_from(Outbox).where(Outbox.sent_at.is_(None)))
    lines = ["# HELP luthier_jobs Jobs by status.", "# TYPE luthier_jobs gauge"]
    lines += [f'luthier_jobs{{status="{status}"}} {count}' for status, count in jobs]
    lines += [
        "# HELP luthier_outbox_unsent Messages not sent yet.",
        "# TYPE luthier_outbox_unsent gauge",
        f"luthier_outbox_unsent {unsent}",
    ]
    lines += ["# HELP luthier_workers Workers heard of in the last half minute.", "# TYPE luthier_workers gauge"]
    queues = [worker.queue for worker in alive()]
    lines += [f'luthier_workers{{queue="{queue}"}} {queues.count(queue)}' for queue in sorted(set(queues))]
    return ("\n".join(lines) + "\n").encode()
