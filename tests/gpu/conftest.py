"""The process that plays a machine with a GPU, started once for all tests here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.settings import PROJECT

HERE = Path(__file__).parent
SOURCE = HERE / "fakecuda.cpp"


def built() -> Path:
    """The library, compiled once for each torch; about two seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
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
        environment = {**os.environ, "LUTHIER_DATA_DIR": str(home / "data"), "OMP_NUM_THREADS": "1"}
        self.log = (home / "child.log").open("wb+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.child", str(built())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, cwd=PROJECT, env=environment, text=True, bufsize=1,
        )  # fmt: skip
        self.known: dict[str, dict[str, Any]] = {}

    def run(self, **case: Any) -> dict[str, Any]:
        """What was seen of the first two steps of a job; each case runs once. Fails where the job did."""
        key = json.dumps(case, sort_keys=True)
        if key not in self.known:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(key + "\n")
            line = self.process.stdout.readline()
            self.log.seek(0)
            assert line, f"the process ended:\n{self.log.read().decode()[-4000:]}"
            self.known[key] = json.loads(line)
        found = self.known[key]
        assert "error" not in found, found.get("trace")
        return found

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.log.close()


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGpu]:
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing, which compiles the fake CUDA device")
    child = FakeGpu(tmp_path_factory.mktemp("gpu"))
    yield child
    child.end()
