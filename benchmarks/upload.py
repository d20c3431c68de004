"""Seconds and memory of a large upload: `python -m benchmarks.upload --bytes 1000000000 --breaks 20`.

A real web process on a real port. The same bytes go up as a form (`POST /v1/files`), as one resumable upload (tus), and as
one that is broken off at random places and resumed each time. The web process's memory is looked at fifty times a second,
and the stored bytes are hashed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.servers import free_port, python, servers

BLOCK = 1 << 20
TUS = {"tus-resumable": "1.0.0"}


class Rows:
    """Chat rows of about a kilobyte, the same every time, as a stream of `size` bytes that can begin anywhere."""

    def __init__(self, size: int) -> None:
        draw = random.Random(1)
        words = ["spruce", "maple", "varnish", "bridge", "string", "bow", "scroll", "rib", "peg", "belly"]
        lines = []
        for n in range(1000):
            said = {"role": "assistant", "content": " ".join(draw.choices(words, k=120))}
            lines.append(json.dumps({"messages": [{"role": "user", "content": f"Question {n}?"}, said]}))
        self.piece, self.size = ("\n".join(lines) + "\n").encode(), size

    def read(self, start: int, end: int) -> Iterator[bytes]:
        at = start
        while at < end:
            place = at % len(self.piece)
            data = self.piece[place : place + min(BLOCK, end - at)]
            yield data
            at += len(data)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for data in self.read(0, self.size):
            digest.update(data)
        return digest.hexdigest()


class Memory:
    """The largest resident memory of a process while the block runs, above what it had before. Bytes."""

    def __init__(self, process: psutil.Process) -> None:
        self.process, self.peak, self.stop = process, 0, threading.Event()

    def __enter__(self) -> Memory:
        self.before = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.02):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *rest: object) -> None:
        self.stop.set()
        self.thread.join()

    @property
    def grew(self) -> int:
        return self.peak - self.before


class Client:
    def __init__(self, port: int, key: str) -> None:
        self.port, self.headers = port, {"authorization": f"Bearer {key}"}

    def send(
        self, method: str, path: str, body: Iterator[bytes] | None = None, length: int = 0, **headers: str
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        given = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body=body, headers=given | {"content-length": str(length)})
        answer = connection.getresponse()
        answer.body = answer.read()  # type: ignore[attr-defined]
        connection.close()
        if answer.status >= 400:
            raise SystemExit(f"{method} {path}: {answer.status} {answer.body[:500]!r}")  # type: ignore[attr-defined]
        return answer

    def break_off(self, path: str, body: Iterator[bytes], length: int, **headers: str) -> None:
        """Announce `length` bytes, send those of `body`, and hang up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.putrequest("PATCH", path)
        for name, value in (self.headers | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            connection.putheader(name, value)
        connection.putheader("content-length", str(length))
        connection.endheaders()
        for data in body:
            connection.send(data)
        connection.close()


def form(client: Client, rows: Rows) -> str:
    """As a form. The id of the file."""
    head = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
    )
    tail = b"\r\n--b--\r\n"

    def body() -> Iterator[bytes]:
        yield head
        yield from rows.read(0, rows.size)
        yield tail

    length = len(head) + rows.size + len(tail)
    answer = client.send("POST", "/v1/files", body(), length, content_type="multipart/form-data; boundary=b")
    return json.loads(answer.body)["id"]  # type: ignore[attr-defined]


def resumable(client: Client, rows: Rows, breaks: int) -> str:
    """As a tus upload that is broken off `breaks` times. The id of the dataset."""
    begun = client.send("POST", "/v1/tus", **TUS, upload_length=str(rows.size), upload_metadata="filename cm93cy5qc29ubA==")
    path = begun.headers["location"]
    draw = random.Random(2)
    cuts = sorted(draw.randrange(rows.size) for _ in range(breaks))
    for cut in cuts:
        at = int(client.send("HEAD", path, **TUS).headers["upload-offset"])
        headers = {**TUS, "upload_offset": str(at), "content_type": "application/offset+octet-stream"}
        client.break_off(path, rows.read(at, max(at, cut)), rows.size - at, **headers)
        _until_free(client, path, at)
    at = int(client.send("HEAD", path, **TUS).headers["upload-offset"])
    headers = {**TUS, "upload_offset": str(at), "content_type": "application/offset+octet-stream"}
    answer = client.send("PATCH", path, rows.read(at, rows.size), rows.size - at, **headers)
    return answer.headers["luthier-dataset"]


def _until_free(client: Client, path: str, at: int) -> None:
    """Wait until the server has noticed that the sender is gone: its offset stands still, then."""
    seen = -1
    while (now := int(client.send("HEAD", path, **TUS).headers["upload-offset"])) != seen:
        seen = now
        time.sleep(0.02)


def measure(process: psutil.Process, how: Callable[[], str], size: int) -> dict[str, Any]:
    began = time.monotonic()
    with Memory(process) as memory:
        made = how()
    seconds = time.monotonic() - began
    return {
        "made": made,
        "seconds": round(seconds, 2),
        "megabytes_per_second": round(size / seconds / 1e6, 1),
        "web_grew_mb": round(memory.grew / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--breaks", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = Rows(options.bytes)
    with servers() as running:
        result = run(rows, options.breaks, running.folder)
    for name, found in result.items():
        print(
            f"{name:24} {found['seconds']:7.2f} s  {found['megabytes_per_second']:7.1f} MB/s  web process +{found['web_grew_mb']:.1f} MB  {found['bytes']}"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def run(rows: Rows, breaks: int, folder: Path) -> dict[str, Any]:
    from app.db import transaction
    from app.kit import ids
    from app.storage import files
    from app.tables import Dataset, File
    from app.web import auth

    with transaction() as session:
        user = auth.first_user(session)
        _, key = auth.create_key(session, user, "upload")
    port = free_port()
    command = ["-m", "uvicorn", "app.main:create_app", "--factory", "--port", str(port), "--no-access-log", "--log-level", "warning"]
    web = python(*command, log=folder / "web.log", LUTHIER_LOG_LEVEL="WARNING")
    wanted, result = rows.sha256(), {}
    try:
        client, process = Client(port, key), psutil.Process(web.pid)
        _warm(client)
        ways = {
            "form": lambda: form(client, rows),
            "tus, in one piece": lambda: resumable(client, rows, 0),
            f"tus, resumed {breaks} times": lambda: resumable(client, rows, breaks),
        }
        for name, how in ways.items():
            result[name] = found = measure(process, how, rows.size)
            with transaction() as session:
                kind = ids.FILE if found["made"].startswith("file") else ids.DATASET
                key_ = ids.parse(kind, found["made"])
                file_id = key_ if kind == ids.FILE else session.get_one(Dataset, key_).file_id
                file = session.get_one(File, file_id)
                same = file.sha256 == wanted and files.blob_path(wanted).stat().st_size == rows.size
                found["bytes"] = "sha256 equal" if same else "BYTES DIFFER"
    finally:
        web.terminate()
        web.wait(20)
    return result


def _warm(client: Client, small: int = 3 << 20) -> None:
    """Wait for the web process, and send something small each way, so that what is imported once is not counted."""
    for _ in range(300):
        try:
            client.send("GET", "/healthz")
            break
        except OSError:
            time.sleep(0.1)
    for _ in range(3):
        form(client, Rows(small))
        resumable(client, Rows(small), 1)


if __name__ == "__main__":
    main()
