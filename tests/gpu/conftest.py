"""The process that plays a machine with a GPU, started once for all tests here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.settings import PROJECT

HERE = Path(__file__).parent
SOURCE = HERE / "fakecuda.cpp"


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def why_not() -> str | None:
    """Why there can be no fake device here; None where there can."""
    if shutil.which("g++") is None:
        return "g++ is missing, which compiles the fake CUDA device"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "this torch is built for CUDA and has a device of its own in the place of the fake one"
    return None


def built() -> Path:
    """The library, compiled once for each torch; about two seconds."""
    torch = torch_folder()
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(SOURCE.read_bytes() + version.encode()).hexdigest()[:16]
    library = PROJECT / ".pytest_cache" / "gpu" / f"libfakecuda-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-shared", "-fPIC", "-std=c++20", "-I", str(torch / "include"), str(SOURCE), "-o", str(made)]
        subprocess.run([*command, "-L", str(torch / "lib"), "-lc10", "-ltorch_cpu"], check=True)
        made.rename(library)
    return library


class FakeGpu:
    """`tests/gpu/child.py` in a process of its own, since torch must be imported with the device already there."""

    def __init__(self, home: Path) -> None:
        environment = {**os.environ, "LUTHIER_DATA_DIR": str(home / "data"), "OMP_NUM_THREADS": "1", "LUTHIER_CUDA_GRAPHS": "auto"}
        self.log = (home / "child.log").open("wb+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.child", str(built())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, cwd=PROJECT, env=environment, text=True, bufsize=1,
        )  # fmt: skip
        self.waiting: queue.PriorityQueue[tuple[int, int, str]] = queue.PriorityQueue()
        self.number = itertools.count()
        self.answers: dict[str, str] = {}
        self.ended = False
        self.told = threading.Condition()
        threading.Thread(target=self._hand_over, daemon=True).start()

    def _hand_over(self) -> None:
        """Give the process one case after the other: those that a test waits for first."""
        assert self.process.stdin is not None and self.process.stdout is not None
        line = "-"
        while line:
            _, _, key = self.waiting.get()
            if key not in self.answers:
                try:
                    self.process.stdin.write(key + "\n")
                    line = self.process.stdout.readline()
                except OSError:
                    line = ""
                with self.told:
                    self.answers[key], self.ended = line, not line
                    self.told.notify_all()

    def run_ahead(self, **case: Any) -> None:
        """Have a case run while no test waits for another one."""
        self.waiting.put((1, next(self.number), json.dumps(case, sort_keys=True)))

    def run(self, **case: Any) -> dict[str, Any]:
        """What was seen of the first two steps of a job; each case runs once. Fails where the job did."""
        key = json.dumps(case, sort_keys=True)
        self.waiting.put((0, next(self.number), key))
        with self.told:
            self.told.wait_for(lambda: key in self.answers or self.ended)
        if not self.answers.get(key):
            self.log.seek(0)
            raise AssertionError(f"the process ended:\n{self.log.read().decode()[-4000:]}")
        found: dict[str, Any] = json.loads(self.answers[key])
        assert "error" not in found, found.get("trace")
        return found

    def end(self) -> None:
        self.process.kill()  # it may still be at a case whose test was not reached
        self.process.wait(timeout=60)
        self.log.close()


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGpu]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    child = FakeGpu(tmp_path_factory.mktemp("gpu"))
    if "PYTEST_XDIST_WORKER" not in os.environ:
        for item in request.session.items:
            case_of, parameters = getattr(getattr(item, "module", None), "case_of", None), getattr(item, "callspec", None)
            if case_of is not None and parameters is not None:
                child.run_ahead(**case_of(parameters.params["name"]))
    yield child
    child.end()


@pytest.fixture(scope="session", autouse=True)
def _ahead(request: pytest.FixtureRequest) -> None:
    """Start the process before the first test here, so that it runs the cases of later ones while others compile. Not in one of several
    processes of tests, each of which would run all cases."""
    wanted = any("gpu" in getattr(item, "fixturenames", ()) for item in request.session.items)
    if wanted and why_not() is None and "PYTEST_XDIST_WORKER" not in os.environ:
        request.getfixturevalue("gpu")
