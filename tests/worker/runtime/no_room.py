"""One of two processes that put a job together, the second of which finds its disk full; each prints what it was told."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from worker.runtime import distributed
from worker.training.backends.fsdp import FsdpBackend


class Full:
    def write_states(self, optimizer: None, path: Path) -> None:
        if os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, "this one's disk")
        path.parent.mkdir()
        path.write_bytes(b"")


with distributed.together(torch.device("cpu"), Path(sys.argv[1])) as world:
    backend = FsdpBackend(SimpleNamespace(device=torch.device("cpu")))
    backend.model, backend.trained, backend.optimizer, backend.world, backend.shards = None, {}, None, world, Full()
    try:
        with backend.gathered(Path(sys.argv[1])):
            print("went on")
    except OSError as error:
        Path(sys.argv[1], f"told-{world.rank}").write_text(f"{error.errno} {error.strerror}")
    world.wait()
