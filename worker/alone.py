"""Become the training process, in the environment that a supervisor gives it: `python -m worker.alone` with the arguments of
`python -m worker.run`, for `luthier train --here`, which has no supervisor."""

from __future__ import annotations

import os
import sys

from app.settings import get_settings
from worker.exits import launcher, trainer_environment


def main() -> None:
    command = [sys.executable, "-m", "worker.run", *sys.argv[1:]]
    if (processes := get_settings().gpus_per_job) > 1:
        command[1:1] = launcher(processes)
    os.execve(sys.executable, command, trainer_environment(os.environ))  # noqa: S606  # a list of words needs no shell


if __name__ == "__main__":
    main()
