"""Prometheus metrics, served at `GET /metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

Sample = tuple[Mapping[str, Any], float]
Family = tuple[str, str, str, Iterable[Sample]]
"""Name, type, help and samples."""


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


def text(families: Iterable[Family] = ()) -> bytes:
    """What this process counted, and the families that were computed for this scrape."""
    from prometheus_client import REGISTRY, generate_latest

    lines = []
    for name, kind, meaning, samples in families:
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{_labels(labels)} {value:g}" for labels, value in samples]
    return generate_latest(REGISTRY) + ("\n".join(lines) + "\n").encode()


def _labels(labels: Mapping[str, Any]) -> str:
    """`{queue="train"}`; empty where there are none. A value may be a name that somebody chose."""
    told = [f'{name}="{_escaped(str(value))}"' for name, value in labels.items()]
    return f"{{{','.join(told)}}}" if told else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
