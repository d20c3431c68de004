"""MLflow, by its REST API (https://mlflow.org/docs/latest/api_reference/rest-api.html): a run in an experiment."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from app.kit.addresses import Address
from app.trackers._base import Point, SentState, TrackedJob, Tracker, chosen_server, chunks, json_number
from app.trackers._http import Refusal, ask

STATUS = {"running": "RUNNING", "succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
METRICS_AT_ONCE, PARAMETERS_AT_ONCE = 500, 100
"""Of one request; MLflow takes 1000 and 100, and needs seconds for as many."""
MAX_PARAMETER_LENGTH = 500
"""Of older servers; newer ones take 6000 characters."""
TAG = "luthier_job"
"""The tag by which a run is found again whose creation was not recorded."""


class Mlflow(Tracker):
    """A run of an MLflow server."""

    kind = "mlflow"
    title = "MLflow"

    experiment: Annotated[str, StringConstraints(min_length=1, max_length=250)] = Field(
        "luthier", description="Created where it is missing."
    )
    name: Annotated[str, StringConstraints(max_length=250)] | None = Field(None, description="Name of the run; otherwise that of the job.")
    tags: (
        dict[Annotated[str, StringConstraints(min_length=1, max_length=250)], Annotated[str, StringConstraints(max_length=500)]] | None
    ) = Field(None, max_length=50)
    tracking_uri: Annotated[str, StringConstraints(max_length=500)] | None = Field(
        None, description="One of the servers in LUTHIER_MLFLOW; otherwise the first."
    )

    def check(self) -> None:
        chosen_server(self.kind, self.tracking_uri)

    def send(self, job: TrackedJob, points: Sequence[Point], state: SentState, beat: Callable[[], None]) -> SentState:
        server = _Server(chosen_server(self.kind, self.tracking_uri))
        if "run_id" not in state:
            state = self._begin(server, job)
        run_id = state["run_id"]
        for some in chunks(_metrics(points), METRICS_AT_ONCE):
            beat()
            server.post("runs/log-batch", {"run_id": run_id, "metrics": some})
        if job.error:
            server.post("runs/set-tag", {"run_id": run_id, "key": "luthier_error", "value": job.error[:MAX_PARAMETER_LENGTH]})
        if state.get("status") != job.status:
            ended = {"end_time": int(job.ended_at * 1000)} if job.ended_at is not None else {}
            server.post("runs/update", {"run_id": run_id, "status": STATUS[job.status], **ended})
        return {**state, "status": job.status}

    def _begin(self, server: _Server, job: TrackedJob) -> SentState:
        """The run of a job, made or found, with its parameters."""
        experiment = server.experiment(self.experiment)
        run_id = server.find_run(experiment, job) or server.create_run(experiment, job, self.name or job.name, self.tags or {})
        given = [{"key": name, "value": str(value)[:MAX_PARAMETER_LENGTH]} for name, value in job.parameters.items()]
        for some in chunks(given, PARAMETERS_AT_ONCE):
            server.post("runs/log-batch", {"run_id": run_id, "params": some})
        return {"run_id": run_id, "url": f"{server.address.url}/#/experiments/{experiment}/runs/{run_id}", "status": "running"}


def _metrics(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Every figure. The server keeps one of equal key, time, step and value, so that one that comes twice is there once."""
    return [
        {"key": tag, "value": json_number(value), "timestamp": int(point.at * 1000), "step": point.step}
        for point in points
        for tag, value in point.values.items()
    ]


class _Server:
    """The calls of the REST API that a run needs."""

    def __init__(self, address: Address) -> None:
        self.address, self.headers = address, {}
        if address.key and address.user:
            pair = base64.b64encode(f"{address.user}:{address.key}".encode()).decode()
            self.headers = {"authorization": f"Basic {pair}"}
        elif address.key:
            self.headers = {"authorization": f"Bearer {address.key}"}

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return ask("MLflow", self.address, "POST", f"/api/2.0/mlflow/{path}", self.headers, json=body)

    def experiment(self, name: str) -> str:
        """The id of an experiment, which is created where it is missing."""
        found = self._experiment(name)
        if found is None:
            try:
                found = str(self.post("experiments/create", {"name": name})["experiment_id"])
            except Refusal as refusal:
                if refusal.name != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._experiment(name)
        assert found is not None
        return found

    def _experiment(self, name: str) -> str | None:
        try:
            asked = {"params": {"experiment_name": name}}
            found = ask("MLflow", self.address, "GET", "/api/2.0/mlflow/experiments/get-by-name", self.headers, **asked)
        except Refusal as refusal:
            if refusal.name == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return str(found["experiment"]["experiment_id"])

    def find_run(self, experiment: str, job: TrackedJob) -> str | None:
        asked = {"experiment_ids": [experiment], "filter": f"tags.{TAG} = '{job.public_id}'", "max_results": 1}
        runs = self.post("runs/search", asked).get("runs") or []
        return str(runs[0]["info"]["run_id"]) if runs else None

    def create_run(self, experiment: str, job: TrackedJob, name: str, tags: dict[str, str]) -> str:
        told = {**tags, TAG: job.public_id, "luthier_url": job.url, "mlflow.note.content": f"[The run in Luthier]({job.url})"}
        made = self.post("runs/create", {
            "experiment_id": experiment, "run_name": name, "start_time": int(job.started_at * 1000),
            "tags": [{"key": key, "value": value} for key, value in told.items()],
        })  # fmt: skip
        return str(made["run"]["info"]["run_id"])
