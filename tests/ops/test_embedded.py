"""`luthier up`: real processes, started, killed in every way, and started again."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import Conflict, Forbidden, Unavailable
from app.kit.child_process import launched
from app.ops.embedded import sweep
from app.ops.embedded.places import MAX_SOCKET_PATH_BYTES, Lock, secret, socket_folder
from app.ops.embedded.postgres import Postgres, give
from app.ops.embedded.supervisor import ServiceProcess, Supervisor
from app.settings import PROJECT
from tests.conftest import Studio, start_studio, studio_environment, wait_until

pytestmark = pytest.mark.studio
AS_ROOT = os.geteuid() == 0


def is_ready(studio: Studio) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{studio.url}/readyz", timeout=3) as answer:
        return answer.status == 200
    return False


def processes_of(folder: Path) -> set[int]:
    found = [*sweep.marked(folder), *sweep.working_in(folder / "postgres"), *sweep.working_in(folder / "valkey")]
    return {pid for pid in found if sweep.is_alive(pid)}


def pid_of(folder: Path, words: str) -> int:
    """The one process of this studio whose command line begins with a program of that name or contains the words."""
    for pid in processes_of(folder):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if words in line and "launch.py" not in line:
                return pid
    raise AssertionError(f"no process with {words!r}")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="luthier-up-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Studio]:
    started = start_studio(folder)
    wait_until(lambda: is_ready(started), what="the studio", seconds=60, log=started.log)
    yield started
    started.stop()


def test_it_answers_and_a_sign_in_link_works_once(running):
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    assert opener.open(running.link).status == 200
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(running.link)
    assert refused.value.code == 404


def test_secrets_and_sockets_are_closed_to_others(running):
    for name in ("secrets", "run/valkey", "run/postgres", "postgres", "logs"):
        assert (running.data_dir / name).stat().st_mode & 0o077 == 0, name
    for file in (running.data_dir / "secrets").iterdir():
        assert file.stat().st_mode & 0o077 == 0, file
    password = (running.data_dir / "secrets" / "postgres").read_text()
    for log in (running.data_dir / "logs").iterdir():
        assert password not in log.read_text(errors="replace"), log
    assert running.link.rpartition("/")[2] not in "".join(log.read_text(errors="replace") for log in (running.data_dir / "logs").iterdir())


def test_no_process_has_the_password_in_its_environment_or_its_arguments(running):
    wait_until(lambda: exists(running.data_dir, "-Q train"), what="the train worker", seconds=30)
    password = (running.data_dir / "secrets" / "postgres").read_bytes()
    for pid in processes_of(running.data_dir):
        with contextlib.suppress(OSError):
            for name in ("environ", "cmdline"):
                assert password not in Path(f"/proc/{pid}/{name}").read_bytes(), f"{name} of {pid}"


@pytest.mark.long
def test_a_second_start_says_who_holds_the_folder(running):
    again = subprocess.run(
        [sys.executable, "-m", "app.cli", "up", "--port", "0", "--data-dir", str(running.data_dir)],
        cwd=PROJECT, env=studio_environment(running.data_dir), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert again.returncode == 1
    assert f"process {running.process.pid}" in again.stderr
    assert running.url in again.stderr
    assert "Traceback" not in again.stderr
    assert is_ready(running)


@pytest.mark.long
def test_commands_work_beside_it(running):
    made = running.luthier("keys", "create", "laptop")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("sk-luthier-") and len(made.stdout.split()) == 1
    request = urllib.request.Request(f"{running.url}/v1/models", headers={"authorization": f"Bearer {made.stdout.strip()}"})
    assert json.load(urllib.request.urlopen(request))["object"] == "list"
    assert str(running.process.pid) in running.luthier("status").stdout


@pytest.mark.parametrize("server", ["valkey-server", "bin/postgres -D", "uvicorn", "app.relay", "-Q train", "-Q generate"])
def test_what_is_killed_is_started_again(running, server):
    wait_until(lambda: exists(running.data_dir, server), what=server, seconds=30)
    before = pid_of(running.data_dir, server)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: exists(running.data_dir, server, but=before), what=f"another {server}", seconds=30, log=running.log)
    wait_until(lambda: is_ready(running), what="the studio", seconds=60, log=running.log)


def exists(folder: Path, words: str, but: int = 0) -> bool:
    try:
        return pid_of(folder, words) != but
    except AssertionError:
        return False


@pytest.mark.long
def test_a_killed_supervisor_leaves_nothing_and_the_next_start_recovers(running, folder):
    """Also a process in a session of its own, as trainers are. What was committed before is there afterwards."""
    key = running.luthier("keys", "create", "kept").stdout.strip()
    mark = Path(f"/proc/{pid_of(folder, 'app.relay')}/environ").read_bytes().split(b"\0")
    environment = dict(item.decode().split("=", 1) for item in mark if b"=" in item)
    grandchild = subprocess.Popen(["sleep", "600"], env=environment, start_new_session=True)
    running.process.kill()
    running.process.wait()
    wait_until(lambda: grandchild.poll() is not None, what="the end of the grandchild", seconds=10)
    wait_until(lambda: not processes_of(folder), what="the end of every process", seconds=15)

    (folder / "postgres" / "postmaster.pid").write_text(f"{os.getpid()}\n{folder}/postgres\n1\n5432\n\n\n\n")  # as after a power cut
    lock = folder / "run" / "postgres" / ".s.PGSQL.5432.lock"
    assert not lock.exists(), "PostgreSQL was killed instead of being allowed to stop in order"
    lock.write_text(f"{os.getpid()}\n{folder}/postgres\n1\n5432\n{lock.parent}\n\n\n")
    again = start_studio(folder)
    try:
        wait_until(lambda: is_ready(again), what="the studio", seconds=60, log=again.log)
        request = urllib.request.Request(f"{again.url}/v1/models", headers={"authorization": f"Bearer {key}"})
        assert urllib.request.urlopen(request).status == 200
    finally:
        began = time.monotonic()
        assert again.stop() == 0, again.log.read_text()[-3000:]
    assert time.monotonic() - began < 40
    assert processes_of(folder) == set()
    assert not (folder / "postgres" / "postmaster.pid").exists(), "PostgreSQL was not shut down in order"
    assert Lock(folder).holder() is None


@pytest.mark.long
def test_a_command_works_without_a_studio(folder, running):
    running.stop()
    alone = running.luthier("keys", "create", "alone")
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith("sk-luthier-")
    assert processes_of(folder) == set()


@pytest.mark.long
def test_it_runs_as_a_plain_user():
    """A user who is not root, with nothing but a folder of their own."""
    folder = Path(tempfile.mkdtemp(prefix="luthier-plain-"))
    prefix: tuple[str, ...] = ()
    if AS_ROOT:
        prefix = plain_user(folder)
    started = start_studio(folder, prefix=prefix)
    try:
        wait_until(lambda: is_ready(started), what="the studio", seconds=60, log=started.log)
        assert (folder / "postgres").stat().st_uid == folder.stat().st_uid
    finally:
        assert started.stop() == 0
        left = processes_of(folder)
        shutil.rmtree(folder, ignore_errors=True)
    assert left == set()


def plain_user(folder: Path) -> tuple[str, ...]:
    """How root becomes an ordinary user: `nobody` where that user can run this Python, else inside a user namespace."""
    as_nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    reaches = "import os, sys; sys.exit(not os.access(sys.executable, os.X_OK))"
    if shutil.which("setpriv") and subprocess.run([*as_nobody, sys.executable, "-c", reaches], cwd=PROJECT, check=False).returncode == 0:
        os.chown(folder, 65534, 65534)
        return as_nobody
    in_namespace = ("unshare", "--user", "--map-user=65534", "--map-group=65534")
    if subprocess.run([*in_namespace, sys.executable, "-c", ""], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets root become no other user")
    return in_namespace


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not AS_ROOT, reason="only root needs another user for the database")
@pytest.mark.parametrize("mode", [0o711, 0o700])
def test_as_root_the_database_runs_as_somebody_else(mode):
    """A number of its own where that can pass through the folders above; else in a user namespace, with root's own files."""
    above = Path(tempfile.mkdtemp(prefix="luthier-root-"))
    above.chmod(mode)
    try:
        database = Postgres(above / "data", fast=True)
        if mode == 0o700:
            assert database.identity.startswith("namespace:")
        else:
            with pytest.raises(KeyError):
                pwd.getpwuid(database.owner[0])
        assert database.prepare()
        server = subprocess.Popen(database.command(), cwd="/", stderr=subprocess.DEVNULL)
        from app.ops.embedded.up import is_open

        wait_until(lambda: is_open(database), what="the database", seconds=20)
        owner = (above / "data" / "postgres").stat().st_uid
        assert owner == (0 if database.identity.startswith("namespace:") else int(database.identity.partition(":")[0]))
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert Postgres(above / "data").identity == database.identity
    finally:
        shutil.rmtree(above, ignore_errors=True)


@pytest.mark.skipif(not AS_ROOT, reason="only root needs another user for the database")
def test_a_database_of_nobody_is_taken_over(tmp_path):
    """Other services run as `nobody` too, and could read it. A start that was cut off half way is made up for."""
    above = Path(tempfile.mkdtemp(prefix="luthier-nobody-"))
    above.chmod(0o711)
    nobody = pwd.getpwnam("nobody")
    try:
        first = Postgres(above / "data", fast=True)
        if first.owner is None:
            pytest.skip("here the database runs in a namespace")
        first.prepare()
        give(first.folder, (nobody.pw_uid, nobody.pw_gid))
        os.chown(first.folder / "base", *first.owner)  # as where the giving over was cut off
        database = Postgres(above / "data", fast=True)
        assert database.identity == f"{nobody.pw_uid}:{nobody.pw_gid}", "only a start may change who owns it"
        assert not database.prepare()
        assert {path.lstat().st_uid for path in (database.folder, *database.folder.rglob("*"))} == {first.owner[0]}
        with subprocess.Popen(database.command(), cwd="/", stderr=subprocess.DEVNULL) as server:
            from app.ops.embedded.up import is_open

            wait_until(lambda: is_open(database), what="the database", seconds=20)
            as_nobody = ["setpriv", "--reuid", str(nobody.pw_uid), "--clear-groups", "ls", str(database.folder / "base")]
            assert subprocess.run(as_nobody, capture_output=True, check=False).returncode != 0
            server.send_signal(signal.SIGINT)
    finally:
        shutil.rmtree(above, ignore_errors=True)


@pytest.mark.skipif(not AS_ROOT, reason="only root needs another user for the database")
def test_as_root_without_any_other_user_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(Postgres, "can_run_as", lambda self, identity: False)
    with pytest.raises(Exception, match="LUTHIER_DATABASE_URL") as refused:
        Postgres(tmp_path / "data")
    assert refused.value.code == "no_database_user"


def test_a_database_of_another_version_is_named(tmp_path):
    database = Postgres(tmp_path / "data", fast=True)
    database.folder.mkdir()
    (database.folder / "PG_VERSION").write_text("15\n")
    with pytest.raises(Unavailable, match="PostgreSQL 15"):
        database.prepare()


def test_a_long_path_gets_a_short_folder_for_its_socket(tmp_path):
    long = tmp_path / ("x" * 120)
    folder = socket_folder(long, "postgres")
    try:
        assert len(os.fsencode(folder / ".s.PGSQL.5432.lock")) <= MAX_SOCKET_PATH_BYTES
        assert socket_folder(long, "postgres") == folder
        assert folder.stat().st_mode & 0o777 == 0o700
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / ".s.PGSQL.5432"))
        shutil.rmtree(folder)
        folder.symlink_to(tmp_path)
        with pytest.raises(Forbidden):
            socket_folder(long, "postgres")
    finally:
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)


def test_one_lock_per_folder_and_it_dies_with_its_holder(tmp_path):
    script = "import sys,time; from pathlib import Path; from app.ops.embedded.places import Lock; l=Lock(Path(sys.argv[1])); l.take(url='here'); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=PROJECT)
    assert holder.stdout.readline() == b"held\n"
    lock = Lock(tmp_path)
    assert lock.holder() == {"pid": holder.pid, "url": "here"}
    with pytest.raises(Conflict, match=f"process {holder.pid}, here"):
        lock.take()
    holder.kill()
    holder.wait()
    assert lock.holder() is None
    lock.take(url="mine")
    assert Lock(tmp_path).holder()["url"] == "mine"
    lock.release()


def test_a_secret_is_made_once(tmp_path):
    first = secret(tmp_path, "postgres")
    assert len(first) > 30
    assert secret(tmp_path, "postgres") == first
    assert (tmp_path / "secrets" / "postgres").stat().st_mode & 0o777 == 0o600


def test_a_launched_program_dies_with_its_parent(tmp_path):
    script = (
        "import subprocess,sys,time; from app.kit.child_process import launched;"
        "p=subprocess.Popen(launched(['/bin/sleep','600']), start_new_session=True); print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=PROJECT)
    pid = int(parent.stdout.readline())
    wait_until(lambda: b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0], what="the child", seconds=10)
    parent.kill()
    parent.wait()
    wait_until(lambda: not sweep.is_alive(pid), what="the end of the child", seconds=5)


def test_a_parent_that_is_gone_already_starts_nothing():
    command = launched(["/bin/echo", "ran"])
    command[4] = "1"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ran" not in done.stdout


def test_pauses_between_starts_grow_and_the_log_is_quoted(tmp_path):
    said: list[str] = []
    supervisor = Supervisor(tmp_path, said.append)
    child = supervisor.start(ServiceProcess("broken", [sys.executable, "-c", "raise SystemExit('no such thing')"]))
    with pytest.raises(Unavailable, match="no such thing"):
        supervisor.wait_for(lambda: False, what=child, seconds=30)
    assert [line.split("again in ")[1].split(" s")[0] for line in said] == ["0.25", "0.5", "1"]
    supervisor.stopping = 1
    supervisor.stop(["broken"])


def test_a_child_that_cannot_be_started_again_is_put_off(tmp_path):
    """As on a disk with no room for its log: the supervisor stands, and goes on trying."""
    said: list[str] = []
    (tmp_path / "logs").mkdir()
    supervisor = Supervisor(tmp_path / "logs", said.append)
    child = supervisor.start(ServiceProcess("one", ["sleep", "600"]))
    shutil.rmtree(tmp_path / "logs")
    child.process.kill()
    wait_until(lambda: supervisor.turn(0.03) or len(said) == 2, what="the second try", seconds=10)
    assert "SIGKILL" in said[0] and "could not be started" in said[1] and child.process is None
    (tmp_path / "logs").mkdir()
    wait_until(lambda: supervisor.turn(0.03) or child.process, what="the child", seconds=10)
    supervisor.stopping = 1
    supervisor.stop(["one"])


def test_the_log_of_a_child_that_never_ends_stays_within_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("app.ops.embedded.supervisor.LOG_LIMIT_BYTES", 200_000)
    supervisor = Supervisor(tmp_path, lambda _: None)
    script = "import time\nn = 0\nwhile True:\n    print(f'{n:099}', flush=True)\n    n += 1\n    time.sleep(0.0001)"
    child = supervisor.start(ServiceProcess("endless", [sys.executable, "-c", script]))
    log, kept = tmp_path / "endless.log", tmp_path / "endless.log.1"
    try:
        wait_until(lambda: supervisor.turn(0.03) or kept.exists(), what="a turn of the log", seconds=60)
        at = kept.stat().st_mtime_ns
        wait_until(lambda: supervisor.turn(0.03) or kept.stat().st_mtime_ns > at, what="another", seconds=60)
        wait_until(lambda: log.stat().st_size > 1000, what="lines after it", seconds=20)
        os.kill(child.process.pid, signal.SIGSTOP)
        before, after = numbers(kept), numbers(log)
    finally:
        supervisor.stopping = 1
        supervisor.kill_group(child)
        supervisor.stop(["endless"])
    assert kept.stat().st_size <= 400_000 and len(after) < len(before)
    for lines in (before, after):
        assert lines == list(range(lines[0], lines[-1] + 1)), "a line is missing or torn"
    assert 0 < after[0] - before[-1] < 100, "more was lost between the two than what fell between copy and cut"


def numbers(log: Path) -> list[int]:
    """Of the whole lines; the copy begins in the middle of one."""
    lines = log.read_bytes().split(b"\n")
    return [int(line) for line in lines if len(line) == 99]


def test_a_child_that_will_not_stop_is_killed_with_its_helpers(tmp_path):
    said: list[str] = []
    supervisor = Supervisor(tmp_path, said.append)
    script = "trap '' TERM; sleep 600 & echo $! > helper; touch ready; wait; sleep 600"
    supervisor.start(ServiceProcess("stubborn", ["/bin/sh", "-c", script], grace_seconds=0.3, cwd=tmp_path))
    wait_until((tmp_path / "ready").exists, what="the child", seconds=10)
    helper = int((tmp_path / "helper").read_text())
    supervisor.stopping = 1
    supervisor.stop(["stubborn"])
    assert "is killed" in said[-1]
    wait_until(lambda: not sweep.is_alive(helper), what="the end of the helper", seconds=5)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_an_open_address_wants_a_password(tmp_path, host):
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "up", "--host", host, "--data-dir", str(tmp_path / "data")],
        cwd=PROJECT, env=studio_environment(tmp_path / "data"), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "LUTHIER_ADMIN_PASSWORD" in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", "up", "--port", str(port), "--data-dir", str(tmp_path / "data")],
            cwd=PROJECT, env=studio_environment(tmp_path / "data"), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "--port" in done.stderr
