"""What an object storage costs and survives: `python -m benchmarks.storage [--only speed,job,machines,kills] [--sizes 0.3,1,5] [--kills 25]`.

Everything is real: an S3 server in a process of its own (rclone), PostgreSQL, Valkey, the relay, Celery workers and trainers.

speed     seconds to store and to bring a model of each size in GB, over S3 and in a plain folder, beside copying it; and to store it again
job       the same job with and without the storage: seconds of all, and of a step
machines  two worker sets with a data folder each: the one that trains is killed with `kill -9`, the other one finishes, with equal weights
kills     uploads and downloads while the S3 server is killed again and again: places lost, places damaged

Exit code 1 where weights differ, or a place is lost or damaged.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.servers import PROJECT, Servers, servers, tiny_model

RUN = {
    "epochs": 10, "max_tokens_per_step": 128, "evaluations_per_epoch": 1, "samples": 0, "early_stopping_patience": 0, "forgetting": False,
    "row_losses": False,
}  # fmt: skip
LEASE = {"LUTHIER_LEASE_SECONDS": "6", "LUTHIER_BEAT_SECONDS": "1", "LUTHIER_REAP_SECONDS": "1", "LUTHIER_ANNOUNCE_AGAIN_SECONDS": "2"}
CELERY = ("-m", "celery", "-A", "worker.main", "worker", "-Q", "train,evaluate", "--pool=prefork", "-c", "1",
          "--without-gossip", "--without-mingle", "--without-heartbeat")  # fmt: skip
PARTS = ("speed", "job", "machines", "kills")


def main() -> None:
    options = _parser().parse_args()
    wanted = options.only.split(",")
    folder = Path(tempfile.mkdtemp(prefix="luthier-storage-"))
    failed = False
    try:
        with s3_server(folder) as server:
            if "speed" in wanted:
                speed(folder, server, [float(size) for size in options.sizes.split(",")])
            if "job" in wanted or "machines" in wanted:
                failed |= not jobs(server, "job" in wanted, "machines" in wanted)
            if "kills" in wanted:
                failed |= not kills(folder, server, options.kills)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(failed)


@contextmanager
def s3_server(folder: Path) -> Iterator[Any]:
    from tests.s3 import S3Server

    server = S3Server(folder / "buckets")
    os.environ.update(server.environment)
    try:
        yield server
    finally:
        server.kill()


def speed(folder: Path, server: Any, sizes: list[float]) -> None:
    from app.storage.objects import ObjectStorage

    print(
        "| GB | storage | copied, s | stored, s | stored again, s | brought, s | stored, MB/s | brought, MB/s |\n|---|---|---:|---:|---:|---:|---:|---:|"
    )
    for size in sizes:
        source = folder / "model"
        source.mkdir()
        _fill(source / "model.safetensors", int(size * 1e9))
        for kind, url in (("S3", f"s3://luthier/speed-{size}"), ("folder", f"file://{folder}/store-{size}")):
            copied, stored, again, brought = _timed_both_ways(ObjectStorage(url), source, folder)
            print(f"| {size} | {kind} | {copied:.1f} | {stored:.1f} | {again:.1f} | {brought:.1f} "
                  f"| {size * 1e3 / stored:.0f} | {size * 1e3 / brought:.0f} |", flush=True)  # fmt: skip
        for left in (source, folder / f"store-{size}", server.folder / "luthier" / f"speed-{size}"):
            shutil.rmtree(left)


def _timed_both_ways(storage: Any, source: Path, folder: Path) -> tuple[float, float, float, float]:
    """Seconds to copy a folder to the same disk, to store it, to store it once more, and to bring it. All are on the disk at the end."""
    copied = _timed(lambda: (shutil.copytree(source, folder / "copy"), _sync(folder / "copy" / "model.safetensors")))
    shutil.rmtree(folder / "copy")
    stored = _timed(lambda: storage.put(source, "models/1"))
    again = _timed(lambda: storage.put(source, "models/1"))
    brought = _timed(lambda: storage.get(storage.find("models/1"), folder / "there"))
    shutil.rmtree(folder / "there")
    return copied, stored, again, brought


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _fill(path: Path, size: int) -> None:
    """Random bytes, no part of which is like another."""
    with path.open("wb") as file:
        while size > 0:
            file.write(os.urandom(min(size, 2**24)))
            size -= 2**24
        file.flush()
        os.fsync(file.fileno())


def _timed(action: Any) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def jobs(server: Any, compare: bool, kill: bool) -> bool:
    """The parts `job` and `machines`. False where weights differ."""
    with servers(**LEASE) as running:
        machines = Machines(running)
        try:
            plain = machines.train("without", None) if compare else None
            url = "s3://luthier/jobs"
            calm = machines.train("with", url)
            if plain is not None:
                for name, one in (("the data folder alone", plain), ("an S3 storage", calm)):
                    print(f"{name}: {one.seconds:.1f} s from the claim to the end, {one.step * 1e3:.1f} ms a step")
            same = plain is None or plain.sha256 == calm.sha256
            if kill:
                beaten = machines.lose_one(url)
                same &= beaten.sha256 == calm.sha256
                print(f"one of two machines without a common folder was killed: the other one finished from step {beaten.resumed} in attempt "
                      f"{beaten.attempts}, {'with equal weights' if same else 'WITH OTHER WEIGHTS'}")  # fmt: skip
            return same
        finally:
            machines.stop()


class Trained:
    """What came of a job."""

    def __init__(self, session: Any, job: Any) -> None:
        from sqlalchemy import select

        from app.tables import Event, Model

        rows = session.scalars(select(Event).where(Event.job_id == job.id).order_by(Event.id)).all()
        starts = [row for row in rows if row.type == "started"]
        last = [row.data for row in rows if row.type == "step"][-1]
        model = session.scalars(select(Model).where(Model.job_id == job.id)).one()
        self.sha256, self.path, self.attempts = model.adapter_sha256, model.path, job.attempt
        self.seconds = (job.finished_at - job.started_at).total_seconds()
        self.step = last["seconds"] / last["step"]
        self.resumed = starts[-1].data["resumed_from"]


class Machines:
    """Worker sets with a data folder each, around one database, one Valkey and one relay."""

    def __init__(self, running: Servers) -> None:
        self.servers, self.processes = running, []
        self.log = running.folder / "machines.log"
        from app.db import get_engine, transaction
        from app.web import auth
        from tests.factories import make_dataset

        get_engine.cache_clear()
        self.web = running.folder / "data"
        with transaction() as session:
            self.user = auth.first_user(session)
            self.model = tiny_model(self.web, session)
            self.dataset = make_dataset(session, self.user, self.web)
            session.expunge_all()

    def start(self, *command: str, at: Path, url: str | None) -> Any:
        at.mkdir(exist_ok=True)
        environment = {"LUTHIER_DATA_DIR": str(at), "LUTHIER_STORAGE_URL": url or ""}
        with self.log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=PROJECT, env=os.environ | environment, stdout=out, stderr=out, start_new_session=True
            )
        self.processes.append(process)
        return process

    def train(self, name: str, url: str | None) -> Trained:
        """A job on one machine, which shares the data folder where there is no storage."""
        self._use(url)
        job = self._order()
        both = [self.start("-m", "app.relay", at=self.web, url=url)]
        both.append(self.start(*CELERY, "-n", f"{name}@%h", at=self.web if url is None else self.servers.folder / name, url=url))
        done = self._ended(job)
        self.stop(*both)
        return done

    def lose_one(self, url: str) -> Trained:
        from app.storage import places

        self._use(url)
        job = self._order()
        relay = self.start("-m", "app.relay", at=self.web, url=url)
        one = self.start(*CELERY, "-n", "one@%h", at=self.servers.folder / "one", url=url)
        _wait(lambda: len(places.stored(f"runs/{job}", "a1/checkpoint-*")) > 1, "two stored checkpoints")
        two = self.start(*CELERY, "-n", "two@%h", at=self.servers.folder / "two", url=url)
        os.killpg(one.pid, signal.SIGKILL)
        one.wait()
        shutil.rmtree(self.servers.folder / "one", ignore_errors=True)
        done = self._ended(job)
        self.stop(relay, two)
        return done

    def _use(self, url: str | None) -> None:
        from app.settings import get_settings
        from app.storage import places

        os.environ["LUTHIER_STORAGE_URL"] = url or ""
        get_settings.cache_clear()
        for place in (self.dataset.rows_path, self.model.path):
            places.push(place)

    def _order(self) -> uuid.UUID:
        from app.db import transaction
        from tests.factories import make_job

        with transaction() as session:
            return make_job(session, self.user, self.model, self.dataset, **RUN).id

    def _ended(self, key: uuid.UUID) -> Trained:
        from app.db import transaction
        from app.tables import Job

        def ended() -> bool:
            with transaction() as session:
                status = session.get_one(Job, key).status
            if status in ("failed", "cancelled"):
                raise SystemExit(f"The job {status}.\n{self.log.read_text(errors='replace')[-3000:]}")
            return status == "succeeded"

        _wait(ended, "the end of the job")
        with transaction() as session:
            return Trained(session, session.get_one(Job, key))

    def stop(self, *processes: Any) -> None:
        for process in processes or self.processes:
            if process.poll() is None:
                process.terminate()
        for process in processes or self.processes:
            process.wait(60)


def _wait(condition: Any, what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not come in {seconds:.0f} s")
        time.sleep(0.2)


def kills(folder: Path, server: Any, count: int) -> bool:
    """The part `kills`. False where something was lost or damaged."""
    from app.storage import objects
    from tests.storage.test_objects import PART, survive

    objects.PART_BYTES = PART
    (into := folder / "kills").mkdir()
    began = time.monotonic()
    try:
        places = survive(server, "s3://luthier/kills", into, count)
    except AssertionError as error:
        print(f"{count} kills of the S3 server: NOT WHOLE: {str(error)[:500]}")
        return False
    print(f"{count} kills of the S3 server in {time.monotonic() - began:.0f} s, {places} uploads and as many downloads: 0 lost, 0 damaged")
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--sizes", default="0.3,1,5", help="sizes of the model in GB")
    parser.add_argument("--kills", type=int, default=25, help="kills of the S3 server")
    return parser


if __name__ == "__main__":
    main()
