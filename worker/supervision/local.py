"""Become the training process, in the environment that a supervisor gives it: `python -m worker.supervision.local` with the
arguments of `python -m worker.run`, for `luthier train --here`, which has no supervisor."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from app.kit.confinement import confined
from app.settings import get_settings
from app.spec import JobSpec
from worker.supervision import confinement
from worker.supervision.exit_codes import launcher, trainer_environment


def main() -> None:
    command = [sys.executable, "-m", "worker.run", *sys.argv[1:]]
    if (processes := get_settings().gpus_per_job) > 1:
        command[1:1] = launcher(processes)
    path = Path(sys.argv[sys.argv.index("--spec") + 1])
    spec = JobSpec.model_validate_json(path.read_bytes())
    environment = trainer_environment(os.environ, path.parent, spec.run.device)
    room = confinement.room_of(spec, path.parent, environment, processes)
    command = confined(command, room, parent=0)  # Ctrl-C reaches it as it does the command that a person typed
    os.execve(sys.executable, command, environment)  # noqa: S606  # a list of words needs no shell


if __name__ == "__main__":
    main()
