"""What a job needs of a machine: what its request asks for, and the memory of its estimate where every layer is recomputed that may be."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.errors import BadField
from app.machines import heartbeats
from app.machines.hardware import Machine
from app.machines.placement import Resources
from app.planning import duration, feasibility
from app.spec import JobSpec
from app.tables import JSON, Dataset

NO_ROOM_BYTES = 1
"""The memory of a machine on which a plan takes as little as it can."""


def columns(session: Session, spec: JobSpec, asked: Resources | None) -> JSON:
    """The columns of a job that say it. Bytes are 0 while its rows are not known, or no machine with a GPU is; None where it does not train
    there."""
    wanted = asked or Resources()
    machine = heartbeats.training_machine(asked, spec.run.device)
    card = next((one for one in heartbeats.training_machines(asked, spec.run.device) if one.cuda), None)
    on_gpu, on_cpu = spec.run.device != "cpu", not wanted.on_gpu and trains_on_cpu(spec, machine)
    gpu_bytes = _least_bytes(session, spec, card.model_copy(update={"gpu_memory_bytes": NO_ROOM_BYTES})) if on_gpu and card else 0
    cpu_bytes = _least_bytes(session, spec, machine.on("cpu").model_copy(update={"memory_bytes": NO_ROOM_BYTES})) if on_cpu else None
    return {
        "num_gpus": wanted.gpus,
        "num_machines": wanted.machines,
        "gpu_type": wanted.gpu,
        "labels": list(wanted.labels),
        "gpu_bytes": max(gpu_bytes, wanted.gpu_memory_bytes or 0) if on_gpu else None,
        "cpu_bytes": cpu_bytes,
    }


def trains_on_cpu(spec: JobSpec, machine: Machine) -> bool:
    """Whether nothing of its settings needs a GPU."""
    if spec.strategy.unavailable(spec.model.shape, task=spec.task, cuda=False):
        return False
    try:
        feasibility.refuse_without_gpu(spec.strategy, spec.run, spec.task, machine.on("cpu"))
    except BadField:
        return False
    return True


def _least_bytes(session: Session, spec: JobSpec, machine: Machine) -> int:
    from app.datasets import inspections

    if not spec.dataset.path:
        return 0
    stats = inspections.stats_for(session, session.get_one(Dataset, spec.dataset.id), spec.model)
    checked_on = inspections.stats_for(session, session.get_one(Dataset, spec.validation.id), spec.model) if spec.validation else None
    return duration.estimate(spec, stats, machine, checked_on).memory_bytes
