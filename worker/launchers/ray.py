"""Jobs train on the machines of a Ray cluster: each is a Ray job, asked for over the Jobs API of the cluster's dashboard.

    POST /api/jobs/              an entrypoint with the CPUs, GPUs and memory that it takes, under an id of ours
    GET  /api/jobs/              all of them, with their states
    POST /api/jobs/<id>/stop     SIGTERM, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S

Nothing of Ray is needed in this worker, so the cluster may have any version that has this API (2.x). Its machines need this package with
the extra `gpu`, and the addresses and keys of the studio in their environment. (https://docs.ray.io/en/latest/cluster/running-applications/job-submission/rest.html)
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any, ClassVar

from app.errors import BadField
from app.settings import get_settings
from worker.launchers import _http
from worker.launchers._elsewhere import EngineLauncher, HandedOver, HandedState, HandOver, is_ours

STATES: dict[str, HandedState] = {"PENDING": "waits", "RUNNING": "runs"}
"""What Ray's states stand for; all others are ends."""
LEAVE_SECONDS = 30.0
"""Time to store what was saved, beyond that for saving."""


class RayLauncher(EngineLauncher):
    name: ClassVar[str] = "ray"
    title: ClassVar[str] = "Ray"

    def __init__(self) -> None:
        self.url = get_settings().launcher_url.rstrip("/")
        if not self.url:
            raise BadField(
                "LUTHIER_LAUNCHER=ray needs LUTHIER_LAUNCHER_URL.",
                hint="It is the address of Ray's dashboard, as http://head:8265.",
                param="launcher_url",
            )

    def handed(self) -> Sequence[HandedOver]:
        ours = [one for one in self._ask("GET", "") if is_ours(one.get("submission_id") or "")]
        return [
            HandedOver(
                one["submission_id"], STATES.get(one["status"], "ended"), one.get("message") or "", (one.get("end_time") or 0) / 1000
            )
            for one in ours
        ]

    def hand_over(self, work: HandOver) -> None:
        try:
            self._ask("POST", "", request_of(work))
        except _http.EngineRefuses as error:
            if "already exists" not in error.message:
                raise

    def take_back(self, name: str) -> None:
        self._ask("POST", f"{name}/stop")

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return _http.ask(self.title, method, f"{self.url}/api/jobs/{path}", body=body)


def request_of(work: HandOver) -> dict[str, Any]:
    """What Ray is asked for. All processes of a job are on one machine, so one entrypoint takes what all of them need."""
    wait = {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(get_settings().stop_grace_seconds + LEAVE_SECONDS))}
    asked: dict[str, Any] = {
        "submission_id": work.name,
        "entrypoint": f"exec {shlex.join(work.command)}",
        "entrypoint_num_cpus": work.processes,
        "runtime_env": {"env_vars": work.environment | wait},
        "metadata": {"luthier_job": str(work.job_id)},
    }
    if work.on_gpu:
        asked["entrypoint_num_gpus"] = work.processes
    if work.memory_bytes:
        asked["entrypoint_memory"] = work.memory_bytes
    if work.on_gpu and work.needs.gpu_type:
        asked["entrypoint_resources"] = {f"accelerator_type:{work.needs.gpu_type.upper()}": 0.001}
    return asked
