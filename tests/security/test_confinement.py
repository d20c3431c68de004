"""What code that came with a foreign model or file can reach from inside, tried by a real process behind the real walls.

Each choice of layers is tried as root and as an ordinary user, since they have different ones. A layer that this kernel lacks is
skipped by name, never counted as holding.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app import events
from app.kit import confinement
from app.ops.embedded import sweep
from app.settings import PROJECT, get_settings
from tests.conftest import wait_until
from tests.worker.supervision.test_train_attempt import ended, new_job, now_of, odd, said  # noqa: F401  # fixtures
from worker.supervision import confinement as supervision_confinement
from worker.supervision import exit_codes, job_turn

USERS = ["root", "plain"]
NEEDS = "needs "

ALWAYS = {"become root", "open more files", "dump its memory", "take more memory", "have memory spared for it", "have capabilities",
          "gain privileges"}  # fmt: skip
FILES = {"read secrets/postgres", "read another model", "read another job", "write another job", "write its model", "write an older attempt",
         "write our sources"}  # fmt: skip
OTHERS = {"read its parent's environment", "read another's environment", "trace another process", "read another's memory", "mount"}
SOCKETS = {"connect to the broker's socket", "connect to an abstract socket", "connect to 127.0.0.1", "connect to this machine's address"}

CLOSED = {
    "all": ALWAYS
    | FILES
    | OTHERS
    | SOCKETS
    | {"list the data folder", "signal another process", "make a user namespace", "start more processes"},
    "no namespaces": ALWAYS | FILES | OTHERS | SOCKETS | {"list the data folder", "make a user namespace"},
    "no landlock": ALWAYS | FILES | OTHERS | SOCKETS | {"make a user namespace"},
    "no seccomp": ALWAYS | FILES | OTHERS | SOCKETS,
}
"""Attempts that no layer of that choice may let through."""


def as_plain_user() -> list[str] | None:
    """How this machine's root starts Python as an ordinary user who reaches it; None where there is no way."""
    if os.geteuid() != 0:
        return [sys.executable]
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    starts_itself = "import ctypes, subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    for python in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        with contextlib.suppress(OSError):
            if subprocess.run([*nobody, python, "-c", starts_itself], capture_output=True, check=False).returncode == 0:
                return [*nobody, python]
    return None


@functools.cache
def burgled(user: str) -> dict[str, Any]:
    command = [sys.executable] if user == "root" else as_plain_user()
    if user == "root" and os.geteuid() != 0:
        pytest.skip("only root can see what root's walls are")
    if command is None:
        pytest.skip("no ordinary user reaches this Python")
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/nonexistent" if user == "plain" else os.environ["HOME"],
    }
    environment["PYTHONPATH"] = ":".join([str(PROJECT), *(path for path in sys.path if path.endswith("site-packages"))])
    done = subprocess.run(
        [*command, "-m", "benchmarks.confinement", "--json", "-", "--no-costs"],
        cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["layers"]


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("choice", CLOSED)
def test_what_a_job_must_not_reach_it_does_not(choice, user):
    found = burgled(user)[choice]
    held = set(found["held"])
    wanted = {"mounts", "network", "landlock", "seccomp", "capabilities", "limits"} - set(
        {"no namespaces": ("mounts", "network"), "no landlock": ("landlock",), "no seccomp": ("seccomp",)}.get(choice, ())
    )
    if missing := wanted - held:
        pytest.skip(f"this kernel, or what it runs in, lacks {', '.join(sorted(missing))}")
    went_through = {name for name, through in found["went_through"].items() if through}
    closed = CLOSED[choice] - ({"start more processes"} if "uid" not in held and found["uid"] == 0 else set())
    assert not went_through & closed
    assert {name for name in found["went_through"] if name.startswith(NEEDS)} <= went_through, "a job needs this"
    if user == "root" and "uid" in held:
        assert found["uid"] >= 60_000 and found["written_by"] == 0, "on disk the files stay the studio's"


@pytest.mark.parametrize("user", USERS)
def test_the_burglar_is_able(user):
    """Without walls almost everything goes through: what is closed above is closed by them."""
    went_through = {name for name, through in burgled(user)["none"]["went_through"].items() if through}
    assert went_through >= FILES - {"write our sources"} | SOCKETS | {
        "read its parent's environment",
        "take more memory",
        "make a user namespace",
    }


# The very start of a trainer ----------------------------------------------------------------------------------------------


def test_a_trainer_starts_behind_the_walls(odd):  # noqa: F811
    secret = get_settings().folder("secrets") / "postgres"
    secret.write_text("canary")
    job, thread = odd("thief")
    ended(job, thread)
    found = json.loads(said(job, "log")[0].data["message"])
    assert {"capabilities", "limits"} <= set(found["held"])
    if not {"mounts", "landlock"} & set(found["held"]):
        pytest.skip("this kernel walls off no files")
    assert found["secret"] is False and found["parent"] is False and found["own"] is True, found


@pytest.mark.long
def test_two_processes_train_one_job_behind_the_walls(new_job):  # noqa: F811
    """They talk over a loopback of their own, and the second opens the pipe that the first was given."""
    get_settings().gpus_per_job, get_settings().stop_grace_seconds = 2, 60.0
    job = new_job(epochs=1, samples=0, forgetting=False, row_losses=False)
    job_turn.work(job.id)
    assert now_of(job).status == "succeeded", now_of(job).error


def test_nothing_that_a_trainer_started_outlives_it(odd):  # noqa: F811
    """A child in a session of its own, whose parent is gone: no signal to the trainer's group reaches it."""
    job, thread = odd("runaway")
    ended(job, thread)
    log = (get_settings().data_dir / f"runs/{job.id}/a1/trainer.log").read_text()
    runaway, held = log.split()[1:3]
    if "mounts" not in held.split(","):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(runaway), signal.SIGKILL)
        pytest.skip("without mounts of its own nothing tells whose child it is")
    wait_until(lambda: not sweep.is_alive(int(runaway)), what="the end of the runaway", seconds=5)


def test_what_a_trainer_says_of_others_files_is_not_believed(data_dir):
    folder = "runs/mine/a2"
    (data_dir / folder).mkdir(parents=True)
    (data_dir / "secrets").mkdir()
    (data_dir / folder / "link").symlink_to(data_dir / "secrets")
    for path in ("secrets", "runs/mine/a1/checkpoint-1", "runs/mine/a2/../../../secrets", "/etc", folder, f"{folder}/link", "", "."):
        told = supervision_confinement.believed(events.Saved(step=1, path=path, bytes=1, manifest_sha256="0" * 64), folder)
        assert isinstance(told, events.Log), path
    own = events.Saved(step=1, path=f"{folder}/checkpoint-1", bytes=1, manifest_sha256="0" * 64)
    assert supervision_confinement.believed(own, folder) is own


def test_a_checkpoint_elsewhere_is_never_swept_away(odd):  # noqa: F811
    """Checkpoints that are no longer kept are removed, wherever the trainer said that they lie."""
    victim = get_settings().folder("models", "victim")
    (victim / "config.json").write_text("{}")
    job, thread = odd("liar-of-checkpoints")
    ended(job, thread)
    assert (victim / "config.json").exists()
    assert not said(job, "saved") and any("not in its own folder" in e.data["message"] for e in said(job, "log"))


def test_a_result_with_a_link_is_refused_and_a_log_that_is_one_is_not_read(data_dir):
    secret = data_dir / "secret"
    secret.write_text("canary")
    result = data_dir / "runs/mine/a1/final"
    result.mkdir(parents=True)
    from app.kit import manifest

    (result / "adapter_config.json").symlink_to(secret)
    manifest.write(result)
    assert "no plain file" in exit_codes.check_result(result).message
    (result / "adapter_config.json").unlink()
    os.mkfifo(result / "adapter_config.json")
    assert "no plain file" in exit_codes.check_result(result).message
    (result / "adapter_config.json").unlink()
    manifest.write(result)
    assert exit_codes.check_result(result) is None
    (log := result.parent / "trainer.log").symlink_to(secret)
    assert exit_codes.tail(log) == ""


# How much is insisted on --------------------------------------------------------------------------------------------------


def test_required_starts_nothing_where_a_wall_is_missing(data_dir, monkeypatch):
    monkeypatch.setattr(get_settings(), "confinement", "required")
    room = confinement.Confinement(write=[data_dir], layers=("limits", "capabilities", "network"))
    done = subprocess.run(confinement.confined(["/bin/echo", "ran"], room), cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "ran" not in done.stdout and "does not wall off: files" in done.stderr
    monkeypatch.setattr(get_settings(), "confinement", "auto")
    done = subprocess.run(confinement.confined(["/bin/echo", "ran"], room), cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "ran\n", "a missing layer fails no job"


def test_a_data_folder_within_a_folder_of_programs_is_not_shown(tmp_path, monkeypatch):
    """Such as /opt/luthier/data: everything beside it is shown, and nothing of it."""
    for name in ("data/secrets", "data/models", "tool", "data-of-others"):
        (tmp_path / "opt" / name).mkdir(parents=True)
    shown = list(confinement._without(str(tmp_path / "opt"), {str(tmp_path / "opt" / "data")}))
    assert shown == [str(tmp_path / "opt" / "data-of-others"), str(tmp_path / "opt" / "tool")]
    assert list(confinement._without(str(tmp_path / "opt" / "data" / "models"), {str(tmp_path / "opt" / "data")})) == []


def test_an_installation_for_root_alone_is_not_run_by_another_user(tmp_path):
    """As after an installation with umask 077: the job runs as root without capabilities then, and does not fail."""
    (python := tmp_path / "venv" / "bin").mkdir(parents=True)
    (python / "python").touch(mode=0o755)
    tmp_path.chmod(0o700)  # above what is shown, so it is not passed through
    assert confinement.open_to_all(str(python / "python"), [str(tmp_path / "venv")])
    python.chmod(0o700)
    assert not confinement.open_to_all(str(python / "python"), [str(tmp_path / "venv")])


def test_it_dies_with_its_parent(data_dir):
    """Also after a change of user, which makes the kernel forget the order."""
    code = (
        "import subprocess, sys, time; from app.kit import confinement;"
        "p = subprocess.Popen(confinement.confined(['/bin/sleep', '600'], confinement.Confinement()), start_new_session=True);"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=PROJECT)
    pid = int(parent.stdout.readline())
    wait_until(lambda: b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0], what="the child", seconds=10)
    parent.kill()
    parent.wait()
    wait_until(lambda: not sweep.is_alive(pid), what="the end of the child", seconds=5)
