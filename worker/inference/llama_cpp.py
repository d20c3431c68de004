"""llama.cpp servers of a generate worker: one child process for each model, GGUF type and adapter in use.

The files are written once, and kept in `cache/gguf/` of the data folder by the hash of the weights that they were written from. The memory
of a server counts as that of the models of the engine: idle ones make room, and all are unloaded by the same rule.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.errors import StudioError, Unavailable
from app.export_formats import FORMATS
from app.inference.protocol import Entry, GenerateRequest, RenderedPrompt
from app.inference.residency import LoadedModelInfo
from app.kit import child_process
from app.kit.addresses import Address
from app.models.integrity import check
from app.settings import get_settings
from app.shapes import Shape
from worker.inference import llama_client, model_cache
from worker.inference.model_pool import ModelPool
from worker.modeling.loading import folder_of

STARTS_SECONDS = 1800.0
"""How long a server may take to answer for the first time, the conversion of the model included."""
MAX_PARALLEL = 8
"""Answers that one server writes at once; others wait for their turn there."""
CACHE_BYTES = 50 * 2**30
"""Files of the cache beyond these are deleted, those first that have not been used for longest."""


@dataclass(eq=False)
class Server:
    """One child, and who uses it."""

    child: child_process.Child
    address: Address
    bytes: int
    folders: list[str]
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)


class LlamaServers:
    """The servers of this process. Thread-safe: while one starts, only requests for its model wait."""

    def __init__(self, shelf: ModelPool) -> None:
        self.shelf = shelf
        self.running: dict[tuple[str, ...], Server] = {}
        self._lock = threading.Lock()
        self._starting: dict[tuple[str, ...], threading.Lock] = {}
        model_cache.ALL.append(self)

    def answer(self, request: GenerateRequest, prompt: RenderedPrompt) -> Generator[list[Entry], None, None]:
        """Entries of one request. Raises StudioError when no server can be started for it."""
        key, server = self._take(request)
        try:
            yield from llama_client.answer(request, prompt, server.address)
        except Unavailable as error:
            if not server.child.ends_within(1.0):
                raise
            self._drop(key, server)
            raise Unavailable(
                "llama.cpp has ended while it was answering.", hint="Ask again: it starts anew.", code="worker_lost"
            ) from error
        finally:
            with self._lock:
                server.users -= 1
                server.used_at = time.monotonic()

    # Starting ---------------------------------------------------------------------------------------------------------

    def _take(self, request: GenerateRequest) -> tuple[tuple[str, ...], Server]:
        ref, engine = request.model, request.engine
        assert engine is not None and ref.revision is not None, "only models whose files are known are answered so"
        key = (ref.path, ref.revision, engine.model, *(a.key for a in ref.adapters))
        with self._lock:
            starting = self._starting.setdefault(key, threading.Lock())
        with starting:
            server = self.running.get(key)
            if server is not None and not server.child.is_running():
                self._drop(key, server)
                server = None
            if server is None:
                server = self._start(request)
            with self._lock:
                self.running[key] = server
                server.users += 1
                server.used_at = time.monotonic()
        return key, server

    def _start(self, request: GenerateRequest) -> Server:
        ref, kind = request.model, request.engine.model if request.engine else ""
        check(ref.path, ref.name, ref.revision, may_be_plain=True)
        for adapter in ref.adapters:
            check(adapter.path, ref.name, may_be_plain=True)
        weights, context = size_of(ref.shape, kind), min(ref.shape.positions, get_settings().generate_context)
        parallel = parallel_for(weights, context * cache_bytes(ref.shape), self.shelf.limit())
        need = weights + parallel * context * cache_bytes(ref.shape)
        self.shelf.make_room(ref.name, need)
        folder = get_settings().folder("cache", "gguf")
        order: dict[str, Any] = {
            "base": str(folder_of(ref.path)), "file": str(folder / f"{_digest(ref.path, ref.revision)}-{kind}.gguf"), "type": kind,
            "context": context, "parallel": parallel, "threads": os.cpu_count() or 1, "key": secrets.token_urlsafe(24),
        }  # fmt: skip
        for adapter in ref.adapters:
            order |= {"adapter": str(folder_of(adapter.path)), "adapter_file": str(folder / f"{_digest(ref.path, adapter.key)}-lora.gguf")}
        url, child = start(order)
        prune(folder)
        return Server(child, Address(f"{url}/v1", order["key"]), need, [adapter.path for adapter in ref.adapters])

    # Putting away -----------------------------------------------------------------------------------------------------

    def _drop(self, key: tuple[str, ...], server: Server) -> None:
        with self._lock:
            if self.running.get(key) is server:
                del self.running[key]
        server.child.end()

    def evict(self, before: float) -> int:
        """End the servers without users that were last used before this time of the monotonic clock; returns how many."""
        with self._lock:
            old = [(key, one) for key, one in self.running.items() if not one.users and one.used_at < before]
        for key, server in old:
            self._drop(key, server)
        return len(old)

    def ready(self) -> list[LoadedModelInfo]:
        now = time.monotonic()
        with self._lock:
            return [
                LoadedModelInfo(
                    path=key[0], adapters=one.folders, bytes=one.bytes, answering=one.users,
                    idle_seconds=0.0 if one.users else now - one.used_at,
                )
                for key, one in self.running.items()
            ]  # fmt: skip


def start(order: dict[str, Any]) -> tuple[str, child_process.Child]:
    """Address and process of a server that answers. Raises Unavailable with the reason where it does not come to that."""
    said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(dir=get_settings().folder("tmp")) as work, tempfile.TemporaryFile() as output:
        path = Path(work) / "order.json"
        path.touch(0o600)
        path.write_text(json.dumps(order))

        def command(pipe: int) -> list[str]:
            import sys

            return child_process.launched([sys.executable, "-m", "worker.inference.llama_process", str(path), str(pipe)])

        child = child_process.start(command, env=dict(os.environ), output=output)
        try:
            child.listen(lambda line: said.put(json.loads(line)), lambda: said.put({}))
            answer = said.get(timeout=STARTS_SECONDS)
            if "url" in answer:
                return answer["url"], child
            output.seek(0)
            last = output.read()[-300:].decode("utf-8", "replace").strip()
            message = answer.get("error") or f"llama.cpp has ended before it answered. {last}".strip()
            raise Unavailable(message, hint=answer.get("hint", "Take the built-in engine on the model's page."), code="engine_failed")
        except queue.Empty:
            child.end()
            raise Unavailable("llama.cpp takes too long to start.", hint="Take the built-in engine.", code="engine_failed") from None
        except StudioError:
            child.end()
            raise


def size_of(shape: Shape, kind: str) -> int:
    """Bytes of a GGUF file of a type."""
    from app.export_formats import ModelFacts

    return FORMATS["gguf"].bytes_of(ModelFacts("", "generic", shape), [kind])


def cache_bytes(shape: Shape) -> int:
    """Bytes of keys and values of one token, in float16."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * 2


def parallel_for(weights: int, one: int, limit: int) -> int:
    """Answers at once: as many, a power of two, as there is memory for; at least one."""
    count = MAX_PARALLEL
    while count > 1 and weights + count * one > limit // 2:
        count //= 2
    return count


def prune(folder: Path) -> None:
    """Delete what is more than `CACHE_BYTES`, least recently used first. A file that a server has open is only unlinked."""
    total = 0
    with contextlib.suppress(FileNotFoundError):  # another worker prunes too
        for path in sorted(folder.glob("*.gguf"), key=lambda p: -p.stat().st_mtime):
            total += path.stat().st_size
            if total > CACHE_BYTES:
                path.unlink()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
