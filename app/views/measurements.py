"""The families of `/metrics` that come from the database and the workers, computed for each scrape."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from sqlalchemy import func, select

from app.db import transaction
from app.machines.heartbeats import alive
from app.settings import get_settings
from app.tables import Job, MachineUse, Outbox, TokenUse
from app.views import operations
from app.web.metrics import Family


def families() -> Iterator[Family]:
    with transaction() as session:
        jobs = session.execute(select(Job.status, func.count()).where(Job.deleted_at.is_(None)).group_by(Job.status)).all()
        unsent = session.scalar(select(func.count()).select_from(Outbox).where(Outbox.sent_at.is_(None))) or 0
        tokens = session.scalar(select(func.sum(Job.trained_tokens))) or 0
        work, running = operations.waiting(session), operations.running(session)
        read, written = session.execute(select(func.sum(TokenUse.read), func.sum(TokenUse.written))).one()
        joules = session.scalar(select(func.sum(MachineUse.joules)))
    yield "luthier_jobs", "gauge", "Runs by status.", [({"status": status}, count) for status, count in jobs]
    yield "luthier_read_tokens_total", "counter", "Tokens of prompts that models read.", [({}, float(read or 0))]
    yield "luthier_generated_tokens_total", "counter", "Tokens that models wrote.", [({}, float(written or 0))]
    if joules is not None:
        yield "luthier_gpu_energy_joules_total", "counter", "Energy of the GPUs while runs held them.", [({}, float(joules))]
    yield "luthier_outbox_unsent", "gauge", "Messages not sent yet.", [({}, unsent)]
    yield "luthier_trained_tokens_total", "counter", "Tokens that runs were trained on.", [({}, float(tokens))]
    queues = Counter(worker.queue for worker in alive())
    yield "luthier_workers", "gauge", "Workers heard of in the last half minute.", [({"queue": q}, n) for q, n in sorted(queues.items())]
    depths = operations.messages().items()
    yield "luthier_queue_messages", "gauge", "Messages that wait in the broker.", [({"queue": queue}, depth) for queue, depth in depths]
    each = [({"work": one.name, "queue": one.queue}, one) for one in work]
    yield "luthier_work_waiting", "gauge", "Things that wait for a worker.", [(labels, one.waiting) for labels, one in each]
    yield "luthier_work_wait_seconds", "gauge", "Wait of the oldest of them.", [(labels, one.wait_seconds) for labels, one in each]
    yield "luthier_leases", "gauge", "Things that workers hold.", [(labels, one.held) for labels, one in each]
    yield (
        "luthier_lease_age_seconds",
        "gauge",
        "Since the quietest holder's heartbeat.",
        [(labels, one.lease_age_seconds) for labels, one in each],
    )
    for name, meaning, values in (
        ("step_seconds", "Time of the newest step.", [(job.id, job.step_seconds) for job in running]),
        ("tokens_per_second", "Speed at the newest step.", [(job.id, job.tokens_per_second) for job in running]),
        ("memory_bytes", "Memory of the device at the newest step.", [(job.id, job.memory_bytes) for job in running]),
    ):
        told = [({"job": key}, float(value)) for key, value in values if value is not None]
        yield f"luthier_job_{name}", "gauge", f"{meaning} Of what trains now.", told
    devices = [({"host": one.host, "device": one.label}, float(one.memory_bytes)) for one in operations.devices()]
    yield "luthier_device_memory_bytes", "gauge", "Memory of the devices that train.", devices
    disk = os.statvfs(get_settings().data_dir)
    yield "luthier_disk_free_bytes", "gauge", "Free on the disk of the data folder.", [({}, float(disk.f_bavail * disk.f_frsize))]
