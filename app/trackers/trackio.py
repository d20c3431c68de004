"""Trackio, by the HTTP API of a server that runs `trackio show` (https://huggingface.co/docs/trackio/self_hosted_server)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import Field, StringConstraints

from app.trackers._base import Point, SentState, TrackedJob, Tracker, chosen_server, chunks, json_number
from app.trackers._http import ask

LOGS_AT_ONCE = 500


class Trackio(Tracker):
    """A run in a project of a Trackio server."""

    kind = "trackio"
    title = "Trackio"

    project: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")] = "luthier"
    name: Annotated[str, StringConstraints(max_length=200)] | None = Field(None, description="Name of the run; otherwise that of the job.")
    server_url: Annotated[str, StringConstraints(max_length=500)] | None = Field(
        None, description="One of the servers in LUTHIER_TRACKIO; otherwise the first."
    )

    def check(self) -> None:
        chosen_server(self.kind, self.server_url)

    def send(self, job: TrackedJob, points: Sequence[Point], state: SentState, beat: Callable[[], None]) -> SentState:
        server = chosen_server(self.kind, self.server_url)
        name = self.name or f"{job.name}-{job.key.hex[:8]}"
        run: dict[str, Any] = {"project": self.project, "run": name, "run_id": job.key.hex}
        config = {**job.parameters, "luthier_url": job.url, "luthier_job": job.public_id}
        headers = {"x-trackio-write-token": server.key} if server.key else {}
        step = points[-1].step if points else int(state.get("step", 0))
        for some in chunks(_logs(job, points, step), LOGS_AT_ONCE):
            beat()
            logs = [{**run, "config": config, **log} for log in some]
            ask(self.title, server, "POST", "/api/bulk_log", headers, json={"logs": logs, "hf_token": None})
        return {"url": f"{server.url}/?project={quote(self.project)}", "step": step, "status": job.status}


def _logs(job: TrackedJob, points: Sequence[Point], last: int) -> list[dict[str, Any]]:
    """One log for each point, and one for the end, which Trackio has no other place for. The server takes the id of a log once."""
    found = [(point.step, f"{point.kind}-{point.step}", point.values) for point in points]
    if job.ended:
        found.append((last, f"ended-{job.status}", {"luthier/succeeded": float(job.status == "succeeded")}))
    return [
        {"step": step, "log_id": f"{job.key.hex}-{name}", "metrics": {tag: json_number(value) for tag, value in values.items()}}
        for step, name, values in found
    ]
