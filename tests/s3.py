"""A real S3 server in a process of its own, over a folder: what it has survives when it is killed."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port

KEY, SECRET = "tests", "a-secret-of-the-tests"
BUCKET = "luthier"


class S3Server:
    """rclone's S3 server. `folder` has a folder for each bucket, and in it a file for each object."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        (folder / BUCKET).mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen | None = None
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to know, in the variables of AWS."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        program = Path(sys.executable).with_name("rclone")
        command = [str(program if program.exists() else shutil.which("rclone")), "serve", "s3", str(self.folder)]
        command += ["--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{SECRET}", "--etag-hash", "", "--config", "", "--use-mmap"]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("the S3 server did not start")

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
            self.process = None

    def objects(self, bucket: str = BUCKET) -> list[Path]:
        return [path for path in (self.folder / bucket).glob("**/objects/*/*") if path.is_file()]


@pytest.fixture(scope="session", name="s3_server")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3") / "buckets")
    yield server
    server.kill()


@pytest.fixture(name="s3")
def own_storage(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[tuple[S3Server, str]]:
    """The server, and the URL of a storage of this test's own in it; the server runs before and after the test."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    yield s3_server, f"s3://{BUCKET}/{request.node.name.replace('[', '-').strip(']')}"
    if s3_server.process is None:
        s3_server.start()
