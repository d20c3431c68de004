"""Processes of ours, started, listened to and ended: real ones, with children of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from app.kit import child_process
from app.kit.child_process import Child
from app.settings import PROJECT
from tests.conftest import wait_until

SPEAKS = """
import os, sys
print("to the log", flush=True)
with os.fdopen(int(sys.argv[1]), "w") as pipe:
    for n in range(3):
        print(n, file=pipe, flush=True)
"""
HAS_A_CHILD = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); import time; time.sleep(600)"


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def start(command, tmp_path: Path, **options) -> Child:
    with (tmp_path / "log").open("ab") as log:
        return child_process.start(command, env=dict(os.environ), output=log, **options)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_every_line_is_heard_and_its_output_goes_to_the_log(tmp_path):
    heard, over = [], []
    with start(lambda pipe: python(SPEAKS, pipe), tmp_path) as child:
        child.listen(heard.append, over=lambda: over.append(True))
        assert child.ends_within(20)
    assert heard == [b"0\n", b"1\n", b"2\n"] and over == [True]
    assert (tmp_path / "log").read_text() == "to the log\n"


def test_one_that_has_ended_is_not_reaped_before_its_end_is_asked_for(tmp_path):
    child = start(python("raise SystemExit(7)"), tmp_path)
    assert child.ends_within(20) and not child.is_running()
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, "its number could be another's by now"
    assert child.end() == 7
    assert not psutil.pid_exists(child.pid) and not child.is_running()


def test_the_end_takes_all_that_it_started(tmp_path):
    child = start(python(HAS_A_CHILD), tmp_path)
    wait_until(lambda: (tmp_path / "log").read_text().endswith("\n"), what="the grandchild")
    grandchild = int((tmp_path / "log").read_text())
    assert child.is_running() and not child.ends_within(0.05) and not gone(grandchild)
    assert child.end() == -signal.SIGKILL
    wait_until(lambda: gone(grandchild), what="the grandchild's end", seconds=5)


def test_a_group_outlives_its_leader_and_is_killed_all_the_same(tmp_path):
    child = start(python("import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"), tmp_path)
    assert child.ends_within(20)
    grandchild = int((tmp_path / "log").read_text())
    assert not gone(grandchild)
    assert child.end() == 0
    wait_until(lambda: gone(grandchild), what="the grandchild's end", seconds=5)


def test_one_that_answers_is_asked_on_its_input(tmp_path):
    with start(
        python("import sys; print(sys.stdin.read().upper(), end=''); print('and to the log', file=sys.stderr)"), tmp_path, answers=True
    ) as it:
        assert it.process.stdin and it.process.stdout
        it.process.stdin.write(b"spruce")
        it.process.stdin.close()
        assert it.process.stdout.read() == b"SPRUCE"
    assert (tmp_path / "log").read_text() == "and to the log\n"


def test_what_cannot_be_started_leaves_nothing_open(tmp_path):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        start(lambda pipe: [str(tmp_path / "no-such-program"), str(pipe)], tmp_path)
    child = start(lambda pipe: python("", pipe), tmp_path)
    child.end()  # nobody listened
    assert os.listdir("/proc/self/fd") == before


def test_a_child_dies_with_its_parent():
    code = (
        "import subprocess, time; from app.kit.child_process import die_with_parent;"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True, preexec_fn=die_with_parent());"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(python(code), cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    assert psutil.Process(child).name() == "sleep"
    parent.kill()
    parent.wait()
    wait_until(lambda: gone(child), what="the child's end", seconds=5)


def test_one_whose_parent_is_gone_already_ends_at_once():
    began = time.monotonic()
    done = subprocess.run(
        python("from app.kit.child_process import die_with_parent; die_with_parent(1)(); print('on')"), cwd=PROJECT, capture_output=True
    )
    assert done.returncode == 1 and not done.stdout and time.monotonic() - began < 60
