"""A stand-in of the Hugging Face hub: the part of its HTTP API that the client of `huggingface_hub` uses to create a repository, upload
large files and commit, and to look at a model and download its files, on the loopback. It keeps what it gets.

https://huggingface.co/docs/hub/api and https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories by name, large files by SHA-256, commits in their order. `refuse` maps a piece of a path to a status."""

    def __init__(self, token: str = "hf_right") -> None:
        self.token = token
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[dict[str, bytes]] = []
        self.puts: Counter[str] = Counter()
        self.refuse: dict[str, int] = {}
        self.hold_after: int | None = None
        """After this many large files the next is kept waiting until `go` is set."""
        self.go, self.held = threading.Event(), threading.Event()
        self.files: dict[str, dict[str, bytes]] = {}
        """What can be downloaded: the files of each repository."""
        self.sha = "c" * 40
        self.cuts: list[int] = []
        """After so many bytes each of the next downloads of a large file breaks off."""
        self.deaf = False
        """Whether it ignores ranges, as some proxies do."""
        self.downloads: list[tuple[str, int, int]] = []
        """Of each download: the name, the first byte asked for, and the bytes sent."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_POST(self) -> None:
                hub.answer(self)

            do_GET = do_PUT = do_POST

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.go.set()
        self.server.shutdown()
        self.server.server_close()

    # What is asked ----------------------------------------------------------------------------------------------------

    def answer(self, asked: BaseHTTPRequestHandler) -> None:
        try:
            body = asked.rfile.read(int(asked.headers.get("content-length") or 0))
            path = asked.path.partition("?")[0]
            if "/resolve/" in path:
                return self.download(asked, path)
            status, said = self.look(asked.command, path, body, asked.headers.get("authorization"))
            data = json.dumps(said).encode()
            asked.send_response(status)
            asked.send_header("content-type", "application/json")
            asked.send_header("content-length", str(len(data)))
            if status >= 400:
                asked.send_header("x-error-message", str(said.get("error")))
            asked.end_headers()
            asked.wfile.write(data)
        except OSError:
            pass  # the client was killed

    def look(self, method: str, path: str, body: bytes, authorization: str | None) -> tuple[int, dict[str, Any]]:
        if status := next((status for piece, status in self.refuse.items() if piece in path), None):
            return status, {"error": f"refused with {status}"}
        if method == "GET" and path.removeprefix("/api/models/").partition("/revision/")[0] in self.files:
            return 200, self.described(path.removeprefix("/api/models/").partition("/revision/")[0])
        if method == "PUT":
            return self.put(path.rpartition("/")[2], body)
        if authorization != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        repo = "/".join(path.removeprefix("/api/models/").removeprefix("/").split("/")[:2]).removesuffix(".git")
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        if path.endswith("/preupload/main"):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith((".gguf", ".safetensors")) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self.batch(one) for one in json.loads(body)["objects"]]}
        if path.endswith("/verify"):
            return 200, {}
        if path.endswith("/commit/main"):
            return self.commit(repo, body)
        return 200, {"id": repo, "private": self.repos[repo]["private"], "sha": "0" * 40, "siblings": [], "tags": []}

    def described(self, repo: str) -> dict[str, Any]:
        files = self.files[repo]
        large = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name.endswith(".safetensors")}
        siblings = [
            {"rfilename": name, "size": len(data)}
            | ({"lfs": {"sha256": large[name], "size": len(data), "pointerSize": 134}} if name in large else {})
            for name, data in files.items()
        ]
        return {"id": repo, "sha": self.sha, "siblings": siblings, "cardData": {"license": "apache-2.0"}, "tags": []}

    def download(self, asked: BaseHTTPRequestHandler, path: str) -> None:
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        sha, _, name = rest.partition("/")
        assert sha == self.sha, "the commit is pinned"
        data = self.files[repo][name]
        start = 0 if self.deaf else int(asked.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        part, cut = data[start:], self.cuts.pop(0) if self.cuts and name.endswith(".safetensors") else None
        asked.send_response(206 if start else 200)
        asked.send_header("content-length", str(len(part)))
        if start:
            asked.send_header("content-range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        asked.end_headers()
        asked.wfile.write(part[:cut])
        self.downloads.append((name, start, len(part[:cut])))
        if cut is not None:
            asked.close_connection = True

    def create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repos[name] = {"private": bool(asked.get("private") or asked.get("visibility") == "private")}
        return 200, {"url": f"{self.url}/{name}", "id": name, "name": name}

    def batch(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.objects:
            return {"oid": one["oid"], "size": one["size"]}
        return {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}

    def put(self, oid: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.hold_after is not None and len(self.objects) >= self.hold_after:
            self.held.set()
            self.go.wait(60)
            return 500, {"error": "too late"}
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        self.puts[oid] += 1
        return 200, {}

    def commit(self, repo: str, body: bytes) -> tuple[int, dict[str, Any]]:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.objects[line["value"]["oid"]]
        self.commits.append(files)
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40, "hookOutput": ""}
