"""One of two processes, of which the second takes three times as long for its passes: what is said of it, as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from worker.runtime import distributed

CPU = torch.device("cpu")

with distributed.together(CPU, Path(sys.argv[1])) as world:
    laps, said = distributed.Laps(world, CPU), []
    for _ in range(45):
        began = laps.now()
        time.sleep(0.003 if world.first else 0.009)
        laps.note(began)
        dist.barrier()  # the sum of their gradients, for which the first waits
        said.append(laps.slow())
    Path(sys.argv[1], f"told-{world.rank}").write_text(json.dumps(said))
