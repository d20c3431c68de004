"""Jobs train in pods: each is a Job of Kubernetes, made from a manifest of the operator's, over the plain API of the cluster.

The manifest (LUTHIER_LAUNCHER_TEMPLATE, YAML) says all that the studio cannot know: image, service account, Secrets, volumes, node selector,
and with the label `kueue.x-k8s.io/queue-name` and `suspend: true` the queue of Kueue, which then decides on quota, order and preemption. Here
only name, command, environment and what the job needs are put into it. States are asked for and not watched, so there is no watch to be cut.

    POST   /apis/batch/v1/namespaces/<ns>/jobs           409: it is there already; 403: a quota or a role refuses it
    GET    /apis/batch/v1/namespaces/<ns>/jobs?limit=…   in pages; 410: the list has changed too much, and is begun again
    DELETE /apis/batch/v1/namespaces/<ns>/jobs/<name>
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import yaml

from app.errors import BadField
from app.settings import get_settings
from worker.launchers import _http
from worker.launchers._elsewhere import EngineLauncher, HandedOver, HandOver, is_ours

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Token, certificate and namespace of the pod that this worker runs in."""
LABEL = "app.kubernetes.io/managed-by"
MANAGER = "luthier-launcher"
PAGE = 500
BEGUN_AGAIN = 3
"""How often a list that has changed too much is begun."""
REMEMBERED_SECONDS = 7200
"""How long a Job is kept after its end where the manifest does not say: longer than the longest pause before it is tried again."""


class KubernetesLauncher(EngineLauncher):
    name: ClassVar[str] = "kubernetes"
    title: ClassVar[str] = "Kubernetes"

    def __init__(self) -> None:
        settings = get_settings()
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        self.url = settings.launcher_url.rstrip("/") or (f"https://{host}:{port}" if host else "")
        if not self.url:
            raise BadField(
                "LUTHIER_LAUNCHER=kubernetes finds no cluster.",
                hint="Run the worker in a pod, or set LUTHIER_LAUNCHER_URL.",
                param="launcher_url",
            )
        self.namespace = _account("namespace") or "default"
        self.manifest = _read_manifest(settings.launcher_template)

    def handed(self) -> Sequence[HandedOver]:
        return [_state_of(one) for one in self._jobs() if is_ours(one["metadata"]["name"])]

    def hand_over(self, work: HandOver) -> None:
        try:
            self._ask("POST", body=manifest_of(self.manifest, work))
        except _http.EngineRefuses as error:
            if error.status_code != 409:
                raise

    def take_back(self, name: str) -> None:
        try:
            self._ask("DELETE", f"/{name}?propagationPolicy=Background")
        except _http.EngineRefuses as error:
            if error.status_code != 404:
                raise

    def _jobs(self) -> list[dict[str, Any]]:
        for _ in range(BEGUN_AGAIN):
            try:
                return list(self._pages())
            except _http.EngineRefuses as error:
                if error.status_code != 410:
                    raise
        raise _http.EngineAway("Kubernetes cannot list its jobs: they change faster than they are read.")

    def _pages(self) -> Iterator[dict[str, Any]]:
        more = ""
        while True:
            page = self._ask("GET", f"?labelSelector={quote(f'{LABEL}={MANAGER}')}&limit={PAGE}{more and f'&continue={quote(more)}'}")
            yield from page.get("items") or []
            more = page.get("metadata", {}).get("continue") or ""
            if not more:
                return

    def _ask(self, method: str, rest: str = "", body: Any = None) -> Any:
        """The token is read each time: it is replaced every hour."""
        token, trusted = _account("token"), ACCOUNT / "ca.crt"
        url = f"{self.url}/apis/batch/v1/namespaces/{self.namespace}/jobs{rest}"
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return _http.ask(self.title, method, url, headers=headers, verify=_trusting(trusted), body=body)


def _trusting(certificate: Path) -> Any:
    import ssl

    return ssl.create_default_context(cafile=str(certificate)) if certificate.is_file() else True


def _account(name: str) -> str:
    try:
        return (ACCOUNT / name).read_text().strip()
    except OSError:
        return ""


def _read_manifest(path: Path | None) -> dict[str, Any]:
    """The operator's manifest. Raises BadField for one that is none."""
    hint = "docs/deploy.md shows one; the Helm chart makes it."
    if path is None:
        raise BadField("LUTHIER_LAUNCHER=kubernetes needs LUTHIER_LAUNCHER_TEMPLATE.", hint=hint, param="launcher_template")
    try:
        found = yaml.safe_load(path.read_text())
        if found["kind"] != "Job" or not found["spec"]["template"]["spec"]["containers"][0]["image"]:
            raise ValueError("it is no Job with an image")
    except (OSError, ValueError, KeyError, TypeError, IndexError, yaml.YAMLError) as error:
        raise BadField(f"{path} is not the manifest of a Job: {str(error)[:200]}", hint=hint, param="launcher_template") from None
    return dict(found)


def manifest_of(template: dict[str, Any], work: HandOver) -> dict[str, Any]:
    """The Job of one attempt. It runs once: what becomes of a lost attempt is decided here, and not by Kubernetes."""
    made = copy.deepcopy(template)
    metadata, spec = made.setdefault("metadata", {}), made["spec"]
    metadata["name"] = work.name
    metadata["labels"] = (metadata.get("labels") or {}) | {LABEL: MANAGER}
    metadata["annotations"] = (metadata.get("annotations") or {}) | {"luthier/job": str(work.job_id)}
    spec["backoffLimit"] = 0
    spec.setdefault("ttlSecondsAfterFinished", REMEMBERED_SECONDS)
    pod = spec["template"]["spec"]
    pod["restartPolicy"] = "Never"
    container = pod["containers"][0]
    container["command"] = work.command
    named = {one["name"]: one for one in container.get("env") or []}
    container["env"] = list((named | {name: {"name": name, "value": value} for name, value in work.environment.items()}).values())
    resources = container.setdefault("resources", {})
    if work.on_gpu:
        resources["limits"] = (resources.get("limits") or {}) | {"nvidia.com/gpu": work.processes}
    if work.memory_bytes:
        resources["requests"] = (resources.get("requests") or {}) | {"memory": str(work.memory_bytes)}
    return made


def _state_of(job: dict[str, Any]) -> HandedOver:
    status, name = job.get("status") or {}, job["metadata"]["name"]
    for condition in status.get("conditions") or []:
        if condition.get("type") in ("Complete", "Failed") and condition.get("status") == "True":
            ended = status.get("completionTime") or condition.get("lastTransitionTime")
            at = datetime.fromisoformat(ended).timestamp() if ended else 0.0
            return HandedOver(name, "ended", condition.get("message") or condition.get("reason") or "", at)
    runs = not job["spec"].get("suspend") and (status.get("ready") or 0) > 0
    return HandedOver(name, "runs" if runs else "waits")
