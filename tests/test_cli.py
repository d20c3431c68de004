"""The commands: what they print, their exit codes, and that a fault is two sentences and no traceback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from app.cli import app, event_line, laid_over, read_spec
from app.errors import BadData, BadField, StudioError
from app.jobs import service as jobs
from app.jobs.local import spec_of
from app.kit import ids
from app.ops import doctor
from app.settings import get_settings
from app.tables import ApiKey, Job, Model

run = CliRunner()


def luthier(*arguments: str, code: int = 0):
    done = run.invoke(app, list(arguments))
    assert done.exit_code == code, (done.output, done.exception)
    assert "Traceback" not in done.output
    return done


def test_a_key_is_printed_alone_and_works(session, user, api):
    done = luthier("keys", "create", "laptop")
    key = done.stdout.strip()
    assert done.stdout == f"{key}\n"
    assert api.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    session.expire_all()
    assert {row.name for row in session.query(ApiKey)} == {"laptop", "tests"}


def test_a_link_signs_in(session, user, web):
    from starlette.testclient import TestClient

    link = luthier("link").stdout.strip()
    assert link.startswith("http://127.0.0.1:8000/sign-in/")
    assert TestClient(web.app, base_url="http://127.0.0.1:8000").get(link).status_code == 200


def test_people_are_let_in_and_out(session, user, web):
    from starlette.testclient import TestClient

    link = luthier("users", "invite", "--role", "viewer", "--days", "1").stdout.strip()
    browser = TestClient(web.app, base_url="http://127.0.0.1:8000", headers={"origin": "http://127.0.0.1:8000"})
    assert browser.post(link, data={"name": "Ada", "password": "spruce and maple"}, follow_redirects=False).status_code == 303
    assert re.search(r"Ada +viewer +active", luthier("users", "list").stdout)
    luthier("users", "role", "Ada", "member")
    luthier("users", "disable", "Ada")
    assert re.search(r"Ada +member +disabled", luthier("users", "list").stdout)
    assert browser.get("/", follow_redirects=False).status_code == 303
    luthier("users", "enable", "Ada")
    assert browser.get(luthier("link", "Ada").stdout.strip(), follow_redirects=False).headers["location"] == "/"
    luthier("users", "reset-two-step", "Ada")
    assert "only admin" in luthier("users", "disable", "owner", code=1).output
    assert "Nobody here" in luthier("users", "role", "Bo", "viewer", code=1).output


def test_status_of_nothing(data_dir):
    assert "No studio is running" in luthier("status", code=3).stdout


def test_jobs_of_nobody(session, user):
    assert "No jobs yet." in luthier("jobs").stdout


@pytest.mark.long
def test_a_folder_becomes_a_model(session, user, tiny_model):
    done = luthier("models", "add", "small", "--path", str(tiny_model))
    assert "small is here." in done.stdout
    model = session.query(Model).one()
    assert (model.name, model.status) == ("small", "ready")
    assert (get_settings().data_dir / model.path / "config.json").exists()


def test_an_unknown_starter_is_named(session, user):
    done = luthier("models", "add", "no-such-model", code=1)
    assert "no-such-model" in done.stderr


def test_a_model_under_terms_is_not_brought_without_them(session, user):
    done = luthier("models", "add", "gemma-3-270m", code=1)
    assert "accept" in done.stderr
    assert session.query(Model).count() == 0


def test_training_without_a_studio_says_how_to_start_one(data_dir, tmp_path):
    spec = tmp_path / "job.yaml"
    spec.write_text("model: tiny\n")
    assert "luthier up" in luthier("train", str(spec), code=1).stderr


def test_a_job_from_a_file(session, user, tiny_registered, tmp_path):
    """The rows beside the YAML file are uploaded; the variant's settings are laid over the others."""
    rows = [
        {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": f"Answer {n}."}]} for n in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    order = {
        "model": "tiny",
        "training_file": "rows.jsonl",
        "strategy": {"name": "lora", "rank": 4},
        "variants": {"small": {"strategy": {"rank": 2}}},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(order))
    done = luthier("train", str(tmp_path / "job.yaml"), "--variant", "small", "--no-follow")
    key = ids.parse(ids.JOB, done.stdout.split()[1])
    job = jobs.get(session, user, key)
    assert job.status == "queued"
    assert job.order["strategy"] == {"name": "lora", "rank": 2}
    assert key.hex in luthier("jobs").stdout


def test_a_job_whose_rows_are_missing(session, user, tiny_registered, tmp_path):
    (tmp_path / "job.yaml").write_text("model: tiny\ntraining_file: nowhere.jsonl\n")
    done = luthier("train", str(tmp_path / "job.yaml"), code=1)
    assert "nowhere.jsonl" in done.stderr and "training_file" in done.stderr
    assert session.query(Job).count() == 0


@pytest.mark.parametrize(("text", "error"), [("a: [", BadData), ("- 1\n", BadData), ("", BadData)])
def test_a_file_that_holds_no_order(tmp_path, text, error):
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(error, match=r"job\.yaml"):
        read_spec(tmp_path / "job.yaml", None)


def test_a_variant_that_is_not_there_names_those_that_are(tmp_path):
    (tmp_path / "job.yaml").write_text("model: tiny\nvariants: {small: {}, large: {}}\n")
    with pytest.raises(BadField, match="small, large"):
        read_spec(tmp_path / "job.yaml", "huge")


def test_settings_are_laid_over_key_by_key():
    assert laid_over({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}, "d": {"e": 4}}) == {"a": {"b": 9, "c": 2}, "d": {"e": 4}}


def test_a_wrong_setting_is_named(data_dir, monkeypatch):
    monkeypatch.setenv("LUTHIER_LEASE_SECONDS", "soon")
    assert "LUTHIER_LEASE_SECONDS" in luthier("status", code=1).stderr


def test_event_lines():
    step = {"step": 3, "loss": 1.25, "tokens_per_second": 812.3}
    assert event_line("step", step, 10) == "step 3/10: loss 1.2500, 812 tokens/s"
    assert event_line("evaluated", {"step": 4, "loss": 2.0}, 10) == "step 4: validation loss 2.0000"


def test_doctor_looks_at_everything(data_dir):
    done = luthier("doctor")
    for word in (
        "python",
        "torch",
        "gpu",
        "memory",
        "disk",
        "database",
        "redis",
        "wall: no network",
        "chromium",
        "models",
        "hub",
        "packages",
    ):
        assert word in done.stdout, word


@pytest.mark.long
def test_doctor_tries_what_only_a_gpu_uses(data_dir, monkeypatch, tmp_path):
    """Without a GPU it says what is installed; with a driver it tries each part in a child, which here finds no device."""
    assert doctor.gpu_parts()[0].verdict == "note"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'A card, 1000, 1'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = {finding.what: finding for finding in doctor.gpu_parts()}
    assert found["gpu: torch for CUDA"].verdict == "bad" and "pytorch.org" in found["gpu: torch for CUDA"].hint
    assert found["gpu: 4-bit bases, 8-bit AdamW"].verdict == "note" and "pip install" in found["gpu: 4-bit bases, 8-bit AdamW"].hint


def test_doctor_goes_on_when_a_check_breaks(data_dir, monkeypatch):
    def broken() -> None:
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "gpu", broken)
    found = {finding.what: finding for finding in doctor.examine()}
    assert found["broken"].verdict == "bad" and "no such device" in found["broken"].found
    assert "disk" in found


def test_doctor_names_a_folder_that_cannot_be_written(data_dir, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert doctor.disk().verdict == "bad"
    assert "LUTHIER_DATA_DIR" in doctor.disk().hint


def test_doctor_reads_the_servers_that_are_given(session):
    assert doctor.database().found.startswith("PostgreSQL 18")
    assert "valkey" in doctor.broker().found and doctor.broker().verdict == "good"


@pytest.mark.parametrize(
    ("name", "version", "found"),
    [
        ("redis", "6.2.14", True), ("redis", "6.2.20", False), ("redis", "7.0.15", True), ("redis", "8.2.1", True), ("redis", "8.2.2", False), ("redis", "8.6.0", False),
        ("valkey", "8.1.3", True), ("valkey", "8.1.4", False), ("valkey", "9.1.2", False), ("another", "1.0", False),
    ],
)  # fmt: skip
def test_doctor_names_a_broker_with_a_known_hole(name, version, found):
    assert doctor.is_vulnerable(name, version) is found


@pytest.mark.long
def test_an_order_trained_here_needs_no_studio(data_dir, tiny_model, tmp_path):
    """No database, no queue: the rows are read, the model learns, a profile is written, and the result lies in the data folder."""
    rows = [
        {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": f"Answer {n}."}]} for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run = {"max_steps": 8, "max_tokens_per_step": 64, "samples": 0, "evaluations_per_epoch": 0, "forgetting": False, "row_losses": False}
    order = {"model": str(tiny_model), "training_file": "rows.jsonl", "strategy": {"name": "lora", "rank": 2}, "run": run}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(order))
    done = luthier("train", str(tmp_path / "job.yaml"), "--profile")
    assert "step 8/8: loss" in done.stdout and "Largest gap:" in done.stdout and "Floor:" in done.stdout
    result = Path(done.stdout.partition("The result is in ")[2].strip().removesuffix("."))
    assert (result / "adapter_model.safetensors").is_file()
    assert (result.parent / "profile" / "trace.json").stat().st_size > 10_000
    assert not (data_dir / "postgres").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model": "no-such-model"}, "no-such-model"), ({"training_file": "nowhere.jsonl"}, "nowhere.jsonl"), ({"comparison": 1}, "'comparison'"),
     ({"strategy": {"name": "lora", "rank": 0}}, "strategy.rank"), ({"run": {"epochs": -1}}, "run.epochs"), ({"strategy": {"name": "bitfit"}}, "biases")],
)  # fmt: skip
def test_a_wrong_order_is_refused_here_too(data_dir, tiny_model, tmp_path, change, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    order = {"model": str(tiny_model), "training_file": "rows.jsonl", **change}
    with pytest.raises(StudioError, match=re.escape(said)):
        spec_of(order, tmp_path)


def test_settings_of_preferences_are_read_here_too(data_dir, tiny_model, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    (tmp_path / "rated.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "label": True}) + "\n")

    def of(file: str, **preference: object):
        return spec_of({"model": str(tiny_model), "training_file": file, "preference": preference}, tmp_path)

    assert of("pairs.jsonl", loss="simpo").preference.model_dump(include={"beta", "gamma"}) == {"beta": 2.0, "gamma": 1.0}
    kto = of("rated.jsonl", desirable_weight=2.0)
    assert (kto.task, kto.preference.desirable_weight) == ("kto", 2.0)
    for file, wrong, param in (("pairs.jsonl", {"gamma": 1.0}, "preference.gamma"), ("rated.jsonl", {"loss": "dpo"}, "preference.loss")):
        with pytest.raises(BadField) as caught:
            of(file, **wrong)
        assert caught.value.param == param
