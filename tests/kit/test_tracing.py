"""The id of a request, and its trace, go with the work that it asked for: through the outbox and the queue to the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import structlog
from sqlalchemy import select

from app.kit import ids, tracing
from app.settings import get_settings
from app.tables import Job, Outbox
from tests.conftest import PROJECT
from tests.factories import make_dataset, make_job


def body(session, user, model, data_dir) -> dict:
    data = make_dataset(session, user, data_dir)
    session.commit()
    return {"model": model.name, "training_file": ids.public(ids.FILE, data.file_id), "run": {"validation_fraction": 0}}


def test_a_message_carries_the_id_of_its_request(api, session, user, tiny_registered, data_dir):
    asked = body(session, user, tiny_registered, data_dir)
    answer = api.post("/v1/fine_tuning/jobs", json=asked, headers={"x-request-id": "from-the-proxy"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-request-id"] == "from-the-proxy"
    job = session.scalars(select(Job)).one()
    assert session.scalars(select(Outbox.context).where(Outbox.key == job.id)).all() == [{"request_id": "from-the-proxy"}]


def test_work_binds_the_ids_and_frees_them_again():
    with tracing.work("luthier.train", {"request_id": "r-1", "secret": "x"}, job_id="ftjob-1", key=None):
        assert structlog.contextvars.get_contextvars() == {"request_id": "r-1", "job_id": "ftjob-1"}
        assert tracing.environment() == {"LUTHIER_REQUEST_ID": "r-1", "LUTHIER_JOB_ID": "ftjob-1"}
        assert tracing.carried() == {"request_id": "r-1"}
    assert structlog.contextvars.get_contextvars() == {} and tracing.carried() is None and tracing.environment() == {}


def test_the_trainer_and_the_worker_log_both_ids_as_json(tmp_path):
    """A line of a library's logger too: all of them go through one formatter."""
    script = (
        "import logging; from app.kit import logs, tracing; logs.configure(); tracing.adopt();"
        "logging.getLogger('a.library').warning('slow %s', 'disk')"
    )
    environment = os.environ | {"LUTHIER_LOG_FORMAT": "json", "LUTHIER_REQUEST_ID": "r-1", "LUTHIER_JOB_ID": "ftjob-1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    line = json.loads(done.stderr.splitlines()[-1])
    assert (line["event"], line["level"], line["request_id"], line["job_id"]) == ("slow disk", "warning", "r-1", "ftjob-1")


@pytest.fixture
def spans(monkeypatch):
    """What was traced, kept in memory, as a person's collector would get it."""
    pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("luthier")
    monkeypatch.setattr(tracing, "_tracer", lambda: tracer)
    return exporter.get_finished_spans


def test_one_trace_from_the_request_to_the_work(spans, api, session, user, tiny_registered, data_dir):
    """And a trace that a caller began goes on."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    asked = body(session, user, tiny_registered, data_dir)
    api.post("/v1/fine_tuning/jobs", json=asked, headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
    context = session.scalars(select(Outbox.context).where(Outbox.task == "luthier.train")).one()
    with tracing.work("luthier.train", context, job_id="ftjob-1"), tracing.span("trainer", attempt=1, nothing=None):
        pass
    found = {span.name: span for span in spans()}
    request, work, trainer = found["POST /v1/fine_tuning/jobs"], found["luthier.train"], found["trainer"]
    assert {f"{span.context.trace_id:032x}" for span in (request, work, trainer)} == {trace}
    assert work.parent.span_id == request.context.span_id and trainer.parent.span_id == work.context.span_id
    assert request.attributes["http.response.status_code"] == 200 and dict(trainer.attributes) == {"attempt": 1}
    assert work.attributes["job_id"] == "ftjob-1" and work.attributes["request_id"] == request.attributes["request_id"]


def test_traces_without_the_extra_are_refused_with_what_to_install(data_dir, monkeypatch):
    from app.errors import Unavailable

    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    get_settings().traces = "console"
    tracing._tracer.cache_clear()
    try:
        with pytest.raises(Unavailable, match="not installed") as refused:
            tracing._tracer()
        assert "luthier[otel]" in refused.value.hint
    finally:
        tracing._tracer.cache_clear()


@pytest.mark.long
def test_the_trainer_itself_logs_the_ids_and_is_a_span(spans, session, user, data_dir, tiny_registered, monkeypatch):
    """The real trainer, as its worker starts it for a message of the queue."""
    from worker import tasks

    monkeypatch.setenv("LUTHIER_LOG_FORMAT", "json")
    job = make_job(session, user, tiny_registered, make_dataset(session, user, data_dir), epochs=1, samples=0, forgetting=False)
    with tracing.span("request") as request, structlog.contextvars.bound_contextvars(request_id="r-1"):
        context = tracing.carried()
    tasks.train.apply(args=[str(job.id)], headers={"luthier": context}, throw=True)
    session.refresh(job)
    assert job.status == "succeeded", job.error
    public = ids.public(ids.JOB, job.id)
    (log,) = (data_dir / "runs" / str(job.id)).glob("a1/trainer.log")
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    begun = next(line for line in lines if line["event"].startswith("training starts"))
    assert (begun["request_id"], begun["job_id"], begun["logger"]) == ("r-1", public, "luthier.trainer")
    found = {span.name: span for span in spans()}
    trainer = found["trainer"]
    assert trainer.context.trace_id == found["luthier.train"].context.trace_id == request.get_span_context().trace_id
    assert (trainer.attributes["attempt"], trainer.attributes["step"], trainer.attributes["outcome"]) == (1, job.total_steps, "finished")
