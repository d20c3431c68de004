"""What a piece of work belongs to, from the request through the queue to the trainer: its request id, and its OpenTelemetry trace.

The ids travel with the message of the outbox. Traces are an extra, `pip install 'luthier[otel]'`, and off until `LUTHIER_TRACES`
says where they go; without it nothing here costs more than a function call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog

from app.errors import Unavailable
from app.settings import get_settings

IDS = ("request_id", "job_id")
"""What is bound to every log line of a piece of work, and handed on."""
_CARRIED = ("request_id", "traceparent")


@functools.cache
def _tracer() -> Any:
    """OpenTelemetry's tracer of this process; None when traces are off."""
    where = get_settings().traces
    if where == "off":
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor
    except ImportError:
        raise Unavailable(
            "LUTHIER_TRACES is set, and OpenTelemetry is not installed.", hint='Install it with `pip install "luthier[otel]"`.'
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "luthier", "service.instance.id": str(os.getpid())}))
    if where == "console":
        provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))  # to OTEL_EXPORTER_OTLP_ENDPOINT
    return provider.get_tracer("luthier")


@contextmanager
def span(name: str, parent: Mapping[str, str] | None = None, **attributes: Any) -> Iterator[Any]:
    """A span around a block; an exception that leaves it is recorded. `parent` is what `carried` gave elsewhere. Yields the span,
    or None when traces are off."""
    tracer = _tracer()
    if tracer is None:
        yield None
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract(dict(parent)) if parent else None
    told = {name: value for name, value in attributes.items() if value is not None}
    with tracer.start_as_current_span(name, context=context, attributes=told) as current:
        yield current


def carried() -> dict[str, str] | None:
    """What a message takes along: the ids of this context, and its trace. None when there is nothing."""
    bound = structlog.contextvars.get_contextvars()
    found = {name: str(bound[name]) for name in ("request_id",) if name in bound}
    if _tracer() is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(found)
    return found or None


@contextmanager
def work(name: str, message: Mapping[str, Any] | None, **ids: str | None) -> Iterator[Any]:
    """A piece of work that a message asked for: its ids are in every log line, and its span continues the request's."""
    told = {key: str(value) for key, value in (message or {}).items() if key in _CARRIED}
    bound = {key: value for key, value in ids.items() if value} | {key: told[key] for key in ("request_id",) if key in told}
    with structlog.contextvars.bound_contextvars(**bound), span(name, told, **bound) as current:
        yield current


def environment() -> dict[str, str]:
    """The ids of this context for a child process."""
    bound = structlog.contextvars.get_contextvars()
    return {f"LUTHIER_{name.upper()}": str(bound[name]) for name in IDS if name in bound}


def adopt() -> None:
    """Bind the ids that the parent process handed on."""
    found = {name: os.environ[f"LUTHIER_{name.upper()}"] for name in IDS if f"LUTHIER_{name.upper()}" in os.environ}
    structlog.contextvars.bind_contextvars(**found)
