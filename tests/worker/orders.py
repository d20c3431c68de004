"""Orders for the trainer's tests: a data folder with the small model and a few rows, and the spec that names them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from app import events
from app.datasets.row_store import write_rows
from app.settings import PROJECT, get_settings
from app.shapes import shape_of
from app.spec import DatasetRef, JobSpec, ModelRef, RunSettings
from app.strategies import STRATEGIES
from tests.tiny import SENTENCES
from tests.warm import FORKS


def chat_rows(count: int = 24) -> list[dict[str, Any]]:
    """Short conversations with answers of different lengths."""
    rows = []
    for i in range(count):
        words = SENTENCES[i % len(SENTENCES)].split()
        rows.append({"messages": [
            {"role": "user", "content": f"{i}: " + " ".join(words[: 3 + i % 4])},
            {"role": "assistant", "content": " ".join(words[: 4 + i % 7])},
        ]})  # fmt: skip
    return rows


def put_dataset(rows: list[dict[str, Any]], format_: str = "chat") -> DatasetRef:
    """Rows as the studio stores them, in the data folder of the settings."""
    key = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(rows))
    path = get_settings().folder("rows", str(key)) / "rows.parquet"
    digest = write_rows(path, rows)
    relative = path.relative_to(get_settings().data_dir).as_posix()
    return DatasetRef(id=key, name="rows", path=relative, sha256=digest, format=format_, rows=len(rows))


def put_model(folder: Path, kind: str = "dialogue") -> ModelRef:
    """The small model in the data folder of the settings."""
    target = get_settings().data_dir / "models" / "tiny"
    if not target.exists():
        shutil.copytree(folder, target)
    shape = shape_of(json.loads((target / "config.json").read_text()))
    return ModelRef(id=uuid.uuid5(uuid.NAMESPACE_OID, "tiny"), name="tiny", kind=kind, path="models/tiny", revision="0" * 64, shape=shape)


def order(model: ModelRef, data: DatasetRef, strategy: str = "lora", settings: dict[str, Any] | None = None, **run: Any) -> JobSpec:
    """A quick job: a few dozen tokens a step, no sample answers unless asked for."""
    # float32, so that what is compared here does not hang on how this machine rounds; bf16 has tests of its own.
    quick = {
        "epochs": 2,
        "max_tokens_per_step": 160,
        "samples": 0,
        "learning_rate": 5e-3,
        "early_stopping_patience": 0,
        "precision": "fp32",
        "forgetting": False,
        **run,
    }
    chosen = STRATEGIES[strategy](**(settings or {}))
    return JobSpec(name="a test", task="generation", model=model, dataset=data, run=RunSettings(**quick), strategy=chosen)


class Trainer:
    """`python -m worker.run` as its supervisor starts it, with its events read as they come."""

    def __init__(self, spec: JobSpec, job: str, attempt: int, environment: dict[str, str] | None = None) -> None:
        root = get_settings().data_dir
        folder = f"runs/{job}/a{attempt}"
        (root / folder).mkdir(parents=True, exist_ok=True)
        path = root / folder / "spec.json"
        path.write_text(spec.model_dump_json())
        read_end, write_end = os.pipe()
        command = [sys.executable, "-m", "worker.run", "--spec", str(path), "--folder", folder]
        command += ["--resume-from", f"runs/{job}", "--events-fd", str(write_end)]
        given = {**os.environ, "LUTHIER_DATA_DIR": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
        self.log = (root / folder / "trainer.log").open("wb")
        self.process = subprocess.Popen(command, cwd=PROJECT, env=given, pass_fds=[write_end], stderr=self.log, start_new_session=True)
        os.close(write_end)
        self.pipe = os.fdopen(read_end, "rb")

    def __iter__(self):
        for line in self.pipe:
            if line.endswith(b"\n"):  # a kill may cut the last line short
                yield events.read_line(line)

    def wait(self) -> int:
        self.pipe.close()
        self.log.close()
        return self.process.wait(timeout=120)

    def run(self) -> tuple[list[events.TrainerEvent], int]:
        said = list(self)
        return said, self.wait()


class WarmTrainer:
    """The same process forked from one that has imported already what takes long, for tests that start and kill it many times.

    With `die_at` it kills itself at that call of fsync or rename: in the middle of writing a checkpoint. What torchrun would tell it of
    its place among several comes by `place`.
    """

    def __init__(
        self, spec: JobSpec, job: str, attempt: int, die_at: int = 0, place: dict[str, str] | None = None, threads: int = 1
    ) -> None:
        root = get_settings().data_dir
        folder = f"runs/{job}/a{attempt}"
        (root / folder).mkdir(parents=True, exist_ok=True)
        place = {"RANK": "0", **(place or {})}
        # a file for each place: another one may be reading its own already
        path, pipe = (root / folder / f"{name}-{place['RANK']}" for name in ("spec.json", "events.fifo"))
        path.write_text(spec.model_dump_json())
        os.mkfifo(pipe)
        arguments = ["--spec", str(path), "--folder", folder, "--resume-from", f"runs/{job}", "--events-fd"]
        self.process = FORKS.Process(target=_forked, args=(arguments, str(pipe), str(root), die_at, place, threads), daemon=True)
        self.process.start()
        self.pipe = pipe.open("rb")

    def __iter__(self):
        for line in self.pipe:
            if line.endswith(b"\n"):
                yield events.read_line(line)

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int:
        self.pipe.close()
        self.process.join(timeout=120)
        return self.process.exitcode

    def run(self) -> tuple[list[events.TrainerEvent], int]:
        said = list(self)
        return said, self.wait()


def killed_at_random(spec: JobSpec, seed: int, kills: int, most: int) -> tuple[list[events.TrainerEvent], list[events.TrainerEvent]]:
    """A job, `killed`, that is killed so many times, each after fewer than `most` steps and evaluations, and then comes to its end: what the
    killed attempts said, and the last one. Steps differ in what follows them: some are followed by an evaluation and a save, which the kill then hits."""
    draw = random.Random(seed)
    said: list[events.TrainerEvent] = []
    resumed: list[int | None] = []
    for attempt in range(1, kills + 1):
        trainer = WarmTrainer(spec, "killed", attempt)
        until, seen = draw.randrange(2, most), 0
        for event in trainer:
            said.append(event)
            seen += isinstance(event, (events.Step, events.Evaluated))
            resumed += [event.resumed_from] if isinstance(event, events.Started) else []
            if seen == until:
                trainer.kill()
                break
        trainer.wait()
    last, code = WarmTrainer(spec, "killed", kills + 1).run()
    assert code == 0 and any(resumed), "no attempt got as far as a checkpoint, so nothing was tested"
    assert all(event.exact for event in [*said, *last] if isinstance(event, events.Started))
    return said, last


def _forked(arguments: list[str], pipe: str, data_dir: str, die_at: int, place: dict[str, str], threads: int) -> None:
    os.environ.update(place, LUTHIER_DATA_DIR=data_dir, OMP_NUM_THREADS=str(threads))
    import torch

    from worker import run as trainer

    trainer.RANK, trainer.PROCESSES = int(place["RANK"]), int(place.get("WORLD_SIZE", "1"))  # it was imported before it had a place
    torch.set_num_threads(threads)
    left = die_at

    def counted(call):
        def run(*given, **named):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **named)

        return run

    if die_at:
        os.fsync, os.rename = counted(os.fsync), counted(os.rename)
    sys.exit(trainer.main([*arguments, str(os.open(pipe, os.O_WRONLY))]))
