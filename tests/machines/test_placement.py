"""What a job needs of a machine, what one has, and the words for it."""

from __future__ import annotations

import pytest

from app.machines.gpus import GpuCard
from app.machines.hardware import Machine
from app.machines.placement import Capacity, GpuKind, Needs, Resources, capacity_of, matching, weakest, why_nowhere

GB = 10**9
T4, H100 = GpuKind(16 * GB, "Tesla T4"), GpuKind(80 * GB, "NVIDIA H100 80GB HBM3")
CPU = Capacity("near", memory_bytes=32 * GB, labels=("quiet",))
SMALL = Capacity("small", (T4, T4), 64 * GB, cuda=True)
BIG = Capacity("big", (T4, H100, H100), 256 * GB, ("team-x", "nvlink"), cuda=True)


@pytest.mark.parametrize(
    "needs, fits",
    [
        (Needs(), (True, True, True)),
        (Needs(gpu_bytes=16 * GB, cpu_bytes=32 * GB), (True, True, True)),
        (Needs(gpu_bytes=40 * GB, cpu_bytes=None), (False, False, True)),
        (Needs(gpu_bytes=40 * GB, cpu_bytes=20 * GB), (True, False, True)),  # a machine with GPUs trains on them
        (Needs(gpu_bytes=None, cpu_bytes=40 * GB), (False, True, True)),
        (Needs(gpu_bytes=1, cpu_bytes=None, num_gpus=2), (False, True, True)),
        (Needs(gpu_bytes=17 * GB, cpu_bytes=None, num_gpus=2), (False, False, True)),
        (Needs(gpu_bytes=17 * GB, cpu_bytes=None, num_gpus=3), (False, False, False)),
        (Needs(cpu_bytes=None, gpu_type="h100"), (False, False, True)),
        (Needs(cpu_bytes=None, gpu_type="t4", num_gpus=2), (False, True, False)),
        (Needs(labels=("quiet",)), (True, False, False)),
        (Needs(labels=("nvlink", "team-x")), (False, False, True)),
        (Needs(labels=("nvlink", "quiet")), (False, False, False)),
    ],
)
def test_what_fits_where(needs, fits):
    assert tuple(one.fits(needs) for one in (CPU, SMALL, BIG)) == fits
    assert (why_nowhere(needs, [CPU, SMALL, BIG]) is None) == any(fits)


def test_processes_of_a_job_share_the_memory_and_take_a_gpu_each():
    assert Capacity("two", memory_bytes=32 * GB, processes=2).fits(Needs(cpu_bytes=16 * GB))
    assert not Capacity("two", memory_bytes=32 * GB, processes=2).fits(Needs(cpu_bytes=17 * GB))
    assert not Capacity("two", (H100,), 32 * GB, processes=2, cuda=True).fits(Needs())


def test_gpus_that_are_kept_for_a_job_are_no_longer_free():
    left = BIG.without_cards_for(Needs(gpu_bytes=40 * GB, num_gpus=2))
    assert left.cards == (T4,) and left.fits(Needs(gpu_bytes=GB)) and left.cuda


def test_the_words():
    why = why_nowhere(Needs(90 * GB, None, 2, "H100", ("team-x",)), [SMALL, BIG, CPU, CPU])
    assert why == (
        "No train worker can take it: it needs 2 GPUs H100 of one machine with 90 GB each, and the label team-x. There is "
        "small: 2 × Tesla T4 (16 GB); big [team-x, nvlink]: 1 × Tesla T4 (16 GB), 2 × NVIDIA H100 80GB HBM3 (80 GB); "
        "near [quiet]: CPU, 32 GB; and 1 more."
    )
    assert "it needs 48 GB of memory. There is near" in why_nowhere(Needs(None, 48 * GB), [CPU])
    assert "a GPU with 90 GB, or 40 GB of memory without a GPU" in why_nowhere(Needs(90 * GB, 40 * GB), [CPU])
    assert why_nowhere(Needs(labels=("a",)), []) is None, "nothing is known of any worker"


def test_a_job_is_planned_for_machines_that_have_what_it_asks_for():
    cards = (GpuCard("GPU-a", 9.0, 80 * GB, "H100"), GpuCard("GPU-b", 9.0, 80 * GB, "H100"))
    cpu = Machine(cores=8, memory_bytes=512 * GB)
    big = Machine(cores=8, memory_bytes=64 * GB, gpu_name="H100", gpu_memory_bytes=80 * GB, cards=cards, labels=("x",))
    old = Machine(cores=8, memory_bytes=64 * GB, gpu_name="T4", gpu_memory_bytes=16 * GB)  # of a worker that tells no cards
    there = [big, cpu, old]
    assert weakest(there) == [cpu, old, big] and Machine.model_validate(big.model_dump(mode="json")) == big
    assert capacity_of("old", old).cards == (GpuKind(16 * GB, "T4"),)
    assert matching(there, None, "cuda") == [big, old] and matching(there, None, "cpu") == there
    assert matching(there, Resources(gpus=2), "auto") == [big] == matching(there, Resources(gpu="h1"), "auto")
    assert matching(there, Resources(gpu_memory_bytes=20 * GB), "auto") == [big] == matching(there, Resources(labels=("x",)), "auto")
    assert matching(there, Resources(gpus=3), "auto") == []
