"""Engines that keep what they get: servers that answer as Ray's Jobs API and as the jobs of Kubernetes do, misbehave where they are told to,
and start nothing by themselves.

Ray itself is in `tests/tools/test_ray.py`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit


class StandInRay:
    """`jobs` are what it was asked for, by id; with `broken` every request is answered by that status."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.broken: int | None = None
        self.stopped: list[str] = []
        self.url = ""

    def set(self, name: str, status: str, message: str = "", ended: bool = True) -> None:
        self.jobs[name] |= {"status": status, "message": message, "end_time": int(time.time() * 1000) if ended else None}

    def answer(self, method: str, path: str, body: Any, token: str = "") -> tuple[int, Any]:
        if self.broken is not None:
            return self.broken, {"message": "it is broken"}
        match method, path.strip("/").split("/")[2:]:
            case "GET", []:
                return 200, list(self.jobs.values())
            case "POST", []:
                name = body["submission_id"]
                if name in self.jobs:
                    return 400, {
                        "message": f"ValueError: Job with submission_id {name} already exists. Please use a different submission_id."
                    }
                self.jobs[name] = body | {"status": "PENDING", "message": "Job has not started yet.", "end_time": None}
                return 200, {"submission_id": name}
            case "POST", [name, "stop"]:
                self.stopped.append(name)
                self.set(name, "STOPPED")
                return 200, {"stopped": True}
        return 404, {"message": path}


class Cut(Exception):
    """The connection breaks in the middle of an answer."""


class StandInKubernetes:
    """`jobs` are manifests by name, each with its status; `asked` is every request. `next_answers` are given before anything is looked at:
    a status, or None for a connection that breaks."""

    PATH = "/apis/batch/v1/namespaces/default/jobs"

    def __init__(self, page: int = 2) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.next_answers: list[int | None] = []
        self.quota = 1000
        self.page = page
        self.url = ""

    def end(self, name: str, kind: str, message: str = "") -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        condition = {"type": kind, "status": "True", "message": message, "lastTransitionTime": now}
        self.jobs[name]["status"] = {"conditions": [{"type": "Suspended", "status": "False"}, condition]}

    def run(self, name: str) -> None:
        self.jobs[name]["spec"]["suspend"] = False
        self.jobs[name]["status"] = {"active": 1, "ready": 1}

    def answer(self, method: str, path: str, body: Any, token: str = "") -> tuple[int, Any]:
        self.asked.append((method, path, token))
        if self.next_answers:
            if (status := self.next_answers.pop(0)) is None:
                raise Cut
            return status, {"kind": "Status", "message": f"told to answer {status}"}
        parts = urlsplit(path)
        name = parts.path.removeprefix(self.PATH).strip("/")
        assert parts.path.startswith(self.PATH), path
        if method == "GET":
            query = parse_qs(parts.query)
            assert query["labelSelector"] == ["app.kubernetes.io/managed-by=luthier-launcher"]
            begin = int(query.get("continue", ["0"])[0])
            found = [
                one for one in self.jobs.values() if one["metadata"]["labels"].get("app.kubernetes.io/managed-by") == "luthier-launcher"
            ]
            more = {"continue": str(begin + self.page)} if begin + self.page < len(found) else {}
            return 200, {"kind": "JobList", "metadata": more, "items": found[begin : begin + self.page]}
        if method == "DELETE":
            gone = self.jobs.pop(name, None)
            return (200, {"kind": "Status"}) if gone else (404, {"message": f'jobs.batch "{name}" not found'})
        name = body["metadata"]["name"]
        if name in self.jobs:
            return 409, {"message": f'jobs.batch "{name}" already exists'}
        if len(self.jobs) >= self.quota:
            return 403, {"message": f'jobs.batch "{name}" is forbidden: exceeded quota: team, requested: count/jobs.batch=1'}
        self.jobs[name] = body | {"status": {}}
        return 201, body


Engine = TypeVar("Engine", StandInRay, StandInKubernetes)


@contextmanager
def serve(engine: Engine) -> Iterator[Engine]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            try:
                status, found = engine.answer(self.command, self.path, body, self.headers.get("authorization", ""))
            except Cut:
                self.send_response(200)
                self.send_header("content-length", "1000")
                self.end_headers()
                self.wfile.write(b'{"kind": "JobList", "items": [')
                self.close_connection = True
                return
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    engine.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
