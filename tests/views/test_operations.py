"""What an admin watches: each number is that of the rows, on the page and for Prometheus."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import func, update

from app import queue
from app.machines import heartbeats
from app.settings import get_settings
from app.tables import Job
from app.views import operations
from tests import lives


def families(api) -> dict[str, dict[tuple, float]]:
    """Parsed as Prometheus would."""
    text = api.get("/metrics").text
    return {
        family.name: {tuple(sorted(sample.labels.items())): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(text)
    }


@pytest.fixture
def busy(session, user, tiny_registered):
    """One job that waits for two minutes, one that trains, one that failed."""
    waiting = lives.order(session, user, tiny_registered, name="waits")
    session.execute(update(Job).where(Job.id == waiting.id).values(created_at=func.clock_timestamp() - timedelta(minutes=2)))
    running = lives.order(session, user, tiny_registered, name='runs "a\\b"')
    lives.Life(session, running).claim().say(lives.started(), *lives.steps(1, 20))
    failed = lives.order(session, user, tiny_registered, name="failed")
    queue.enqueue(session, queue.TRAIN, waiting.id)
    lives.Life(session, failed).claim().fail(lives.events.Failed(kind="bad_data", message="Row 3 is empty.", hint="Fill it."))
    session.commit()
    return waiting, running, failed


def work(session, name):
    return next(one for one in operations.waiting(session) if one.name == name)


def test_what_waits_and_what_is_held(session, busy):
    session.execute(update(Job).where(Job.id == busy[1].id).values(lease_until=func.clock_timestamp() + timedelta(seconds=10)))
    session.execute(update(type(busy[0])).where(Job.id == busy[0].id).values(status="queued"))
    session.commit()
    jobs = work(session, "job")
    assert (jobs.queue, jobs.held) == ("train", 1) and abs(jobs.lease_age_seconds - (get_settings().lease_seconds - 10)) < 2
    assert jobs.waiting == 1 and 119 < jobs.wait_seconds < 130
    others = {one.name for one in operations.waiting(session) if one.name != "job" and (one.held or one.waiting)}
    assert others == {"examination"}, "that of the base model, and nothing else"


def test_prometheus_reads_all_of_it(session, api, busy):
    heartbeats.say_alive("train", 0.0)
    heartbeats.say_machine(name="gpu-1")
    found = families(api)
    job = next(iter(found["luthier_job_step_seconds"]))
    assert dict(job) == {"job": operations.running(session)[0].id} and abs(found["luthier_job_step_seconds"][job] - 2.8) < 1e-6
    assert found["luthier_job_memory_bytes"][job] > 1e9 and found["luthier_job_tokens_per_second"][job] > 0
    assert found["luthier_work_waiting"][("queue", "train"), ("work", "job")] == 1
    assert found["luthier_leases"][("queue", "train"), ("work", "job")] == 1
    assert found["luthier_work_wait_seconds"][("queue", "train"), ("work", "job")] > 119
    assert found["luthier_workers"][(("queue", "train"),)] == 1 and found["luthier_queue_messages"][(("queue", "train"),)] == 0
    assert [dict(labels)["host"] for labels in found["luthier_device_memory_bytes"]] == ["gpu-1"]
    assert found["luthier_disk_free_bytes"][()] > 0 and found["luthier_outbox_unsent"][()] == 1
    assert found["luthier_jobs"][(("status", "failed"),)] == 1
    assert {"luthier_requests", "luthier_request_seconds"} <= set(found)


def test_the_page_shows_it(client, session, busy):
    page = client.get("/admin").text
    assert "Row 3 is empty." in page and "Fill it." in page and "runs &#34;a\\b&#34;" in page
    row = re.search(r'<tr><td>Run</td><td class="mono">train</td>.*?</tr>', page, re.S)
    assert row and ("2 min" in row[0] or "2:0" in row[0]), row
    assert "LUTHIER_KEEP_LOG_DAYS" in page and "forever" in page
    assert client.get("/admin/audit").status_code == 200
