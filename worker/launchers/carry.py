"""The attempt at one job, on a machine that an engine found for it: `python -m worker.launchers.carry --job ID`.

It claims the job as a worker does, and is its supervisor. SIGTERM has its trainer save and leave, and the job is queued again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import uuid

from app.errors import StudioError
from app.kit import ids, logs, tracing
from app.machines.gpus import CUDA_ORDER
from app.queue import TRAIN
from app.storage import objects
from worker.supervision import job_turn
from worker.supervision.claiming import ClaimOutcome

NOT_TAKEN = 75
"""Exit code where the job could not be claimed here (EX_TEMPFAIL): it is handed over again."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.launchers.carry", description="The attempt at one job.")
    parser.add_argument("--job", required=True, type=uuid.UUID, help="the job's id, as the launcher named it")
    job_id: uuid.UUID = parser.parse_args(arguments).job
    os.environ |= CUDA_ORDER
    logs.configure()
    leaving = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: leaving.set())
    try:
        objects.check()
        with tracing.work(TRAIN, None, job_id=ids.public(ids.JOB, job_id)):
            outcome = job_turn.work(job_id, leaving.is_set)
    except StudioError as error:
        print(f"{error.message} {error.hint}".strip(), file=sys.stderr)
        return 1
    if outcome in (ClaimOutcome.DONE, ClaimOutcome.GONE, ClaimOutcome.LEFT):
        return 0
    print(f"The job was not taken here: {outcome.value}.", file=sys.stderr)
    return NOT_TAKEN


if __name__ == "__main__":
    sys.exit(main())
