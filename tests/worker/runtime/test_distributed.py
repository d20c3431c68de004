"""Two processes train as one does: the same packs, the same weights within float error, one voice."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from app import events
from app.settings import PROJECT, get_settings
from tests.conftest import free_port
from tests.worker.orders import WarmTrainer, chat_rows, order, put_dataset, put_model
from worker.run import STOPPED
from worker.runtime import attendance, failures
from worker.supervision import exit_codes
from worker.supervision.exit_codes import ask_to_save, launcher
from worker.train import StopSignals, train
from worker.training.checkpoint import piece_of, read_optimizer, write_piece


@pytest.fixture
def spec(data_dir, tiny_model):
    return order(put_model(tiny_model), put_dataset(chat_rows(24)), micro_batches=2, epochs=1, evaluations_per_epoch=2)


class Pair:
    """`worker.run` as two processes under torchrun, as a supervisor with that many GPUs per job starts it."""

    def __init__(self, spec, job: str) -> None:
        root, folder = get_settings().data_dir, f"runs/{job}/a1"
        (root / folder).mkdir(parents=True, exist_ok=True)
        path = root / folder / "spec.json"
        path.write_text(spec.model_dump_json())
        read_end, write_end = os.pipe()
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)  # so that it cannot run ahead of its reader by more than a dozen steps
        command = [sys.executable, *launcher(2), "-m", "worker.run"]
        command += ["--spec", str(path), "--folder", folder, "--resume-from", f"runs/{job}", "--events-fd", str(write_end)]
        given = {**os.environ, "LUTHIER_DATA_DIR": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = root / folder / "trainer.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=PROJECT, env=given, pass_fds=[write_end], stdout=log, stderr=log)
        os.close(write_end)
        self.pipe = os.fdopen(read_end, "rb", buffering=0)

    def __iter__(self):
        for line in self.pipe:
            yield events.read_line(line)

    def wait(self) -> int:
        return self.process.wait(timeout=120)


class WarmPair:
    """The same processes without their launcher, forked from one that has imported already what takes long."""

    def __init__(self, spec, job: str, attempt: int = 1, processes: int = 2) -> None:
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        self.all = [WarmTrainer(spec, job, attempt, place=place) for place in places]
        fcntl.fcntl(self.all[0].pipe, fcntl.F_SETPIPE_SZ, 4096)

    def __iter__(self):
        return iter(self.all[0])

    def stop_after(self, step: int) -> None:
        """Read their events to the end, and ask the last to stop once that step was told: any may be asked."""
        for event in self:
            if isinstance(event, events.Step) and event.step == step:
                self.all[-1].process.terminate()
        assert self.wait() == [STOPPED] * len(self.all)

    def wait(self) -> list[int]:
        return [one.wait() for one in self.all]


def weights(path):
    return load_file(get_settings().data_dir / path / "adapter_model.safetensors")


@pytest.mark.long
def test_two_processes_learn_what_one_does(spec, data_dir):
    alone = list(train(spec, data_dir / "runs" / "alone" / "a1"))
    pair = Pair(spec, "pair")
    said = list(pair)
    assert pair.wait() == 0, pair.log.read_text()[-3000:]
    assert [type(e) for e in said] == [type(e) for e in alone]
    one, two = ([e for e in run if isinstance(e, events.Step)] for run in (alone, said))
    assert [(e.step, e.tokens, e.trained_tokens) for e in one] == [(e.step, e.tokens, e.trained_tokens) for e in two]
    assert max(abs(a.loss - b.loss) for a, b in zip(one, two, strict=True)) < 1e-4
    first, second = weights(alone[-1].path), weights(said[-1].path)
    assert first.keys() == second.keys()
    assert max(float((first[k] - second[k]).abs().max()) for k in first) < 2e-4
    assert any(float(v.abs().max()) > 1e-3 for k, v in first.items() if "lora_B" in k)


@pytest.mark.long
def test_a_pair_that_was_stopped_is_finished_by_one(spec, data_dir):
    """Their checkpoint is whole on its own, so any number of processes goes on from it."""
    whole = list(train(spec, data_dir / "runs" / "whole" / "a1"))
    pair = Pair(spec, "shared")
    saved = []
    for event in pair:
        if isinstance(event, events.Step) and event.step == 1:
            assert ask_to_save(pair.process.pid, 2)  # they go on, and the launcher between lives
        if isinstance(event, events.Saved):
            saved.append(event.step)
            pair.process.send_signal(signal.SIGTERM)
    pair.wait()
    assert saved and saved[0] < 6
    rest = list(train(spec, data_dir / "runs" / "shared" / "a2", data_dir / "runs" / "shared"))
    began = next(e for e in rest if isinstance(e, events.Started))
    assert began.resumed_from and not began.exact
    first, second = weights(whole[-1].path), weights(rest[-1].path)
    assert max(float((first[k] - second[k]).abs().max()) for k in first) < 5e-4


@pytest.mark.long
def test_full_tuning_is_spread_and_put_together(data_dir, tiny_model):
    """Each process holds its rows of the blocks; the result and the checkpoints are those of one process alone."""
    spec = order(put_model(tiny_model), put_dataset(chat_rows(24)), "full", micro_batches=2, epochs=1, learning_rate=1e-3)
    alone = list(train(spec, data_dir / "runs" / "alone" / "a1"))
    pair = WarmPair(spec, "pair")
    said = list(pair)
    assert pair.wait() == [0, 0]
    assert [type(e) for e in said] == [type(e) for e in alone]
    one, two = ([e for e in run if isinstance(e, events.Step)] for run in (alone, said))
    assert max(abs(a.loss - b.loss) for a, b in zip(one, two, strict=True)) < 1e-4
    assert max(abs(a.grad_norm - b.grad_norm) for a, b in zip(one, two, strict=True)) < 1e-3
    first, second = (load_file(data_dir / run[-1].path / "model.safetensors") for run in (alone, said))
    assert first.keys() == second.keys()
    assert max(float((first[k] - second[k]).abs().max()) for k in first) < 1e-4
    last = [[e.path for e in run if isinstance(e, events.Saved)][-1] for run in (alone, said)]
    saved = [read_optimizer(data_dir / path) for path in last]
    assert saved[0].keys() == saved[1].keys()
    pieces = [load_file(path) for path in sorted((data_dir / last[1] / "trainer").glob("optimizer*"))]
    moment = next(key for key in saved[0] if key.startswith("exp_avg/") and "q_proj" in key)
    assert [len(piece[moment]) for piece in pieces] == [len(saved[0][moment]) / 2] * 2  # each wrote its own rows
    assert not list((data_dir / "runs" / "pair").rglob("*.tmp"))
    assert all(torch.allclose(saved[0][k], saved[1][k], atol=1e-5) for k in saved[0])


@pytest.mark.long
@pytest.mark.parametrize(("began_with", "ends_with"), [(2, 1), (1, 2), (2, 3)])
def test_a_spread_job_goes_on_with_another_number_of_processes(data_dir, tiny_model, began_with, ends_with):
    spec = order(put_model(tiny_model), put_dataset(chat_rows(24)), "full", micro_batches=6, epochs=5, learning_rate=1e-3)
    whole = list(train(spec, data_dir / "runs" / "whole" / "a1"))
    runs = data_dir / "runs" / "shared"
    if began_with == 2:
        WarmPair(spec, "shared").stop_after(1)
    else:
        control = StopSignals()
        for event in train(spec, runs / "a1", runs, control):
            control.stop = control.stop or isinstance(event, events.Step)
    if ends_with == 1:
        rest = list(train(spec, runs / "a2", runs))
    else:
        pair = WarmPair(spec, "shared", attempt=2, processes=ends_with)
        rest = list(pair)
        assert pair.wait() == [0] * ends_with
    began = next(e for e in rest if isinstance(e, events.Started))
    assert began.resumed_from and began.resumed_from < began.total_steps
    first, second = (load_file(data_dir / run[-1].path / "model.safetensors") for run in (whole, rest))
    assert max(float((first[k] - second[k]).abs().max()) for k in first) < 2e-4


def two_of(module: str, folder) -> tuple[list[str], str]:
    """What two processes of a module wrote into `folder`, and printed."""
    command = [sys.executable, *launcher(2), "-m", module, str(folder)]
    given = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=PROJECT, env=given, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return [(folder / f"told-{rank}").read_text() for rank in (0, 1)], ended.stdout


@pytest.mark.long
def test_blocks_are_gathered_one_after_the_other_and_in_bf16(tmp_path):
    """A block's weights are there while it computes and no longer, in the type of the products; what is kept stays float32."""
    for told in map(json.loads, two_of("tests.worker.runtime.spread_blocks", tmp_path)[0]):
        assert told["spread_after"] and len(told["gathered"]) == 3 and max(told["gathered"]) <= 2  # itself, and the next beforehand
        assert told["kinds"] == ["torch.bfloat16"] and told["rows"] == ["torch.float32"]
        assert told["losses"][0] == pytest.approx(told["losses"][1], rel=2e-3)
        assert told["lengths"][0] == pytest.approx(told["lengths"][1], rel=2e-2)


@pytest.mark.long
def test_compiled_blocks_are_spread_like_others(tmp_path):
    """The hooks that gather a block's weights break no graph, and none is made again for the next block or step."""
    for told in map(json.loads, two_of("tests.worker.runtime.compiled_blocks", tmp_path)[0]):
        assert told["losses"][0] == pytest.approx(told["losses"][1], rel=1e-5)
        assert told["breaks"] == 0 and told["graphs"] in (1, 2, 3) and told["apart"] < 1e-4


@pytest.mark.long
def test_the_process_that_all_wait_for_is_named(tmp_path):
    """Once, in both, though each waits for the other at the end of every step."""
    first, second = map(json.loads, two_of("tests.worker.runtime.slow_rank", tmp_path)[0])
    (said,) = [text for text in first if text]
    assert first == second and said.startswith("Process 1 of 2 takes 0.0") and first.index(said) == 19


@pytest.mark.long
@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_process_that_is_lost_is_named_by_the_others(tmp_path, monkeypatch, how):
    """At once where it ended, and where it hangs after the timeout of a step, which is 3 seconds here; the launcher then ends them all."""
    monkeypatch.setattr(get_settings(), "stop_grace_seconds", 1.0)
    command = [sys.executable, *launcher(2), "-m", "tests.worker.runtime.lost_rank", how, str(tmp_path)]
    given = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=PROJECT, env=given, capture_output=True, text=True, timeout=120)
    told = json.loads((tmp_path / "told").read_text())
    assert told["kind"] == "worker_lost" and told["message"].startswith("Process 1 of 2 ended or hangs"), told
    assert told["seconds"] < (2 if how == "killed" else 8)
    fault = exit_codes.of_process(ended.stderr, 2, False)
    assert ended.returncode == 1
    if how == "killed":  # the launcher knows more
        assert fault and (fault.kind, fault.message) == ("worker_lost", "Process 1 of 2: The trainer was killed by SIGKILL.")
    else:
        assert fault is None


def test_who_is_behind_is_read_from_the_attendance(tmp_path):
    assert attendance.waited_for(attendance.read(tmp_path), 2) == ""
    places = [attendance.Attendance(tmp_path, rank) for rank in (2, 0)]  # the last one first, and the second never
    assert attendance.waited_for(attendance.read(tmp_path), 3) == ""
    for place in places:
        for _ in range(11):
            place.come()
    assert attendance.waited_for(attendance.read(tmp_path), 3) == "process 1 of 3"
    places[1].come()
    assert attendance.waited_for(attendance.read(tmp_path), 3) == "processes 1, 2 of 3"
    places[0].come()
    assert attendance.waited_for(attendance.read(tmp_path), 1) == ""


def report(*ended: tuple[int, int], later: tuple[int, int] | None = None) -> str:
    """What torchrun says of ranks and their exit codes: the first is the one that it saw first, `later` one that it killed itself."""
    told = [
        f"[0]:\n  time      : 2026-01-01_00:00:0{second}\n  host      : h\n  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code} (pid: 9)\n"
        for second, (rank, code) in [(0, one) for one in ended] + [(2, one) for one in [later] if one]
    ]
    return f"Failures:\n{''.join(told[1:]) or '  <NO_OTHER_FAILURES>'}\n{'-' * 60}\nRoot Cause (first observed failure):\n{told[0]}{'=' * 60}\n"


def test_an_abort_of_the_watchdog_is_laid_to_the_process_that_was_waited_for():
    """NCCL's watchdog ends the process that waits: the launcher names that one as the first that failed."""
    said = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)\n"
    aborted, killed = report((0, -6)), report((0, -9))
    assert exit_codes.of_process(said + aborted, 2, False) is None
    assert failures.of_peer(said + aborted, "process 1 of 2").message.startswith("Process 1 of 2 ended or hangs")
    assert exit_codes.of_process(aborted, 2, False).message == "Process 0 of 2: The trainer ended by SIGABRT."
    assert exit_codes.of_process(killed, 2, True).kind == "out_of_memory" and exit_codes.of_process(killed, 2, False).kind == "worker_lost"
    assert failures.of_peer("ValueError: rows of 3 places", "") is None


@pytest.mark.parametrize("ended", [[(1, -9), (0, 1)], [(0, 1), (1, -9)], [(0, -15), (2, 1), (1, -9)], [(1, -9)]])
def test_the_process_that_a_signal_ended_is_named_whichever_was_seen_first(ended):
    """Processes that end within one look of torchrun come in the order of their ranks."""
    assert exit_codes.of_process(report(*ended), 3, False).message == "Process 1 of 3: The trainer was killed by SIGKILL."
    assert exit_codes.of_process(report((0, 1), (2, 1), (1, -15)), 3, False) is None


def test_a_process_that_the_launcher_killed_is_not_the_first():
    assert exit_codes.of_process(report((0, 1), later=(1, -9)), 2, False) is None


@pytest.mark.long
def test_all_are_told_that_one_has_no_room(tmp_path):
    """The first speaks for all, so it must know why the second could not save its rows."""
    told, said = two_of("tests.worker.runtime.no_room", tmp_path)
    assert "went on" not in said
    assert told == [f"{errno.ENOSPC} {os.strerror(errno.ENOSPC)}", f"{errno.ENOSPC} this one's disk"]


@pytest.mark.parametrize("wrote", [1, 2, 3, 5])
@pytest.mark.parametrize("reads", [1, 2, 4])
def test_rows_are_read_by_whoever_wrote_them(tmp_path, wrote, reads):
    """Four rows and a count, written by one process or more and read by one or more: each reads its own, and no row twice."""
    states = {"exp_avg/up": torch.arange(12.0).view(4, 3), "exp_avg/bias": torch.arange(4.0), "step/up": torch.tensor(7.0)}
    for place in range(wrote):
        rows = {key: x.split(-(-4 // wrote)) for key, x in states.items() if x.ndim}
        own = {key: pieces[place] if place < len(pieces) else states[key][:0] for key, pieces in rows.items()}
        write_piece(piece_of(tmp_path / "trainer", place, wrote), own | ({"step/up": states["step/up"]} if place == 0 else {}))
    each = -(-4 // reads)
    found = [read_optimizer(tmp_path, lambda _, n, r=rank: slice(r * each, (r + 1) * each)) for rank in range(reads)]
    for key, x in states.items():
        assert all(torch.equal(one[key], x) for one in found) if not x.ndim else torch.equal(torch.cat([one[key] for one in found]), x)
    assert all(torch.equal(x, states[key]) for key, x in read_optimizer(tmp_path).items())


def test_gradients_of_many_sizes_are_summed(monkeypatch):
    """The messages split and join tensors of different shapes and types; a world of one leaves them alone."""
    from worker.runtime import distributed

    monkeypatch.setattr(distributed, "MESSAGE_BYTES", 64)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda flat, *a, **k: flat.mul_(2))
    tensors = [torch.ones(3), torch.ones(20), torch.ones(2, 2), torch.ones(5, dtype=torch.float64)]
    distributed.ProcessGroup(size=1).sum_(tensors)
    assert all(bool((t == 1).all()) for t in tensors)
    distributed.ProcessGroup(size=2).sum_(tensors)
    assert all(bool((t == 2).all()) for t in tensors)
