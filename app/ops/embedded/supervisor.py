"""Supervises the children of a studio: start, watch, restart, stop in order. One thread, no polling: signals wake it.

Each child leads a process group of its own, so that Ctrl-C in the terminal reaches only the supervisor and a child is ended
together with its helpers. Each dies with the supervisor (app/kit/launch.py), and the warden (sweep.py) handles the rest.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from app.errors import Unavailable
from app.kit.logs import turn_over
from app.settings import PROJECT

MAX_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 60.0
LOG_LIMIT_BYTES = 10 * 2**20
"""Maximum size of one child's log; as much of the previous log is kept next to it."""


@dataclass
class ServiceProcess:
    """One process: its command, the signal that stops it, and its grace period."""

    name: str
    command: list[str]
    stop_signal: int = signal.SIGTERM
    grace_seconds: float = 10.0
    env: dict[str, str] = field(default_factory=dict)
    before: Callable[[], object] | None = None
    cwd: Path = PROJECT
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    started_at: float = 0.0
    deaths: int = 0
    start_at: float | None = None
    """When it is restarted, by the monotonic clock; None while it runs or was stopped on purpose."""


class Supervisor:
    """Keeps children alive until told to stop. `say` prints one line for the person at the console."""

    def __init__(self, logs: Path, say: Callable[[str], None]) -> None:
        self.logs = logs
        self.say = say
        self.children: list[ServiceProcess] = []
        self.selector = selectors.DefaultSelector()
        self.stopping = 0
        self.bounded_at = 0.0
        self.wake_reader, self.wake_writer = os.pipe()
        for end in (self.wake_reader, self.wake_writer):
            os.set_blocking(end, False)
        self.selector.register(self.wake_reader, selectors.EVENT_READ)

    # Signals

    def catch_signals(self) -> None:
        """SIGINT, SIGTERM and SIGHUP request an orderly stop; a second one skips the grace periods."""
        signal.set_wakeup_fd(self.wake_writer, warn_on_full_buffer=False)
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, self.on_signal)

    def on_signal(self, number: int, frame: object) -> None:
        self.stopping += 1

    # Starting

    def start(self, child: ServiceProcess) -> ServiceProcess:
        """Start it now and keep it alive from here on."""
        if child not in self.children:
            self.children.append(child)
        if child.before:
            child.before()
        with self.log_path(child.name).open("ab") as log:
            child.process = subprocess.Popen(
                child.command,
                cwd=child.cwd,
                env=os.environ | child.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        child.pidfd = os.pidfd_open(child.process.pid)
        child.started_at, child.start_at = time.monotonic(), None
        self.selector.register(child.pidfd, selectors.EVENT_READ, child)
        return child

    def bound_logs(self) -> None:
        """Rotate logs, at most once a second: a child that runs for months is never restarted."""
        if time.monotonic() > self.bounded_at + 1:
            self.bounded_at = time.monotonic()
            for child in self.children:
                turn_over(self.log_path(child.name), LOG_LIMIT_BYTES)

    def log_path(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def log_tail(self, name: str, lines: int = 8) -> str:
        """The last lines of a child's log, for the console when it died."""
        with contextlib.suppress(OSError), self.log_path(name).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            return "\n".join(f"    {line}" for line in log.read().decode(errors="replace").splitlines()[-lines:])
        return ""

    # Watching

    def wait_for(self, ready: Callable[[], bool], *, what: ServiceProcess, seconds: float) -> None:
        """Supervise the children until `ready()`; raises Unavailable when it never is, or the child dies too often before that."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.stopping:
                raise KeyboardInterrupt
            if time.monotonic() > deadline or what.deaths >= 3:
                raise Unavailable(
                    f"{what.name} did not come up.\n{self.log_tail(what.name, 15)}", hint=f"Its whole log is {self.log_path(what.name)}."
                )
            self.turn(0.03)

    def run(self) -> None:
        """Supervise until a signal requests a stop."""
        while not self.stopping:
            self.turn(1.0)

    def turn(self, longest_seconds: float) -> None:
        """Sleep until something happens, then handle it: a child that exited, or one whose time to restart has come."""
        due = [child.start_at for child in self.children if child.start_at is not None]
        timeout = min([longest_seconds, *(max(0.0, at - time.monotonic()) for at in due)])
        for key, _ in self.selector.select(timeout):
            if key.fd == self.wake_reader:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wake_reader, 512)
            else:
                self.ended(key.data)
        self.bound_logs()
        if self.stopping:
            return
        for child in self.children:
            if child.start_at is not None and child.start_at <= time.monotonic():
                self.start_again(child)

    def start_again(self, child: ServiceProcess) -> None:
        """Start it, or postpone that where there is no room for its log, for example, or no memory for a process."""
        try:
            self.start(child)
        except OSError as error:
            self.put_off(child, f"could not be started: {error}")

    def ended(self, child: ServiceProcess) -> None:
        """Handle a child that exited; it restarts at once at first, then after longer and longer pauses."""
        code = self.collect(child)
        if self.stopping:
            return
        if time.monotonic() - child.started_at > STEADY_SECONDS:
            child.deaths = 0
        self.put_off(child, f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}")

    def put_off(self, child: ServiceProcess, why: str) -> None:
        """Report what happened to a child, and set when it restarts."""
        pause = min(MAX_PAUSE_SECONDS, 0.25 * 2 ** min(child.deaths, 10))
        child.deaths += 1
        child.start_at = time.monotonic() + pause
        self.say(f"{child.name} {why}; starting it again in {pause:g} s. Its log: {self.log_path(child.name)}\n{self.log_tail(child.name)}")

    def collect(self, child: ServiceProcess) -> int:
        """The exit code of a child that exited."""
        assert child.process is not None
        self.kill_group(child)  # before it is reaped, while its number cannot belong to anything else
        code = child.process.wait()
        self.selector.unregister(child.pidfd)
        os.close(child.pidfd)
        child.process = None
        return code

    # Stopping

    def stop(self, names: list[str]) -> None:
        """Ask these to stop, all at once, and wait: each as long as its grace period allows, then it is killed."""
        running = [child for child in self.children if child.name in names and child.process]
        for child in self.children:
            if child.name in names:
                child.start_at = None
        asked_at, patience = time.monotonic(), self.stopping
        for child in running:
            assert child.process is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, child.stop_signal)
        while running:
            for child in list(running):
                waited = time.monotonic() - asked_at
                if waited > child.grace_seconds or (self.stopping > max(patience, 1) and waited > 0.1):
                    self.say(f"{child.name} is killed: it did not stop in {waited:.0f} s.")
                    self.kill_group(child)
                if select.select([child.pidfd], [], [], 0.05)[0]:
                    self.collect(child)
                    running.remove(child)

    @staticmethod
    def kill_group(child: ServiceProcess) -> None:
        """Kill the child and whatever is left of its process group."""
        assert child.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)
