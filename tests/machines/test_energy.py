"""The energy counter of GPUs: read through the real loader from a library with the functions of NVML, compiled here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from app import limits
from app.db import transaction
from app.jobs import lifecycle, usage
from app.kit import ids
from app.machines import energy
from app.settings import get_settings
from app.tables import MachineUse
from tests.factories import make_dataset, make_job

SOURCE = r"""
#include <stdio.h>
#include <string.h>
static int cards[2] = {0, 1};
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    if (strncmp(uuid, "GPU-", 4) != 0) return 2;
    *device = &cards[uuid[4] == '1'];
    return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    FILE *file = fopen("@COUNTER@", "r");
    if (!file || *(int *)device == 1) return 3;
    int found = fscanf(file, "%llu", millijoules);
    fclose(file);
    return found == 1 ? 0 : 999;
}
"""


@pytest.fixture
def counter(tmp_path: Path, monkeypatch) -> Path:
    """A file with the millijoules of GPU-0; GPU-1 does not count, and a MIG instance is not found."""
    file, source, library = tmp_path / "counter", tmp_path / "nvml.c", tmp_path / "libnvidia-ml.so.1"
    source.write_text(SOURCE.replace("@COUNTER@", str(file)))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    file.write_text("5000000")
    monkeypatch.setattr(energy, "LIBRARY", str(library))
    energy._nvml.cache_clear()
    yield file
    energy._nvml.cache_clear()


def test_what_is_used_from_now_on(counter):
    meter = energy.Meter(["GPU-0"])
    assert energy.joules_of("GPU-0") == 5000.0 and meter.joules() == 0.0
    counter.write_text("7500000")
    assert meter.joules() == 2500.0


def test_what_does_not_count_is_unknown(counter):
    assert energy.joules_of("GPU-1") is None and energy.joules_of("MIG-0") is None
    assert energy.Meter(["GPU-0", "GPU-1"]).joules() is None, "half of it is no answer"
    assert energy.Meter([]).joules() is None


def test_without_a_driver_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "LIBRARY", str(tmp_path / "none.so"))
    energy._nvml.cache_clear()
    assert energy.Meter(["GPU-0"]).joules() is None
    energy._nvml.cache_clear()


@pytest.fixture
def ran(session, user, data_dir, tiny_registered):
    """A job that held two GPUs for an hour and a half, in two attempts."""
    job = make_job(session, user, tiny_registered, make_dataset(session, user, data_dir))
    for number, (hours, joules) in enumerate([(1.0, 1.8e6), (0.5, 1.8e6)], 1):
        held = lifecycle.claim(session, job.id, "w", gpus=2)
        usage.record_energy(session, job.id, held.fence, joules)
        lifecycle.stopped(session, held, number)
        session.commit()
        use = session.query(MachineUse).filter_by(fence=held.fence).one()
        use.ended_at = use.started_at.replace(microsecond=0)
        use.started_at = use.ended_at.fromtimestamp(use.ended_at.timestamp() - hours * 3600, use.ended_at.tzinfo)
        session.commit()
    return job


def test_the_cost_of_a_job_where_it_is_known(session, ran, api, client, monkeypatch):
    path, page = f"/v1/fine_tuning/jobs/{ids.public(ids.JOB, ran.id)}", f"/jobs/{ids.public(ids.JOB, ran.id)}"
    cost = api.get(path).json()["cost"]
    assert cost == {"gpu_hours": pytest.approx(3.0), "kwh": pytest.approx(1.0), "amount": None, "currency": "EUR"}
    assert "Energy" in client.get(page).text
    monkeypatch.setattr(get_settings(), "price_per_gpu_hour", 2.5)
    monkeypatch.setattr(get_settings(), "price_per_kwh", 0.3)
    assert api.get(path).json()["cost"]["amount"] == pytest.approx(7.8)
    assert "7.80 EUR" in client.get(page).text
    session.query(MachineUse).update({"joules": None})
    session.commit()
    assert api.get(path).json()["cost"]["amount"] == pytest.approx(7.5)
    monkeypatch.setattr(get_settings(), "price_per_gpu_hour", None)
    assert api.get(path).json()["cost"] is None and "Cost" not in client.get(page).text


def test_metrics_have_tokens_and_energy(session, user, ran, api):

    with transaction() as own:
        limits.count_tokens(own, user.id, user.id, read=11, written=7)
    text = api.get("/metrics").text
    assert "luthier_read_tokens_total 11" in text and "luthier_generated_tokens_total 7" in text
    assert "luthier_gpu_energy_joules_total 3.6e+06" in text
