"""Answers that a server (vLLM) draws for a job of reinforcement: with the base that it serves, and the job's newest adapter on it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.errors import Unavailable
from app.inference.external_server import MAX_ANSWER_LENGTH, exchange, find, names, no_adapter, refused, strange
from app.inference.protocol import ExternalEngine
from app.inference.questions import DrawAsk, DrawnTokens
from app.kit.addresses import Address
from app.languages import gettext

SECONDS = 1800.0
"""Time limit of the answers to one prompt."""


class ServerDraws:
    """Draws for one attempt at a job, from any thread. The adapters are in folders below `folder`, which the server sees too; one is loaded there
    at a time, under the name `name`, which ends in the attempt's number, and the folder's."""

    def __init__(self, engine: ExternalEngine, folder: Path, name: str) -> None:
        self.engine, self.folder, self.name = engine, folder, name
        self._lock, self._loaded = threading.Lock(), ""

    def __call__(self, ask: DrawAsk) -> tuple[DrawnTokens, ...]:
        """`ask.count` answers. Raises Unavailable for a server that is away or loads no adapter, and its own error for a request that it refuses."""
        address = find(self.engine.url)
        if ask.adapter:
            self._load(address, ask.adapter)
        body = {
            "model": f"{self.name}-{ask.adapter}" if ask.adapter else self.engine.model, "prompt": ask.prompt, "n": ask.count,
            "max_tokens": ask.most, "temperature": 1.0, "top_p": 1.0, "seed": ask.seed, "stop_token_ids": ask.stops, "logprobs": 0,
            "return_token_ids": True,
        }  # fmt: skip
        status, said = exchange(address, "POST", "completions", body, seconds=SECONDS, most=MAX_ANSWER_LENGTH)
        if status != 200:
            if status == 404:  # it was started again since
                self._loaded = ""
            raise refused(address, status, said, None)
        try:
            return _answers(json.loads(said)["choices"], ask)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise strange(address) from None

    def close(self) -> None:
        """Have the server forget the adapter; one that is away has forgotten it already."""
        with contextlib.suppress(Exception):
            self._unload(find(self.engine.url))

    def _load(self, address: Address, adapter: str) -> None:
        with self._lock:
            if self._loaded == adapter:
                return
            if not self._loaded:
                self._unload_left(address)
            self._unload(address)
            folder = (self.folder / adapter).resolve()
            if folder.parent != self.folder.resolve() or not folder.is_dir():  # a link, say: the trainer is a stranger
                raise Unavailable(gettext("The trainer has no adapter %(name)s.", name=adapter))
            status, said = exchange(address, "POST", "load_lora_adapter", {"lora_name": f"{self.name}-{adapter}", "lora_path": str(folder)})
            if status != 200 and b"already" not in said[:2000]:
                raise no_adapter(address, status)
            self._loaded = adapter

    def _unload(self, address: Address) -> None:
        if self._loaded:
            exchange(address, "POST", "unload_lora_adapter", {"lora_name": f"{self.name}-{self._loaded}"})
            self._loaded = ""

    def _unload_left(self, address: Address) -> None:
        """What an earlier attempt at the job left there, whose supervisor was killed."""
        job = self.name.rpartition("-")[0]
        for name in names(address):
            if name.startswith(f"{job}-"):
                exchange(address, "POST", "unload_lora_adapter", {"lora_name": name})


def _answers(choices: Sequence[Any], ask: DrawAsk) -> tuple[DrawnTokens, ...]:
    """Raises ValueError and what comes of fields that are not there."""
    found = []
    for choice in sorted(choices, key=lambda one: int(one["index"])):
        tokens, logs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if not 0 < len(tokens) == len(logs) <= ask.most:
            raise ValueError(len(tokens))
        found.append(DrawnTokens(ids=tokens, nats=[-value for value in logs], ended=tokens[-1] in ask.stops))
    if len(found) != ask.count:
        raise ValueError(len(found))
    return tuple(found)
