"""Jobs that are handed over to Kubernetes: what it is asked for, and what is made of its answers, the bad ones too."""

from __future__ import annotations

import json
import uuid

import pytest
import yaml

from app.db import transaction
from app.errors import BadField
from app.jobs import service as jobs
from app.machines import heartbeats
from app.machines.placement import Needs
from app.settings import get_settings
from tests.conftest import forget_settings
from tests.factories import make_dataset, make_job
from tests.worker.launchers.engine import StandInKubernetes, serve
from tests.worker.launchers.test_elsewhere import name_of, turn
from tests.worker.supervision.test_train_attempt import RUN, now_of, said
from worker import launchers
from worker.launchers import _elsewhere, kubernetes
from worker.launchers._elsewhere import HandOver

TEMPLATE = """
apiVersion: batch/v1
kind: Job
metadata:
  labels: {kueue.x-k8s.io/queue-name: team, app.kubernetes.io/part-of: luthier}
spec:
  suspend: true
  backoffLimit: 4
  template:
    spec:
      serviceAccountName: trainer
      containers:
        - name: trainer
          image: luthier-gpu:0.2.0
          env: [{name: LUTHIER_DATA_DIR, value: /data}, {name: LUTHIER_LABELS, value: old}]
          envFrom: [{secretRef: {name: luthier-environment}}]
          resources: {limits: {memory: 32Gi}}
"""


@pytest.fixture
def engine(session, monkeypatch, tmp_path):
    (account := tmp_path / "account").mkdir()
    (account / "token").write_text("first-token\n")
    (tmp_path / "job.yaml").write_text(TEMPLATE)
    monkeypatch.setattr(kubernetes, "ACCOUNT", account)
    with serve(StandInKubernetes()) as running:
        for name, value in {"LAUNCHER": "kubernetes", "LAUNCHER_URL": running.url, "LAUNCHER_TEMPLATE": str(tmp_path / "job.yaml")}.items():
            monkeypatch.setenv(f"LUTHIER_{name}", value)
        monkeypatch.setenv("LUTHIER_LABELS", "lab")
        forget_settings()
        launchers._made.cache_clear()
        yield running
    launchers._made.cache_clear()


@pytest.fixture
def new_job(engine, session, user, data_dir, tiny_registered):
    dataset = make_dataset(session, user, data_dir)
    return lambda **run: make_job(session, user, tiny_registered, dataset, **(RUN | run))


def test_the_life_of_what_is_handed_over(engine, new_job, user, monkeypatch, tmp_path):
    first, second, third = (new_job() for _ in range(3))
    for _ in range(4):
        turn()
    assert list(engine.jobs) == [name_of(job) for job in (first, second, third)], "a list in pages is read to its end"
    turn()
    assert len(engine.jobs) == 3 and {now_of(job).status for job in (first, second, third)} == {"queued"}
    engine.run(name_of(first))
    with transaction() as session:
        jobs.cancel(session, user, second.id)
    (tmp_path / "account" / "token").write_text("second-token\n")
    engine.end(name_of(third), "Failed", "Job has reached the specified backoff limit")
    turn()
    assert sorted(engine.jobs) == sorted([name_of(first), name_of(third)]), "what waits and is cancelled is removed, what runs is not"
    assert [event.data["message"] for event in said(third, "log")] == [
        "Kubernetes could not begin with it (1 attempt): Job has reached the specified backoff limit"
    ]
    assert engine.asked[-1][2] == "Bearer second-token" and engine.asked[0][2] == "Bearer first-token"
    monkeypatch.setattr(_elsewhere, "AGAIN_SECONDS", 0.0)
    turn()
    assert name_of(third, number=1) in engine.jobs


def test_bad_answers_lose_nothing_and_hand_nothing_over_twice(engine, new_job):
    made = [new_job() for _ in range(3)]
    for answers, words in (
        ([500], "Kubernetes answers 500: told to answer 500"),
        ([429], "Kubernetes answers 429. It is asked again."),
        ([None], "does not answer"),
        ([410, 410, 410], "they change faster than they are read"),
    ):
        engine.next_answers = list(answers)
        turn()
        assert words in (heartbeats.launcher_words() or ""), answers
        assert not engine.jobs and not engine.next_answers
    engine.next_answers = [410]  # a list that has changed is begun again
    turn()
    assert list(engine.jobs) == [name_of(made[0])] and heartbeats.launcher_words() is None
    launchers.current().hand_over(HandOver(made[0].id, name_of(made[0]), Needs(), 1, False))  # 409: another worker was faster
    engine.quota = 1
    turn()
    assert "exceeded quota: team" in heartbeats.launcher_words() and list(engine.jobs) == [name_of(made[0])]
    engine.quota = 9
    turn()
    assert list(engine.jobs) == [name_of(job) for job in made[:2]]
    launchers.current().take_back(name_of(made[2]))  # 404: it is gone already
    assert {now_of(job).status for job in made} == {"queued"}


def test_what_is_suspended_again_waits_and_is_taken_back_once_its_attempt_is_over(engine, new_job):
    """Kueue preempts: its pod saves and leaves, so the job is queued under another fence, and its Job would start it too."""
    job = new_job()
    turn()
    engine.run(name_of(job))
    with transaction() as session:
        session.get_one(type(job), job.id).fence = 1  # claimed by its pod, and queued again
    engine.jobs[name_of(job)]["spec"]["suspend"] = True
    engine.jobs[name_of(job)]["status"] = {}
    turn()
    assert list(engine.jobs) == [name_of(job, fence=2)]


def test_the_manifest_is_the_operators_with_what_the_job_needs(engine, monkeypatch):
    validate = pytest.importorskip(
        "kubernetes_validate", reason="the schemas of Kubernetes are not installed: pip install kubernetes-validate"
    )
    monkeypatch.setenv("LUTHIER_DATABASE_URL", "postgresql+psycopg://luthier:hush@db/luthier")
    template, key = yaml.safe_load(TEMPLATE), uuid.uuid4()
    made = kubernetes.manifest_of(template, HandOver(key, name := f"luthier-0badcafe-{key.hex}-1-0", Needs(70 * 10**9), 4, on_gpu=True))
    validate.validate(made, "1.34", strict=True)
    assert template == yaml.safe_load(TEMPLATE), "the operator's manifest was changed"
    assert made["metadata"]["name"] == name and made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert made["spec"]["suspend"] is True and made["spec"]["backoffLimit"] == 0 and made["spec"]["ttlSecondsAfterFinished"] == 7200
    pod = made["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["restartPolicy"] == "Never" and pod["serviceAccountName"] == "trainer"
    assert container["command"] == ["python", "-m", "worker.launchers.carry", "--job", str(key)]
    assert container["resources"] == {"limits": {"memory": "32Gi", "nvidia.com/gpu": 4}}
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert (
        environment["LUTHIER_DATA_DIR"] == "/data" and environment["LUTHIER_LABELS"] == "lab" and environment["LUTHIER_LAUNCHER"] == "local"
    )
    assert "hush" not in json.dumps(made)
    on_cpu = kubernetes.manifest_of(template, HandOver(key, name, Needs(None, 3 * 10**9), 2, on_gpu=False))
    assert on_cpu["spec"]["template"]["spec"]["containers"][0]["resources"] == {
        "limits": {"memory": "32Gi"},
        "requests": {"memory": "6000000000"},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [("kind: Pod", "it is no Job"), ("kind: Job", "'spec'"), ("{", "while parsing"), ("- a", "list indices"), (None, "No such file")],
)
def test_a_manifest_that_cannot_be_used_is_refused_at_the_start(engine, monkeypatch, tmp_path, text, said):
    path = tmp_path / "other.yaml"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(get_settings(), "launcher_template", path)
    with pytest.raises(BadField, match=r"other\.yaml is not the manifest of a Job") as refused:
        kubernetes.KubernetesLauncher()
    assert said in refused.value.message
    monkeypatch.setattr(get_settings(), "launcher_template", None)
    with pytest.raises(BadField, match="needs LUTHIER_LAUNCHER_TEMPLATE"):
        kubernetes.KubernetesLauncher()
    monkeypatch.setattr(get_settings(), "launcher_url", "")
    with pytest.raises(BadField, match="finds no cluster"):
        kubernetes.KubernetesLauncher()
